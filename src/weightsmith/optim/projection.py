"""Tell scale-invariant weights by their gradient, and take the radial part out of an update.

A loss that ignores the length of ``w`` has a gradient orthogonal to ``w``. So a weight whose gradient is orthogonal to
it, row by row or as a whole, is taken for scale-invariant, and the part of its update along ``w``, which changes only
the norm, is removed:

    u <- u - (<w, u> / (||w|| + eps)^2) w

Source: "AdamP: Slowing Down the Slowdown for Momentum Optimizers on Scale-invariant Weights", arXiv 2006.08217,
section 3; the two views and their thresholds are those of the authors' code.

The first half is branchless: every decision stays a tensor on the device. The second half is for the CPU, where looking
first is cheaper than computing both answers.
"""

import math
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Any, cast

import torch
from torch import Tensor

# Rows are worked on in blocks of about this many elements, so that one block of every operand stays in cache.
BLOCK = 1 << 18


class View(IntEnum):
    """How a weight was found to be scale-invariant."""

    NONE = 0
    CHANNEL = 1
    LAYER = 2


def cosine(dot: Tensor, norm_x: Tensor, norm_y: Tensor, eps: float) -> Tensor:
    """Absolute cosine, each norm clamped at ``eps``: ``|<x, y>| / (max(||x||, eps) max(||y||, eps))``.

    Args:
        dot: Inner products, any shape.
        norm_x: Norms of one side, same shape.
        norm_y: Norms of the other side, same shape.
        eps: Smallest norm divided by.
    """
    return dot.abs() / (norm_x.clamp(min=eps) * norm_y.clamp(min=eps))


def row_dot(x: Tensor, y: Tensor) -> Tensor:
    """Inner product of each pair of slices ``x[c]``, ``y[c]``, accumulated in float32 at least.

    Args:
        x: ``(C, d1, ..., dk)``, any memory layout.
        y: Same shape.

    Returns:
        ``(C,)``.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    return (x.to(wide) * y.to(wide)).sum(dim=tuple(range(1, x.dim())))


def invariant_view(w: Tensor, g: Tensor, *, delta: float, eps: float) -> Tensor:
    """Decide whether ``w`` looks scale-invariant, without leaving the device.

    ``CHANNEL`` if every row has ``cosine(g_c, w_c) < delta / sqrt(n)``, else ``LAYER`` if ``cosine(g, w) < delta /
    sqrt(C n)``, else ``NONE``. A comparison with NaN is false.

    Args:
        w: Weight ``(C, d1, ..., dk)``, real, ``k >= 1``; ``n = d1 ... dk``.
        g: Its gradient, same shape.
        delta: Threshold.
        eps: Smallest norm divided by.

    Returns:
        A ``View`` as a 0-d int8 tensor.
    """
    gw, gg, ww = row_dot(g, w), row_dot(g, g), row_dot(w, w)
    orthogonal = cosine(gw, gg.sqrt(), ww.sqrt(), eps) < delta / math.sqrt(w.numel() / len(w))
    # counted, because a maximum is undefined on a rank whose shard has no rows
    channel = (~orthogonal).sum() == 0
    layer = cosine(gw.sum(), gg.sum().sqrt(), ww.sum().sqrt(), eps) < delta / math.sqrt(w.numel())
    return (channel + 2 * (layer & ~channel)).to(torch.int8)


def project(u: Tensor, w: Tensor, view: Tensor, *, eps: float) -> Tensor:
    """Remove from ``u`` its part along ``w``: per row, over all, or not at all, as ``view`` says.

    Args:
        u: Update ``(C, d1, ..., dk)``.
        w: Weight, same shape.
        view: What ``invariant_view`` returned.
        eps: Added to the norm of ``w``.

    Returns:
        The projected update, same shape and dtype as ``u``.
    """
    wu, ww = row_dot(w, u), row_dot(w, w)
    per_row = wu / (ww.sqrt() + eps) ** 2
    overall = wu.sum() / (ww.sum().sqrt() + eps) ** 2
    # `.value`: torch.compile does not compare a tensor with a member of an enumeration
    pull = torch.where(view == View.CHANNEL.value, per_row, torch.where(view == View.LAYER.value, overall, 0.0))
    projected = u - (materialized(pull).view(-1, *[1] * (w.dim() - 1)) * w).to(u.dtype)
    # a distributed tensor of one column comes back whole on every rank
    placements = getattr(u, "placements", None)
    return cast(Any, projected).redistribute(placements=placements) if placements else projected


def move_projected_(w: Tensor, d: Tensor, view: Tensor, *, decay: Any, wd_ratio: float, eps: float) -> None:
    """``w <- (1 - decay rho) w + project(d, w, view)``, with ``rho = wd_ratio`` where ``view`` projects, else 1.

    Args:
        w: Weight ``(C, d1, ..., dk)``; changed in place.
        d: Its unprojected displacement, same shape.
        view: What ``invariant_view`` returned.
        decay: Share of ``w`` that undiminished decay takes; a number or a 0-d tensor.
        wd_ratio: Share of the decay that projected weights keep.
        eps: Added to the norm of ``w``.
    """
    d = project(d, w, view, eps=eps)
    spared = view.clamp(max=1).to(torch.promote_types(w.dtype, torch.float32)) * (1 - wd_ratio)
    w.mul_(1 - decay * (1 - spared)).add_(d)


def materialized(x: Tensor) -> Tensor:
    """``x``, which a compiled step then computes once and stores, not anew for every element of what it is used in."""
    return x.as_strided(x.shape, x.stride()) if torch.compiler.is_compiling() and type(x) is Tensor else x


def row_views(*tensors: Tensor) -> list[Tensor] | None:
    """View tensors of one shape as contiguous ``(C, n)`` (vectors as they are), elements in the same order in all.

    Returns:
        The views, or ``None`` if the tensors do not share one dense layout with rows outermost.
    """
    if not all(t.is_contiguous() for t in tensors):
        w = tensors[0]
        order = [*range(min(w.dim(), 1)), *sorted(range(1, w.dim()), key=w.stride, reverse=True)]
        tensors = tuple(t.permute(order) for t in tensors)
        if not all(t.is_contiguous() for t in tensors):
            return None
    return [t.flatten(1) for t in tensors] if tensors[0].dim() >= 2 else list(tensors)


def look(w: Tensor, g: Tensor, *, delta: float, eps: float) -> tuple[View, Tensor]:
    """``invariant_view`` for the CPU, which looks at the remaining rows only if the first few are orthogonal.

    Args:
        w: Weight ``(C, n)``, contiguous.
        g: Its gradient, same.
        delta: Threshold.
        eps: Smallest norm divided by.

    Returns:
        The view, and the norms of ``w`` in it: ``(C,)``, ``(1,)`` or, for ``NONE``, ``(0,)``.
    """
    rows, n = w.shape
    limit = delta / math.sqrt(n)
    if all(_flat_cosine(g[c], w[c], eps) < limit for c in range(min(rows, 4))):
        block = max(1, BLOCK // n)
        sums = [
            (_dense_row_dot(a, b), torch.linalg.vector_norm(a, dim=1), torch.linalg.vector_norm(b, dim=1))
            for a, b in zip(g.split(block), w.split(block), strict=True)
        ]
        gw, g_norms, w_norms = (torch.cat(parts) for parts in zip(*sums, strict=True))
        if cosine(gw, g_norms, w_norms, eps).max() < limit:
            return View.CHANNEL, w_norms
    g, w = g.view(-1), w.view(-1)
    if _flat_cosine(g, w, eps) < delta / math.sqrt(rows * n):
        return View.LAYER, torch.linalg.vector_norm(w)[None]
    return View.NONE, w.new_empty(0)


def look_and_move_(
    w: Tensor,
    displace: Callable[..., Tensor],
    operands: Sequence[Tensor],
    *,
    keep: float,
    delta: float,
    eps: float,
) -> View:
    """`move_` of a weight that `look` finds scale-invariant, as rows or as one long row; others are left as they are.

    Args:
        w: As for `move_`.
        displace: Likewise.
        operands: Likewise; the first is the gradient.
        keep: Likewise.
        delta: Threshold.
        eps: Smallest norm divided by, and added to the norms.

    Returns:
        The view; for ``NONE`` nothing has moved.
    """
    view, norms = look(w, operands[0], delta=delta, eps=eps)
    if view == View.LAYER:
        w, *operands = (t.view(1, -1) for t in (w, *operands))
    if view != View.NONE:
        move_(w, norms, displace, operands, keep=keep, eps=eps)
    return view


def move_(
    w: Tensor,
    norms: Tensor,
    displace: Callable[..., Tensor],
    operands: Sequence[Tensor],
    *,
    keep: float,
    eps: float,
) -> None:
    """``w <- keep w + project(d, w)``, block of rows by block of rows.

    What the projection takes from a row of ``d`` is a multiple of that row of ``w``, so the whole change is one number
    per row times ``w``, plus ``d``.

    Args:
        w: Weight ``(C, n)``, contiguous; changed in place.
        norms: Norms of its rows ``(C,)``.
        displace: Takes a block of rows of every operand, returns the unprojected displacement ``d`` of these rows.
        operands: Tensors ``(C, n)``.
        keep: What weight decay leaves of ``w``.
        eps: Added to the norms.
    """
    block = max(1, BLOCK // w.shape[1])
    for w_rows, weights, *rows in zip(*(t.split(block) for t in (w, (norms + eps) ** -2, *operands)), strict=True):
        d = displace(*rows)
        torch.addcmul(d, w_rows, (keep - weights * _dense_row_dot(w_rows, d))[:, None], out=w_rows)


def _dense_row_dot(x: Tensor, y: Tensor) -> Tensor:
    # a single row may be the whole weight: BLAS needs no room for the products
    return torch.dot(x[0], y[0])[None] if len(x) == 1 else (x * y).sum(1)


def _flat_cosine(x: Tensor, y: Tensor, eps: float) -> float:
    xy, xx, yy = torch.dot(x, y).item(), torch.dot(x, x).item(), torch.dot(y, y).item()
    norms = max(math.sqrt(xx), eps) * max(math.sqrt(yy), eps)
    return abs(xy) / norms if norms else math.nan  # eps = 0, or both so small that the product vanishes
