"""What an object with state promises."""

import io
from typing import Any

import torch

from weightsmith.testing.kinds import Check, State
from weightsmith.testing.measures import expect, same


def continuing_equals_never_having_stopped(state: State, _name: str) -> None:
    """Use, save, use on; then load into new objects and use those on: the same results and the same state."""
    objects = _make(state)
    _use(state, objects)
    file = io.BytesIO()
    torch.save([one.state_dict() for one in objects], file)
    went_on = _use(state, objects)

    resumed = _make(state)
    file.seek(0)
    for one, saved in zip(resumed, torch.load(file, weights_only=True), strict=True):
        one.load_state_dict(saved)
    expect(same(_use(state, resumed), went_on), "what is loaded must go on to the same results")
    for one, other in zip(objects, resumed, strict=True):
        if not isinstance(one, torch.optim.Optimizer):  # it keeps what is recomputed; the results above are what counts
            expect(same(one.state_dict(), other.state_dict()), f"{type(one).__name__} must go on to the same state")


def the_same_seed_gives_the_same_results(state: State, _name: str) -> None:
    """Twice new objects, twice the same results."""
    first, second = (_use(state, _make(state)) for _ in range(2))
    expect(same(first, second), "new objects with the same seed must give the same results")


def _make(state: State) -> tuple[Any, ...]:
    torch.manual_seed(0)
    made = state.make()
    return made if isinstance(made, tuple) else (made,)


def _use(state: State, objects: tuple[Any, ...]) -> list[Any]:
    torch.manual_seed(0)
    return [state.use(*objects) for _ in range(3)]


STATEFUL = (
    Check(continuing_equals_never_having_stopped, ()),
    Check(the_same_seed_gives_the_same_results, ()),
)
