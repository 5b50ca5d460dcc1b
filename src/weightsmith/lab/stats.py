"""Paired comparison over seeds: mean difference, 95 % t-interval, Holm's correction, verdict."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

from weightsmith.lab.claim import Claim

Scores = Mapping[str, Mapping[int, Mapping[str, float]]]
"""Metrics by arm, then seed, then metric name."""

Verdict = Literal["supported", "refuted", "inconclusive"]
LEVEL = 0.95
FEWEST_SEEDS = 3


@dataclass(frozen=True, slots=True)
class Summary:
    """Mean and sample standard deviation of one metric of one arm over ``n`` seeds (``nan`` where undefined)."""

    mean: float
    sd: float
    n: int


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the seeds say about one claim.

    Attributes:
        claim: The claim.
        n: Seeds that both arms finished with a finite value.
        difference: Mean over seeds of ``s * (winner - loser)``: positive is in the claim's favour.
        low: Lower end of the 95 % interval of ``difference``.
        high: Upper end.
        threshold: Mean margin that ``difference`` has to exceed.
        p: Two-sided p-value of ``difference = threshold``, after Holm's correction over all claims judged together.
        verdict: ``supported``, ``refuted`` or ``inconclusive``.
        reason: Why, in a few words.
    """

    claim: Claim
    n: int
    difference: float
    low: float
    high: float
    threshold: float
    p: float
    verdict: Verdict
    reason: str


def summarise(values: Sequence[float]) -> Summary:
    """Mean, sample standard deviation and count of the finite values."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return Summary(math.nan, math.nan, 0)
    if len(finite) == 1 or np.ptp(finite) == 0:  # equal values have no spread, whatever their mean rounds to
        return Summary(finite[0], 0.0 if len(finite) > 1 else math.nan, len(finite))
    return Summary(float(np.mean(finite)), float(np.std(finite, ddof=1)), len(finite))


def judge(claims: Sequence[Claim], scores: Scores) -> list[Judgement]:
    """Decide every claim from the same runs.

    The seeds of the two arms are paired; the excess over the margin is tested against zero with Student's t, two-sided,
    at level 0.05 after Holm's step-down correction (Holm 1979) over the claims that have enough seeds.

    Args:
        claims: The claims to judge together.
        scores: Metrics by arm, seed and name.

    Returns:
        One judgement per claim, in the same order.
    """
    samples = [_paired(claim, scores) for claim in claims]
    raw = [_p_value(excess) if len(excess) >= FEWEST_SEEDS else math.nan for _, excess in samples]
    adjusted = _holm(raw)
    return [
        _judgement(claim, differences, excess, p)
        for claim, (differences, excess), p in zip(claims, samples, adjusted, strict=True)
    ]


def _paired(claim: Claim, scores: Scores) -> tuple[np.ndarray, np.ndarray]:
    sign = 1.0 if claim.better == "higher" else -1.0
    winners, losers = scores.get(claim.winner, {}), scores.get(claim.loser, {})
    differences, excess = [], []
    for seed in sorted(set(winners) & set(losers)):
        winner = winners[seed].get(claim.metric, math.nan)
        loser = losers[seed].get(claim.metric, math.nan)
        if math.isfinite(winner) and math.isfinite(loser):
            difference = sign * (winner - loser)
            differences.append(difference)
            excess.append(difference - claim.margin * (abs(loser) if claim.relative else 1.0))
    return np.array(differences), np.array(excess)


def _p_value(excess: np.ndarray) -> float:
    if np.ptp(excess) == 0:  # no spread at all: every seed agrees to the last bit
        return 1.0 if excess[0] == 0 else 0.0
    return float(stats.ttest_1samp(excess, 0.0).pvalue)


def _holm(p_values: Sequence[float]) -> list[float]:
    adjusted = [math.nan] * len(p_values)
    order = sorted((p, index) for index, p in enumerate(p_values) if math.isfinite(p))
    largest = 0.0
    for rank, (p, index) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p))
        adjusted[index] = largest
    return adjusted


def _judgement(claim: Claim, differences: np.ndarray, excess: np.ndarray, p: float) -> Judgement:
    n = len(differences)
    verdict: Verdict
    mean = float(differences.mean()) if n else math.nan
    threshold = float((differences - excess).mean()) if n else math.nan
    low = high = math.nan
    if n > 1:
        spread = float(differences.std(ddof=1)) / math.sqrt(n)
        half = spread * float(stats.t.ppf(0.5 + LEVEL / 2, n - 1))
        low, high = mean - half, mean + half
    if n < FEWEST_SEEDS:
        verdict, reason = "inconclusive", f"{n} paired seeds, at least {FEWEST_SEEDS} are needed"
    elif p >= 1 - LEVEL:
        verdict, reason = "inconclusive", "the seeds do not tell the difference from the threshold"
    elif mean > threshold:
        verdict, reason = "supported", ""
    else:
        verdict, reason = "refuted", "the difference is on the other side"
    return Judgement(claim, n, mean, low, high, threshold, p, verdict, reason)
