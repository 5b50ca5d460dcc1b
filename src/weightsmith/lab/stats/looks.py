"""When the runs are looked at, and how much of the level each look may spend.

Looking again after every few seeds and stopping when something shows gives false verdicts far above 5 %. Here the looks
are fixed beforehand, and look ``k`` of a claim that may err with probability ``level`` is made at the nominal level
``share[k] * level``. The shares add up to a little more than 1 because the looks share their seeds; how much more is
found by simulation (``benchmarks/levels.py`` writes ``levels.json``). The first look spends little: with 3 seeds
Student's t has fat tails, and a verdict needs a very large effect.
"""

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import pairwise

from weightsmith.core.errors import UsageError

LOOKS = (3, 5, 10, 20)
LEVEL = 0.05
"""Probability of any false verdict in a family of claims, over all looks."""
FEWEST = 3
"""With fewer seeds nothing is decided: one or two differences do not show their own spread."""


@cache
def _table() -> dict[int, float]:
    table = json.loads(files(__package__).joinpath("levels.json").read_text(encoding="utf-8"))
    return dict(zip(table["looks"], table["shares"], strict=True))


@dataclass(frozen=True, slots=True)
class Plan:
    """The numbers of seeds at which claims are judged, fixed before the first job.

    Attributes:
        looks: Numbers of seeds, ascending: the default lets the runs stop early; ``(7,)`` is one look at 7 seeds.
    """

    looks: tuple[int, ...] = LOOKS

    def __post_init__(self) -> None:
        looks = self.looks
        if not looks or looks[0] < 1 or any(a >= b for a, b in pairwise(looks)):
            raise UsageError(f"looks must be ascending numbers of seeds such as (3, 5, 10, 20) or (7,), got {looks}")

    @property
    def shares(self) -> tuple[float, ...]:
        """Share of the level that each look spends.

        One look spends all of it. The calibrated looks, or the first few of them, use the table. Any other looks share
        the level equally, which needs no calibration (union bound).
        """
        if len(self.looks) == 1:
            return (1.0,)
        table = _table()
        if self.looks == tuple(table)[: len(self.looks)]:
            return tuple(table.values())[: len(self.looks)]
        return (1 / len(self.looks),) * len(self.looks)

    def reached(self, seeds: int) -> int | None:
        """The last look that ``seeds`` complete seeds allow, or ``None`` before the first."""
        return max((look for look in self.looks if look <= seeds), default=None)

    def share(self, look: int) -> float:
        """Share of the level that ``look`` spends."""
        return self.shares[self.looks.index(look)]


def next_look(seeds: int, plan: Plan | None = None) -> int | None:
    """The number of seeds to run up to when ``seeds`` are done, or ``None`` after the last look."""
    return min((look for look in (plan or Plan()).looks if look > seeds), default=None)
