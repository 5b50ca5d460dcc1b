"""The seeds on which a claim is judged: both arms' scores side by side, and what is missing from them.

A seed counts with both arms or not at all, in the order of the seeds. A seed that one arm has not finished ends the
list: dropping it and going on would let what made it fail choose the sample.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from weightsmith.lab.experiment import Claim, Metric
from weightsmith.lab.stats.intervals import (
    Array,
    Estimate,
    over_seeds,
    over_seeds_and_examples,
    smallest_step,
)
from weightsmith.lab.stats.looks import FEWEST, Plan


@dataclass(frozen=True, slots=True)
class Result:
    """What one job says: the metrics of one arm and one seed.

    Attributes:
        metrics: Value by name.
        diverged: The training did not end in a usable model. A metric that is not finite says the same.
        scores: By metric, one score per test example ``(E,)`` whose mean is the metric. Position ``e`` is the same
            example in all arms and seeds.
    """

    metrics: Mapping[str, float]
    diverged: bool = False
    scores: Mapping[str, Array] = field(default_factory=dict)


Results = Mapping[str, Mapping[int, Result]]
"""Results by arm, then seed."""


@dataclass(frozen=True, slots=True)
class Pairs:
    """The paired seeds of one claim.

    Attributes:
        claim: The claim.
        sign: 1 when higher is better, -1 when lower is.
        winner: Scores ``(n,)``, or ``(n, E)`` with scores per example, of the seeds where neither arm diverged.
        loser: The other arm's.
        seeds: Seeds that count, diverged ones included.
        look: The look that they make, or ``None`` before the first.
        step: Smallest step of the metric.
        winner_diverged: Seeds in which the winner diverged.
        loser_diverged: Seeds in which the loser diverged.
        absent: Why there is nothing to judge (an arm that was left out), or ``""``.
        missing: The result that keeps the next seed from counting although a later one is there, or ``""``.
        uneven: There are scores per example, but they cannot be used.
    """

    claim: Claim
    sign: float
    winner: Array
    loser: Array
    seeds: int
    look: int | None
    step: float
    winner_diverged: int
    loser_diverged: int
    absent: str = ""
    missing: str = ""
    uneven: bool = False

    @property
    def n(self) -> int:
        """Seeds with a difference."""
        return len(self.winner)

    @property
    def judged(self) -> bool:
        """There is a look, and enough seeds with a difference in it."""
        return self.look is not None and self.n >= FEWEST

    def bound(self, size: float) -> Array:
        """``size`` of the claim in the metric's unit, one per seed (and example)."""
        if not self.claim.relative:
            return np.full_like(self.loser, size)
        seeds = self.loser if self.loser.ndim == 1 else self.loser.mean(-1, keepdims=True)
        return size * np.sign(seeds) * self.loser  # its mean over examples is a fraction of the absolute value

    def beyond(self, size: float) -> Estimate:
        """Estimate by how much the difference exceeds ``size``."""
        values = self.sign * (self.winner - self.loser) - self.bound(size)
        weight = 1 + (1 + abs(size)) ** 2 if self.claim.relative else 2.0
        estimate = over_seeds if values.ndim == 1 else over_seeds_and_examples
        return estimate(values, step=self.step, weight=weight)

    def mean_bound(self, size: float) -> float:
        """``size`` of the claim in the metric's unit, on average over seeds."""
        return float(self.bound(size).mean()) if self.n else math.nan


def pair(claim: Claim, metric: Metric, results: Results, plan: Plan) -> Pairs:
    """Collect the seeds of the last complete look for ``claim``."""
    arms = [results.get(name, {}) for name in (claim.winner, claim.loser)]
    names = (claim.winner, claim.loser)
    absent = _absent(names[0], metric, arms[0]) or _absent(names[1], metric, arms[1])
    complete: list[int] = []
    missing = ""
    wanted = sorted(set(arms[0]) | set(arms[1]))
    for seed in wanted:
        lacking = [name for name, arm in zip(names, arms, strict=True) if not _is_there(arm.get(seed), metric)]
        if lacking:
            missing = f"seed {seed} of {lacking[0]!r}" if not absent else ""
            break
        complete.append(seed)
    look = plan.reached(len(complete))
    counted = complete[: look or None]
    good = [seed for seed in counted if not any(_diverged(arm[seed], metric) for arm in arms)]
    winner, loser = (np.array([arm[seed].metrics[metric.name] for seed in good], dtype=np.float64) for arm in arms)
    step = metric.resolution or float(smallest_step(np.concatenate([winner, loser]))) if good else math.inf
    tables = [[arm[seed].scores.get(metric.name) for seed in good] for arm in arms]
    per_example = any(row is not None for table in tables for row in table)
    usable = per_example and _usable(tables, (winner, loser))
    if usable:
        winner, loser = (np.array(table, dtype=np.float64) for table in tables)
    return Pairs(
        claim=claim,
        sign=-1.0 if metric.better == "lower" else 1.0,
        winner=winner,
        loser=loser,
        seeds=len(counted),
        look=look,
        step=step,
        winner_diverged=sum(_diverged(arms[0][seed], metric) for seed in counted),
        loser_diverged=sum(_diverged(arms[1][seed], metric) for seed in counted),
        absent=absent,
        missing=missing,
        uneven=per_example and not usable,
    )


def _diverged(result: Result, metric: Metric) -> bool:
    return result.diverged or not math.isfinite(result.metrics.get(metric.name, math.nan))


def _is_there(result: Result | None, metric: Metric) -> bool:
    return result is not None and (result.diverged or metric.name in result.metrics)


def _absent(name: str, metric: Metric, arm: Mapping[int, Result]) -> str:
    if not arm:
        return f"{name!r} was left out"
    if not any(_is_there(result, metric) for result in arm.values()):
        return f"{name!r} did not report {metric.name}"
    return ""


def _usable(tables: list[list[Array | None]], means: tuple[Array, Array]) -> bool:
    rows = [row for table in tables for row in table]
    if any(row is None or np.ndim(row) != 1 or len(row) < 2 for row in rows):
        return False
    if len({len(row) for row in rows if row is not None}) != 1:
        return False
    scores = np.array(rows, dtype=np.float64)
    return bool(np.allclose(scores.mean(-1), np.concatenate(means), rtol=1e-4, atol=1e-9))
