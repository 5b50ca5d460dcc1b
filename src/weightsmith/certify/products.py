"""Bounds of products and quotients, of two activations too: attention and gates."""

from typing import Any

import torch
from torch import Tensor

from weightsmith.certify.affine import finite, gamma, replaced_by_size
from weightsmith.certify.interval import Interval, intervals, lower, upper
from weightsmith.certify.rules import Planes, register
from weightsmith.core.errors import UsageError
from weightsmith.core.graph import UnsupportedOperation


def _bilinear_planes(call: Any, args: Any, kwargs: Any) -> Planes:
    """McCormick's planes for ``f(x, y)``, bilinear without negative coefficients (McCormick 1976)."""
    at = [index for index, arg in enumerate(args) if isinstance(arg, Interval)]
    if len(at) == 1:  # linear in the one that is not known
        (one,) = at

        def alone(x: Tensor) -> Tensor:
            product: Tensor = call(*args[:one], x, *args[one + 1 :], **kwargs)
            return product

        return Planes(alone, alone)
    i, j = at

    def f(x: Tensor, y: Tensor) -> Tensor:
        filled = list(args)
        filled[i], filled[j] = x, y
        product: Tensor = call(*filled, **kwargs)
        return product

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
    return Interval.ball(x.center * y, x.radius * (y if isinstance(y, Tensor) and y.dtype == torch.bool else abs(y)))


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
    if scale < 0:
        raise UnsupportedOperation(f"attention with a negative scale, {scale}, has no rule")
    turned = k.linear(lambda t: t.transpose(-1, -2)) if isinstance(k, Interval) else k.transpose(-1, -2)
    out = matrix_product(torch.matmul, (q, turned), {})
    return Interval(call_mask(out.lower * scale, mask), call_mask(out.upper * scale, mask))


def call_mask(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Apply an attention mask: added, or ``False`` for what is not seen."""
    if mask is None:
        return scores
    least = torch.finfo(scores.dtype).min / 8  # finite, so that differences of masked scores are numbers
    return scores.masked_fill(~mask, least) if mask.dtype == torch.bool else scores + finite(mask, scores.dtype)


def _factors(args: Any) -> tuple[str, list[Any]]:
    equation, *factors = args
    return equation, list(factors[0]) if len(factors) == 1 and isinstance(factors[0], list | tuple) else factors


def _einsum_planes(call: Any, args: Any, kwargs: Any) -> Planes:
    equation, factors = _factors(args)
    unknown = len(intervals(factors))
    signed = any(isinstance(f, Tensor) and bool((f < 0).any()) for f in factors)
    if unknown > 2 or (unknown == 2 and signed):
        raise UnsupportedOperation(
            "einsum of two factors that depend on the input and a negative one, or of more than two such factors, has "
            "no linear bounds: use method='ibp'"
        )
    return _bilinear_planes(call, (equation, *factors), kwargs)


@register("einsum", crown=_einsum_planes)
def einsum(call: Any, args: Any, kwargs: Any) -> Interval:
    """Center and radius: ``|xy - c d| <= |c| s + r |d| + r s``."""
    equation, factors = _factors(args)
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
        product: Tensor = call(x, *args[1:], **kwargs)
        return product

    return Planes(f, f)


def _least(corners: list[Tensor]) -> Tensor:
    return torch.minimum(torch.minimum(corners[0], corners[1]), torch.minimum(corners[2], corners[3]))


def _greatest(corners: list[Tensor]) -> Tensor:
    return torch.maximum(torch.maximum(corners[0], corners[1]), torch.maximum(corners[2], corners[3]))
