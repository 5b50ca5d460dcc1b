"""`check_technique` takes correct techniques of others and names what broken ones break."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from weightsmith import fold_, select
from weightsmith.testing import (
    Change,
    ContractBroken,
    Function,
    Optimizer,
    Parametrization,
    Rewrite,
    State,
    check_technique,
)


def is_layer(_, module):
    return isinstance(module, nn.Linear | nn.Conv2d)


class Doubled(nn.Module):
    """``w = 2 v``."""

    def forward(self, v):
        return 2 * v

    def right_inverse(self, w):
        return w / 2


def double_(model, x=None, where=None, parametrization=Doubled):
    for module in select(model, where, default=is_layer).values():
        parametrize.register_parametrization(module, "weight", parametrization())
    return model


# the head of "tied" shares its parameter with an embedding, which this verb would separate
REFUSES = {"conv-transpose": "matches nothing", "tied": "is tied"}


def careful(verb):
    def begin(model, x, where=None):
        if hasattr(model, "embedding"):
            raise ValueError("head is tied to embedding")
        return verb(model, x, where)

    return begin


def doubling(verb=double_, **options):
    return Rewrite(careful(verb), refuses=REFUSES, **{"change_at_begin": 0.0, **options})


def scale_(model, x=None, where=None):
    for module in select(model, where, default=is_layer).values():
        module.weight.data.mul_(0.5)
    return model


def scaling(verb=scale_):
    return Change(verb, refuses={"conv-transpose": "matches nothing"})


class Sign(torch.optim.Optimizer):
    def __init__(self, params, lr=0.003):
        super().__init__(params, {"lr": lr, "beta": 0.9})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                mean = self.state[parameter].setdefault("mean", torch.zeros_like(parameter))
                mean.lerp_(parameter.grad, 1 - group["beta"])
                parameter.sub_(group["lr"] * mean.sign())
        return loss


class Average:
    """A running mean."""

    def __init__(self):
        self.total, self.count = torch.zeros(3), 0

    def update(self):
        self.total, self.count = self.total + torch.rand(3), self.count + 1
        return self.total / self.count

    def state_dict(self):
        return {"total": self.total, "count": self.count}

    def load_state_dict(self, state):
        self.total, self.count = state["total"], state["count"]


def unit(w):
    return w / w.norm().clamp_min(1e-12)


def functional(call):
    return Function(call, lambda: (torch.linspace(-1, 2, 12).reshape(3, 4),))


CORRECT = {
    "a verb": doubling(),
    "a parametrization": Parametrization(Doubled, change_at_begin=0.0),
    "a change": scaling(),
    "an optimizer": Optimizer(lambda model: Sign([p for p in model.parameters() if p.requires_grad])),
    "an object": State(Average, Average.update),
    "a function": functional(unit),
}


@pytest.mark.parametrize("technique", CORRECT.values(), ids=CORRECT)
def test_a_correct_technique_passes(technique):
    assert check_technique(technique, compiled=False).passed


def test_what_passes_compiles_too():
    passed = check_technique(functional(unit)).passed
    assert "it compiles without graph breaks" in passed


@pytest.mark.slow
@pytest.mark.parametrize("technique", CORRECT.values(), ids=CORRECT)
def test_a_correct_technique_passes_under_compile(technique):
    assert check_technique(technique).passed


def test_an_optimizer_class_and_a_parametrization_are_taken_as_they_are():
    assert check_technique(torch.optim.AdamW).passed
    assert check_technique(Doubled(), compiled=False).passed


class Off(Doubled):
    def right_inverse(self, w):
        return w / 2 + 0.1


class Upcast(Doubled):
    def forward(self, v):
        return (2 * v).to(torch.float32)


class Rowless(Doubled):
    def forward(self, v):
        return v * (2 * v.abs().max() / v.abs().max())


class Branching(Doubled):
    def forward(self, v):
        return 2 * v if v.sum().item() > 0 else v + v


class Stateful(Doubled):
    """Its state is no buffer."""

    def __init__(self):
        super().__init__()
        self.calls = 0.0

    def forward(self, v):
        self.calls += self.training
        return 2 * v * (1 + self.calls)


class Contiguous(Doubled):
    def forward(self, v):
        return 2 * v.contiguous()

    def right_inverse(self, w):
        return (w / 2).contiguous()


def written(parametrization):
    return doubling(lambda model, x, where=None: double_(model, x, where, parametrization))


def everywhere(model, x, where=None):
    select(model, where, default=is_layer)
    return double_(model, x)


def half_done(model, x, where=None):
    next(module for module in model.modules() if hasattr(module, "weight")).weight.data.mul_(2)
    return double_(model, x, where)


def nothing(model, x, where=None):
    double_(model, x, where)


def thaws(model, x, where=None):
    return double_(model, x, where).requires_grad_(True)


def random_(model, x, where=None):
    generator = torch.Generator()
    generator.seed()
    for module in select(model, where, default=is_layer).values():
        module.weight.data.normal_(generator=generator)
    return model


def evaluates_(model, x, where=None):
    return scale_(model, x, where).eval()


def unties_(model, x, where=None):
    scale_(model, x, where)
    if hasattr(model, "embedding"):
        model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    return model


class Ascent(Sign):
    def __init__(self, params, lr=0.003):
        super().__init__(params, -lr)


class Forgetful(Sign):
    def state_dict(self):
        return {**super().state_dict(), "state": {}}


class Mute(Sign):
    def step(self, closure=None):
        super().step(closure)


class Dtype(Sign):
    def step(self, closure=None):
        loss = super().step(closure)
        for parameter in self.param_groups[0]["params"]:
            parameter.data = parameter.data.float()
        return loss


class Partial(Average):
    def state_dict(self):
        return {"total": self.total}

    def load_state_dict(self, state):
        self.total = state["total"]


def normalize(w):
    return w.div_(w.norm())


def jitter(w):
    return w + torch.rand_like(w)


def promoting(w):
    return w.float() / w.float().norm()


def strided(w):
    return w.as_strided((3, 4), (4, 1)).clone()


def optimizing(cls):
    return Optimizer(lambda model: cls([p for p in model.parameters() if p.requires_grad]))


BROKEN = [
    (written(Off), "beginning keeps the outputs .*outputs must stay within 0 of what they were, they moved by"),
    (written(Upcast), "any float dtype is kept .*may not change the dtype"),
    (written(Rowless), "an empty shard is taken: "),
    (written(Stateful), "a state dict or a copy .*must restore the outputs to the last bit"),
    (written(Contiguous), "the memory format is kept .*channels_last must stay so"),
    (doubling(everywhere), "where touches only what it names .*must change nothing else, it changed patch_embed"),
    (doubling(half_done), "where that matches nothing .*must stay as it was"),
    (doubling(nothing), "must return the model that it changed, or a report with it as .model, got NoneType"),
    (doubling(thaws), "requires_grad of parameters differ"),
    (doubling(end=lambda model: model), "classes or modes of modules differ"),
    (doubling(end=lambda model: scale_(fold_(model))), "outputs must stay within 0 at the end"),
    (Rewrite(double_, change_at_begin=0.0), "conv-transpose.*matches nothing"),
    (Rewrite(double_, refuses={"conv-transpose": "matches nothing"}), r"tied weights stay tied \(tied\)"),
    (Rewrite(double_, refuses={"linear": "too small"}), "a ValueError that matches 'too small' must be raised"),
    (scaling(random_), "the same seed must give the same weights"),
    (scaling(evaluates_), "classes or modes of modules differ"),
    (scaling(unties_), "must go on sharing it"),
    (scaling(lambda model, x, where=None: select(model, where, default=is_layer) and model), "must change a value"),
    (optimizing(Ascent), "eight steps must lower the loss"),
    (optimizing(Forgetful), "what is loaded must go on to the same results"),
    (optimizing(Mute), "must return the loss, got None"),
    (optimizing(Dtype), "any float dtype is trained .*must have the same dtype"),
    (State(Partial, Partial.update), "what is loaded must go on to the same results"),
    (functional(normalize), "must leave its arguments untouched"),
    (functional(jitter), "randomness must come from a generator"),
    (functional(promoting), "must be torch.float64, got torch.float32"),
    (functional(strided), "not contiguous must give the same"),
]


@pytest.mark.parametrize(
    ("technique", "message"), BROKEN, ids=lambda value: value[:40] if isinstance(value, str) else ""
)
def test_what_is_broken_is_named(technique, message):
    if hasattr(technique, "models"):
        small = tuple(name for name in technique.models if name not in ("llama", "depthwise", "embedding"))
        technique = dataclasses.replace(technique, models=small)
    with pytest.raises(ContractBroken, match=message):
        check_technique(technique, compiled=False)


@pytest.mark.parametrize(
    "technique", [Parametrization(Branching, models=("frozen",)), functional(lambda w: w if w.sum().item() > 0 else -w)]
)
def test_a_graph_break_is_named(technique):
    with pytest.raises(ContractBroken, match="compiles without graph breaks"):
        check_technique(technique)


def test_every_promise_that_does_not_hold_is_listed():
    with pytest.raises(ContractBroken, match=r"^\d+ of \d+ checks fail") as caught:
        check_technique(written(Off), compiled=False)
    lines = str(caught.value).splitlines()[1:]
    assert len(lines) > 5
    assert all(line.startswith("- ") for line in lines)


def test_anything_else_is_refused():
    with pytest.raises(TypeError, match="must be an optimizer class, a parametrization, or one of"):
        check_technique(double_)
