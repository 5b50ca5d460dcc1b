"""What the verbs share: checks, the first random matrix, norms, and writing into any memory layout."""

import math
from typing import Literal

import torch
from torch import Tensor

from weightsmith.core.errors import UsageError, unknown

Norm = Literal["frobenius", "spectral", "none"]
Base = Tensor | Literal["normal", "current"]

NORMS = ("frobenius", "spectral", "none")


def check(w: Tensor, norm: Norm, gain: float) -> None:
    """Refuse what is no matrix, or has no values to write."""
    if not isinstance(w, Tensor):
        raise TypeError(f"w must be a tensor, got {type(w).__name__}; for a module use init.apply_")
    if w.is_meta:
        raise UsageError("w has no values yet, as it is on the meta device: materialize the model first")
    if not w.is_floating_point() or w.layout is not torch.strided or w.element_size() < 2 or hasattr(w, "placements"):
        raise TypeError(
            f"w must be a dense, unsharded floating-point tensor, got {type(w).__name__} of {w.dtype}, {w.layout}"
        )
    if w.dim() < 2:
        raise UsageError(f"w must have two dimensions at least, got shape {tuple(w.shape)}: a vector has no rank")
    if not w.numel():
        raise UsageError(f"w must have elements, got shape {tuple(w.shape)}")
    if norm not in NORMS:
        raise unknown("norm", str(norm), NORMS)
    if not (math.isfinite(gain) and gain > 0):
        raise UsageError(f"gain must be a number above 0, got {gain}")


def first_matrix(w: Tensor, base: Base, gain: float, generator: torch.Generator | None) -> Tensor:
    """The matrix that is given a structure, ``(rows, columns)`` in float64."""
    rows = w.shape[0]
    columns = w.numel() // rows
    if isinstance(base, Tensor):
        if tuple(base.shape) not in (tuple(w.shape), (rows, columns)):
            raise UsageError(f"base must have the shape of w, {tuple(w.shape)}, got {tuple(base.shape)}")
        found = base
    elif base == "current":
        found = w
    elif base == "normal":
        return normal((rows, columns), w, generator) * (gain / math.sqrt(columns))
    else:
        raise unknown("base", str(base), ["normal", "current", "a tensor"])
    matrix = found.detach().to(device=_device(w), dtype=torch.float64).reshape(rows, columns)
    if not matrix.isfinite().all():
        raise UsageError(f"base holds NaN or infinite values: {_unchanged}")
    return matrix


def normal(shape: tuple[int, ...], w: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal numbers in float64, the same ones whatever dtype ``w`` has."""
    device = generator.device if generator is not None else _device(w)
    return torch.randn(shape, generator=generator, device=device, dtype=torch.float64).to(_device(w))


def write(w: Tensor, matrix: Tensor, reference: Tensor, norm: Norm) -> Tensor:
    """Scale a matrix to the norm of ``reference`` and write it into ``w``."""
    if norm != "none":
        order: str | int = "fro" if norm == "frobenius" else 2
        wanted, found = (float(torch.linalg.matrix_norm(m, order)) for m in (reference, matrix))
        if not (math.isfinite(wanted) and wanted > 0 and found > 0):
            raise UsageError(f"norm={norm!r} cannot be kept: it is {wanted:g} of the base and {found:g} of the result")
        matrix = matrix * (wanted / found)
    if not matrix.abs().sum() > 0:
        raise UsageError(f"the result would be all zeros: {_unchanged}")
    if float(matrix.abs().max()) > torch.finfo(w.dtype).max:
        raise UsageError(f"the result does not fit into {w.dtype}: {_unchanged}")
    with torch.no_grad():
        w.copy_(matrix.reshape(w.shape))
    return w


def square(w: Tensor, verb: str) -> int:
    """Size of a square matrix, whose rows and columns are the same units."""
    if w.dim() != 2 or w.shape[0] != w.shape[1]:
        raise UsageError(
            f"{verb} needs a square matrix, whose rows and columns are the same units, got {tuple(w.shape)}"
        )
    return w.shape[0]


def _device(w: Tensor) -> torch.device:
    return torch.device("cpu") if w.device.type == "mps" else w.device  # no float64 there


_unchanged = "nothing has been changed"
