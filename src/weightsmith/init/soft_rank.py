"""Initial weights whose effective rank is any number: a rank that can be turned continuously.

The singular vectors of a random matrix are kept, its singular values replaced by ``s_i = exp(-i / t)``, where ``t`` is
found such that the effective rank is the wanted one; then the matrix is scaled back to its norm. Every measure rises
with ``t``, from 1 to the full rank. This is ours, not the paper's (arXiv 2310.08513), which cuts.
"""

import math

import torch
from torch import Tensor

from weightsmith.core.errors import UsageError
from weightsmith.core.spectrum import spectral_rank
from weightsmith.init._matrix import Base, Norm, check, first_matrix, write

_LOWEST, _HIGHEST, _HALVINGS = -8.0, 20.0, 100


def soft_rank_(
    w: Tensor,
    effective_rank: float,
    kind: str = "participation",
    *,
    base: Base = "normal",
    gain: float = 1.25,
    norm: Norm = "frobenius",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Fill a weight with a matrix of a given effective rank, at the norm that ``W0`` has.

    Args:
        w: As for `weightsmith.init.low_rank_`.
        effective_rank: From 1 to ``min(out, in)``; the largest gives equal singular values.
        kind: How it is measured: ``"stable"``, ``"nuclear"``, ``"participation"``, ``"participation_s"`` or
            ``"entropy"``, as `weightsmith.diagnose.effective_rank` defines them.
        base: As for `weightsmith.init.low_rank_`; gives the singular vectors and the norm.
        gain: As there.
        norm: As there.
        generator: As there.

    Returns:
        ``w``.

    Raises:
        UsageError: ``effective_rank`` is outside its range, ``kind`` is not known, or as for `low_rank_`.
        TypeError: ``w`` is no dense floating-point tensor.
    """
    check(w, norm, gain)
    reference = first_matrix(w, base, gain, generator)
    size = min(reference.shape)
    spectral_rank(torch.ones(1, dtype=torch.float64), kind)
    if not 1 <= effective_rank <= size:
        raise UsageError(
            f"effective_rank must be between 1 and {size} for shape {tuple(w.shape)}, got {effective_rank}"
        )
    u, _, v = torch.linalg.svd(reference, full_matrices=False)
    s = _spectrum(size, float(effective_rank), kind).to(u.device)
    return write(w, (u * s) @ v, reference, norm)


def _spectrum(size: int, target: float, kind: str) -> Tensor:
    index = torch.arange(size, dtype=torch.float64)
    if target == size:
        return torch.ones_like(index)
    low, high = _LOWEST, _HIGHEST
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        below = float(spectral_rank((-index / math.exp(middle)).exp(), kind)) < target
        low, high = (middle, high) if below else (low, middle)
    return (-index / math.exp((low + high) / 2)).exp()
