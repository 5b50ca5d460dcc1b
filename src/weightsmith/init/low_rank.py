"""Initial weights of a chosen rank at a fixed norm.

A random matrix ``W0`` with singular values ``s`` is cut to its first ``r`` directions and scaled back to its norm:

    W = U[:, :r] diag(s[:r]) V[:r],    W <- W * |W0| / |W|

At fixed Frobenius norm a low rank makes learning *richer* (features change), a high rank *lazier* (the network stays
close to the kernel machine that it was at the start). Mind that the cut also raises the largest singular value: with
``norm="spectral"`` that one is kept, and the order of ranks can vanish or turn round.

Source: Liu et al., "How connectivity structure shapes rich and lazy learning in neural circuits", ICLR 2024,
arXiv 2310.08513, and the authors' code.
"""

import operator
import warnings
from typing import SupportsIndex

import torch
from torch import Tensor

from weightsmith.core.errors import UsageError, WeightsmithWarning
from weightsmith.init._matrix import Base, Norm, check, first_matrix, write


def low_rank_(
    w: Tensor,
    rank: int,
    *,
    base: Base = "normal",
    gain: float = 1.25,
    norm: Norm = "frobenius",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Fill a weight with a matrix of a given rank, at the norm that the matrix of full rank would have.

    The same generator state gives the same ``W0`` for every rank, which is how ranks should be compared.

    Args:
        w: ``(out, in)``, or a kernel ``(out, in, ...)`` that is read as ``(out, in * ...)``; filled in place. Weights
            that stack gates or have their inputs first go through `weightsmith.init.apply_`.
        rank: At least 1; above ``min(out, in)`` it is lowered to that, with a warning.
        base: ``W0``: ``"normal"`` draws it with standard deviation ``gain / sqrt(in)``, ``"current"`` takes the
            values in ``w``; or a tensor of ``w``'s shape.
        gain: See ``base``.
        norm: What of ``W0`` is kept: ``"frobenius"``, ``"spectral"`` (its largest singular value), or ``"none"``.
        generator: For ``"normal"``; ``None``: torch's global one.

    Returns:
        ``w``.

    Raises:
        UsageError: ``rank`` is no integer above 0, ``w`` has fewer than two dimensions, ``W0`` is zero or not finite.
            Nothing has been changed then.
        TypeError: ``w`` is no dense floating-point tensor.

    Example:
        >>> rnn = torch.nn.RNN(3, 100)
        >>> _ = low_rank_(rnn.weight_hh_l0, 10, generator=torch.Generator().manual_seed(0))
        >>> int(torch.linalg.matrix_rank(rnn.weight_hh_l0))
        10
    """
    check(w, norm, gain)
    kept = _rank(rank, w)
    reference = first_matrix(w, base, gain, generator)
    u, s, v = torch.linalg.svd(reference, full_matrices=False)
    return write(w, (u[:, :kept] * s[:kept]) @ v[:kept], reference, norm)


def low_rank_from_(w: Tensor, rank: int, *, norm: Norm = "frobenius") -> Tensor:
    """Cut a weight, for example a pretrained one, to a given rank and scale it back to its norm.

    Args:
        w: As for `low_rank_`.
        rank: As for `low_rank_`.
        norm: As for `low_rank_`; ``"none"`` and ``"spectral"`` give the best approximation of that rank.

    Returns:
        ``w``.

    Raises:
        UsageError: As `low_rank_`.
        TypeError: As `low_rank_`.
    """
    return low_rank_(w, rank, base="current", norm=norm)


def _rank(rank: SupportsIndex, w: Tensor) -> int:
    try:
        found = operator.index(rank)
    except TypeError:
        found = 0
    if found < 1 or isinstance(rank, bool):
        raise UsageError(f"rank must be an integer of at least 1, got {rank!r}")
    most = min(w.shape[0], w.numel() // w.shape[0])
    if found > most:
        warnings.warn(
            f"rank {found} is lowered to {most}, the full rank of shape {tuple(w.shape)}", WeightsmithWarning, 3
        )
    return min(found, most)
