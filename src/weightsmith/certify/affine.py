"""Bounds of operations that are linear in what is not known: layers with weights, sums, and everything that moves
elements.

``c' = op(c; W, b)`` and ``r' = op(r; |W|)``: two kernels for both ends.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from weightsmith.certify.interval import Interval, intervals, lower, upper
from weightsmith.certify.rules import Planes, register
from weightsmith.core.errors import UsageError
from weightsmith.core.graph import UnsupportedOperation


def gamma(terms: float, like: Tensor) -> float:
    """Largest relative error of a sum of products of this many terms, in any order (Higham 2002, lemma 3.1)."""
    unit = (terms + 4) * torch.finfo(like.dtype).eps / 2
    return unit / (1 - unit)


def _weighted_rounding(call: Any, args: Any, kwargs: Any, out: Interval) -> Tensor:
    x, weight, bias = args[0], args[1], args[2] if len(args) > 2 else kwargs.get("bias")
    bias = None if bias is None else bias.abs()
    terms = max(weight[0].numel(), weight.numel() // max(1, out.shape[-1] if weight.dim() == 2 else weight.shape[1]))
    return gamma(terms, weight) * call(x.center.abs() + x.radius, weight.abs(), bias, *args[3:])


def _sum_rounding(call: Any, args: Any, kwargs: Any, out: Interval) -> Tensor:
    """Sums of inputs with weights of at most 1: as many terms as there are inputs per output."""
    first = intervals((args, kwargs))
    terms = sum(x.sample.numel() for x in first) / max(1, out.sample.numel()) + 2
    many = replaced_by_size(args), replaced_by_size(kwargs)
    return gamma(terms, out.sample) * call(*many[0], **many[1])


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
    return x.linear(lambda tensor: call(tensor, *more, **kwargs))


@register("interpolate", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_bilinear2d",
          affine=True)  # fmt: skip
def resized(call: Any, args: Any, kwargs: Any) -> Interval:
    """Nearest or linear interpolation; cubic has negative weights and is refused."""
    if "bicubic" in (*args[1:], *kwargs.values()):
        raise UnsupportedOperation("bicubic interpolation has negative weights and no rule")
    return averaged(call, args, kwargs)


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


def _bilinear_planes(call: Any, args: Any, kwargs: Any) -> Planes:
    """McCormick's planes for ``f(x, y)``, bilinear without negative coefficients (McCormick 1976)."""
    at = [index for index, arg in enumerate(args) if isinstance(arg, Interval)]
    if len(at) == 1:  # linear in the one that is not known
        (one,) = at

        def alone(x: Tensor) -> Tensor:
            return call(*args[:one], x, *args[one + 1 :], **kwargs)

        return Planes(alone, alone)
    i, j = at

    def f(x: Tensor, y: Tensor) -> Tensor:
        filled = list(args)
        filled[i], filled[j] = x, y
        return call(*filled, **kwargs)

    x0, y0 = args[i].lower, args[j].lower

    def plane(y1: Tensor) -> Any:
        return lambda x, y: f(x, y1) + f(x0, y) - f(x0, y1)

    return Planes(plane(y0), plane(args[j].upper))


@register("mul", crown=_bilinear_planes, rounding=lambda call, args, kwargs, out: (
    gamma(1, out.sample) * replaced_by_size(args[0]) * replaced_by_size(args[1])
))  # fmt: skip
def multiplied(call: Any, args: Any, kwargs: Any) -> Interval:
    """``x y``."""
    x, y = args[:2]
    if isinstance(x, Interval) and isinstance(y, Interval):
        corners = [x.lower * y.lower, x.lower * y.upper, x.upper * y.lower, x.upper * y.upper]
        return Interval(_least(corners), _greatest(corners))
    x, y = (x, y) if isinstance(x, Interval) else (y, x)
    return Interval.ball(x.center * y, x.radius * abs(y))


@register("matmul", crown=_bilinear_planes, rounding=lambda call, args, kwargs, out: (
    gamma(replaced_by_size(args[0]).shape[-1], out.sample) * call(replaced_by_size(args[0]), replaced_by_size(args[1]))
))  # fmt: skip
def matrix_product(call: Any, args: Any, kwargs: Any) -> Interval:
    """``x @ y``: the sum of the intervals of all products where neither factor is known."""
    x, y = args[:2]
    if not isinstance(y, Interval):
        return Interval.ball(call(x.center, y), call(x.radius, y.abs()))
    if not isinstance(x, Interval):
        return Interval.ball(call(x, y.center), call(x.abs(), y.radius))
    return pairwise(x, y)


@register("addmm", affine=True)
def added_product(call: Any, args: Any, kwargs: Any) -> Interval:
    """``bias + x @ W``."""
    bias, x, weight = args
    if kwargs or not isinstance(x, Interval) or intervals((bias, weight)):
        raise UnsupportedOperation("addmm has bounds for a known bias and a known second factor only")
    return Interval.ball(call(bias, x.center, weight), x.radius @ weight.abs())


def pairwise(x: Interval, y: Interval) -> Interval:
    """Interval of ``x @ y`` row by row, so that the products of one row are in memory at a time."""
    if min(x.sample.dim(), y.sample.dim()) < 2:
        raise UnsupportedOperation("a product of a vector with something else that depends on the input has no rule")
    yl, yu = y.lower.unsqueeze(-3), y.upper.unsqueeze(-3)
    low, high = [], []
    for xl, xu in zip(x.lower.unsqueeze(-1).split(1, -3), x.upper.unsqueeze(-1).split(1, -3), strict=True):
        corners = [xl * yl, xl * yu, xu * yl, xu * yu]
        low.append(_least(corners).sum(-2))
        high.append(_greatest(corners).sum(-2))
    return Interval(torch.cat(low, -2), torch.cat(high, -2))


@register("scores", crown=_bilinear_planes)
def attention_scores(call: Any, args: Any, kwargs: Any) -> Interval:
    """``scale q k^T + mask``."""
    q, k, scale, mask = args
    turned = k.linear(lambda t: t.transpose(-1, -2)) if isinstance(k, Interval) else k.transpose(-1, -2)
    out = matrix_product(torch.matmul, (q, turned), {})
    return Interval(call_mask(out.lower * scale, mask), call_mask(out.upper * scale, mask))


def call_mask(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Apply an attention mask: added, or ``False`` for what is not seen."""
    if mask is None:
        return scores
    least = torch.finfo(scores.dtype).min / 8  # finite, so that differences of masked scores are numbers
    return scores.masked_fill(~mask, least) if mask.dtype == torch.bool else scores + finite(mask, scores.dtype)


@register("einsum", crown=_bilinear_planes)
def einsum(call: Any, args: Any, kwargs: Any) -> Interval:
    """Center and radius: ``|xy - c d| <= |c| s + r |d| + r s``."""
    equation, *factors = args
    factors = list(factors[0]) if len(factors) == 1 and isinstance(factors[0], list | tuple) else factors
    center = call(equation, *[f.center if isinstance(f, Interval) else f for f in factors])
    most = call(equation, *[(f.center.abs() + f.radius) if isinstance(f, Interval) else f.abs() for f in factors])
    least = call(equation, *[f.center.abs() if isinstance(f, Interval) else f.abs() for f in factors])
    return Interval.ball(center, most - least)


@register("div", crown=lambda call, args, kwargs: _quotient_planes(call, args, kwargs), rounding=(
    lambda call, args, kwargs, out: gamma(1, out.sample) * replaced_by_size(out)
))  # fmt: skip
def divided(call: Any, args: Any, kwargs: Any) -> Interval:
    """``x / y``; an interval that is divided by must not contain 0."""
    x, y = args[:2]
    if kwargs.get("rounding_mode") is not None:
        raise UnsupportedOperation("a division that rounds has no rule")
    if not isinstance(y, Interval):
        inverse = 1 / y
        return Interval.ball(x.center * inverse, x.radius * abs(inverse))
    check_away_from_zero(y)
    corners = [a / b for a in (lower(x), upper(x)) for b in (y.lower, y.upper)]
    return Interval(_least(corners), _greatest(corners))


def check_away_from_zero(y: Interval) -> None:
    """Refuse to divide by an interval that contains 0.

    Raises:
        UsageError: It does.
    """
    if bool(((y.lower <= 0) & (y.upper >= 0)).any()):
        raise UsageError("eps is too large: the model divides by a quantity whose bounds contain 0")


def _quotient_planes(call: Any, args: Any, kwargs: Any) -> Planes:
    if isinstance(args[1], Interval):
        raise UnsupportedOperation("dividing by what depends on the input has no linear bounds: use method='ibp'")

    def f(x: Tensor) -> Tensor:
        return call(x, *args[1:], **kwargs)

    return Planes(f, f)


def _least(corners: list[Tensor]) -> Tensor:
    return torch.minimum(torch.minimum(corners[0], corners[1]), torch.minimum(corners[2], corners[3]))


def _greatest(corners: list[Tensor]) -> Tensor:
    return torch.maximum(torch.maximum(corners[0], corners[1]), torch.maximum(corners[2], corners[3]))
