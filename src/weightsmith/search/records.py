"""What a search has found, generation by generation."""

from dataclasses import dataclass

from weightsmith.core.errors import UsageError
from weightsmith.search.evaluation import Values
from weightsmith.search.space import Genotype


@dataclass(frozen=True, slots=True)
class Scored:
    """An individual that was evaluated.

    Attributes:
        genotype: The architecture.
        values: What ``evaluate`` returned.
        minimized: The objectives as they were sorted: smaller is better, the worst value everywhere for failed ones.
        rank: 0 for the Pareto front of its generation.
        failed: A value was not finite, or its training was not.
    """

    genotype: Genotype
    values: Values
    minimized: tuple[float, ...]
    rank: int
    failed: bool


@dataclass(frozen=True, slots=True)
class Generation:
    """All individuals of a generation, by slot."""

    number: int
    scored: tuple[Scored, ...]


@dataclass(frozen=True, slots=True)
class SearchResult:
    """What `weightsmith.search.evolve` returns.

    Attributes:
        generations: All of them, in order.
        objectives: Names, the most important first.
        stopped: Why the search ended early; ``""``: it did not.
    """

    generations: tuple[Generation, ...]
    objectives: tuple[str, ...]
    stopped: str = ""

    @property
    def front(self) -> tuple[Scored, ...]:
        """Rank 0 of the last generation, the most important objective's best first."""
        last = self.generations[-1].scored
        return tuple(sorted((one for one in last if one.rank == 0), key=lambda one: one.minimized))

    @property
    def best(self) -> Scored:
        """Of the front the one with the best first objective; ties are decided by the next ones.

        Raises:
            UsageError: All individuals of the last generation failed.
        """
        best = self.front[0]
        if best.failed:
            raise UsageError("all individuals of the last generation failed: lower the learning rate or train longer")
        return best

    @property
    def best_slot(self) -> int:
        """Where the best one is in its population."""
        return self.generations[-1].scored.index(self.front[0])

    @property
    def evaluations(self) -> int:
        """Number of evaluations."""
        return sum(len(generation.scored) for generation in self.generations)
