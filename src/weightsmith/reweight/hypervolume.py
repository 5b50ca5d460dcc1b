"""Hypervolume of points in objective space: the volume that they dominate above a reference point."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from weightsmith.core.errors import UsageError, require

Floats = NDArray[np.float64]


def hypervolume(points: ArrayLike, reference: ArrayLike, maximize: Sequence[bool] | bool = True) -> float:
    """Compute the volume dominated by ``points`` with respect to ``reference``.

    A coordinate that is worse than the reference counts as equal to it, so that such a point adds nothing.

    Args:
        points: ``(n, K)``; may be empty.
        reference: ``(K,)``.
        maximize: Per objective, whether larger is better; one value for all.

    Returns:
        The volume, 0 for no points.

    Raises:
        UsageError: Shapes do not fit, or a number is not finite.
        MissingExtra: moocore is not installed.
    """
    sign, worst = _oriented(reference, maximize)
    found = _points(points, sign)
    if not len(found):
        return 0.0
    heights = np.maximum(found * sign - worst, 0.0)
    if heights.shape[1] == 1:
        return float(heights.max())
    moocore = require("moocore", extra="search", purpose="hypervolumes")
    # moocore minimizes, and leaves out what does not dominate its reference
    return float(moocore.hypervolume(-heights, ref=np.zeros(heights.shape[1])))


def hypervolume_contribution(
    point: ArrayLike, points: ArrayLike, reference: ArrayLike, maximize: Sequence[bool] | bool = True
) -> float:
    """Compute by how much ``point`` enlarges the hypervolume of ``points``; at least 0.

    Args:
        point: ``(K,)``.
        points: ``(n, K)``; may be empty.
        reference: ``(K,)``.
        maximize: See `hypervolume`.

    Raises:
        UsageError: As `hypervolume`.
        MissingExtra: moocore is not installed.
    """
    sign, _ = _oriented(reference, maximize)
    before, new = _points(points, sign), _points(point, sign)
    if len(new) != 1:
        raise UsageError(f"point must be ({len(sign)},), got {np.shape(point)}")
    together = np.concatenate([before, new])
    gain = hypervolume(together, reference, maximize) - hypervolume(before, reference, maximize)
    return max(gain, 0.0)


def pareto_front(points: ArrayLike, maximize: Sequence[bool] | bool = True) -> NDArray[np.bool_]:
    """Tell which points no other one dominates; of equal points the first.

    Args:
        points: ``(n, K)``.
        maximize: See `hypervolume`.

    Returns:
        ``(n,)``, boolean.
    """
    found = np.asarray(points, dtype=np.float64)
    if found.ndim != 2:
        raise UsageError(f"points must be (n, K), got {found.shape}")
    sign, _ = _oriented(np.zeros(found.shape[1]), maximize)
    better = _points(found, sign) * sign
    no_worse = (better[:, None] >= better[None]).all(-1)
    strictly = (better[:, None] > better[None]).any(-1)
    earlier = np.tri(len(better), k=-1, dtype=bool).T
    return np.asarray(~(no_worse & (strictly | (earlier & ~strictly))).any(0))


def _oriented(reference: ArrayLike, maximize: Sequence[bool] | bool) -> tuple[Floats, Floats]:
    worst = np.asarray(reference, dtype=np.float64)
    if worst.ndim != 1 or not len(worst) or not np.isfinite(worst).all():
        raise UsageError(f"reference must be finite numbers, (K,), got {np.asarray(reference).tolist()}")
    flags = [bool(maximize)] * len(worst) if isinstance(maximize, bool) else [bool(flag) for flag in maximize]
    if len(flags) != len(worst):
        raise UsageError(f"maximize must have one entry per objective, {len(worst)}, got {len(flags)}")
    sign = np.where(flags, 1.0, -1.0)
    return sign, worst * sign


def _points(points: ArrayLike, sign: Floats) -> Floats:
    found = np.asarray(points, dtype=np.float64)
    found = found.reshape(-1, len(sign)) if found.ndim < 2 and found.size in (0, len(sign)) else found
    if found.ndim != 2 or found.shape[1] != len(sign):
        raise UsageError(f"points must have {len(sign)} coordinates each, got {found.shape}")
    if not np.isfinite(found).all():
        raise UsageError(f"points must be finite, got {found[~np.isfinite(found).all(1)][0].tolist()}")
    return found
