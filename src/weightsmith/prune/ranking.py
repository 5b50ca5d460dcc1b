"""A percentile of many numbers in several tensors, exactly and without putting them into one.

A sample brackets the percentile; one pass counts what lies below the bracket and collects what lies inside, of which
the right one is selected. If the sample misleads, the bracket is widened.
"""

from collections.abc import Callable, Iterator

import numpy as np
from torch import Tensor

Scores = Callable[[], Iterator[Tensor]]
"""Gives the numbers anew for every pass: 1-D tensors, float32 or float64, all of one dtype, none negative."""

_HAIR = 1e-12
_BRACKETS = (0.01, 0.1, 1.0)


def percentile(scores: Scores, amount: float, sample: Tensor) -> tuple[float, int] | None:
    """The nonzero number with a share of the other nonzero ones below it.

    With linear interpolation at ``amount (count - 1)``, comparing strictly with the percentile is the same as comparing
    with the number at the next whole position, which this returns.

    Args:
        scores: The numbers; zeros do not count.
        amount: The share, in [0, 1).
        sample: Some of the numbers, ``(m,)``: any will do, a fair sample saves passes.

    Returns:
        The number as a Python float of the same value, and how many others come before it in ascending order; ``None``:
        all are zero.
    """
    known = np.sort(sample.numpy())
    known = known[known > 0]
    for width in _BRACKETS:
        low, high = _bracket(known, amount, width)
        below, count = 0, 0
        inside = []
        for piece in scores():
            values = piece.numpy()
            nonzero = int(np.count_nonzero(values > 0))  # counting truth values is many times faster than numbers
            under, between = values < low, values <= high
            count += nonzero
            below += int(np.count_nonzero(under)) - (len(values) - nonzero)
            np.greater(between, under, out=between)
            inside.append(values[between])
        if not count:
            return None
        position = amount * (count - 1)
        first, index = int(np.floor(position)), int(np.ceil(position))
        # a whole position that rounding has put a hair above itself: numpy's interpolation may round it back
        hair = index - first if 0 < position - first < _HAIR * position else 0
        found = np.concatenate(inside)
        if index - hair - below >= 0 and index - below < len(found):
            ordered = np.partition(found, [index - hair - below, index - below])
            lower, upper = ordered[index - hair - below], ordered[index - below]
            if hair and np.quantile(np.array([lower, upper]), position - first) <= lower:
                return float(lower), first
            return float(upper), index
    raise AssertionError("the widest bracket holds every number")


def _bracket(sample: np.ndarray, amount: float, width: float) -> tuple[float, float]:
    """Bounds between which the percentile should lie; the lower one above 0."""
    least = float(np.finfo(sample.dtype).smallest_subnormal)
    if width >= 1 or len(sample) < 100:
        return least, np.inf
    first, last = (int(len(sample) * share) for share in (amount - width, amount + width))
    return float(sample[first]) if first > 0 else least, float(sample[last]) if last < len(sample) else np.inf
