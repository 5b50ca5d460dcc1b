"""Bounds of operations that are linear in what is not known: layers with weights, sums, and everything that moves
elements.

``c' = op(c; W, b)`` and ``r' = op(r; |W|)``: two kernels for both ends.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from weightsmith.certify.fused import linear_of_ball
from weightsmith.certify.interval import Interval, intervals, lower, upper
from weightsmith.certify.rules import register
from weightsmith.core.graph import UnsupportedOperation


def gamma(terms: float, like: Tensor) -> float:
    """Largest relative error of a sum of products of this many terms, in any order (Higham 2002, lemma 3.1)."""
    unit = (terms + 4) * torch.finfo(like.dtype).eps / 2
    return unit / (1 - unit)


def _weighted_rounding(call: Any, args: Any, kwargs: Any, out: Interval) -> Tensor:
    x, weight, bias = args[0], args[1], args[2] if len(args) > 2 else kwargs.get("bias")
    bias = None if bias is None else bias.abs()
    terms = max(weight[0].numel(), weight.numel() // max(1, out.shape[-1] if weight.dim() == 2 else weight.shape[1]))
    error: Tensor = gamma(terms, weight) * call(x.center.abs() + x.radius, weight.abs(), bias, *args[3:])
    return error


def _sum_rounding(call: Any, args: Any, kwargs: Any, out: Interval) -> Tensor:
    """Sums of inputs with weights of at most 1: as many terms as there are inputs per output."""
    first = intervals((args, kwargs))
    terms = sum(x.sample.numel() for x in first) / max(1, out.sample.numel()) + 2
    many = replaced_by_size(args), replaced_by_size(kwargs)
    error: Tensor = gamma(terms, out.sample) * call(*many[0], **many[1])
    return error


def replaced_by_size(tree: Any) -> Any:
    """Arguments with every interval, and every tensor, replaced by the largest absolute values in it."""
    from weightsmith.core.graph import replaced

    def size(leaf: Any) -> Any:
        if isinstance(leaf, Interval):
            return torch.maximum(leaf.lower.abs(), leaf.upper.abs())
        return leaf.abs() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    return replaced(tree, size)


def _exact(call: Any, args: Any, kwargs: Any, out: Interval) -> Tensor:
    return torch.zeros_like(out.sample)


@register(
    "linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
    affine=True, rounding=_weighted_rounding,
)  # fmt: skip
def weighted(call: Any, args: Any, kwargs: Any) -> Interval:
    """A layer with a weight: center and radius, two kernels."""
    x, weight, *more = args
    if not isinstance(x, Interval) or intervals(more):
        raise UnsupportedOperation("a layer whose weight or bias depends on the input has no bounds as a layer")
    if isinstance(weight, Interval):
        if call is not F.linear and getattr(call, "__name__", "") != "linear.default":
            raise UnsupportedOperation("a convolution whose weight depends on the input has no bounds")
        raise UnsupportedOperation("a linear layer whose weight depends on the input: write it with torch.matmul")
    if call is F.linear and torch.is_grad_enabled() and x.sample.dim() > 1:
        return Interval.ball(*linear_of_ball(x.center, x.radius, weight, more[0] if more else kwargs.get("bias")))
    center = call(x.center, weight, *more)
    radius = call(x.radius, weight.abs(), None, *more[1:])
    return Interval.ball(center, radius)


@register("scale_shift", affine=True, rounding=lambda call, args, kwargs, out: (
    gamma(1, out.sample) * (replaced_by_size(args[0]) * args[1].abs() + args[2].abs())
))  # fmt: skip
def scale_shift(call: Any, args: Any, kwargs: Any) -> Interval:
    """``a x + b`` per channel: batch norm with known statistics."""
    x, a, b = args
    return Interval.ball(x.center * a + b, x.radius * a.abs())


@register(
    "reshape", "reshape_as", "flatten", "unflatten", "permute", "transpose", "squeeze", "unsqueeze", "expand",
    "expand_as", "select", "slice", "narrow", "getitem", "index_select", "movedim", "t", "flip", "roll", "repeat",
    "repeat_interleave", "pixel_shuffle", "pixel_unshuffle", "identity", "detach", "pick", "tile", "chunk", "split",
    "unbind", "broadcast_to", affine=True, reshapes=True, rounding=_exact,
)  # fmt: skip
def moved(call: Any, args: Any, kwargs: Any) -> Any:
    """Elements move, repeat or drop out."""
    x, *more = args
    if not isinstance(x, Interval) or intervals((more, kwargs)):
        raise UnsupportedOperation("an index that depends on the input has no bounds")
    return x.linear(lambda tensor: call(tensor, *more, **kwargs))


@register("cat", "stack", "where", "masked_fill", "to", "type_as", "float", "double", "pad", "hstack", "vstack",
          affine=True, reshapes=True, rounding=_exact)  # fmt: skip
def placed(call: Any, args: Any, kwargs: Any) -> Interval:
    """Elements are put beside others, or take the place of others."""
    if getattr(call, "__name__", "").startswith("where") and isinstance(args[0], Interval):
        raise UnsupportedOperation("a condition that depends on the input has no bounds")
    return Interval(call(*lower(args), **lower(kwargs)), call(*upper(args), **upper(kwargs)))


@register("mean", "sum", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d",
          "adaptive_avg_pool3d", "cumsum", affine=True, rounding=_sum_rounding)  # fmt: skip
def averaged(call: Any, args: Any, kwargs: Any) -> Interval:
    """Sums with weights that are not negative."""
    x, *more = args
    divisor = kwargs.get("divisor_override", args[6] if len(args) > 6 else None)
    if divisor is not None and divisor < 0:
        raise UnsupportedOperation(f"a pool with the divisor {divisor} has no bounds: it must be above 0")
    found: Interval = x.linear(lambda tensor: call(tensor, *more, **kwargs))
    return found


@register("interpolate", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_bilinear2d",
          affine=True)  # fmt: skip
def resized(call: Any, args: Any, kwargs: Any) -> Interval:
    """Nearest or linear interpolation; cubic has negative weights and is refused."""
    if "bicubic" in (*args[1:], *kwargs.values()):
        raise UnsupportedOperation("bicubic interpolation has negative weights and no rule")
    found: Interval = averaged(call, args, kwargs)
    return found


def _scaled(value: Any, alpha: float) -> Any:
    if alpha == 1:
        return value
    if isinstance(value, Interval):
        return Interval.ball(value.center * alpha, value.radius * abs(alpha))
    return value * alpha


@register("add", affine=True, rounding=_sum_rounding)
def added(call: Any, args: Any, kwargs: Any) -> Interval:
    """``x + alpha y``."""
    x, y = args[0], _scaled(args[1], kwargs.get("alpha", args[2] if len(args) > 2 else 1))
    if isinstance(x, Interval) and isinstance(y, Interval):
        if x._center is not None and y._center is not None:
            return Interval.ball(x.center + y.center, x.radius + y.radius)
        return Interval(x.lower + y.lower, x.upper + y.upper)
    x, y = (x, y) if isinstance(x, Interval) else (y, x)
    y = finite(y, x.sample.dtype)
    return Interval(x.lower + y, x.upper + y)


def finite(value: Any, dtype: torch.dtype) -> Any:
    """A constant with a very negative number in the place of minus infinity: masks, of which only ``exp`` is taken."""
    least = torch.finfo(dtype).min / 8
    if isinstance(value, Tensor):
        return value.clamp_min(least) if value.is_floating_point() else value
    return least if isinstance(value, float) and value == float("-inf") else value


@register("sub", "rsub", affine=True, rounding=lambda call, args, kwargs, out: (
    gamma(1, out.sample) * (replaced_by_size(args[0]) + replaced_by_size(args[1]))
))  # fmt: skip
def subtracted(call: Any, args: Any, kwargs: Any) -> Interval:
    """``x - alpha y``."""
    x, y = args[:2]
    if "rsub" in str(getattr(call, "__name__", "")):
        x, y = y, x
    y = _scaled(y, kwargs.get("alpha", args[2] if len(args) > 2 else 1))
    return Interval(lower(x) - upper(y), upper(x) - lower(y))


@register("neg", affine=True, rounding=_exact)
def negated(call: Any, args: Any, kwargs: Any) -> Interval:
    """``-x``."""
    return Interval(-args[0].upper, -args[0].lower)
