"""How often verdicts are wrong, and how many seeds they take: the whole rule, with its looks and its early stop.

Prints one table: false verdicts per family under the null (at most 5 %), for continuous metrics and for counts of a
test set's examples; power at an effect of one standard deviation; and how often "no relevant effect" is found, rightly
and wrongly.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from weightsmith.lab.stats.effect import p_value, t_statistic
from weightsmith.lab.stats.families import rejected
from weightsmith.lab.stats.levels import LOOKS, Plan

Draw = Callable[[np.random.Generator, tuple[int, ...]], NDArray[np.float64]]
PLAN = Plan()


def gaussian(generator: np.random.Generator, shape: tuple[int, ...], effect: float = 0.0) -> NDArray[np.float64]:
    """Differences of standard deviation 1."""
    return generator.standard_normal(shape) + effect


def counts(generator: np.random.Generator, shape: tuple[int, ...], sd: float = 1.0) -> NDArray[np.float64]:
    """Differences of two counts, each rounded, of standard deviation ``sd`` examples; the step is 1."""
    first, second = (np.round(generator.standard_normal(shape) * sd / np.sqrt(2) + 0.3) for _ in range(2))
    return first - second


def families(draw: Draw, claims: int, runs: int, step: float = 0.0, seed: int = 0) -> tuple[float, float, float]:
    """Simulate families that stop as soon as every claim is rejected.

    Returns:
        Share of families with any rejection, share of claims rejected, and seeds used on average.
    """
    generator = np.random.default_rng(seed)
    differences = draw(generator, (runs, claims, LOOKS[-1]))
    running = np.ones(runs, bool)
    verdict = np.zeros((runs, claims), bool)
    any_time = np.zeros(runs, bool)
    used = np.zeros(runs)
    for look, n in enumerate(LOOKS):
        p = p_value(t_statistic(differences[..., :n], step), n)
        found = rejected(p, partial(PLAN.level, look))
        any_time |= running & found.any(1)
        verdict[running] = found[running]
        used[running] = n
        running &= ~verdict.all(1)
    return float(any_time.mean()), float(verdict.mean()), float(used.mean())


def irrelevant(effect: float, sd: float, worth: float, runs: int, seed: int = 0) -> tuple[float, float]:
    """One claim with ``worth``: share of runs that end with "no relevant effect", and seeds used on average."""
    generator = np.random.default_rng(seed)
    differences = effect + sd * generator.standard_normal((runs, LOOKS[-1]))
    running, found, used = np.ones(runs, bool), np.zeros(runs, bool), np.zeros(runs)
    for look, n in enumerate(LOOKS):
        some = differences[:, :n]
        error, level = some.std(1, ddof=1) / np.sqrt(n), PLAN.level(look, 1)
        small = np.abs(some.mean(1)) + stats.t.isf(level / 2, n - 1) * error < worth
        clear = p_value(some.mean(1) / error, n) <= level
        found[running] = small[running]
        used[running] = n
        running &= ~(small | clear)
    return float(found.mean()), float(used.mean())


def main(runs: int = 100_000) -> None:
    """Print the table."""
    print("false verdicts per family under the null, over all looks (at most 5 %)")
    print(f"{'claims':>8} {'Gaussian':>9}" + "".join(f"{f'sd {sd} ex.':>11}" for sd in (1, 2, 5)))
    for m in (1, 2, 3, 5, 7):
        row = [families(gaussian, m, runs)[0]]
        row += [families(partial(counts, sd=sd), m, runs, step=1.0)[0] for sd in (1, 2, 5)]
        print(f"{m:>8} {100 * row[0]:>8.2f}%" + "".join(f"{100 * share:>10.2f}%" for share in row[1:]))
    _, power, used = families(partial(gaussian, effect=1.0), 1, runs)
    print(f"power at 1 sd, one claim: {100 * power:.1f} % with {used:.1f} seeds on average")
    share, used = irrelevant(0.0, 1.0, 3.0, runs)
    print(f"effect 0, sd a third of worth: no relevant effect in {100 * share:.1f} %, {used:.1f} seeds on average")
    share, _ = irrelevant(3.0, 1.0, 3.0, runs)
    print(f"effect equal to worth: wrongly no relevant effect in {100 * share:.2f} %")


if __name__ == "__main__":
    main()
