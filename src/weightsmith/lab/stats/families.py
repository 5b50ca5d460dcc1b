"""Several claims together: Holm's step-down rule over a family that is fixed by what was declared.

Source: S. Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6 (1979).
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray


def remaining(p: NDArray[np.float64], level: Callable[[int], float]) -> NDArray[np.int64]:
    """How many claims were still in question when each was tested.

    Claims are tested in the order of their p-values; the smallest against ``level(m)``, the next against
    ``level(m - 1)``, until one is not rejected; it and all after it stay in question together.

    Args:
        p: ``(..., m)``, p-values; ``nan`` for claims that cannot be judged, which count all the same.
        level: Nominal level by the number of claims in question.

    Returns:
        ``(..., m)``: claim ``i`` is rejected where ``p_i <= level(remaining_i)``.
    """
    p = np.where(np.isnan(p), np.inf, p)
    m = p.shape[-1]
    order = np.argsort(p, axis=-1, kind="stable")
    sizes = np.arange(m, 0, -1)
    levels = np.array([level(int(size)) for size in sizes])
    passed = np.cumprod(np.take_along_axis(p, order, -1) <= levels, axis=-1)
    in_question = m - passed.sum(-1, keepdims=True)
    found = np.where(passed == 1, sizes, in_question)
    result = np.empty_like(found)
    np.put_along_axis(result, order, found, -1)
    return result


def rejected(p: NDArray[np.float64], level: Callable[[int], float]) -> NDArray[np.bool_]:
    """Which claims of ``p (..., m)`` Holm's rule rejects."""
    sizes = remaining(p, level)
    levels = np.array([np.inf, *(level(size) for size in range(1, p.shape[-1] + 1))])
    return np.where(np.isnan(p), False, p <= levels[sizes])
