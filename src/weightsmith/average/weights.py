"""How much each checkpoint counts, from numbers that its training run has logged anyway.

A run's checkpoints are ranked by their loss (lower counts more), their step (later counts more) or any score, and one
number, the *penalty*, says how sharply. The paper that proposes this publishes no formula, so the schemes here are a
family of our own that holds the plausible readings of it; none of them is "the paper's".

`decay_weights` needs no metric: it weighs checkpoints so that their average stands for a decay of the learning
rate that was never trained.

Sources: "Parameter-Efficient Checkpoint Merging via Metrics-Weighted Averaging" (arXiv 2504.18580), abstract, figures;
"WSM: Decay-Free Learning Rate Schedule via Checkpoint Merging for LLM Pre-training" (arXiv 2507.17634).
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from weightsmith.core.errors import UsageError, unknown

Metric = Literal["loss", "steps", "score"]
Scheme = Literal["power", "linear", "softmax", "rank", "ema", "uniform"]
Decay = Literal["cosine", "linear", "1-sqrt"]

_RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "power": ("at least 0", lambda p: p >= 0),
    "linear": ("between 0 and 1", lambda p: 0 <= p <= 1),
    "softmax": ("above 0: it is a temperature", lambda p: p > 0),
    "rank": ("above 0 and at most 1", lambda p: 0 < p <= 1),
    "ema": ("between 0 and 1, both excluded", lambda p: 0 < p < 1),
}


_DECAYED: dict[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {
    "cosine": lambda t: t / 2 + np.sin(math.pi * t) / (2 * math.pi),
    "linear": lambda t: t - t**2 / 2,
    "1-sqrt": lambda t: t - 2 / 3 * t**1.5,
}
"""The integral from 0 to ``t`` of each decay curve: of ``(1 + cos(pi t)) / 2``, ``1 - t`` and ``1 - sqrt(t)``."""


def decay_weights(steps: Sequence[int], decay: Decay = "1-sqrt") -> NDArray[np.float64]:
    """Weigh checkpoints of a constant-rate run so that their average equals a decay of its learning rate.

    Had the rate decayed to 0 from the first checkpoint to the last, the updates between checkpoints ``i - 1`` and ``i``
    would have been scaled by ``d_i``, the curve's mean over these steps, and training would have ended, to first order,
    at ``theta_0 + sum_i d_i (theta_i - theta_(i-1))``. Sorted by checkpoint, that is

        w_0 = 1 - d_1,   w_i = d_i - d_(i+1),   w_n = d_n

    The first checkpoint is where the decay begins, so ``n`` checkpoints stand for ``n - 1`` intervals.

    Args:
        steps: ``(n,)``, strictly increasing: at which step each checkpoint was saved.
        decay: ``"cosine"``: ``(1 + cos(pi t)) / 2``; ``"linear"``: ``1 - t``; ``"1-sqrt"``: ``1 - sqrt(t)``.

    Returns:
        ``(n,)``, float64, at least 0, of sum 1.

    Raises:
        UsageError: The curve is not known, or there are no steps, or they do not increase.

    Source: arXiv 2507.17634, with the mean of the curve over each interval in place of its value at one
    step, so that checkpoints may be any number of steps apart.

    Example:
        >>> print(decay_weights([100, 200, 300], "linear"))
        [0.25 0.5  0.25]
    """
    if decay not in _DECAYED:
        raise unknown("decay", decay, _DECAYED)
    at = np.asarray(steps, dtype=np.float64)
    if at.ndim != 1 or not len(at) or not np.isfinite(at).all() or (np.diff(at) <= 0).any():
        raise UsageError(f"steps must increase from checkpoint to checkpoint, got {list(steps)}")
    if len(at) == 1:
        return np.ones(1)
    t = (at - at[0]) / (at[-1] - at[0])
    means = np.diff(_DECAYED[decay](t)) / np.diff(t)
    weights = -np.diff(means, prepend=1.0, append=0.0)
    raw: NDArray[np.float64] = np.maximum(weights, 0.0)
    return raw / float(raw.sum())


def metric_weights(
    values: Sequence[float] | NDArray[np.float64],
    metric: Metric = "loss",
    scheme: Scheme = "power",
    penalty: float = 1.0,
) -> NDArray[np.float64]:
    """Turn metrics into averaging weights ``w_i = u_i / sum(u)``.

    With ``m`` the values and ``p`` the penalty, the raw weights ``u_i`` are

    | scheme | loss | steps, score | p |
    |---|---|---|---|
    | ``power`` | ``m^-p`` | ``m^p`` | >= 0; 0 is uniform |
    | ``linear`` | ``1 - p (m - min) / (max - min)`` | ``1 - p (max - m) / (max - min)`` | [0, 1]; 1 drops the worst |
    | ``softmax`` | ``exp(-m / p)`` | ``exp(m / p)`` | > 0, a temperature |
    | ``rank`` | ``p^(how many are better)`` | the same | (0, 1]; ties share a rank |
    | ``ema`` | ``p^(how many are newer)`` | the same | (0, 1); values are ignored |
    | ``uniform`` | ``1`` | ``1`` | ignored |

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
    if scheme in _RANGES and not (math.isfinite(penalty) and _RANGES[scheme][1](penalty)):
        raise UsageError(f"penalty of scheme {scheme!r} must be finite and {_RANGES[scheme][0]}, got {penalty}")
    bad = np.flatnonzero(~np.isfinite(m))
    if len(bad):
        raise UsageError(f"values[{bad[0]}] must be finite, got {m[bad[0]]}")
    raw: NDArray[np.float64] = np.exp(_log_raw(m if metric != "loss" else -m, m, metric, scheme, penalty))
    total = float(raw.sum())
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
        with np.errstate(divide="ignore", over="ignore"):  # the logarithm of step 0 is -inf: weight 0
            logs = np.log(m) if metric != "loss" else -np.log(m)
            return (logs - logs.max()) * p if np.isfinite(logs.max()) else logs
    if not math.isfinite(float(good.max()) - float(good.min())):
        good, p = good / 4, p / 4 if scheme == "softmax" else p  # only differences count, and these overflow
    best, worst = float(good.max()), float(good.min())
    if scheme == "linear" and best > worst:
        with np.errstate(divide="ignore"):
            return np.log1p(-p * (best - good) / (best - worst))
    if scheme == "softmax":
        with np.errstate(over="ignore"):
            return (good - best) / p
    if scheme == "rank":
        better: NDArray[np.float64] = (good[None, :] > good[:, None]).sum(axis=1, dtype=np.float64)
        return better * float(np.log(p))
    if scheme == "ema":
        return np.arange(len(m), dtype=np.float64)[::-1] * float(np.log(p))
    return np.zeros_like(m)
