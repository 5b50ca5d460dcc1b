"""How large an effect n seeds can show, and how many seeds an effect takes."""

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from scipy import special

from weightsmith.lab.stats.intervals import Array, Estimate
from weightsmith.lab.stats.looks import FEWEST, LEVEL

POWER = 0.8
MOST = 100_000


def power(effect: float, estimate: Estimate, level: float = LEVEL) -> float:
    """Probability that an interval at ``level`` excludes 0 on the right side when the true mean is ``effect``.

    The variances in ``estimate`` count as the true ones; their estimate in the next runs varies with the degrees of
    freedom of the seeds.
    """
    scale = _chi_square(estimate.seeds_df)
    seen = Estimate(
        np.full_like(scale, effect),
        np.asarray(estimate.seeds * scale),
        np.full_like(scale, estimate.examples),
        estimate.seeds_df,
        estimate.examples_df,
        estimate.slack,
    )
    spread = math.sqrt(float(estimate.seeds + estimate.examples))
    return float(special.ndtr((effect - seen.half_width(level)) / spread).mean())


@lru_cache(maxsize=4096)
def _chi_square(df: float) -> Array:
    """Chi² divided by its degrees of freedom, at equally likely quantiles."""
    return np.asarray(2 * special.gammaincinv(df / 2, (np.arange(400) + 0.5) / 400) / df)


def detectable(estimate: Estimate, level: float = LEVEL) -> float:
    """The smallest effect that an interval at ``level`` shows in 80 % of such runs."""
    unit = math.sqrt(float(estimate.seeds + estimate.examples))
    if not 0 < unit < math.inf:
        return unit
    return _first(lambda effect: power(effect * unit, estimate, level) >= POWER) * unit


def seeds_needed(
    sd: float,
    effect: float,
    *,
    level: float = LEVEL,
    step: float = 0.0,
    examples: float = 0.0,
    examples_df: float = math.inf,
) -> int | None:
    """The number of seeds that show ``effect`` at ``level`` in 80 % of runs, or ``None`` when no number does.

    Args:
        sd: Standard deviation of the paired difference over seeds.
        effect: True mean difference, positive.
        level: Two-sided level of one look at these seeds.
        step: Smallest step of the metric.
        examples: Variance of the mean that stems from the test examples and that seeds do not reduce.
        examples_df: Its degrees of freedom.
    """

    def enough(seeds: int) -> bool:
        parts = (np.asarray(effect), np.asarray(sd**2 / seeds), np.asarray(examples))
        return power(effect, Estimate(*parts, seeds - 1, examples_df, np.asarray(step / (2 * seeds))), level) >= POWER

    if sd == 0 and examples == 0:
        return FEWEST
    if not math.isfinite(sd) or not enough(MOST):
        return None
    low, high = FEWEST - 1, MOST
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def examples_needed(variance: float, effect: float, *, level: float = LEVEL) -> int:
    """The number of test examples with which ``effect`` is shown at ``level`` in 80 % of runs.

    They take half of the variance that such an interval may have; the seeds have the other half.

    Args:
        variance: Variance over examples of the difference that all seeds have in common.
        effect: True mean difference, positive.
        level: Two-sided level.
    """
    reach = special.ndtri(POWER) - special.ndtri(level / 2)
    return math.ceil(2 * variance * (reach / effect) ** 2)


def _first(holds: Callable[[float], bool]) -> float:
    """The smallest positive number for which ``holds`` is true, to one part in a million; ``holds`` is monotone."""
    low, high = 0.0, 1.0
    while not holds(high):
        low, high = high, 2 * high
    while high - low > 1e-6 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
