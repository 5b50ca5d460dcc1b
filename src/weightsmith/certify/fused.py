"""Operations whose gradients are written by hand, because memory traffic is what a training step on bounds pays for.

They save only what their neighbors keep anyway, and go over every tensor as few times as possible.
"""

from typing import Any

import torch
from torch import Tensor


class _ReluOfBall(torch.autograd.Function):
    """Both ends are found again on the way back: the lower one is above 0 exactly where center and radius differ."""

    @staticmethod
    def forward(ctx: Any, center: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
        high, low = (center + radius).clamp_(min=0), (center - radius).clamp_(min=0)
        out = high.sub_(low).mul_(0.5)
        low.add_(out)
        if ctx is not None:
            ctx.save_for_backward(low, out)
        return low, out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        of_center, of_radius = grads
        center, radius = ctx.saved_tensors
        masked = torch.ops.aten.threshold_backward
        of_high = masked(of_center + of_radius, center + radius, 0)
        of_low = masked(of_center - of_radius, center - radius, 0)
        both = torch.lerp(of_high, of_low, 0.5)
        return both, of_high.sub_(both)


def relu_of_ball(center: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
    """Center and radius of ReLU of everything between ``center - radius`` and ``center + radius``."""
    if not torch.is_grad_enabled():
        return _ReluOfBall.forward(None, center, radius)
    found: tuple[Tensor, Tensor] = _ReluOfBall.apply(center, radius)  # type: ignore[no-untyped-call]
    return found


class _LinearOfBall(torch.autograd.Function):
    """One gradient of the weight in the place of two, and no copy of its signs."""

    @staticmethod
    def forward(ctx: Any, center: Tensor, radius: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        size = weight.abs()
        ctx.save_for_backward(center, radius, weight, size)
        return torch.nn.functional.linear(center, weight, bias), radius @ size.T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        of_center, of_radius = grads
        center, radius, weight, size = ctx.saved_tensors
        first, second, of_weight, of_bias = (None,) * 4
        if ctx.needs_input_grad[0]:
            first = of_center @ weight
        if ctx.needs_input_grad[1]:
            second = of_radius @ size
        flat = [t.flatten(0, -2) for t in (of_center, of_radius, center, radius)]
        if ctx.needs_input_grad[2]:
            of_weight = flat[1].T @ flat[3]
            rows = max(1, _CHUNK // weight.shape[1])
            for part, signs in zip(of_weight.split(rows), weight.split(rows), strict=True):
                part.mul_(signs.sgn())
            of_weight.addmm_(flat[0].T, flat[2])
        if ctx.needs_input_grad[3]:
            of_bias = flat[0].sum(0)
        return first, second, of_weight, of_bias


_CHUNK = 2**18
"""Numbers that stay in a processor's cache."""


def linear_of_ball(center: Tensor, radius: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """``W c + b`` and ``|W| r``."""
    found: tuple[Tensor, Tensor] = _LinearOfBall.apply(center, radius, weight, bias)  # type: ignore[no-untyped-call]
    return found


class _Normalized(torch.autograd.Function):
    """Torch's own kernels, whose statistics carry no gradient; theirs is two more passes over memory."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        out, mean, rstd = torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.set_materialize_grads(False)
        ctx.eps = eps
        return out, mean, rstd

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        of_out, of_mean, of_rstd = grads
        x, weight, mean, rstd = ctx.saved_tensors
        parts: list[Tensor | None] = [None, None, None]
        wanted = list(ctx.needs_input_grad[:3])
        if of_out is not None:
            parts = list(
                torch.ops.aten.native_batch_norm_backward(
                    of_out, x, weight, None, None, mean, rstd, True, ctx.eps, wanted
                )
            )
        if wanted[0] and (of_mean is not None or of_rstd is not None):
            count = x.numel() // x.shape[1]
            slope = torch.zeros_like(rstd) if of_rstd is None else of_rstd * rstd.pow(3) / -count
            shift = -slope * mean if of_mean is None else of_mean / count - slope * mean
            slope, shift = (part.view(1, -1, *[1] * (x.dim() - 2)) for part in (slope, shift))
            so_far = parts[0]
            parts[0] = torch.addcmul(shift, x, slope) if so_far is None else so_far.add_(shift).addcmul_(x, slope)
        return (*parts, None)


def normalized(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Normalize a batch per channel.

    Args:
        x: ``(N, C, ...)``.
        weight: ``(C,)``; ``None``: 1.
        bias: ``(C,)``; ``None``: 0.
        eps: Added to the variance.

    Returns:
        ``weight (x - mean) / sqrt(var + eps) + bias``, the mean, and ``1 / sqrt(var + eps)`` of the biased variance.
    """
    out, mean, rstd = _Normalized.apply(x, weight, bias, eps)  # type: ignore[no-untyped-call]
    return out, mean, rstd
