"""StatsQ: quantize weights with a scale that is measured from them, not learned.

A learned scale moves at every step and carries weights over rounding thresholds with it. StatsQ recomputes the scale
from the weights themselves, and puts the levels on half-integers, so that no weight becomes zero.

    s  = 2 * mean |W|                                per output row, no gradient
    k  = clamp(round(W / (s / n) - 1/2), -n, n - 1)  n = 2^(bits-1); halves go to the even integer
    W^ = (s / n) * (k + 1/2)                         dL/dW = dL/dW^ for every entry, also the clipped ones

Source: "Oscillation-free Quantization for Low-bit Vision Transformers", Shih-Yang Liu, Zechun Liu, Kwang-Ting Cheng,
ICML 2023, arXiv 2302.02210; details as in the authors' code, nbasyl/OFQ.
"""

from typing import Any

import torch
from torch import Tensor

from weightsmith.core.errors import UsageError
from weightsmith.quantize.grid import check_bits
from weightsmith.quantize.in_training.cache import VersionCache
from weightsmith.quantize.in_training.weight_quantizer import WeightQuantizer, threshold_distance

_TINY = 1e-30  # scale of a row of zeros


def statsq(w: Tensor, bits: int, keep_axis: int = 0) -> Tensor:
    """Quantize a tensor to ``2^bits`` half-integer levels; the gradient passes unchanged.

    Args:
        w: Any shape, floating point; half precision is computed in float32.
        bits: Bit width, 1 to 8 (the paper: 2 to 4). With 1 bit the levels are ``-mean|w|`` and ``mean|w|``.
        keep_axis: The axis whose entries each have a scale of their own.

    Returns:
        Exact grid values, shaped like ``w``. A row that is not finite becomes NaN, alone.

    Raises:
        UsageError: ``bits`` or ``keep_axis`` is out of range.

    Example:
        >>> statsq(torch.tensor([[0.1, -0.4, 0.9, -2.6]]), bits=2)
        tensor([[ 0.5000, -0.5000,  0.5000, -1.5000]])
    """
    check_bits(bits)
    out: Tensor = _StatsQ.apply(w, bits, _axis(w, keep_axis), None, None)  # type: ignore[no-untyped-call]
    return out


@torch.no_grad()
def statsq_codes(w: Tensor, bits: int, keep_axis: int = 0) -> tuple[Tensor, Tensor]:
    """Integer codes and steps of ``statsq``: ``W^ = step * (code + 1/2)``.

    Args:
        w: Any shape, floating point.
        bits: Bit width, 1 to 8.
        keep_axis: The axis whose entries each have a step of their own.

    Returns:
        Codes, int8, shaped like ``w``; steps, in float32 at least, broadcastable to ``w``.
    """
    check_bits(bits)
    codes, step = _grid(w, bits, _axis(w, keep_axis))
    return codes.to(torch.int8), step


class StatsQ(WeightQuantizer):
    """The parametrization ``W -> statsq(W)``: stateless, the same in training and evaluation.

    Args:
        bits: Bit width, 1 to 8.
        axis: The axis whose entries each have a scale.
        first_row: Rows before this one are passed on as they are.

    Attributes:
        boundary: Gradients of entries farther than this from a threshold are dropped; ``None``: of none.
    """

    offset = 0.5

    def __init__(self, bits: int, axis: int = 0, first_row: int = 0) -> None:
        super().__init__(bits, axis, first_row)
        self.boundary: float | None = None
        self._cache = VersionCache()

    def quantize(self, w: Tensor) -> Tensor:
        """Return `statsq` of ``w``; within ``cached_weights`` it is made once."""
        axis = _axis(w, self.axis)
        kept = self._cache(lambda: _forward(w.detach(), self.bits, axis), w)
        out: Tensor = _StatsQ.apply(w, self.bits, axis, self.boundary, kept)  # type: ignore[no-untyped-call]
        return out

    def step(self, w: Tensor) -> Tensor:
        """Return ``s / n``."""
        return _step(_size(w.detach()), self.bits, self.axis)


class _StatsQ(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, bits: int, axis: int, boundary: float | None, value: Tensor | None) -> Tensor:
        ctx.masked = boundary is not None
        if boundary is not None:
            ctx.save_for_backward(threshold_distance(w, _step(_size(w), bits, axis), bits, offset=0.5) <= boundary)
        return _forward(w, bits, axis) if value is None else value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0] * ctx.saved_tensors[0] if ctx.masked else grads[0]
        return grad, None, None, None, None


def _forward(w: Tensor, bits: int, axis: int) -> Tensor:
    codes, step = _grid(w, bits, axis)
    return codes.add_(0.5).mul_(step).to(w.dtype)


def _grid(w: Tensor, bits: int, axis: int) -> tuple[Tensor, Tensor]:
    half, size = 1 << (bits - 1), _size(w)
    step = _step(size, bits, axis)
    # in the memory of the sizes: for a small weight, fetching more costs as much as the arithmetic
    return torch.div(w, step, out=size).sub_(0.5).round_().clamp_(-half, half - 1), step


def _size(w: Tensor) -> Tensor:
    return w.to(torch.promote_types(w.dtype, torch.float32)).abs()


def _step(size: Tensor, bits: int, axis: int) -> Tensor:
    # in one order of summation, whatever the strides are
    rows = (size.movedim(axis, 0) if axis else size).reshape(size.shape[axis], -1).contiguous()
    step = rows.mean(1).mul_(2 / (1 << (bits - 1))).clamp_min_(_TINY)
    return step.view([-1 if i == axis else 1 for i in range(size.dim())])


def _axis(w: Tensor, axis: int) -> int:
    if not -w.dim() <= axis < w.dim():
        raise UsageError(f"keep_axis must be an axis of a tensor of shape {tuple(w.shape)}, got {axis}")
    return axis % w.dim()
