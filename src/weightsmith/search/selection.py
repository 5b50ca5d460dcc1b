"""Which individuals survive: non-dominated sorting and crowding from pymoo, and the authors' variant.

``j`` dominates ``i`` when it is nowhere worse and somewhere better; rank 0 is dominated by nobody, rank 1 by rank 0
alone, and so on (arXiv 2111.15097, equation 11; NSGA-II: Deb et al., 2002).
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from weightsmith.core.errors import UsageError, require

Objectives = npt.NDArray[np.float64]
WORST = 1e9
"""What a failed individual gets for every objective: a NaN would change the ranks of others."""

_TINY = 1e-10


def ranks(objectives: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Rank of every individual.

    Args:
        objectives: ``(N, M)``, smaller is better. Rows with a value that is not finite count as the worst.

    Returns:
        ``(N,)``, 0 for the Pareto front.

    Raises:
        UsageError: There are no individuals or no objectives.
    """
    F = finite(objectives)
    found = np.zeros(len(F), dtype=np.int64)
    for rank, front in enumerate(_fronts(F)):
        found[front] = rank
    return found


def crowding(objectives: npt.ArrayLike) -> Objectives:
    """Crowding distance of every individual within its rank, ``(N,)``; infinite at the ends of a front."""
    F = finite(objectives)
    return np.array(
        [individual.get("crowding") for individual in _ranked(F, len(F), np.random.default_rng(0))[0]], dtype=np.float64
    )


def nsga2(objectives: npt.ArrayLike, keep: int, rng: np.random.Generator) -> list[int]:
    """Indices of the survivors of NSGA-II: whole ranks, the last one cut by crowding distance.

    Args:
        objectives: ``(N, M)``, smaller is better.
        keep: How many survive.
        rng: Decides among equal crowding distances.
    """
    return [int(index) for index in _ranked(finite(objectives), keep, rng)[1]]


def cars(
    inception: npt.ArrayLike, distance: npt.ArrayLike, size: npt.ArrayLike, keep: int, rng: np.random.Generator
) -> list[int]:
    """Survivors of the released code of EAGAN, for comparison; it protects the worst distance.

    For the distance and for the size, individuals are sorted twice: by ``(1 / IS, value)`` and by ``(1 / IS, 1 /
    value)``. Stage by stage the union of the four fronts is taken, whole while it fits, then a random part of what is
    new in it.

    Args:
        inception: ``(N,)`` Inception Scores.
        distance: ``(N,)`` Fréchet distances.
        size: ``(N,)`` numbers of parameters.
        keep: How many survive.
        rng: For the random part.
    """
    inverse = 1 / (np.asarray(inception, dtype=np.float64) + _TINY)
    sorts = []
    for values in (np.asarray(distance, dtype=np.float64), np.asarray(size, dtype=np.float64)):
        sorts += [_fronts(finite(np.stack([inverse, other], 1))) for other in (values, 1 / (values + _TINY))]
    selected: list[int] = []
    for stage in range(max(map(len, sorts))):
        union = sorted({int(index) for fronts in sorts if stage < len(fronts) for index in fronts[stage]})
        new = [index for index in union if index not in selected]
        if len(selected) + len(union) > keep:
            room = min(keep - len(selected), len(new))
            new = [new[place] for place in rng.choice(len(new), room, replace=False)] if room else []
        selected += new
    return selected


def finite(objectives: npt.ArrayLike) -> Objectives:
    """Check objectives, ``(N, M)``, and put the worst value into all columns of rows that are not finite."""
    F = np.array(objectives, dtype=np.float64)
    if F.ndim != 2 or not F.size:
        raise UsageError(f"objectives must be (individuals, objectives) and not empty, got shape {F.shape}")
    F[~np.isfinite(F).all(axis=1)] = WORST
    return F


def _fronts(F: Objectives) -> list[npt.NDArray[np.int64]]:
    module = require("pymoo.util.nds.non_dominated_sorting", extra="search", purpose="evolutionary search")
    return list(module.NonDominatedSorting().do(F))


def _ranked(F: Objectives, keep: int, rng: np.random.Generator) -> tuple[Any, list[Any]]:
    purpose = "evolutionary search"
    survival = require("pymoo.operators.survival.rank_and_crowding", extra="search", purpose=purpose).RankAndCrowding()
    population = require("pymoo.core.population", extra="search", purpose=purpose).Population.new(F=F)
    problem = require("pymoo.core.problem", extra="search", purpose=purpose).Problem(n_var=1, n_obj=F.shape[1])
    return population, survival.do(problem, population, n_survive=keep, random_state=rng, return_indices=True)
