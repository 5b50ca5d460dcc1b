"""One metric of one arm in three numbers."""

import math
from collections.abc import Sequence
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
