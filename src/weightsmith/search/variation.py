"""New genotypes from surviving ones, none of them seen before in the run."""

import logging
from collections.abc import Sequence

import numpy as np

from weightsmith.search.space import Genotype, SearchSpace

_log = logging.getLogger(__name__)
_TRIES = 50


def first_population(space: SearchSpace, number: int, seen: set[Genotype], rng: np.random.Generator) -> list[Genotype]:
    """Draw different random genotypes and note them in ``seen``; fewer than ``number`` when the space has no more."""
    made: list[Genotype] = []
    while len(made) < number:
        fresh = _fresh_random(space, seen, rng)
        if fresh is None:
            break
        made.append(fresh)
    return made


def offspring(
    space: SearchSpace,
    parents: Sequence[Genotype],
    number: int,
    seen: set[Genotype],
    rng: np.random.Generator,
    *,
    crossover: float = 0.375,
) -> list[Genotype]:
    """Make children that differ from a parent in one gene.

    A child is a crossover with probability ``crossover``, else a mutation. Where parents are equal, no single gene can
    be exchanged, or every child tried is known, a mutation is tried, then a random genotype.

    Args:
        space: The genotypes.
        parents: Drawn from uniformly.
        number: How many children.
        seen: Genotypes that are not made again; the children are added.
        rng: For all draws.
        crossover: Share of crossovers; default 0.3 / (0.3 + 0.5), the paper's probabilities made exclusive.

    Returns:
        The children; fewer than ``number`` when the space has no more.
    """
    made: list[Genotype] = []
    while len(made) < number:
        child = _child(space, parents, seen, rng, crossover)
        if child is None:
            _log.info("the search space has no unseen genotype left; %d of %d children were made", len(made), number)
            break
        seen.add(child)
        made.append(child)
    return made


def _child(
    space: SearchSpace, parents: Sequence[Genotype], seen: set[Genotype], rng: np.random.Generator, crossover: float
) -> Genotype | None:
    for _ in range(_TRIES):
        one = parents[int(rng.integers(len(parents)))]
        child = None
        if rng.random() < crossover:
            child = space.crossover(one, parents[int(rng.integers(len(parents)))], rng)
        child = child if child is not None else space.mutate(one, rng)
        if child not in seen:
            return child
    for _ in range(_TRIES):
        child = space.mutate(parents[int(rng.integers(len(parents)))], rng)
        if child not in seen:
            return child
    return _fresh_random(space, seen, rng)


def _fresh_random(space: SearchSpace, seen: set[Genotype], rng: np.random.Generator) -> Genotype | None:
    # a thousand draws find the last unseen one of a small space, or there is none
    for _ in range(1000):
        drawn = space.sample(rng)
        if drawn not in seen:
            seen.add(drawn)
            return drawn
    return None
