"""How much each checkpoint counts, from numbers that its training run has logged anyway.

A run's checkpoints are ranked by their loss (lower counts more), their step (later counts more) or any score, and one
number, the *penalty*, says how sharply. The paper that proposes this publishes no formula, so the schemes here are a
family of our own that holds the plausible readings of it; none of them is "the paper's".

Source: "Parameter-Efficient Checkpoint Merging via Metrics-Weighted Averaging" (arXiv 2504.18580), abstract, figures.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from weightsmith.core.errors import UsageError, unknown

Metric = Literal["loss", "steps", "score"]
Scheme = Literal["power", "linear", "softmax", "rank", "ema", "uniform"]

_RANGES = {
    "power": ("at least 0", lambda p: p >= 0),
    "linear": ("between 0 and 1", lambda p: 0 <= p <= 1),
    "softmax": ("above 0: it is a temperature", lambda p: p > 0),
    "rank": ("above 0 and at most 1", lambda p: 0 < p <= 1),
    "ema": ("between 0 and 1, both excluded", lambda p: 0 < p < 1),
}


def metric_weights(
    values: Sequence[float] | NDArray[np.float64],
    metric: Metric = "loss",
    scheme: Scheme = "power",
    penalty: float = 1.0,
) -> NDArray[np.float64]:
    """Turn metrics into averaging weights ``w_i = u_i / sum(u)``.

    With ``m`` the values and ``p`` the penalty, the raw weights ``u_i`` are

    =========== ================================== ================================== ==========================
    scheme      loss                               steps, score                       p
    =========== ================================== ================================== ==========================
    ``power``   ``m^-p``                           ``m^p``                            >= 0; 0 is uniform
    ``linear``  ``1 - p (m - min) / (max - min)``  ``1 - p (max - m) / (max - min)``  [0, 1]; 1 drops the worst
    ``softmax`` ``exp(-m / p)``                    ``exp(m / p)``                     > 0, a temperature
    ``rank``    ``p^(how many are better)``        the same                           (0, 1]; ties share a rank
    ``ema``     ``p^(how many are newer)``         the same                           (0, 1); values are ignored
    ``uniform`` ``1``                              ``1``                              ignored
    =========== ================================== ================================== ==========================

    Late checkpoints have nearly equal losses, for which ``power`` with ``p = 1`` is nearly uniform; ``linear`` looks at
    differences instead.

    Args:
        values: ``(n,)``, one per checkpoint, oldest first.
        metric: ``"loss"``: lower is better; ``"steps"`` and ``"score"``: higher is better.
        scheme: See the table.
        penalty: ``p``.

    Returns:
        ``(n,)``, float64, at least 0, of sum 1.

    Raises:
        UsageError: There is no value, one is not finite, the penalty is out of range, ``power`` meets a value that it
            cannot take, or all raw weights are 0.

    Source: arXiv 2504.18580 names the metrics and the penalty factor; the formulas are ours.
    """
    if metric not in get_args(Metric):
        raise unknown("metric", metric, get_args(Metric))
    if scheme not in get_args(Scheme):
        raise unknown("scheme", scheme, get_args(Scheme))
    m = np.asarray(values, dtype=np.float64)
    if m.ndim != 1 or not len(m):
        raise UsageError(f"values must be one number per checkpoint, got shape {m.shape}")
    if scheme in _RANGES and not _RANGES[scheme][1](penalty):
        raise UsageError(f"penalty of scheme {scheme!r} must be {_RANGES[scheme][0]}, got {penalty}")
    bad = np.flatnonzero(~np.isfinite(m))
    if len(bad):
        raise UsageError(f"values[{bad[0]}] must be finite, got {m[bad[0]]}")
    raw = np.exp(_log_raw(m if metric != "loss" else -m, m, metric, scheme, penalty))
    total = raw.sum()
    if total == 0:
        raise UsageError(f"all raw weights are 0: {metric} {m.tolist()} with scheme {scheme!r} and penalty {penalty}")
    return raw / total


def _log_raw(
    good: NDArray[np.float64], m: NDArray[np.float64], metric: Metric, scheme: Scheme, p: float
) -> NDArray[np.float64]:
    """Logarithms of the raw weights, the largest about 0; ``good`` is the metric, its sign such that more is better."""
    if scheme == "power" and p > 0:
        least = "above 0" if metric == "loss" else "at least 0"
        if (m < 0).any() or (metric == "loss" and (m == 0).any()):
            raise UsageError(
                f"{metric} must be {least} for scheme 'power', got {m.min():g}; take 'linear', 'rank' or 'softmax'"
            )
        with np.errstate(divide="ignore"):  # the logarithm of step 0 is -inf: weight 0
            logs = np.log(m) * (-p if metric == "loss" else p)
        return logs - logs.max() if np.isfinite(logs.max()) else logs
    if scheme == "linear" and good.max() > good.min():
        with np.errstate(divide="ignore"):
            return np.log1p(-p * (good.max() - good) / (good.max() - good.min()))
    if scheme == "softmax":
        return (good - good.max()) / p
    if scheme == "rank":
        better = (good[None, :] > good[:, None]).sum(axis=1)
        return better * np.log(p)
    if scheme == "ema":
        return np.arange(len(m))[::-1] * np.log(p)
    return np.zeros_like(m)
