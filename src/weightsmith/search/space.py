"""What an architecture is to a search: integers, one per choice, in cells of equal length.

A genotype is a tuple of cells, a cell a tuple of genes, a gene the index of a candidate. A space knows the range of
every gene and which cells make sense, and varies genotypes by one gene at a time.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np

from weightsmith.core.errors import UsageError, brief

Cell = tuple[int, ...]
Genotype = tuple[Cell, ...]
Problem = Callable[[Cell], str]
"""Says in words what is wrong with a cell whose genes are all in range; ``""``: nothing."""

_TRIES = 1000


@dataclass(frozen=True, slots=True)
class Gene:
    """One choice.

    Attributes:
        name: What is chosen, for example ``"0->2"``.
        low: Smallest index.
        high: Largest index, included.
    """

    name: str
    low: int
    high: int

    @property
    def values(self) -> range:
        """All indices."""
        return range(self.low, self.high + 1)


@dataclass(frozen=True)
class SearchSpace:
    """Genotypes of ``cells`` cells with the same genes each.

    Args:
        genes: The genes of a cell, in the order of the format.
        cells: Number of cells.
        problem: ``cell -> words`` for cells that cannot be built; ``""`` for those that can. By default all can.
        coupled: ``(cell, gene, generator) -> cell``: after a gene has been set, adapts others that must go with it.

    Raises:
        UsageError: There is nothing to choose.

    Example:
        >>> space = SearchSpace((Gene("kernel", 0, 2), Gene("width", 0, 3)), cells=2)
        >>> space.size()
        144
        >>> space.check([[0, 3], [2, 1]])
        ((0, 3), (2, 1))
    """

    genes: tuple[Gene, ...]
    cells: int = 1
    problem: Problem = lambda cell: ""
    coupled: Callable[[Cell, int, np.random.Generator], Cell] | None = None

    def __post_init__(self) -> None:
        if self.cells < 1 or not self.genes:
            raise UsageError(f"a search space needs cells and genes, got {self.cells} cells of {len(self.genes)} genes")
        for gene in self.genes:
            if gene.low > gene.high:
                raise UsageError(f"gene {gene.name!r} has no values: low {gene.low} is above high {gene.high}")

    @classmethod
    def of(cls, **choices: int) -> "SearchSpace":
        """Make a space of a single cell from names and numbers of candidates: ``SearchSpace.of(kernel=3, width=4)``."""
        return cls(tuple(Gene(name, 0, number - 1) for name, number in choices.items()))

    def check(self, genotype: Any) -> Genotype:
        """Bring a genotype into its plain form, or say what is wrong with it.

        Args:
            genotype: ``(cells, genes)``: nested sequences, an array or a tensor of integers. A space of a single cell
                also takes the cell itself.

        Raises:
            UsageError: Names cell and gene.
        """
        rows = genotype.tolist() if hasattr(genotype, "tolist") else genotype
        if self.cells == 1 and isinstance(rows, Sequence) and rows and not isinstance(rows[0], Sequence):
            rows = [rows]
        shape = f"a genotype has {self.cells} cells of {len(self.genes)} genes"
        if not isinstance(rows, Sequence) or isinstance(rows, str) or len(rows) != self.cells:
            raise UsageError(f"{shape}, got {brief(rows)}")
        return tuple(self._checked(row, index, shape) for index, row in enumerate(rows))

    def is_valid(self, genotype: Any) -> bool:
        """Whether `check` accepts it."""
        try:
            self.check(genotype)
        except UsageError:
            return False
        return True

    def size(self) -> int:
        """Number of valid genotypes."""
        size: int = self._valid_cells**self.cells
        return size

    def sample(self, rng: np.random.Generator) -> Genotype:
        """Draw uniformly from the valid genotypes, by rejection.

        Raises:
            UsageError: A thousand draws found no valid cell.
        """
        return tuple(self._sample_cell(rng) for _ in range(self.cells))

    def mutate(self, genotype: Genotype, rng: np.random.Generator) -> Genotype:
        """Change one gene of one cell, both drawn uniformly, to a different value in its range; the result is valid.

        Returns ``genotype`` itself when it has no valid neighbor.
        """
        open_moves = {
            (cell, gene): [value for value in self.genes[gene].values if value != genotype[cell][gene]]
            for cell in range(self.cells)
            for gene in range(len(self.genes))
        }
        for _ in range(_TRIES):
            cell, gene = int(rng.integers(self.cells)), int(rng.integers(len(self.genes)))
            values = open_moves[cell, gene]
            if values:
                changed = self._set(genotype[cell], gene, int(rng.choice(values)), rng)
                if not self.problem(changed):
                    return (*genotype[:cell], changed, *genotype[cell + 1 :])
        return genotype

    def crossover(self, one: Genotype, other: Genotype, rng: np.random.Generator) -> Genotype | None:
        """Copy ``one`` with exactly one of the differing genes taken from ``other``, drawn among the valid results.

        Returns:
            The child; ``None`` when the parents are equal or no single gene gives a valid one.
        """
        children = []
        for cell, gene in product(range(self.cells), range(len(self.genes))):
            if one[cell][gene] != other[cell][gene]:
                changed = self._set(one[cell], gene, other[cell][gene], rng)
                if not self.problem(changed):
                    children.append((*one[:cell], changed, *one[cell + 1 :]))
        return children[int(rng.integers(len(children)))] if children else None

    def to_text(self, genotype: Genotype) -> str:
        """Write a genotype as text, for example ``"1 1 1 0 2 3 1 / ..."``."""
        return " / ".join(" ".join(map(str, cell)) for cell in genotype)

    def from_text(self, text: str) -> Genotype:
        """Read what `to_text` has written.

        Raises:
            UsageError: It is no valid genotype.
        """
        try:
            return self.check([[int(gene) for gene in cell.split()] for cell in text.split("/")])
        except ValueError as error:
            raise UsageError(f"genotype {brief(text)} must be whole numbers, cells separated by /: {error}") from error

    @cached_property
    def _valid_cells(self) -> int:
        return sum(not self.problem(cell) for cell in product(*(gene.values for gene in self.genes)))

    def _checked(self, row: Any, index: int, shape: str) -> Cell:
        if not isinstance(row, Sequence) or isinstance(row, str) or len(row) != len(self.genes):
            raise UsageError(f"{shape}, got {brief(row)} as cell {index}")
        for gene, value in zip(self.genes, row, strict=True):
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value not in gene.values:
                raise UsageError(
                    f"cell {index}, gene {gene.name!r} must be a whole number from {gene.low} to {gene.high}, "
                    f"got {brief(value)}"
                )
        cell = tuple(int(value) for value in row)
        words = self.problem(cell)
        if words:
            raise UsageError(f"cell {index} is invalid: {words}, got {cell}")
        return cell

    def _sample_cell(self, rng: np.random.Generator) -> Cell:
        for _ in range(_TRIES):
            cell = tuple(int(rng.integers(gene.low, gene.high + 1)) for gene in self.genes)
            if not self.problem(cell):
                return cell
        raise UsageError(f"{_TRIES} random cells were all invalid: {self.problem(cell)}; widen the search space")

    def _set(self, cell: Cell, gene: int, value: int, rng: np.random.Generator) -> Cell:
        changed = (*cell[:gene], value, *cell[gene + 1 :])
        return changed if self.coupled is None else self.coupled(changed, gene, rng)


def different(genotypes: Iterable[Genotype]) -> list[Genotype]:
    """Drop repeated genotypes, in order."""
    return list(dict.fromkeys(genotypes))


def possible(space: SearchSpace, most: int) -> int:
    """The smaller of ``most`` and the number of genotypes, without enumerating spaces that are clearly larger."""
    raw = math.prod(len(gene.values) for gene in space.genes)
    return most if space.cells * math.log(max(raw, 1)) > math.log(most) + 60 else min(most, space.size())
