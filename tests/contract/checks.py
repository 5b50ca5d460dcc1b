"""What the contract suites have in common."""

from collections.abc import Mapping

import pytest
import torch
from models import MODELS, build
from torch import Tensor

each_model = pytest.mark.parametrize("name", list(MODELS))


def numbered(cases):
    """Parameters from a table of cases, with ids from their names."""
    return [
        pytest.param(case, id=f"{name.rpartition('.')[2]}-{i}")
        for name, made in cases.items()
        for i, case in enumerate(made)
    ]


def pairs(rewrites, names=MODELS, *, refused=False, one=False, when=lambda rewrite: True):
    """Parametrize by every rewrite with the models that it takes, or refuses, or with just the first that it takes."""
    chosen = []
    for case in numbered(rewrites):
        (rewrite,) = case.values
        taken = [name for name in names if when(rewrite) and (name in rewrite.refuses) == refused]
        chosen += [pytest.param(rewrite, name, id=f"{case.id}-{name}") for name in (taken[:1] if one else taken)]
    return pytest.mark.parametrize(("rewrite", "name"), chosen)


def loss_of(model, x):
    out = model(x)
    return (out.float() ** 2).mean() + out.float().mean()


def train(model, opt, x, steps):
    for _ in range(steps):
        opt.zero_grad()
        loss_of(model, x).backward()
        opt.step()


def sgd(model, lr=0.01):
    return torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=lr)


def mixed(model):
    """A model of which some modules are in training and some parameters frozen."""
    for index, module in enumerate(model.modules()):
        module.training = index % 2 == 0
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(parameter.requires_grad and index % 3 != 1)
    return model


def trained(rewrite, name, steps=2):
    """A model that has been rewritten and has trained since, with its inputs."""
    model, x = build(name)
    rewrite.begin(model, x)
    train(model, sgd(model), x, steps)
    return model, x


def same(left, right):
    """Whether two states are equal, however deep."""
    if isinstance(left, Mapping):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    return torch.equal(left, right) if isinstance(left, Tensor) else left == right


def near(left, right, distance):
    """Whether two outputs are equal to within a distance; 0: to the last bit."""
    return torch.allclose(left, right, atol=distance, rtol=10 * distance)


def values(model, names):
    """What the network sees of the named parameters, however they are written."""
    found = {}
    for name in names:
        owner, _, attribute = name.rpartition(".")
        found[name] = getattr(model.get_submodule(owner), attribute).detach().clone()
    return found


def shape_of(model):
    """All that a user knows a model by, but its values: classes, keys, dtypes, modes, flags."""
    modules = [(name, type(module), module.training) for name, module in model.named_modules()]
    tensors = [(key, value.shape, value.dtype) for key, value in model.state_dict().items()]
    flags = [(name, parameter.requires_grad) for name, parameter in model.named_parameters(remove_duplicate=False)]
    return modules, tensors, flags


def is_untouched(model, name):
    """Whether a model is as it was built."""
    plain, _ = build(name)
    return shape_of(model) == shape_of(plain) and same(model.state_dict(), plain.state_dict())


def shared(model):
    """How many parameters have a second owner."""
    return len(list(model.named_parameters(remove_duplicate=False))) - len(list(model.parameters()))


def assert_resumes(start, x, path):
    """Saving, loading and going on equals never having stopped.

    Args:
        start: Makes a model, its optimizer, and whatever else has state.
        x: Inputs.
        path: A file.
    """
    objects = start()
    train(*objects[:2], x, 3)
    torch.save([one.state_dict() for one in objects], path)
    train(*objects[:2], x, 3)

    resumed = start()
    for one, state in zip(resumed, torch.load(path, weights_only=True), strict=True):
        one.load_state_dict(state)
    train(*resumed[:2], x, 3)
    for one, other in zip(objects, resumed, strict=True):
        if not isinstance(one, torch.optim.Optimizer):
            assert same(one.state_dict(), other.state_dict())
