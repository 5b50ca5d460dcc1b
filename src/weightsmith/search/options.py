"""What a user can set about a search: its size, its selection, and how shared weights are trained."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from weightsmith.core.errors import UsageError
from weightsmith.search.records import Scored
from weightsmith.search.selection import cars
from weightsmith.search.space import Genotype, SearchSpace

Direction = Literal["min", "max"]
Select = Callable[[Sequence[Scored], int, np.random.Generator], Sequence[int]]
"""``(scored, keep, rng) -> indices of the survivors``."""


@dataclass(frozen=True, slots=True)
class EvolveOptions:
    """How a search runs.

    Attributes:
        population: Individuals; even, at least 4. Half of them survive a generation.
        generations: How often the population is trained and evaluated.
        crossover: Share of crossovers among children, the others are mutations; default 0.3 / (0.3 + 0.5), as in the
            EAGAN paper but exclusive.
        selector: ``"nsga2"``; ``"random"``: no selection, every generation is drawn anew (the control with an equal
            budget); or a function ``(scored, keep, rng) -> indices``.
    """

    population: int = 32
    generations: int = 18
    crossover: float = 0.375
    selector: Literal["nsga2", "random"] | Select = "nsga2"

    def check(self) -> None:
        """Refuse values out of range.

        Raises:
            UsageError: Names the argument.
        """
        if not isinstance(self.population, int) or self.population < 4 or self.population % 2:
            raise UsageError(f"population must be an even number of at least 4, got {self.population!r}")
        if not isinstance(self.generations, int) or self.generations < 1:
            raise UsageError(f"generations must be a whole number of at least 1, got {self.generations!r}")
        if not 0 <= self.crossover <= 1:
            raise UsageError(f"crossover must be between 0 and 1, got {self.crossover}")
        if self.selector not in ("nsga2", "random") and not callable(self.selector):
            raise UsageError(f"selector must be 'nsga2', 'random' or a function, got {self.selector!r}")


class Trainer:
    """Trains the weights that the individuals share; override what is needed.

    Randomness must come from the seeds that are passed, or from the global generators, which are seeded with them: then
    a resumed search equals an unbroken one.

    Attributes:
        failed: Slots whose last training was not finite; they count as the worst.
    """

    failed: frozenset[int] = frozenset()

    def warm_up(self, model: Any, space: SearchSpace, seed: int) -> None:
        """Train before the first population is drawn."""

    def train(self, model: Any, population: Sequence[Genotype], seed: int) -> None:
        """Train for one generation."""

    def selected(self, model: Any, best: int) -> None:
        """The population of the last training was judged; ``best`` is the slot of the best individual."""

    def state_dict(self) -> dict[str, Any]:
        """What training needs beside the model, such as optimizers: tensors, numbers and text in dicts and lists."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take a `state_dict` back."""


def cars_selector(inception: str = "is", distance: str = "fid", size: str = "parameters") -> Select:
    """The selection of EAGAN's released code as a ``selector``; see `weightsmith.search.selection.cars`.

    Args:
        inception: Name of the score that should be high.
        distance: Name of the distance that should be low.
        size: Name of the size.
    """

    def select(scored: Sequence[Scored], keep: int, rng: np.random.Generator) -> Sequence[int]:
        one, two, three = ([each.values[name] for each in scored] for name in (inception, distance, size))
        return cars(one, two, three, keep, rng)

    return select
