"""What a verb promises that changes the values of weights once."""

import copy

import torch

from weightsmith.testing.kinds import Change, Check
from weightsmith.testing.measures import changed, expect, expect_shape, mixed, model_of, same, shared
from weightsmith.testing.models import build
from weightsmith.testing.rewrites import WHERE


def classes_keys_modes_and_flags_are_kept(change: Change, name: str) -> None:
    """Only values change, and some do; the verb returns the model."""
    model, x = build(name)
    mixed(model)
    model_of(change.apply(model, x), model)
    expect_shape(model, mixed(build(name)[0]), "after the verb")
    expect(changed(model, build(name)[0]), "the verb must change a value")


def changed_weights_load_without_us(change: Change, name: str) -> None:
    """A plain model with the state computes the same, and so does a deep copy."""
    model, x = build(name)
    change.apply(model, x)
    plain, _ = build(name)
    plain.load_state_dict(model.state_dict())
    out = plain.eval()(x)
    expect(out.isfinite().all(), "outputs must be finite")
    expect(torch.equal(model.eval()(x), out), "a plain model with this state_dict must compute the same")
    expect(torch.equal(copy.deepcopy(model).eval()(x), out), "copy.deepcopy must restore the outputs to the last bit")


def the_same_seed_gives_the_same_change(change: Change, name: str) -> None:
    """Twice the same call, twice the same weights."""
    states = []
    for _ in range(2):
        model, x = build(name)
        change.apply(model, x)
        states.append(model.state_dict())
    expect(same(*states), "the same seed must give the same weights")


def tied_weights_stay_tied_and_equal(change: Change, name: str) -> None:
    """A weight with two owners has two owners after the change."""
    model, x = build(name)
    change.apply(model, x)
    expect(shared(model) == shared(build(name)[0]), "weights that share a parameter must go on sharing it")


def a_changed_weight_keeps_its_dtype(change: Change, name: str) -> None:
    """In every float dtype, with finite outputs."""
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        model, x = build(name, dtype)
        change.apply(model, x)
        expect_shape(model, build(name, dtype)[0], f"for a model of {dtype}")
        expect(model.eval()(x).isfinite().all(), f"outputs of a model of {dtype} must be finite")


CHANGING = (
    Check(classes_keys_modes_and_flags_are_kept),
    Check(changed_weights_load_without_us),
    Check(the_same_seed_gives_the_same_change),
    Check(tied_weights_stay_tied_and_equal, ("tied",)),
    Check(a_changed_weight_keeps_its_dtype, ("conv-bn", "frozen")),
    *WHERE,
)
