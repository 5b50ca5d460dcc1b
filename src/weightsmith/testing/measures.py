"""What the checks have in common: small trainings, and what they compare."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from weightsmith.testing.models import build


class Broken(AssertionError):
    """One promise that does not hold; the text says what was expected and what was found."""


def expect(holds: object, message: str) -> None:
    """Raise `Broken` unless something holds."""
    if not holds:
        raise Broken(message)


def model_of(result: Any, model: nn.Module) -> nn.Module:
    """Return what a verb returned, the model or a report's, which must be the model that it was given."""
    returned = getattr(result, "model", result) if not isinstance(result, nn.Module) else result
    expect(
        returned is model,
        f"the verb must return the model that it changed, or a report with it as .model, got {type(result).__name__}",
    )
    return model


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    """A loss that every output takes part in."""
    out = model(x)
    loss: Tensor = (out.float() ** 2).mean() + out.float().mean()
    return loss


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, steps: int) -> None:
    """Train on one batch."""
    for _ in range(steps):
        optimizer.zero_grad()
        torch.autograd.backward(loss_of(model, x))
        optimizer.step()


def sgd(model: nn.Module, lr: float = 0.01) -> torch.optim.Optimizer:
    """SGD over what requires gradients."""
    return torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=lr)


def mixed(model: nn.Module) -> nn.Module:
    """Put some modules into training mode, and freeze some parameters."""
    for index, module in enumerate(model.modules()):
        module.training = index % 2 == 0
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(parameter.requires_grad and index % 3 != 1)
    return model


def trained(rewrite: Any, name: str, steps: int = 2) -> tuple[nn.Module, Tensor]:
    """A model that has been rewritten and has trained since, with its inputs."""
    model, x = build(name)
    rewrite.begin(model, x)
    train(model, sgd(model), x, steps)
    return model, x


def same(left: Any, right: Any) -> bool:
    """Whether two states are equal, however deep."""
    if isinstance(left, Mapping):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return torch.equal(left, right) if isinstance(left, Tensor) else bool(left == right)


def near(left: Tensor, right: Tensor, distance: float) -> bool:
    """Whether two outputs are equal to within a distance; 0: to the last bit."""
    return torch.allclose(left, right, atol=distance, rtol=10 * distance)


def apart(left: Tensor, right: Tensor) -> str:
    """How far two outputs are apart, in words."""
    if left.shape != right.shape:
        return f"they have shapes {tuple(left.shape)} and {tuple(right.shape)}"
    return f"they moved by {(left - right).abs().max().item() if left.numel() else 0.0:.3g}"


def values(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """What the network sees of the named parameters, however they are written."""
    found = {}
    for name in names:
        owner, _, attribute = name.rpartition(".")
        found[name] = getattr(model.get_submodule(owner), attribute).detach().clone()
    return found


def shape_of(model: nn.Module) -> tuple[list[Any], list[Any], list[Any]]:
    """All that a user knows a model by, but its values: classes, keys, dtypes, modes, flags."""
    modules = [(name, type(module), module.training) for name, module in model.named_modules()]
    tensors = [(key, value.shape, value.dtype) for key, value in model.state_dict().items()]
    flags = [(name, parameter.requires_grad) for name, parameter in model.named_parameters(remove_duplicate=False)]
    return modules, tensors, flags


def expect_shape(model: nn.Module, plain: nn.Module, when: str) -> None:
    """Classes, modes, keys, dtypes and flags must be those of another model."""
    what = ("classes or modes of modules", "keys, shapes or dtypes of the state_dict", "requires_grad of parameters")
    for title, left, right in zip(what, shape_of(model), shape_of(plain), strict=True):
        odd = [str(one) for one in left if one not in right] + [f"no {one}" for one in right if one not in left]
        expect(left == right, f"{title} differ {when}: {', '.join(odd[:3]) or 'in their order'}")


def is_untouched(model: nn.Module, name: str) -> bool:
    """Whether a model is as it was built."""
    plain, _ = build(name)
    return shape_of(model) == shape_of(plain) and same(model.state_dict(), plain.state_dict())


def shared(model: nn.Module) -> int:
    """How many parameters have a second owner."""
    return len(list(model.named_parameters(remove_duplicate=False))) - len(list(model.parameters()))


def changed(model: nn.Module, plain: nn.Module) -> list[str]:
    """Names of modules of the plain model whose class or own tensors differ."""
    found = []
    for name, module in plain.named_modules():
        other = model.get_submodule(name)
        own = [*module._parameters.items(), *module._buffers.items()]
        differs = type(other) is not type(module) or any(
            (tensor is None) != (getattr(other, key, None) is None)
            or (tensor is not None and not torch.equal(tensor, getattr(other, key)))
            for key, tensor in own
        )
        if differs:
            found.append(name)
    return found
