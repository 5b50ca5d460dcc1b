"""Calibrate how much of the level each look may spend, by simulation; `--write` replaces the committed table.

    OMP_NUM_THREADS=1 python benchmarks/levels.py [--write] [--runs N]

Each look of a claim that may err with probability g is made at the nominal level share * g. WEIGHTS fixes the shares up
to a factor: little at 3 seeds, where Student's t has fat tails, most at 10 and 20. The factor is the largest for which
the chance of any p-value below its level stays at g, for every g = 0.05 / m that Holm's correction uses in families of
m = 1 to 10 claims. It nears 1 as g falls (rare events of different looks hardly ever coincide), so the smallest counts.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

import weightsmith.lab.stats
from weightsmith.lab.stats.intervals import Array, over_seeds
from weightsmith.lab.stats.looks import LEVEL, LOOKS

WEIGHTS = (1 / 15, 2 / 15, 6 / 15, 6 / 15)
FAMILIES = (1, 2, 3, 5, 7, 10)
FILE = Path(weightsmith.lab.stats.__file__).with_name("levels.json")


def null_p_values(runs: int, generator: np.random.Generator) -> Array:
    """p-values ``(runs, looks)`` of paired differences that are pure noise."""
    chunks = []
    for start in range(0, runs, 100_000):
        values = generator.standard_normal((min(100_000, runs - start), LOOKS[-1]))
        chunks.append(np.stack([over_seeds(values[:, :look]).p() for look in LOOKS], -1))
    return np.concatenate(chunks)


def crossing(p: Array, shares: Array, claims: int) -> float:
    """Chance that one of the looks of one claim gives a false verdict when it may err with ``LEVEL / claims``."""
    return float((p <= shares * LEVEL / claims).any(-1).mean())


def factor(p: Array, claims: int) -> float:
    """The largest factor on ``WEIGHTS`` that keeps the chance at ``LEVEL / claims``."""
    return float(np.quantile((p / np.array(WEIGHTS)).min(-1), LEVEL / claims) * claims / LEVEL)


def main() -> None:
    """Print the calibration, and write it when asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="replace levels.json of the package")
    parser.add_argument("--runs", type=int, default=2_000_000)
    options = parser.parse_args()
    p = null_p_values(options.runs, np.random.default_rng(0))
    smallest = min(factor(p, claims) for claims in FAMILIES)
    shares = np.array([math.floor(weight * smallest * 1000) / 1000 for weight in WEIGHTS])
    table = Table("claims", "level per claim", "largest factor", "level reached", title=f"shares {shares.tolist()}")
    for claims in FAMILIES:
        reached = crossing(p, shares, claims)
        table.add_row(str(claims), f"{LEVEL / claims:.4f}", f"{factor(p, claims):.3f}", f"{reached:.4f}")
    Console().print(table)
    if options.write:
        content = {"looks": list(LOOKS), "shares": shares.tolist(), "runs": options.runs}
        FILE.write_text(json.dumps(content) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
