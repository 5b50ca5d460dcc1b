"""How often the lab's verdicts are false, and how soon they come, by simulation.

    OMP_NUM_THREADS=1 python benchmarks/verdicts.py [--runs N]

Families of claims are judged at 3, 5, 10 and 20 seeds, as `weightsmith run --seeds auto` does. A family counts as false
when any of its claims shows a verdict that is not true at any of these looks; families do not stop early here unless
the row says so, which is the harder case.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray
from rich.console import Console
from rich.table import Table

from weightsmith.lab.stats.decisions import IRRELEVANT, REFUTED, SUPPORTED, UNDECIDED, Evidence, decide, evidence
from weightsmith.lab.stats.intervals import Array, over_seeds, over_seeds_and_examples
from weightsmith.lab.stats.looks import Plan

Draw = Callable[[int, np.random.Generator], Array]
"""``(families, generator) -> differences`` ``(families, claims, seeds)`` or ``(families, claims, seeds, examples)``."""


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: What is simulated.
        draw: The paired differences.
        truth: True mean difference of each claim.
        worth: Smallest effect worth having; 0: none.
        step: Resolution of the metric.
        plan: The looks.
        runs: Divides the number of families, for rows that are expensive.
    """

    name: str
    draw: Draw
    truth: ArrayLike = 0.0
    worth: float = 0.0
    step: float = 0.0
    plan: Plan = field(default_factory=Plan)
    runs: int = 1


def verdicts(values: Array, *, worth: float, step: ArrayLike, plan: Plan, crossed: bool = False) -> NDArray[np.int_]:
    """Verdict codes ``(families, looks, claims)`` of one family of claims with threshold 0, without stopping."""
    estimate = over_seeds_and_examples if crossed else over_seeds
    codes = []
    for look in plan.looks:
        seen = values[..., :look, :] if crossed else values[..., :look]
        sizes = (estimate(seen - size, step=step) for size in (0.0, worth, -worth))
        threshold, side, small = evidence(*sizes, plan.share(look))
        small = small if worth else np.ones_like(small)
        codes.append(decide(Evidence(threshold, side, small, np.ones(values.shape[1], bool)))[0])
    return np.stack(codes, 1)


def stop(codes: NDArray[np.int_]) -> NDArray[np.int_]:
    """Index ``(families,)`` of the look at which every claim is decided, or of the last."""
    done = (codes != UNDECIDED).all(-1)
    return np.where(done.any(-1), done.argmax(-1), codes.shape[1] - 1)


def false(codes: NDArray[np.int_], truth: ArrayLike, worth: float) -> NDArray[np.bool_]:
    """Which verdicts are not true."""
    effect = np.asarray(truth)
    wrong = ((codes == SUPPORTED) & (effect <= 0)) | ((codes == REFUTED) & (effect >= 0))
    return wrong | ((codes == IRRELEVANT) & (np.abs(effect) >= worth))


def gaussian(claims: int, effect: ArrayLike = 0.0, seeds: int = 20, shared: float = 0.0) -> Draw:
    """Differences with sd 1 around ``effect``; ``shared`` of their variance is that of a common baseline."""

    def draw(runs: int, generator: np.random.Generator) -> Array:
        own = generator.standard_normal((runs, claims, seeds)) * np.sqrt(1 - shared)
        common = generator.standard_normal((runs, 1, seeds)) * np.sqrt(shared)
        return own + common + np.asarray(effect)[..., None]

    return draw


def counts(claims: int, sd: float, seeds: int = 20) -> Draw:
    """Differences of two counts of right answers that vary by ``sd`` examples each; claims share their baseline."""

    def draw(runs: int, generator: np.random.Generator) -> Array:
        level = generator.uniform(size=(runs, 1, 1))  # where the mean lies between two counts
        scores = generator.standard_normal((runs, claims + 1, seeds)) * sd + level
        rounded = np.round(scores)
        return np.asarray(rounded[:, 1:] - rounded[:, :1])

    return draw


def answers(claims: int, examples: int, seeds: int = 20) -> Draw:
    """Right or wrong answers of arms that are equally good on average, but on different examples."""

    def draw(runs: int, generator: np.random.Generator) -> Array:
        arms = generator.standard_normal((runs, claims + 1, 1, examples)) + 1
        noise = generator.standard_normal((runs, claims + 1, seeds, examples))
        right = (arms + noise > 0).astype(np.float64)
        return np.asarray(right[:, 1:] - right[:, :1])

    return draw


def crossed(claims: int, seed: float, example: float, rest: float, examples: int, seeds: int = 20) -> Draw:
    """Differences per seed and test example, with these standard deviations of their parts."""

    def draw(runs: int, generator: np.random.Generator) -> Array:
        by_seed = generator.standard_normal((runs, claims, seeds, 1)) * seed
        by_example = generator.standard_normal((runs, claims, 1, examples)) * example
        return np.asarray(by_seed + by_example + generator.standard_normal((runs, claims, seeds, examples)) * rest)

    return draw


FIXED = [Plan((n,)) for n in (3, 5, 7)]
ROWS = [
    *(Row(f"{m} claims, Gaussian", gaussian(m)) for m in range(1, 8)),
    Row("7 claims, Gaussian, one baseline", gaussian(7, shared=0.5)),
    *(Row(f"{m} claims, counts, sd {sd}", counts(m, sd), step=1) for sd in (0.5, 1, 2, 5) for m in (1, 3, 7)),
    *(Row(f"1 claim, counts, sd 1, {p.looks[0]} seeds", counts(1, 1, p.looks[0]), step=1, plan=p) for p in FIXED),
    *(Row(f"1 claim, Gaussian, {p.looks[0]} seeds", gaussian(1, 0, p.looks[0]), plan=p) for p in FIXED),
    Row("1 claim, effect 0, sd worth / 3", gaussian(1), worth=3),
    Row("7 claims, effect 0, sd worth / 3", gaussian(7), worth=3),
    Row("1 claim, effect = worth = sd", gaussian(1, 1), truth=1, worth=1),
    Row("1 claim, effect = worth = 3 sd", gaussian(1, 3), truth=3, worth=3),
    Row("3 claims, effects 0, worth, 2 worth", gaussian(3, [0, 2, 4]), truth=[0, 2, 4], worth=2),
    Row("7 claims, effects -1 to 1 sd", gaussian(7, (e := np.linspace(-1, 1, 7))), truth=e, worth=1),
    Row("1 claim, effect 1 sd", gaussian(1, 1), truth=1),
    Row("2 claims, effect 1 sd", gaussian(2, [1, 1]), truth=1),
    Row("1 claim, effect 2 sd", gaussian(1, 2), truth=2),
    Row("seeds x examples, all from seeds", crossed(1, 0.5, 0, 1, 50), runs=10),
    Row("seeds x examples, all from examples", crossed(1, 0, 1, 1, 50), runs=10),
    Row("seeds x examples, half each", crossed(1, 0.3, 1, 1, 50), runs=10),
    Row("seeds x examples, 3 claims, 12 examples", crossed(3, 0.3, 1, 1, 12), runs=10),
    Row("seeds x examples, 3 claims, right or wrong", answers(3, 40), step=1 / 40, runs=20),
]


def measure(row: Row, runs: int, generator: np.random.Generator) -> dict[str, float]:
    """Shares of families, and seeds used."""
    values = row.draw(runs // row.runs, generator)
    codes = verdicts(values, worth=row.worth, step=row.step, plan=row.plan, crossed=values.ndim == 4)
    last = stop(codes)
    at_stop = np.take_along_axis(codes, last[:, None, None], 1)[:, 0]
    return {
        "false": float(false(codes, row.truth, row.worth).any((1, 2)).mean()),
        "error": float(0.05 * 0.95 / len(values)) ** 0.5,
        "supported": float((at_stop == SUPPORTED).mean()),
        "irrelevant": float((at_stop == IRRELEVANT).mean()),
        "undecided": float((at_stop == UNDECIDED).mean()),
        "seeds": float(np.array(row.plan.looks)[last].mean()),
    }


def main() -> None:
    """Print one line per simulation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=40_000)
    runs = parser.parse_args().runs
    heads = ("families with a false verdict", "supported", "no relevant effect", "undecided", "mean seeds")
    table = Table("simulated", *heads, caption="shares of claims when the runs stop; false: at any look, ± one error")
    generator = np.random.default_rng(0)
    for row in ROWS:
        found = measure(row, runs, generator)
        shares = (f"{found[key]:.3f}" for key in ("supported", "irrelevant", "undecided"))
        table.add_row(row.name, f"{found['false']:.4f} ± {found['error']:.4f}", *shares, f"{found['seeds']:.1f}")
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
