"""How far a network has moved between two moments: alignments near 1 are lazy learning, near 0 rich learning.

``cos(A, B) = <A, B> / (|A| |B|)`` of two Gram matrices, whether of hidden activity or of the tangent kernel. All sums
are in float64. Where one of the two is zero there is no angle: the result is NaN, with a warning.

Source: Liu et al., arXiv 2310.08513, and the authors' code.
"""

import math
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from weightsmith.core.errors import UsageError, WeightsmithWarning


def kernel_alignment(before: Tensor, after: Tensor, *, what: str = "kernel") -> float:
    """Return ``<K0, K1> / (|K0| |K1|)`` of two kernels of the same inputs.

    Args:
        before: ``(n, n)``.
        after: ``(n, n)``.
        what: How warnings call them, for example a layer's name.

    Returns:
        At most 1; NaN, with a warning, if one is zero or not finite.

    Raises:
        UsageError: The shapes differ.
    """
    _same_shape("after", before, after)
    return ratio(_product(before, after), _product(before, before), _product(after, after), what)


def representation_alignment(
    before: Tensor, after: Tensor, *, centered: bool = False, what: str = "representation"
) -> float:
    """Return the alignment of ``R = H H^T``, the similarities of samples, before and after.

    Args:
        before: Activity ``(N, ...)``; further dimensions are units.
        after: The same for the same samples; it may have other units.
        centered: Subtract each unit's mean over samples first: linear CKA. The paper does not.
        what: How warnings call them.

    Returns:
        From 0 to 1; NaN, with a warning, if an activity is zero or not finite: all units of a dead layer are silent.

    Raises:
        UsageError: The numbers of samples differ.
    """
    if before.dim() < 1 or after.dim() < 1 or len(before) != len(after):
        raise UsageError(
            f"after must be activity of the same samples, got shapes {tuple(before.shape)} and {tuple(after.shape)}"
        )
    if not len(before):
        raise UsageError("before holds no samples")
    h0, h1 = (h.detach().reshape(len(h), -1).to(_double(h)) for h in (before, after))
    if centered:
        h0, h1 = h0 - h0.mean(0), h1 - h1.mean(0)
    scales = [float(h.abs().amax()) if h.numel() else 0.0 for h in (h0, h1)]
    h0, h1 = (h / scale if 0 < scale < math.inf else h for h, scale in zip((h0, h1), scales, strict=True))
    # <A A^T, B B^T> = |A^T B|^2: the smaller of the two ways
    if max(h0.shape[1], h1.shape[1]) < len(h0):
        return ratio(_squares(h0.mH @ h1), _squares(h0.mH @ h0), _squares(h1.mH @ h1), what)
    return kernel_alignment(h0 @ h0.mH, h1 @ h1.mH, what=what)


def weight_change(
    before: Tensor | Mapping[str, Tensor], after: Tensor | Mapping[str, Tensor], *, relative: bool = False
) -> float:
    """Return ``|W1 - W0|``, the Frobenius norm of what has changed.

    Args:
        before: A weight, or several by name (such as a state dict); of several the norm is over all together.
        after: The same later.
        relative: Divide by ``|W0|``.

    Returns:
        At least 0; NaN if values are not finite, or if ``relative`` and only ``before`` is zero.

    Raises:
        UsageError: Names or shapes differ.
    """
    zero, one = (w if isinstance(w, Mapping) else {"weight": w} for w in (before, after))
    if zero.keys() != one.keys():
        odd = sorted(zero.keys() ^ one.keys())
        raise UsageError(f"after must have the same weights as before; only one of them has {', '.join(odd[:5])}")
    change = size = 0.0
    for name, w in zero.items():
        _same_shape(name, w, one[name])
        if not (w.is_floating_point() or w.is_complex()):
            continue
        w0 = w.detach().to(_double(w))
        change += _squares(one[name].detach().to(w0) - w0)
        size += _squares(w0)
    if not relative:
        return math.sqrt(change)
    if not change:
        return 0.0
    return math.sqrt(change / size) if size else math.nan


def sign_similarity(before: Tensor, after: Tensor) -> float:
    """Return the share of activities whose sign is the same, zero being a sign of its own.

    With ReLU it counts units that are active, or silent, both times. It says nothing about the task.

    Args:
        before: Activity of any shape.
        after: The same for the same inputs.

    Returns:
        From 0 to 1; NaN if there are values that are NaN.

    Raises:
        UsageError: The shapes differ.
    """
    _same_shape("after", before, after)
    if before.isnan().any() or after.isnan().any() or not before.numel():
        return math.nan
    return (torch.sign(before) == torch.sign(after.to(before.device))).double().mean().item()


def kernel_target_alignment(kernel: Tensor, targets: Tensor, *, by: str = "norm") -> float:
    """Return ``y^T K y / (|y|^2 |K|)``, how much of the kernel points at the targets.

    Args:
        kernel: ``(n, n)``.
        targets: As many numbers as the kernel has rows, in their order: sample first, then output.
        by: ``"norm"``: the Frobenius norm of ``K``; ``"trace"``: its trace.

    Returns:
        NaN, with a warning, if kernel or targets are zero.

    Raises:
        UsageError: The number of targets, or ``by``, does not fit.
    """
    if by not in ("norm", "trace"):
        raise UsageError(f"by must be norm or trace, got {by!r}")
    k = kernel.detach().double()
    y = targets.detach().to(k).flatten()
    if k.dim() != 2 or k.shape != (len(y), len(y)):
        raise UsageError(f"targets must be one number per row of the kernel {tuple(k.shape)}, got {len(y)}")
    size = math.sqrt(_squares(k)) if by == "norm" else k.trace().item()
    bottom = y.square().sum().item() * size
    if not (bottom and math.isfinite(bottom)):
        _warn("targets and kernel", "zero or not finite")
        return math.nan
    return (y @ k @ y).item() / bottom


def ratio(product: float, first: float, second: float, what: str) -> float:
    """A cosine from an inner product and two squared norms; NaN with a warning where there is none."""
    if not all(map(math.isfinite, (product, first, second))):
        _warn(what, "not finite")
        return math.nan
    if first <= 0 or second <= 0:
        _warn(what, "zero before and after" if first <= 0 and second <= 0 else "zero before or after")
        return math.nan
    return product / (math.sqrt(first) * math.sqrt(second))


def _warn(what: str, why: str) -> None:
    warnings.warn(f"the alignment of {what} is NaN: it is {why}", WeightsmithWarning, stacklevel=4)


def _same_shape(name: str, one: Tensor, other: Tensor) -> None:
    if one.shape != other.shape:
        raise UsageError(f"{name} must have the shape that it had before, {tuple(one.shape)}, got {tuple(other.shape)}")


def _product(one: Tensor, other: Tensor) -> float:
    dtype = _double(one) if one.is_complex() else _double(other)
    return torch.vdot(*(t.detach().to(one.device, dtype).flatten() for t in (one, other))).real.item()


def _squares(t: Tensor) -> float:
    return t.abs().square().sum().item()


def _double(t: Tensor) -> torch.dtype:
    return torch.complex128 if t.is_complex() else torch.float64
