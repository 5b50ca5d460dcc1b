"""How many directions a weight really uses: effective ranks, each by its exact definition."""

import torch
from torch import Tensor

from weightsmith.core.errors import UsageError, unknown
from weightsmith.core.spectrum import SPECTRAL, spectral_rank

KINDS = ("eig", "eig_sum", *SPECTRAL, "numerical")


def effective_rank(w: Tensor, kind: str = "eig", *, batch_dims: int = 0, tol: float | None = None) -> float | Tensor:
    """Measure the effective rank of a weight.

    With eigenvalues ``l`` and singular values ``s`` (and ``p = s / sum(s)``):

    | kind | definition | range |
    |---|---|---|
    | ``eig`` | ``sum(|l|) / (max(|l|) N)``, the paper's measure (arXiv 2310.08513, figure 2) | (0, 1] |
    | ``eig_sum`` | ``sum(|l|) / max(|l|)`` | [1, N] |
    | ``stable`` | ``sum(s^2) / max(s)^2`` | [1, rank] |
    | ``nuclear`` | ``sum(s) / max(s)`` | [1, rank] |
    | ``participation`` | ``sum(s^2)^2 / sum(s^4)`` | [1, rank] |
    | ``participation_s`` | ``sum(s)^2 / sum(s^2)`` | [1, rank] |
    | ``entropy`` | ``exp(-sum(p log p))`` | [1, rank] |
    | ``numerical`` | how many ``s`` are above ``tol * max(s)`` | [1, rank] |

    Args:
        w: ``(out, in)``, or a kernel ``(out, in, ...)`` that is read as ``(out, in * ...)``.
        kind: See above. Eigenvalues need a square matrix.
        batch_dims: How many leading dimensions count matrices.
        tol: Of ``numerical``; ``None``: the larger side times the resolution of ``w``'s dtype.

    Returns:
        A number, or with ``batch_dims`` a float64 tensor of those dimensions. A zero matrix has 0; one that holds NaN
        or infinite values has NaN.

    Raises:
        UsageError: ``kind`` is not known, or needs a square matrix; ``w`` has too few dimensions or no elements.
        TypeError: ``w`` is no floating-point or complex tensor.
    """
    if kind not in KINDS:
        raise unknown("kind", kind, KINDS)
    if not isinstance(w, Tensor) or not (w.is_floating_point() or w.is_complex()) or w.layout is not torch.strided:
        got = f"{w.dtype}, {w.layout}" if isinstance(w, Tensor) else type(w).__name__
        raise TypeError(f"w must be a dense floating-point or complex tensor, got {got}")
    if not 0 <= batch_dims <= w.dim() - 2 or not w.numel() or w.is_meta:
        raise UsageError(
            f"w must have two dimensions beyond batch_dims={batch_dims}, elements and values, "
            f"got shape {tuple(w.shape)} on {w.device}"
        )
    if tol is not None and not 0 <= tol < 1:
        raise UsageError(f"tol must be between 0 and 1, got {tol}")
    device = "cpu" if w.device.type == "mps" else w.device  # no float64 there
    matrices = w.detach().to(device, torch.complex128 if w.is_complex() else torch.float64).flatten(batch_dims + 1)
    if kind.startswith("eig") and matrices.shape[-1] != matrices.shape[-2]:
        shape = tuple(matrices.shape[-2:])
        raise UsageError(f"kind {kind!r} needs a square matrix, got {shape}: choose stable, participation or another")
    finite = matrices.isfinite().flatten(-2).all(-1)
    clean = torch.where(finite[..., None, None], matrices, 0)
    found = _measured(clean, kind, tol if tol is not None else max(clean.shape[-2:]) * torch.finfo(w.dtype).eps)
    found = found.where(finite, found.new_full((), float("nan")))
    return found if batch_dims else found.item()


def _measured(matrices: Tensor, kind: str, tol: float) -> Tensor:
    if kind.startswith("eig"):
        total = spectral_rank(torch.linalg.eigvals(matrices).abs(), "nuclear")
        return total / matrices.shape[-1] if kind == "eig" else total
    s = torch.linalg.svdvals(matrices)
    if kind == "numerical":
        counted: Tensor = (s > tol * s.amax(-1, keepdim=True)).sum(-1).double()
        return counted
    return spectral_rank(s, kind)
