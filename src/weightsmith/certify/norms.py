"""Bounds of what normalizes: softmax, layer norm and its relatives, max pools.

Layer norm is written as three steps, ``center``, ``normalize`` (divide by the root mean square) and an affine one, and
attention as scores, softmax and product, so that every step has a rule of its own.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from weightsmith.certify.elementwise import monotone
from weightsmith.certify.interval import Interval
from weightsmith.certify.products import call_mask
from weightsmith.certify.rules import RULES, Planes, Rule, register
from weightsmith.core.graph import Expansion, Node, UnsupportedOperation

_WIDEST = 60.0
"""Differences of logits beyond this are not worth lines: ``exp`` of them leaves any use."""


# --- softmax ----------------------------------------------------------------------------------------------------------


def _dim(args: Any, kwargs: Any) -> int:
    dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
    if not isinstance(dim, int):
        raise UnsupportedOperation("softmax needs dim")
    return dim


def _differences(x: Interval, dim: int) -> tuple[Tensor, Tensor]:
    """Bounds of ``x_j - x_i``, ``(..., i, j)``; the diagonal is 0."""
    low, high = x.lower.movedim(dim, -1), x.upper.movedim(dim, -1)
    below, above = low.unsqueeze(-2) - high.unsqueeze(-1), high.unsqueeze(-2) - low.unsqueeze(-1)
    same = torch.eye(low.shape[-1], dtype=torch.bool, device=low.device)
    return below.masked_fill(same, 0), above.masked_fill(same, 0)


def _softmax_planes(call: Any, args: Any, kwargs: Any) -> Planes:
    """Around ``p_i = 1 / s_i`` with ``s_i = sum_j exp(x_j - x_i)`` (the bounds of arXiv 2303.01713, made linear).

    Every ``exp`` lies below its chord and above a tangent. ``1/s`` lies above its own tangent and below its chord, and
    falls, so each takes the other side of ``s``.
    """
    x, dim = args[0], _dim(args, kwargs)
    below, above = _differences(x, dim)
    exact = RULES["softmax"].ibp(call, args, kwargs)
    tight = (above <= _WIDEST).all(-1, keepdim=True) & (below >= -_WIDEST).all(-1, keepdim=True)
    below, above = below.clamp(-_WIDEST, _WIDEST), above.clamp(-_WIDEST, _WIDEST)
    low, high = below.exp(), above.exp()
    chord = (high - low) / (above - below).clamp_min(1e-8)
    chord_at = torch.maximum(low - chord * below, high - chord * above)
    middle = torch.minimum((below + above) / 2, below + 1)  # beyond, the tangent would be negative at the lower end
    tangent = middle.exp()
    tangent_at = tangent * (1 - middle)
    least, most = low.sum(-1), high.sum(-1)  # the diagonal adds its 1

    def differences(t: Tensor) -> Tensor:
        t = t.movedim(dim, -1)
        return t.unsqueeze(-2) - t.unsqueeze(-1)

    def at_most(t: Tensor) -> Tensor:
        return (chord * differences(t) + chord_at).sum(-1)

    def at_least(t: Tensor) -> Tensor:
        return (tangent * differences(t) + tangent_at).sum(-1)

    tight = tight.squeeze(-1)
    anchor = at_most(x.center).clamp_min(1e-30)
    ends = exact.lower.movedim(dim, -1), exact.upper.movedim(dim, -1)

    def lower(t: Tensor) -> Tensor:
        return torch.where(tight, 1 / anchor - (at_most(t) - anchor) / anchor.square(), ends[0]).movedim(-1, dim)

    def upper(t: Tensor) -> Tensor:
        inverse = 1 / least + 1 / most - at_least(t) / (least * most)
        return torch.where(tight, inverse, ends[1]).movedim(-1, dim)

    return Planes(lower, upper)


@register("softmax", crown=_softmax_planes)
def softmax(call: Any, args: Any, kwargs: Any) -> Interval:
    """``1 / (1 + sum exp(u_j - l_i)) <= p_i <= 1 / (1 + sum exp(l_j - u_i))``."""
    x, dim = args[0], _dim(args, kwargs)
    below, above = _differences(x, dim)
    low, high = 1 / above.exp().sum(-1), 1 / below.exp().sum(-1)
    return Interval(low.movedim(-1, dim), high.movedim(-1, dim))


@register("log_softmax")
def log_softmax(call: Any, args: Any, kwargs: Any) -> Interval:
    """``-log`` of the same sums."""
    x, dim = args[0], _dim(args, kwargs)
    below, above = _differences(x, dim)
    return Interval(-above.logsumexp(-1).movedim(-1, dim), -below.logsumexp(-1).movedim(-1, dim))


# --- layer norm -------------------------------------------------------------------------------------------------------


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


@register("normalize", crown=lambda call, args, kwargs: _normalize_planes(call, args, kwargs))
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
        rest = torch.where(far, rest_high, near)
        value: Tensor = end * ((square + rest) / n + eps).rsqrt()
        return value

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
        "normalize", lambda t, *_: normalize_by(t, count, eps), add("center", center_of, x, count), count, eps, True
    )
    return _affine(add, z, weight, bias)


def rms_norm(add: Any, x: Any, shape: Any, weight: Any = None, eps: float | None = None) -> Node:
    """Write root-mean-square norm as two steps."""
    count, small = len(shape), torch.finfo(torch.float32).eps if eps is None else eps
    z = add("normalize", lambda t, *_: normalize_by(t, count, small), x, count, small, False)
    return _affine(add, z, weight, None)


def group_norm(add: Any, x: Any, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any) -> Node:
    """Write group norm as layer norm over groups of channels."""
    parts = add("flatten", lambda t: t.unflatten(1, (groups, -1)).flatten(2), x)
    z = add("center", center_of, parts, 1)
    z = add("normalize", lambda t, *_: normalize_by(t, 1, eps), z, 1, eps, True)
    shape = add("size", lambda t: t.shape, x)
    z = add("reshape", lambda t, shape: t.reshape(shape), z, shape)

    def view(t: Tensor, like: Tensor) -> Tensor:
        return t.view(-1, *[1] * (like.dim() - 2))

    z = add("scale", lambda t, w: t if w is None else t * view(w, t), z, weight) if weight is not None else z
    out: Node = add("shift", lambda t, b: t if b is None else t + view(b, t), z, bias) if bias is not None else z
    return out


# --- attention --------------------------------------------------------------------------------------------------------


def attention(
    add: Any, q: Any, k: Any, v: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> Node:  # fmt: skip
    """Write scaled dot-product attention as scores, softmax and product."""
    if dropout_p or enable_gqa:
        raise UnsupportedOperation(
            "attention with dropout or grouped queries has no rule: put the model into eval mode"
        )

    def scores(q: Tensor, k: Tensor, factor: Any, mask: Any) -> Tensor:
        return call_mask(q @ k.transpose(-1, -2) * factor, mask)

    factor = scale if scale is not None else add("size", lambda t: t.shape[-1] ** -0.5, q)
    mask = attn_mask
    if is_causal:
        mask = add(
            "size", lambda q, k: torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril(), q, k
        )
    weights = add("softmax", lambda t, dim: t.softmax(dim), add("scores", scores, q, k, factor, mask), -1)
    out: Node = add("matmul", torch.matmul, weights, v)
    return out


EXPANSIONS: Mapping[Any, Expansion] = {
    "layer_norm": layer_norm,
    "rms_norm": rms_norm,
    "group_norm": group_norm,
    "scaled_dot_product_attention": attention,
}


# --- max pools --------------------------------------------------------------------------------------------------------


def _pool_lines(call: Any, args: Any, kwargs: Any) -> Planes:
    """The input whose lower end is largest, below; the largest upper end, above, or that input where it always wins.

    Raises:
        UnsupportedOperation: Windows overlap.
    """
    x, kernel = args[0], args[1]
    names = ("stride", "padding", "dilation", "ceil_mode")
    given = dict(zip(names, args[2:], strict=False)) | dict(kwargs)
    stride, padding, dilation = given.get("stride"), given.get("padding") or 0, given.get("dilation") or 1
    dims = x.sample.dim() - 2

    def every(value: Any) -> tuple[int, ...]:
        return (value,) * dims if isinstance(value, int) else tuple(value) * (dims if len(value) == 1 else 1)

    if (stride not in (None, [], ()) and every(stride) != every(kernel)) or every(dilation) != (1,) * dims:
        raise UnsupportedOperation(
            f"a max pool with stride {stride} and kernel_size {kernel} has no linear bounds: windows must not overlap; "
            "use method='ibp'"
        )
    pool = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}[dims]
    kernel, padding = every(kernel), every(padding)
    options: dict[str, Any] = {"padding": padding, "ceil_mode": bool(given.get("ceil_mode", False))}
    _, at = pool(x.lower, kernel, kernel, return_indices=True, **options)
    flat = at.flatten(2)
    best = x.lower.flatten(2).gather(2, flat)
    others = x.upper.flatten(2).scatter(2, flat, float("-inf")).view_as(x.upper)
    second = pool(others, kernel, kernel, **options).flatten(2)
    wins = (best >= second).view_as(at)
    most = pool(x.upper, kernel, kernel, **options)

    def chosen(t: Tensor) -> Tensor:
        return t.flatten(2).gather(2, flat).view_as(at)

    return Planes(chosen, lambda t: torch.where(wins, chosen(t), most))


for _name in ("max_pool1d", "max_pool2d", "max_pool3d"):
    RULES[_name] = Rule(monotone, _pool_lines)
for _name in ("adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d"):
    RULES[_name] = Rule(monotone)
