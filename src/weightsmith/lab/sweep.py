"""Choose a hyper-parameter on the validation split, fairly: the same values for every arm, the test split untouched."""

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

Trial = TypeVar("Trial")


def best_of(values: Sequence[float], attempt: Callable[[float], tuple[float, Trial]]) -> tuple[float, Trial]:
    """Try every value and keep the one with the highest validation score; ties go to the earlier value.

    Args:
        values: What to try, for example learning rates.
        attempt: ``value -> (validation score, trial)``; a score that is not finite loses to every other.

    Returns:
        The chosen value and its trial. Only the best trial so far is held in memory.
    """
    chosen, best, score = values[0], None, -math.inf
    for value in values:
        new_score, trial = attempt(value)
        if best is None or new_score > score:
            chosen, best, score = value, trial, new_score if math.isfinite(new_score) else -math.inf
    assert best is not None
    return chosen, best
