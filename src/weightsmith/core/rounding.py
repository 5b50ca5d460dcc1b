"""Rounding that gradients pass through, and the integer ranges that go with them.

Rounding has zero gradient almost everywhere; the straight-through estimator (Bengio et al. 2013, arXiv 1308.3432)
takes the gradient of the identity instead.
"""

from typing import Any, cast

import torch
from torch import Tensor


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def straight_through(x: Tensor, value: Tensor) -> Tensor:
    """Return ``value`` with the gradient of ``x``.

    Args:
        x: Any shape, floating point; receives the gradient.
        value: Same shape; what the result equals, to the last bit.
    """
    result: Tensor = cast(Any, _StraightThrough).apply(x, value.detach())
    return result


def round_ste(x: Tensor) -> Tensor:
    """Round half to even, ``d out / d x = 1``.

    Args:
        x: Any shape, floating point.
    """
    return straight_through(x, x.round())


def integer_range(bits: int, *, signed: bool) -> tuple[int, int]:
    """Smallest and largest code of a two's-complement (signed) or plain binary integer.

    Args:
        bits: Bit width, 1 to 16.
        signed: ``True``: ``[-2^(bits-1), 2^(bits-1) - 1]``; ``False``: ``[0, 2^bits - 1]``.

    Raises:
        ValueError: ``bits`` is out of range.
    """
    if not 1 <= bits <= 16:
        raise ValueError(f"bits must be between 1 and 16, got {bits}")
    return (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)
