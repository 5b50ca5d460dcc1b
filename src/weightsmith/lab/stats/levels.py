"""The nominal level of each look at the data, so that looking again and stopping early is allowed.

Under the null a family of ``m`` claims shows any false verdict with probability at most 0.05 over all looks together.
``LEVELS[m][j]`` is the level of one claim's two-sided test at look ``j`` when ``m`` claims are still in question
(Holm's step-down rule): ``shares[j]`` scaled so that one claim crosses at any look with probability ``0.05 / m``. The
table comes from ``benchmarks/levels.py``, a simulation of t statistics on growing samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass

ALPHA = 0.05
LOOKS = (3, 5, 10, 20)
SHARES = (0.06, 0.14, 0.30, 0.50)
"""How ``ALPHA`` is spent before scaling: little on few seeds, where the t distribution has heavy tails."""

SCALES = (1.150, 1.112, 1.092, 1.082, 1.075, 1.069, 1.064, 1.060)
"""By family size, from 1: what correlation between looks allows beyond Bonferroni; larger families use 1."""


@dataclass(frozen=True, slots=True)
class Plan:
    """When the data are looked at; decided before the first job.

    Attributes:
        looks: Numbers of seeds; the verdict is that of the last one reached.
    """

    looks: tuple[int, ...] = LOOKS

    def level(self, look: int, size: int) -> float:
        """Nominal level of one claim's test.

        Args:
            look: Index of the look.
            size: Claims of the family that are not rejected yet.
        """
        if self.looks != LOOKS:  # looks of the user's own share the level evenly
            return ALPHA / len(self.looks) / size
        return ALPHA * SHARES[look] * (SCALES[size - 1] if size <= len(SCALES) else 1.0) / size

    def reached(self, seeds: Sequence[int]) -> int | None:
        """Index of the last look that a number of seeds allows, or ``None``."""
        done = [index for index, look in enumerate(self.looks) if look <= len(seeds)]
        return done[-1] if done else None
