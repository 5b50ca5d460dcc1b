"""Effective ranks: what a list of singular values says of how many directions a matrix really uses."""

from collections.abc import Callable, Mapping

from torch import Tensor

from weightsmith.core.errors import unknown


def _stable(s: Tensor) -> Tensor:
    return s.square().sum(-1) / s.amax(-1).square()


def _nuclear(s: Tensor) -> Tensor:
    return s.sum(-1) / s.amax(-1)


def _participation(s: Tensor) -> Tensor:
    return s.square().sum(-1).square() / s.pow(4).sum(-1)


def _participation_s(s: Tensor) -> Tensor:
    return s.sum(-1).square() / s.square().sum(-1)


def _entropy(s: Tensor) -> Tensor:
    p = s / s.sum(-1, keepdim=True)
    return (-p * p.clamp_min(1e-300).log()).sum(-1).exp()  # p = 0 adds nothing: the limit of p log p


SPECTRAL: Mapping[str, Callable[[Tensor], Tensor]] = {
    "stable": _stable,
    "nuclear": _nuclear,
    "participation": _participation,
    "participation_s": _participation_s,
    "entropy": _entropy,
}
"""Effective ranks of singular values ``(..., m)``, all in [1, m]: see `spectral_rank`."""


def spectral_rank(s: Tensor, kind: str) -> Tensor:
    """Return the effective rank of singular values.

    With ``p = s / sum(s)``: ``stable`` is ``sum(s^2) / max(s)^2``, ``nuclear`` ``sum(s) / max(s)``, ``participation``
    ``sum(s^2)^2 / sum(s^4)``, ``participation_s`` ``sum(s)^2 / sum(s^2)`` and ``entropy`` ``exp(-sum(p log p))``.

    Args:
        s: Singular values, float64, ``(..., m)``.
        kind: One of `SPECTRAL`.

    Returns:
        ``(...)``; 0 where all values are 0, NaN where one is.

    Raises:
        UsageError: ``kind`` is not known.
    """
    if kind not in SPECTRAL:
        raise unknown("kind", kind, SPECTRAL)
    largest = s.amax(-1, keepdim=True)
    # the measures do not depend on scale; without it the fourth powers of small values would vanish
    scaled = s / largest.where(largest != 0, largest.new_ones(()))
    return SPECTRAL[kind](scaled).where(largest.squeeze(-1) != 0, s.new_zeros(()))
