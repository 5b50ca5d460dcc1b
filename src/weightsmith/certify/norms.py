"""Bounds of layer norm and its relatives, written as ``center``, ``divide_by_rms`` (the root mean square) and an
affine step, so that every step has a rule of its own.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from weightsmith.certify.elementwise import monotone
from weightsmith.certify.interval import Interval
from weightsmith.certify.rules import RULES, Planes, Rule, register
from weightsmith.certify.softmax import attention
from weightsmith.core.graph import Expansion, Node


def center_of(x: Tensor, count: int) -> Tensor:
    """``x`` minus its mean over the last ``count`` axes."""
    return x - x.mean(tuple(range(-count, 0)), keepdim=True)


@register("center", affine=True)
def centered(call: Any, args: Any, kwargs: Any) -> Interval:
    """``(1 - 1/n) x_i - (1/n) sum of the others``: exact, since every input appears once."""
    x, count = args
    axes = tuple(range(-count, 0))
    n = x.shape[-count:].numel()
    # |coefficients|: 1 - 1/n on itself, 1/n on the others
    radius = x.radius * (1 - 2 / n) + x.radius.mean(axes, keepdim=True)
    return Interval.ball(center_of(x.center, count), radius if n > 1 else torch.zeros_like(radius))


def normalize_by(x: Tensor, count: int, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps)`` over the last ``count`` axes."""
    return x * (x.square().mean(tuple(range(-count, 0)), keepdim=True) + eps).rsqrt()


def _squares(x: Interval) -> tuple[Tensor, Tensor]:
    low, high = x.lower.square(), x.upper.square()
    across = (x.lower <= 0) & (x.upper >= 0)
    return torch.where(across, torch.zeros_like(low), torch.minimum(low, high)), torch.maximum(low, high)


@register("divide_by_rms", crown=lambda call, args, kwargs: _normalize_planes(call, args, kwargs))
def normalized(call: Any, args: Any, kwargs: Any) -> Interval:
    """``z_i / sqrt((z_i^2 + rest_i) / n + eps)`` rises with ``z_i``; ``rest_i`` shrinks it towards 0."""
    z, count, eps, is_centered = args
    axes, n = tuple(range(-count, 0)), z.shape[-count:].numel()
    least, most = _squares(z)
    rest_low = (least.sum(axes, keepdim=True) - least).clamp_min(0)
    rest_high = most.sum(axes, keepdim=True) - most

    def at(end: Tensor, far: Tensor) -> Tensor:
        square = end.square()
        # the others of a sum of 0 have at least this together (Cauchy and Schwarz)
        near = torch.maximum(rest_low, square / (n - 1)) if is_centered and n > 1 else rest_low
        total = (square + torch.where(far, rest_high, near)) / n + eps
        # squares of large numbers overflow: what is left then is 0, or a root of n that nothing exceeds
        limit = torch.where(far, 0.0, end.sign() * n**0.5)
        return torch.where(total.isinf(), limit, end * total.rsqrt())

    return Interval(at(z.lower, z.lower > 0), at(z.upper, z.upper < 0))


def _normalize_planes(call: Any, args: Any, kwargs: Any) -> Planes:
    """McCormick's planes for ``z s`` with ``s = (mean(z^2) + eps)^(-1/2)`` between two lines of its own.

    ``z^2`` lies between tangents and chords, and ``s``, convex and falling in the mean square, between a tangent and a
    chord, each of which takes the other side of the squares.
    """
    z, count, eps, _ = args
    axes = tuple(range(-count, 0))
    least, most = _squares(z)
    v_low, v_high = least.mean(axes, keepdim=True) + eps, most.mean(axes, keepdim=True) + eps
    s_low, s_high = v_high.rsqrt(), v_low.rsqrt()
    chord, chord_at = z.lower + z.upper, -z.lower * z.upper
    touch = z.center
    anchor = (v_low + v_high) / 2
    slope = -0.5 * anchor.pow(-1.5)
    fall = (s_low - s_high) / (v_high - v_low).clamp_min(1e-12)
    fall_at = torch.maximum(s_high - fall * v_low, s_low - fall * v_high)

    def s_below(t: Tensor) -> Tensor:
        v = (chord * t + chord_at).mean(axes, keepdim=True) + eps
        line: Tensor = anchor.rsqrt() + slope * (v - anchor)
        return line

    def s_above(t: Tensor) -> Tensor:
        v = (2 * touch * t - touch.square()).mean(axes, keepdim=True) + eps
        line: Tensor = fall * v + fall_at
        return line

    positive, negative = z.lower.clamp(min=0), z.lower.clamp(max=0)

    def lower(t: Tensor) -> Tensor:
        plane: Tensor = s_low * t + positive * s_below(t) + negative * s_above(t) - z.lower * s_low
        return plane

    def upper(t: Tensor) -> Tensor:
        plane: Tensor = s_high * t + positive * s_above(t) + negative * s_below(t) - z.lower * s_high
        return plane

    return Planes(lower, upper)


def _affine(add: Any, x: Node, weight: Any, bias: Any, shape: Any = None) -> Node:
    def view(t: Tensor) -> Tensor:
        return t if shape is None else t.view(shape)

    if weight is not None:
        x = add("scale", lambda t, w: t if w is None else t * view(w), x, weight)
    if bias is not None:
        x = add("shift", lambda t, b: t if b is None else t + view(b), x, bias)
    return x


@register("scale", affine=True)
def scaled(call: Any, args: Any, kwargs: Any) -> Interval:
    """``w x``; without a weight ``x``."""
    x, w = args
    return x if w is None else Interval.ball(call(x.center, w), call(x.radius, w.abs()))


RULES["shift"] = Rule(monotone, affine=True)


def layer_norm(add: Any, x: Any, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any) -> Node:
    """Write layer norm as three steps."""
    count = len(shape)
    z = add(
        "divide_by_rms", lambda t, *_: normalize_by(t, count, eps), add("center", center_of, x, count), count, eps, True
    )
    return _affine(add, z, weight, bias)


def rms_norm(add: Any, x: Any, shape: Any, weight: Any = None, eps: float | None = None) -> Node:
    """Write root-mean-square norm as two steps; without ``eps`` torch takes that of the numbers' type."""
    count = len(shape)
    small = add("size", lambda t: torch.finfo(t.dtype).eps, x) if eps is None else eps
    z = add("divide_by_rms", lambda t, count, small, _: normalize_by(t, count, small), x, count, small, False)
    return _affine(add, z, weight, None)


def group_norm(add: Any, x: Any, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any) -> Node:
    """Write group norm as layer norm over groups of channels."""
    parts = add("flatten", lambda t: t.unflatten(1, (groups, -1)).flatten(2), x)
    z = add("center", center_of, parts, 1)
    z = add("divide_by_rms", lambda t, *_: normalize_by(t, 1, eps), z, 1, eps, True)
    shape = add("size", lambda t: t.shape, x)
    z = add("reshape", lambda t, shape: t.reshape(shape), z, shape)

    def view(t: Tensor, like: Tensor) -> Tensor:
        return t.view(-1, *[1] * (like.dim() - 2))

    z = add("scale", lambda t, w: t if w is None else t * view(w, t), z, weight) if weight is not None else z
    out: Node = add("shift", lambda t, b: t if b is None else t + view(b, t), z, bias) if bias is not None else z
    return out


EXPANSIONS: Mapping[Any, Expansion] = {
    "layer_norm": layer_norm,
    "rms_norm": rms_norm,
    "group_norm": group_norm,
    "scaled_dot_product_attention": attention,
}
