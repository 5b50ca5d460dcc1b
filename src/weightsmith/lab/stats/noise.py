"""Measure the noise before believing a gain: what a baseline's spread over seeds allows n seeds to show."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

from weightsmith.core.errors import UsageError
from weightsmith.lab.stats.intervals import Estimate, over_seeds, smallest_step
from weightsmith.lab.stats.looks import FEWEST, LEVEL
from weightsmith.lab.stats.power import detectable


@dataclass(frozen=True, slots=True)
class Noise:
    """The spread of one arm over seeds, and what it allows to see.

    Attributes:
        n: Seeds measured.
        sd: Standard deviation over seeds, at least what rounding alone gives; infinite when all values are equal
            and no resolution is given.
        low: Lower end of the 95 % interval of the standard deviation.
        high: Upper end; wide when few seeds were measured.
        effects: Smallest difference of two arms shown by that many seeds in 80 % of runs, two-sided at 5 %.
    """

    n: int
    sd: float
    low: float
    high: float
    effects: dict[int, float]


def noise(values: Sequence[float], *, resolution: float | None = None, seeds: Iterable[int] = range(3, 31)) -> Noise:
    """What the spread of a baseline says about the effects that ``seeds`` can show.

    The difference of two arms is taken to vary ``sqrt(2)`` times as much as one arm. Arms that share what a seed
    decides (initial weights, order of examples) often vary less, so the effects are rather too large than too small.

    Args:
        values: One value of the metric per seed of the baseline.
        resolution: Smallest step of the metric; ``None``: the smallest gap between the values.
        seeds: Numbers of seeds to list, each at least 3.

    Raises:
        UsageError: Fewer than 3 values, a value that is not finite, or fewer than 3 seeds to list.
    """
    numbers, listed = np.asarray(values, dtype=np.float64), tuple(seeds)
    if len(numbers) < FEWEST or not np.isfinite(numbers).all():
        raise UsageError(f"values must be at least {FEWEST} finite numbers, one per seed, got {list(values)}")
    if min(listed, default=FEWEST) < FEWEST:
        raise UsageError(f"seeds must be at least {FEWEST}, got {min(listed)}")
    df = len(numbers) - 1
    step = resolution or float(smallest_step(numbers))
    sd = math.sqrt(float(over_seeds(numbers, step=step, weight=1.0).seeds) * len(numbers))
    low, high = (sd * math.sqrt(df / 2 / special.gammaincinv(df / 2, q)) for q in (0.975, 0.025))
    effects = {n: detectable(_difference(sd, n, step), LEVEL) for n in listed}
    return Noise(len(numbers), sd, low, high, effects)


def _difference(sd: float, seeds: int, step: float) -> Estimate:
    none, variance = np.asarray(0.0), np.asarray(2 * sd**2 / seeds)
    return Estimate(none, variance, none, seeds - 1, math.inf, np.asarray(step / (2 * seeds)))
