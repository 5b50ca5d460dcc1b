"""The search spaces of EAGAN, and the published architectures by name.

Indices of operations are part of the format; ``none`` is not executed and ``-1`` means "no down-sampling".

| kind | candidates |
|---|---|
| normal | none, skip, conv 1x1, 3x3, 5x5, 3x3 dilated, 5x5 dilated |
| up | nearest, bilinear, transposed |
| down | average, maximum, conv 3x3, 5x5, 3x3 dilated, 5x5 dilated |

Source: arXiv 2111.15097, section 3.1; indices as in the authors' code.
"""

import numpy as np

from weightsmith.core.errors import unknown
from weightsmith.search.space import Cell, Gene, Genotype, SearchSpace

CELLS = 3


def _generator_problem(cell: Cell) -> str:
    if not (cell[2] or cell[3]):
        return "node 2 has no input, as genes '0->2' and '1->2' are both none (0)"
    if not (cell[4] or cell[5] or cell[6]):
        return "node 3 has no input, as genes '0->3', '1->3' and '2->3' are all none (0)"
    return ""


def _discriminator_problem(cell: Cell) -> str:
    if not (cell[1] or cell[2]):
        return "node 2 has no input, as genes '0->2' and '1->2' are both none (0)"
    if not (cell[3] or cell[4]):
        return "node 3 has no input, as genes '1->3' and '0->3' are both none (0)"
    if (cell[5] < 0) != (cell[6] < 0):
        return "genes 'down on 2' and 'down on 3' must be both -1 or both from 0 to 5"
    return ""


def _paired_down(cell: Cell, gene: int, rng: np.random.Generator) -> Cell:
    """Keep the two down-sampling genes both off or both on, whichever of them was set."""
    if gene not in (5, 6) or (cell[5] < 0) == (cell[6] < 0):
        return cell
    other = 11 - gene
    value = -1 if cell[gene] < 0 else int(rng.integers(6))
    return (*cell[:other], value, *cell[other + 1 :])


GENERATOR_SPACE = SearchSpace(
    (
        Gene("up0", 0, 2), Gene("up1", 0, 2),
        *(Gene(edge, 0, 6) for edge in ("0->2", "1->2", "0->3", "1->3", "2->3")),
    ),
    CELLS,
    _generator_problem,
)  # fmt: skip
"""Generators: 147,744 valid cells, 3.2e15 genotypes."""

DISCRIMINATOR_SPACE = SearchSpace(
    (
        Gene("0->1", 1, 6),
        *(Gene(edge, 0, 6) for edge in ("0->2", "1->2", "1->3", "0->3")),
        Gene("down on 2", -1, 5), Gene("down on 3", -1, 5),
    ),
    CELLS,
    _discriminator_problem,
    _paired_down,
)  # fmt: skip
"""Discriminators: 511,488 valid cells."""

GENERATORS: dict[str, Genotype] = {
    "G*": ((1, 1, 1, 0, 2, 3, 1), (1, 1, 0, 1, 3, 0, 5), (0, 1, 0, 3, 0, 0, 3)),
    "adversarialnas": ((1, 1, 1, 0, 3, 3, 1), (1, 1, 0, 1, 3, 3, 3), (0, 1, 0, 3, 3, 0, 3)),
}
"""Published generators: EAGAN's (figure 3) and that of AdversarialNAS (arXiv 1912.02037)."""

DISCRIMINATORS: dict[str, Genotype] = {
    "D_C": ((3, 0, 3, 0, 2, 0, 0), (1, 0, 3, 0, 1, -1, -1), (3, 0, 3, 0, 1, -1, -1)),
    "D_S": ((3, 0, 3, 0, 2, 0, 0), (4, 0, 4, 0, 1, -1, -1), (3, 0, 3, 0, 1, -1, -1)),
    "D_autogan": ((3, 0, 3, 0, 2, 0, 0), (3, 0, 3, 0, 1, -1, -1), (3, 0, 3, 0, 1, -1, -1)),
}
"""Published discriminators: found on CIFAR-10 (figure 4) and STL-10, and the one of AutoGAN."""


def generator_genotype(name: str) -> Genotype:
    """Look up a published generator by name, or read a genotype from text such as ``"1 1 1 0 2 3 1 / ..."``.

    Raises:
        UsageError: Neither; the message lists the names.
    """
    return _looked_up("generator", name, GENERATORS, GENERATOR_SPACE)


def discriminator_genotype(name: str) -> Genotype:
    """Look up a published discriminator by name, or read a genotype from text.

    Raises:
        UsageError: Neither; the message lists the names.
    """
    return _looked_up("discriminator", name, DISCRIMINATORS, DISCRIMINATOR_SPACE)


def _looked_up(kind: str, name: str, known: dict[str, Genotype], space: SearchSpace) -> Genotype:
    if name in known:
        return known[name]
    if "/" in name:
        return space.from_text(name)
    raise unknown(kind, name, known)
