"""Mean and spread of one metric of one arm, and how coarse its values are."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Summary:
    """Mean and sample standard deviation of one metric of one arm over ``n`` seeds (``nan`` where undefined)."""

    mean: float
    sd: float
    n: int


def summarize(values: Sequence[float]) -> Summary:
    """Mean, sample standard deviation and count of the finite values."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return Summary(math.nan, math.nan, 0)
    if len(finite) == 1 or np.ptp(finite) == 0:  # equal values have no spread, whatever their mean rounds to
        return Summary(finite[0], 0.0 if len(finite) > 1 else math.nan, len(finite))
    return Summary(float(np.mean(finite)), float(np.std(finite, ddof=1)), len(finite))


def step_of(values: Iterable[float]) -> float:
    """The step of a lattice on which all values lie, such as the shares of a test set; 0 for continuous values.

    A few values may lie on a lattice by chance; taking a step for real only widens intervals.
    """
    known = np.unique([value for value in values if math.isfinite(value)])
    if len(known) < 2:
        return 0.0
    step = float(np.diff(known).min())
    counts = (known - known[0]) / step
    return step if bool(np.all(np.abs(counts - counts.round()) < 1e-4)) else 0.0
