"""How large a paired difference is, and how uncertain: over seeds, over test examples, and by rounding.

With scores per example the differences ``d[s, e] = mu + a_s + b_e + r_se`` have two random factors, seeds and test
examples. From the mean squares of the two-way layout

    var(mean) = (MS_seeds + max(MS_examples - MS_rest, 0)) / (S E)

so that an interval speaks of other seeds *and* of other test examples. Student's t takes ``S - 1`` degrees of freedom,
the fewest of the parts, which errs on the safe side. Values on a lattice of step ``h`` get the variance of rounding two
of them, ``h^2 / 6``, added: three equal differences are no certainty.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Array = NDArray[np.float64]
_POWER = 0.8


@dataclass(frozen=True, slots=True)
class Effect:
    """A mean paired difference over ``n`` seeds.

    Attributes:
        mean: Of the differences.
        seeds: Variance over seeds of one difference, rounding included.
        examples: Variance of the mean that the choice of test examples adds, whatever the number of seeds.
        n: Seeds.
    """

    mean: float
    seeds: float
    examples: float
    n: int

    @property
    def error(self) -> float:
        """Standard error of the mean."""
        return math.sqrt(self.seeds / self.n + self.examples)

    def p(self, threshold: float) -> float:
        """Two-sided p-value of ``mean = threshold``."""
        distance = self.mean - threshold
        if not self.error:  # all differences are equal to the last bit
            return 0.0 if distance else 1.0
        return float(p_value(distance / self.error, self.n))

    def half(self, level: float) -> float:
        """Half the width of the interval whose test has this level."""
        return float(stats.t.isf(level / 2, self.n - 1)) * self.error

    def detectable(self, level: float, n: Any = None) -> Any:
        """Smallest difference that ``n`` seeds, a number or an array, show at this level four times out of five."""
        n = self.n if n is None else n
        quantiles = stats.t.isf(level / 2, n - 1) + stats.t.ppf(_POWER, n - 1)
        return quantiles * np.sqrt(self.seeds / n + self.examples)


def p_value(t: Any, n: int) -> Any:
    """Two-sided p-value of Student's t on ``n`` values; 1 where there is neither difference nor spread."""
    return np.where(np.isnan(t), 1.0, 2 * stats.t.sf(np.abs(t), n - 1))


def t_statistic(differences: Array, step: float = 0.0) -> Array:
    """Student's t of ``differences (..., n)`` against 0, with the variance of rounding to a lattice of ``step``."""
    n = differences.shape[-1]
    error = np.sqrt((differences.var(-1, ddof=1) + step**2 / 6) / n)
    with np.errstate(invalid="ignore", divide="ignore"):
        return differences.mean(-1) / error


def effect_of(differences: Array, step: float = 0.0, examples: Array | None = None) -> Effect:
    """Measure a paired difference.

    Args:
        differences: ``(n,)``, one per seed, ``n >= 2``.
        step: Of the lattice on which the metric's values lie; 0: continuous.
        examples: ``(n, E)``, differences per seed and test example, whose means over examples are ``differences``.
    """
    n = len(differences)
    seeds = float(differences.var(ddof=1)) + step**2 / 6
    shared = 0.0
    if examples is not None and examples.shape[1] > 1:
        by_seed, by_example = examples.mean(1, keepdims=True), examples.mean(0, keepdims=True)
        rest = examples - by_seed - by_example + examples.mean()
        count = examples.shape[1]
        ms_rest = float((rest**2).sum()) / ((n - 1) * (count - 1))
        ms_examples = n * float(by_example.var(ddof=1))
        shared = max(ms_examples - ms_rest, 0.0) / (n * count)
    return Effect(float(differences.mean()), seeds, shared, n)
