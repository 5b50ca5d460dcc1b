"""The k-th smallest of many numbers in several tensors, exactly and without putting them into one.

Non-negative floats are ordered as their bit patterns are. Two passes count the upper and the lower 16 bits of float32
patterns; float64 takes four. Only a piece of a tensor is copied at a time.
"""

from collections.abc import Callable, Iterator

import numpy as np
from torch import Tensor

Scores = Callable[[], Iterator[Tensor]]
"""Gives the numbers anew for every pass: 1-D tensors, float32 or float64, all of one dtype, none negative."""


def kth_smallest(scores: Scores, k: int) -> float:
    """The value with exactly ``k`` others before it in ascending order, zeros left out.

    Args:
        scores: The numbers; zeros do not count.
        k: From 0 to the number of nonzero ones less 1.

    Returns:
        The value, as a Python float of the same value.
    """
    prefix: int | None = None
    shift = None
    while shift != 0:
        counts = np.zeros(1 << 16, np.int64)
        width = 32
        for piece in scores():
            width = piece.element_size() * 8
            at = width - 16 if shift is None else shift - 16
            bits = piece.numpy().view(np.uint32 if width == 32 else np.uint64)
            bits = bits[bits != 0]
            if prefix is not None:
                bits = bits[(bits >> (at + 16)) == prefix]
            counts += np.bincount((bits >> at).astype(np.uint16), minlength=1 << 16)
        shift = width - 16 if shift is None else shift - 16
        below = counts.cumsum()
        bucket = int(below.searchsorted(k, side="right"))
        k -= int(below[bucket - 1]) if bucket else 0
        prefix = bucket if prefix is None else (prefix << 16) | bucket
    assert prefix is not None
    kind = np.uint32 if width == 32 else np.uint64
    return float(np.array([prefix], kind).view(np.float32 if width == 32 else np.float64)[0])


def cutoff_index(amount: float, count: int) -> int:
    """How many of ``count`` ranked numbers lie below their ``amount`` percentile, when all differ.

    With linear interpolation at ``amount (count - 1)``, comparing strictly with the percentile is the same as comparing
    with the number at the next whole position.
    """
    position = amount * (count - 1)
    return int(np.ceil(position))
