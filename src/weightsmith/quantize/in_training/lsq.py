"""LSQ: quantize with a learned step, for activations (with two learned shifts per channel) and for weights.

    x1 = x + b                                 b, a: learned shifts per channel, start at 0
    q  = round(clamp(x1 / s, Qn, Qp))          signed: -2^(bits-1) .. 2^(bits-1) - 1, unsigned: 0 .. 2^bits - 1
    x^ = q * s + a
    dL/dx = g where Qn <= x1 / s <= Qp, else 0
    dL/ds = sum(g * (q - x1 / s inside, q outside)) / sqrt(Qp * M),  M entries share the step s

Source: "Learned Step Size Quantization", ICLR 2020, arXiv 1902.08153; its start, shifts and one step per token as in
the authors' code of arXiv 2302.02210, nbasyl/OFQ.
"""

import math
import warnings
from typing import Any, cast

import torch
from torch import Tensor, nn

from weightsmith.core.errors import UsageError, WeightsmithWarning
from weightsmith.core.rounding import integer_range
from weightsmith.quantize.grid import check_bits
from weightsmith.quantize.in_training.weight_quantizer import WeightQuantizer

_FLOOR = 1e-5  # steps below this count as this


def lsq(
    x: Tensor,
    scale: Tensor,
    bits: int,
    *,
    signed: bool = True,
    axis: int | None = None,
    before: Tensor | None = None,
    after: Tensor | None = None,
) -> Tensor:
    """Quantize a tensor with a learned step.

    Args:
        x: Any shape, floating point; half precision is computed in float32.
        scale: ``(x.shape[axis],)``, or one entry when ``axis`` is ``None``; below 1e-5 it counts as 1e-5.
        bits: Bit width, 1 to 8.
        signed: Two's-complement codes, else ``0 .. 2^bits - 1``.
        axis: The axis whose entries each have a step; ``None``: one for all.
        before: Added first; broadcasts against the last axes.
        after: Added last; likewise.

    Returns:
        Shaped like ``x``.

    Raises:
        UsageError: ``bits`` is out of range, or ``scale`` has another length than the axis.
    """
    check_bits(bits)
    wanted = 1 if axis is None else x.shape[axis]
    if scale.numel() != wanted:
        raise UsageError(
            f"scale must have {wanted} entries for a tensor of shape {tuple(x.shape)}, got {scale.numel()}"
        )
    low, high = integer_range(bits, signed=signed)
    out: Tensor = _LSQ.apply(x, scale, before, after, low, high, axis)  # type: ignore[no-untyped-call]
    return out


@torch.no_grad()
def lsq_start(x: Tensor, bits: int, *, signed: bool = True, axis: int | None = None) -> Tensor:
    """Where a learned step starts: ``c * mean|x| / sqrt(Qp)``, ``c`` = 4 for unsigned codes per axis, else 2.

    Args:
        x: A typical tensor.
        bits: Bit width.
        signed: As for `lsq`.
        axis: As for `lsq`.

    Returns:
        ``(x.shape[axis],)`` or ``(1,)``, in float32 at least and no smaller than 1e-5.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32)).abs()
    mean = x.mean().view(1) if axis is None else x.movedim(axis, 0).flatten(1).mean(1)
    factor = 4 if not signed and axis is not None else 2
    return (factor * mean / math.sqrt(_top(bits, signed))).clamp_min(_FLOOR)


class LSQWeight(WeightQuantizer):
    """The baseline of StatsQ: weights on integer levels of a learned step per output row, which starts from the weight.

    Args:
        w: The weight that it is put on.
        bits: Bit width, 1 to 8.
        axis: The axis whose entries each have a step.
        first_row: Rows before this one are passed on as they are.
    """

    def __init__(self, w: Tensor, bits: int, axis: int = 0, first_row: int = 0) -> None:
        super().__init__(bits, axis, first_row)
        self.scale = nn.Parameter(lsq_start(self.rows(w), bits, axis=axis), requires_grad=w.requires_grad)

    def quantize(self, w: Tensor) -> Tensor:
        """Return `lsq` of ``w``."""
        return lsq(w, self.scale, self.bits, axis=self.axis)

    def step(self, w: Tensor) -> Tensor:
        """Return the learned step."""
        return _spread(self.scale.clamp_min(_FLOOR), w, self.axis)


class ActivationQuantizer(nn.Module):
    """`lsq` for activations; its steps have their start from the first batch that it sees, see ``calibrate_``.

    Args:
        bits: Bit width, 1 to 8.
        axis: The axis whose entries each have a step, counted from the end, where the batch is not; ``None``: one for
            all, as for every two-dimensional input, whose axes are batch and channel.
        signed: Whether codes are signed; ``None``: unsigned if no calibration input is below -1e-5.
        shifts: Shape of the two learned shifts; ``()``: that of the calibration images; ``None``: there are none.
        dtype: Of the parameters.
        device: Likewise.
    """

    unsigned: Tensor
    before: nn.Parameter | None
    after: nn.Parameter | None

    def __init__(
        self,
        bits: int,
        axis: int | None = -2,
        *,
        signed: bool | None = True,
        shifts: tuple[int, ...] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        check_bits(bits)
        super().__init__()
        self.bits, self.axis, self.signed, self.calibrating, self.name = bits, axis, signed, False, ""
        self._decide, self._per_pixel = signed is None, shifts == ()
        # empty until calibrated; the parameter keeps its identity, so that an optimizer may own it before
        self.scale = nn.Parameter(torch.empty(0, dtype=dtype, device=device))
        self.register_buffer("unsigned", torch.tensor(signed is False, device=device))
        for name in ("before", "after"):
            zeros = None if shifts is None else nn.Parameter(torch.zeros(shifts or 0, dtype=dtype, device=device))
            self.register_parameter(name, zeros)

    @property
    def calibrated(self) -> bool:
        """Whether the steps have a value."""
        return self.scale.numel() > 0

    def forward(self, x: Tensor) -> Tensor:
        """Return the quantized ``x``, of its shape.

        Raises:
            UsageError: The length differs from the calibrated one, or the calibration batch is not finite.
        """
        axis = None if x.dim() <= 2 and self.axis == -2 else self.axis
        if not self.calibrated:
            self._start(x.detach(), axis)
        wanted = 1 if axis is None else x.shape[axis]
        if self.scale.numel() != wanted:
            raise UsageError(
                f"{self.name} was calibrated for a length of {self.scale.numel()} and got one of {wanted}: give inputs "
                'of one length, or prepare with granularity="tensor"'
            )
        return lsq(x, self.scale, self.bits, signed=bool(self.signed), axis=axis, before=self.before, after=self.after)

    def reset(self) -> None:
        """Discard the steps; the next batch sets them again."""
        for parameter in self.parameters() if self._per_pixel else [self.scale]:
            parameter.data = parameter.data.new_empty(0)
        if self._decide:
            self.signed = None

    def _start(self, x: Tensor, axis: int | None) -> None:
        if not x.isfinite().all():
            raise UsageError(f"the calibration batch brings NaN or infinite values to {self.name}")
        if not self.calibrating:
            warnings.warn(
                f"{self.name} takes its scale from the first batch it sees: call calibrate_ before you build the "
                "optimizer",
                WeightsmithWarning,
                stacklevel=4,
            )
        if self.signed is None:
            self.signed = bool((x < -_FLOOR).any())
        self.unsigned.fill_(not self.signed)
        if self._per_pixel:
            for shift in (self.before, self.after):
                cast(nn.Parameter, shift).data = self.scale.data.new_zeros(x.shape[2:])
        shifted = x if self.before is None else x + self.before.detach()
        self.scale.data = lsq_start(shifted, self.bits, signed=self.signed, axis=axis).to(self.scale.dtype)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, parameter in self._parameters.items():
            stored = state_dict.get(prefix + name)
            if parameter is not None and stored is not None and 0 in (parameter.numel(), stored.numel()):
                parameter.data = parameter.data.new_empty(stored.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.calibrated:
            self.signed = not bool(self.unsigned)

    def extra_repr(self) -> str:
        """Word the grid."""
        return f"bits={self.bits}, axis={self.axis}, signed={self.signed}"


class _LSQ(torch.autograd.Function):
    """Keeps ``x1 / s`` for the backward pass and nothing else of that size."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        before: Tensor | None,
        after: Tensor | None,
        low: int,
        high: int,
        axis: int | None,
    ) -> Tensor:
        step = _spread(scale.to(torch.promote_types(x.dtype, torch.float32)).clamp_min(_FLOOR), x, axis)
        units = x.to(step.dtype) / step if before is None else (x + before).to(step.dtype).div_(step)
        out = units.clamp(low, high).round_().mul_(step)
        if after is not None:
            out.add_(after)
        ctx.save_for_backward(units, scale, before, after)
        ctx.low, ctx.high, ctx.axis = low, high, axis
        return out.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        units, scale, before, after = ctx.saved_tensors
        wants_x, wants_scale, wants_before, wants_after = ctx.needs_input_grad[:4]
        grad = grads[0].to(units.dtype)
        clamped = units.clamp(ctx.low, ctx.high)
        inside = clamped == units
        grad_x = grad * inside if wants_x or wants_before else None
        grad_scale = None
        if wants_scale:
            slope = clamped.round_().addcmul_(units, inside, value=-1).mul_(grad)
            others = [i for i in range(units.dim()) if ctx.axis is None or i != ctx.axis % units.dim()]
            shared = max(1, units.numel()) / max(1, scale.numel())  # a shard may have none of the rows
            factor = 1 / math.sqrt(max(ctx.high, 1) * shared)
            total = slope.sum(others) if others else slope
            grad_scale = (total * factor).view_as(scale).to(scale.dtype)
        return (
            cast(Tensor, grad_x).to(grads[0].dtype) if wants_x else None,
            grad_scale,
            cast(Tensor, grad_x).sum_to_size(before.shape).to(before.dtype) if wants_before else None,
            grad.sum_to_size(after.shape).to(after.dtype) if wants_after else None,
            None,
            None,
            None,
        )


def _spread(scale: Tensor, x: Tensor, axis: int | None) -> Tensor:
    if axis is None:
        return scale
    shape = [1] * x.dim()
    shape[axis] = -1
    return scale.view(shape)


def _top(bits: int, signed: bool) -> int:
    return max(integer_range(bits, signed=signed)[1], 1)
