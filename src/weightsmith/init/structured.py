"""Initial recurrent weights with the structure of nervous systems, at the norm of a random matrix.

Rows are targets and columns sources, ``h = W h_before``: column ``j`` holds what unit ``j`` sends out. The structure is
there at the start only; training may change it. The paper (arXiv 2310.08513) starts from such connectivity too; its
recipes were not found, so these are ours.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from weightsmith.core.errors import UsageError
from weightsmith.init._matrix import Norm, check, first_matrix, normal, square, write


def dale_(
    w: Tensor,
    frac_exc: float = 0.8,
    balanced: bool = True,
    *,
    gain: float = 1.25,
    norm: Norm = "frobenius",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Give every unit one sign for all that it sends out (Dale's law).

    The first ``round(frac_exc * in)`` columns are excitatory, the others inhibitory; magnitudes are those of a normal
    distribution.

    Args:
        w: ``(out, in)``; filled in place.
        frac_exc: Share of excitatory units, in [0, 1].
        balanced: Multiply inhibitory weights by ``frac_exc / (1 - frac_exc)``, with the share that rounding has left,
            so that the sum of a row is 0 on average; this needs units of both signs.
        gain: Standard deviation of the random matrix is ``gain / sqrt(in)``.
        norm: What of it is kept: ``"frobenius"``, ``"spectral"`` or ``"none"``.
        generator: ``None``: torch's global one.

    Returns:
        ``w``.

    Raises:
        UsageError: An argument is out of range, or ``w`` is no matrix.
        TypeError: ``w`` is no dense floating-point tensor.
    """
    check(w, norm, gain)
    if not 0 <= frac_exc <= 1:
        raise UsageError(f"frac_exc must be between 0 and 1, got {frac_exc}")
    columns = w.numel() // w.shape[0]
    excitatory = round(frac_exc * columns)
    if balanced and not 0 < excitatory < columns:
        raise UsageError(
            f"frac_exc={frac_exc} leaves {excitatory} of {columns} units excitatory: balanced=True needs both kinds"
        )
    reference = first_matrix(w, "normal", gain, generator)
    matrix = reference.abs()
    matrix[:, excitatory:] *= -(excitatory / (columns - excitatory)) if balanced else -1.0
    return write(w, matrix, reference, norm)


def block_(
    w: Tensor,
    sizes: Sequence[int],
    mean: Any,
    std: Any,
    *,
    gain: float = 1.25,
    norm: Norm = "frobenius",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw weights whose mean and spread depend on the types of the two units.

    A weight from type ``a`` to type ``b`` is drawn from ``N(mean[b, a], std[b, a]^2) / sqrt(H)``.

    Args:
        w: ``(H, H)``; filled in place.
        sizes: Number of units of each type, in order; their sum is ``H``.
        mean: ``(types, types)``, target type first; a tensor, array, nested list or number.
        std: The same for standard deviations, of at least 0.
        gain: As for `dale_`; with a norm to keep it alone sets the scale.
        norm: As for `dale_`.
        generator: As for `dale_`.

    Returns:
        ``w``.

    Raises:
        UsageError: ``w`` is not square, sizes or shapes do not fit, or all weights would be 0.
        TypeError: ``w`` is no dense floating-point tensor.
    """
    check(w, norm, gain)
    units, counts = square(w, "block_"), [int(size) for size in sizes]
    if min(counts, default=0) < 1 or sum(counts) != units:
        raise UsageError(f"sizes must be numbers above 0 with the sum {units}, got {list(sizes)}")
    types = len(counts)
    tables = []
    for name, value in (("mean", mean), ("std", std)):
        table = torch.as_tensor(value, dtype=torch.float64)
        if table.dim() and tuple(table.shape) != (types, types):
            raise UsageError(f"{name} must have shape ({types}, {types}), got {tuple(table.shape)}")
        if not table.isfinite().all() or (name == "std" and table.min() < 0):
            raise UsageError(f"{name} must be finite{' and at least 0' if name == 'std' else ''}, got {value}")
        tables.append(table.expand(types, types))
    reference = first_matrix(w, "normal", gain, generator)
    repeats = torch.tensor(counts)
    means, deviations = (
        table.repeat_interleave(repeats, 0).repeat_interleave(repeats, 1).to(reference) for table in tables
    )
    noise = reference / gain  # standard normal over sqrt(H)
    return write(w, means / math.sqrt(units) + deviations * noise, reference, norm)


def chain_(
    w: Tensor,
    chain: float,
    conv: float,
    div: float,
    *,
    gain: float = 1.25,
    norm: Norm = "frobenius",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw weights with given motifs: chains of two, and weights that share their target or their source.

    ``W_ij = (sqrt(1 - conv - div) xi_ij + sqrt(conv) a_i + sqrt(div) b_j) gain / sqrt(H)`` with ``corr(a_j, b_j) =
    chain / sqrt(conv div)``. In units of ``gain^2 / H`` the mean of ``W_ij W_jk`` is then ``chain``, the covariance of
    weights that share the target ``conv``, the source ``div``. The part of rank two brings outlying eigenvalues.

    Args:
        w: ``(H, H)``; filled in place.
        chain: Between ``-sqrt(conv * div)`` and ``sqrt(conv * div)``.
        conv: At least 0.
        div: At least 0; ``conv + div`` at most 1.
        gain: See above.
        norm: As for `dale_`. The statistics above are exact with ``"none"``.
        generator: As for `dale_`.

    Returns:
        ``w``.

    Raises:
        UsageError: ``w`` is not square, or there are no weights with such motifs.
        TypeError: ``w`` is no dense floating-point tensor.
    """
    check(w, norm, gain)
    units = square(w, "chain_")
    if not (conv >= 0 and div >= 0 and conv + div <= 1):
        raise UsageError(f"conv and div must be at least 0 with a sum of at most 1, got {conv} and {div}")
    most = math.sqrt(conv * div)
    if not abs(chain) <= most * (1 + 1e-12):
        raise UsageError(f"chain must be between -{most:.6g} and {most:.6g}, which is sqrt(conv * div), got {chain}")
    rho = max(-1.0, min(1.0, chain / most)) if most else 0.0
    reference = first_matrix(w, "normal", gain, generator)
    a, other = normal((2, units), w, generator)
    b = rho * a + math.sqrt(1 - rho**2) * other
    parts = (math.sqrt(conv) * a[:, None] + math.sqrt(div) * b) * (gain / math.sqrt(units))
    return write(w, math.sqrt(max(0.0, 1 - conv - div)) * reference + parts, reference, norm)


def from_matrix_(
    w: Tensor,
    matrix: Any,
    *,
    gain: float = 1.25,
    norm: Norm = "frobenius",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Fill a weight with a measured matrix, such as a connectome, at the norm of a random one.

    From a larger matrix units are drawn at random, in their order; if both are square, the same for rows and columns.

    Args:
        w: ``(out, in)``; filled in place.
        matrix: ``(rows, columns)`` of at least that size: a tensor, array or nested list. Targets are rows.
        gain: As for `dale_`; with a norm to keep.
        norm: As for `dale_`; ``"none"`` leaves the values as they are.
        generator: As for `dale_`.

    Returns:
        ``w``.

    Raises:
        UsageError: ``matrix`` is too small, not finite, or zero.
        TypeError: ``w`` is no dense floating-point tensor.
    """
    check(w, norm, gain)
    source = torch.as_tensor(matrix).detach()
    rows, columns = w.shape[0], w.numel() // w.shape[0]
    if source.dim() != 2 or source.shape[0] < rows or source.shape[1] < columns:
        raise UsageError(f"matrix must be at least ({rows}, {columns}), got {tuple(source.shape)}")
    reference = first_matrix(w, "normal", gain, generator)
    source = source.to(reference)
    if not source.isfinite().all():
        raise UsageError("matrix holds NaN or infinite values: nothing has been changed")
    kept = _some(source.shape[0], rows, generator)
    same_units = source.shape[0] == source.shape[1] and rows == columns
    across = kept if same_units else _some(source.shape[1], columns, generator)
    return write(w, source[kept.to(source.device)][:, across.to(source.device)], reference, norm)


def _some(available: int, wanted: int, generator: torch.Generator | None) -> Tensor:
    if available == wanted:
        return torch.arange(wanted)
    device = generator.device if generator is not None else "cpu"
    return torch.randperm(available, generator=generator, device=device)[:wanted].sort().values.cpu()
