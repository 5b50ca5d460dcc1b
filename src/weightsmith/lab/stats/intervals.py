"""How far a mean paired difference can be from what it estimates, over seeds and over test examples.

Differences over seeds alone give Student's t. With scores per example the differences form a table, seeds x examples:

    d[s, e] = mean + seed[s] + example[e] + rest[s, e]
    variance of the mean = var(seed) / S + var(rest) / (S E)  +  var(example) / E
                           |------ shrinks with seeds -----|     |-- does not --|

The two parts are estimated by the mean squares of the table. They are combined as in Banerjee (1961):

    half width² = t(S - 1)² * seeds  +  t(E - 1)² * examples

which covers at least as often as its level says. The usual alternative, one t with Satterthwaite's degrees of freedom,
is narrower but errs more often than it says at the first look, where the level is small: three seeds that happen to
agree give it many degrees of freedom.

A metric that counts examples moves in steps and can show no spread at all, which is no certainty. No variance below
that of the rounding is believed, and the interval reaches half a step of the sum over seeds further on each side
(continuity correction).

All functions work on the last axes, so that a simulation judges a million families with the code that judges one.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

Array = NDArray[np.float64]
SMALLEST_P = 1e-15
FLOAT_NOISE = 1e-6
"""Values closer than this fraction of the largest are one value: a float32 mean repeats no better."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean, and the two parts of its variance.

    Attributes:
        mean: Mean over seeds (and examples).
        seeds: Variance of the mean that more seeds reduce.
        examples: Variance of the mean that only more test examples reduce; 0 without scores per example.
        seeds_df: Degrees of freedom of ``seeds``.
        examples_df: Degrees of freedom of ``examples``.
        slack: Continuity correction: half of the step that the mean moves in.
    """

    mean: Array
    seeds: Array
    examples: Array
    seeds_df: float
    examples_df: float
    slack: Array

    def p(self) -> Array:
        """Two-sided p-value of "the true mean is 0": the level at which the interval touches 0."""
        if not np.any(self.examples):
            with np.errstate(invalid="ignore", divide="ignore"):
                t = np.maximum(np.abs(self.mean) - self.slack, 0.0) / np.sqrt(self.seeds)
            return np.maximum(2 * special.stdtr(self.seeds_df, -t), SMALLEST_P)
        low, high = np.full_like(self.mean, np.log(SMALLEST_P)), np.zeros_like(self.mean)
        for _ in range(50):
            middle = (low + high) / 2
            wide = self.half_width(np.exp(middle)) > np.abs(self.mean)  # the level is still too small to exclude 0
            low, high = np.where(wide, middle, low), np.where(wide, high, middle)
        return np.exp(high)

    def half_width(self, level: ArrayLike) -> Array:
        """Half of the width of the interval that misses the true mean with probability ``level`` at most."""
        return np.asarray(np.sqrt(self.part_of_seeds(level) + self.part_of_examples(level)) + self.slack)

    def part_of_seeds(self, level: ArrayLike) -> Array:
        """What the seeds contribute to the square of the half width."""
        return np.asarray(special.stdtrit(self.seeds_df, np.asarray(level) / 2) ** 2 * self.seeds)

    def part_of_examples(self, level: ArrayLike) -> Array:
        """What the test examples contribute to the square of the half width."""
        return np.asarray(special.stdtrit(self.examples_df, np.asarray(level) / 2) ** 2 * self.examples)


def over_seeds(values: Array, *, step: ArrayLike = 0.0, weight: float = 2.0) -> Estimate:
    """Estimate the mean of ``values`` ``(..., S)``.

    Args:
        values: One value per seed.
        step: Smallest step of the scores in ``values``.
        weight: Sum of squared weights of the scores in one value; 2 for winner minus loser.
    """
    seeds, step = values.shape[-1], np.asarray(step, dtype=np.float64)
    variance = np.maximum(values.var(-1, ddof=1), _rounding(step, weight))
    none = np.zeros_like(variance)
    return Estimate(np.asarray(values.mean(-1)), variance / seeds, none, seeds - 1, np.inf, step / (2 * seeds))


def over_seeds_and_examples(table: Array, *, step: ArrayLike = 0.0, weight: float = 2.0) -> Estimate:
    """Estimate the mean of ``table`` ``(..., S, E)``.

    Args:
        table: One value per seed and test example; column ``e`` is the same example for every seed.
        step: Smallest step of one seed's mean of scores.
        weight: As in `over_seeds`.
    """
    seeds, examples = table.shape[-2:]
    rows, columns = table.mean(-1), table.mean(-2)
    over_rows = over_seeds(rows, step=step, weight=weight)
    rest = table - rows[..., :, None] - columns[..., None, :] + over_rows.mean[..., None, None]
    noise = (rest**2).sum((-2, -1)) / ((seeds - 1) * (examples - 1))
    by_example = np.maximum(columns.var(-1, ddof=1) - noise / seeds, 0.0) / examples
    return replace(over_rows, examples=np.asarray(by_example), examples_df=examples - 1)


def _rounding(step: Array, weight: float) -> Array:
    """Variance that rounding to multiples of ``step`` alone gives."""
    return np.asarray(step**2 * (weight / 12))


def smallest_step(values: Array) -> Array:
    """The smallest gap between different values ``(..., K)``; infinite when all are equal."""
    ordered = np.sort(values, -1)
    gaps = np.diff(ordered, axis=-1)
    noise = FLOAT_NOISE * np.abs(values).max(-1, keepdims=True)
    return np.asarray(np.where(gaps > noise, gaps, np.inf).min(-1, initial=np.inf))
