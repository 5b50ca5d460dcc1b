"""Bounds of softmax, and attention written as scores, softmax and product."""

from typing import Any

import torch
from torch import Tensor

from weightsmith.certify.interval import Interval
from weightsmith.certify.products import call_mask
from weightsmith.certify.rules import RULES, Planes, register
from weightsmith.core.graph import Node, UnsupportedOperation

_WIDEST = 60.0
"""Differences of logits beyond this are not worth lines: ``exp`` of them leaves any use."""


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
