"""From p-values to verdicts: Holm's correction within a family, and what each claim may be called.

A claim is decided when its interval leaves its threshold (*supported*, *refuted*) or lies within the smallest effect
worth having (*no relevant effect*). All three read one interval at one level, so a claim errs at most at that level,
whatever its true effect. Holm (1979) raises the level for the claims that remain when others of the family are decided.

All functions have the claims on the last axis, so that a simulation decides a million families with the code that
decides one.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from weightsmith.lab.stats.intervals import Array, Estimate
from weightsmith.lab.stats.judgement import Verdict
from weightsmith.lab.stats.looks import LEVEL

NAMES: tuple[Verdict, ...] = ("undecided", "supported", "refuted", "no relevant effect")
UNDECIDED, SUPPORTED, REFUTED, IRRELEVANT = range(4)


@dataclass(frozen=True, slots=True)
class Evidence:
    """The tests of a family of claims, claims on the last axis; p-values are already divided by the look's share.

    Attributes:
        threshold: p-value of "the difference equals the threshold"; 1 where the verdict it would give is barred.
        side: Sign of the difference minus the threshold.
        worth: p-value of "the difference is as large as worth, up or down"; 1 where there is no worth.
        plain: Claims whose threshold is 0: there an effect too small to matter is called that, whatever its sign.
    """

    threshold: Array
    side: Array
    worth: Array
    plain: NDArray[np.bool_]


def evidence(threshold: Estimate, above: Estimate, below: Estimate, share: float) -> tuple[Array, Array, Array]:
    """The two p-values at one look, and the side of the threshold.

    Args:
        threshold: By how much the difference exceeds the threshold.
        above: By how much it exceeds ``worth``.
        below: By how much it exceeds ``-worth``.
        share: The look's share of the level.
    """
    high = np.where(above.mean < 0, above.p(), np.inf)
    low = np.where(below.mean > 0, below.p(), np.inf)
    return threshold.p() / share, np.sign(threshold.mean), np.maximum(high, low) / share


def holm(p: Array, level: float = LEVEL) -> tuple[Array, Array]:
    """Holm's step-down correction over the last axis.

    Returns:
        Adjusted p-values, and the level at which each claim is judged: ``level`` divided by the number of claims that
        are not decided before it.
    """
    size = p.shape[-1]
    order = np.argsort(p, -1, kind="stable")
    rank = np.argsort(order, -1, kind="stable")
    ordered = np.take_along_axis(p, order, -1) * (size - np.arange(size))
    adjusted = np.minimum(np.maximum.accumulate(ordered, -1), 1.0)
    first = (adjusted <= level).sum(-1, keepdims=True)  # rank of the first claim that is not decided
    remaining = size - np.minimum(rank, np.minimum(first, size - 1))
    return np.take_along_axis(adjusted, rank, -1), level / remaining


def decide(tests: Evidence, level: float = LEVEL) -> tuple[NDArray[np.int_], Array, Array]:
    """Decide a family of claims.

    Returns:
        Verdict codes, Holm's adjusted p-values, and the level of each claim's interval before the look's share.
    """
    adjusted, levels = holm(np.minimum(np.minimum(tests.threshold, tests.worth), 1.0), level)
    leaves = np.where(tests.side > 0, SUPPORTED, REFUTED)
    leaves = np.where((tests.threshold <= levels) & (tests.side != 0), leaves, UNDECIDED)
    small = tests.worth <= levels
    codes = np.where(small & (tests.plain | (leaves == UNDECIDED)), IRRELEVANT, leaves)
    return codes, adjusted, levels
