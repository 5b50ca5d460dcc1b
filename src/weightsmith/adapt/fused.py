"""Adapted linear layers with a backward pass of their own: nothing of the weight's size is saved or copied.

Notation: ``x_c`` is the c-th slice of ``r`` inputs, ``dy`` the gradient that comes in, ``fold`` the sum over slices.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

_CACHED = 2**20  # elements of a weight that are worked on at a time, so that they stay in a processor's cache


def block_sum(x: Tensor, r: int, dim: int = -1) -> Tensor:
    """Sum slices of length ``r`` along ``dim``; the last may be shorter.

    Args:
        x: Any tensor with at least ``r`` entries along ``dim``.
        r: Length of a slice.
        dim: Which dimension; negative.

    Returns:
        ``x`` with ``r`` entries along ``dim``.
    """
    tail = x.shape[dim] % r
    total: Tensor = x.narrow(dim, 0, x.shape[dim] - tail).unflatten(dim, (-1, r)).sum(dim - 1)
    if tail:
        total.narrow(dim, 0, tail).add_(x.narrow(dim, -tail, tail))
    return total


class Shared(torch.autograd.Function):
    """``y = x W^T + b + tiled(S D)`` with ``S = sum_c x_c``; ``x`` is not needed again.

    dD = S^T fold(dy),   dx = dy W + tiled(fold(dy) D^T)
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, block: Tensor) -> Tensor:
        """Map ``x (N, in)`` to ``(N, out)``; ``block`` is ``(r, m)``."""
        sums = block_sum(x.to(torch.promote_types(x.dtype, block.dtype)), block.shape[0])
        ctx.save_for_backward(sums, weight, block)
        y = _linear(x, weight, bias)
        if block.shape[1] == y.shape[1] and sums.dtype == y.dtype:
            return y.addmm_(sums, block.to(y.dtype))
        _slices(y, block.shape[1]).add_((sums @ block.to(sums.dtype)).unsqueeze(1))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Give the gradients of ``x``, ``bias`` and ``block``."""
        sums, weight, block = ctx.saved_tensors
        r, m = block.shape
        folded = (dy if m == dy.shape[1] else dy.unflatten(1, (-1, m)).sum(1)).to(sums.dtype)
        dx = dblock = None
        if ctx.needs_input_grad[0]:
            dx = dy @ weight.to(dy.dtype)
            dsums = folded @ block.to(sums.dtype).T
            tail = dx.shape[1] % r
            _slices(dx, r).add_(dsums.unsqueeze(1))
            if tail:
                dx[:, -tail:].add_(dsums[:, :tail])
        if ctx.needs_input_grad[3]:
            dblock = (sums.T @ folded).to(block.dtype)
        return dx, None, dy.sum(0) if ctx.needs_input_grad[2] else None, dblock


class Row(torch.autograd.Function):
    """``y = (x + t) W^T + b + tiled(sum_c t_c)`` with ``t_c = x_c B[c]^T``.

    dt_c = (dy W)_c + fold(dy),   dB[c] = dt_c^T x_c,   dx_c = (dy W)_c + dt_c B[c]
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, block: Tensor) -> Tensor:
        """Map ``x (N, in)`` to ``(N, out)``; ``block`` is ``(in / r, r, r)``."""
        ctx.save_for_backward(x, weight, block)
        r = block.shape[-1]
        wide = torch.promote_types(x.dtype, block.dtype)
        t = _by_slice(x, r).to(wide) @ block.mT.to(wide)
        z = (x.unflatten(1, (-1, r)) + t.transpose(0, 1)).to(x.dtype).flatten(1)
        y = _linear(z, weight, bias)
        _slices(y, r).add_(t.sum(0).unsqueeze(1))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Give the gradients of ``x``, ``bias`` and ``block``."""
        x, weight, block = ctx.saved_tensors
        r = block.shape[-1]
        wide = torch.promote_types(x.dtype, block.dtype)
        dz = dy @ weight.to(dy.dtype)
        dt = (dz.unflatten(1, (-1, r)).to(wide) + dy.unflatten(1, (-1, r)).sum(1, keepdim=True).to(wide)).transpose(
            0, 1
        )
        dblock = (dt.mT @ _by_slice(x, r).to(wide)).to(block.dtype) if ctx.needs_input_grad[3] else None
        if ctx.needs_input_grad[0]:
            _slices(dz, r).add_((dt @ block.to(wide)).transpose(0, 1))
        return dz, None, dy.sum(0) if ctx.needs_input_grad[2] else None, dblock


class Col(torch.autograd.Function):
    """``y = x V^T + b`` with ``V[a] = W[a] + W[a] B[a] + B[a]``, made a few block-rows at a time in both passes.

    With ``G = dy^T x``: dB[a] = sum_c (W[a, c]^T + I) G[a, c],   dx = dy V
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, block: Tensor) -> Tensor:
        """Map ``x (N, in)`` to ``(N, out)``; ``block`` is ``(out / r, r, r)``."""
        ctx.save_for_backward(x, weight, block)
        y = x.new_empty(len(x), len(weight))
        for rows, b, made, at in _block_rows(weight, block, x.dtype):
            torch.mm(x, _adapted(rows, b, made).T, out=y[:, at])
        return y if bias is None else y.add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Give the gradients of ``x``, ``bias`` and ``block``."""
        x, weight, block = ctx.saved_tensors
        dx, dblocks = torch.empty_like(x), []
        for rows, b, made, at in _block_rows(weight, block, x.dtype):
            if ctx.needs_input_grad[0]:
                dx.addmm_(dy[:, at], _adapted(rows, b, made), beta=0 if at.start == 0 else 1)
            if ctx.needs_input_grad[3]:
                torch.mm(dy[:, at].T, x, out=made.view(-1, x.shape[1]))
                dblocks.append((rows.mT @ made).add_(made.view(len(b), *b.shape[1:2], -1, b.shape[1]).sum(2)))
        dblock = torch.cat(dblocks).to(block.dtype) if dblocks else None
        return dx, None, dy.sum(0) if ctx.needs_input_grad[2] else None, dblock


class Free(torch.autograd.Function):
    """``y = x V^T + b`` with ``V = W + dW`` made afresh in both passes, so that ``x`` and the blocks alone are saved.

    With ``G = dy^T x``: dB[p, q] = sum over its blocks of ``(W[a, c]^T + I) G[a, c]``,   dx = dy V
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, tiles: Tensor) -> Tensor:
        """Map ``x (N, in)`` to ``(N, out)``; ``tiles`` is ``(p, q, r, r)``, dividing the weight evenly."""
        ctx.save_for_backward(x, weight, tiles)
        return _linear(x, weight.to(x.dtype) + guided(weight.to(x.dtype), tiles.to(x.dtype)), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Give the gradients of ``x``, ``bias`` and ``tiles``."""
        x, weight, tiles = ctx.saved_tensors
        weight = weight.to(dy.dtype)
        dx = dtiles = None
        if ctx.needs_input_grad[0]:
            dx = dy @ (weight + guided(weight, tiles.to(dy.dtype)))
        if ctx.needs_input_grad[3]:
            g = in_tiles(dy.T @ x, tiles)
            dtiles = torch.einsum("apicqj,apicqk->pqjk", in_tiles(weight, tiles), g)
            dtiles = dtiles.add_(g.sum((0, 3)).transpose(1, 2)).to(tiles.dtype)
        return dx, None, dy.sum(0) if ctx.needs_input_grad[2] else None, dtiles


def guided(weight: Tensor, tiles: Tensor) -> Tensor:
    """Write out ``dW[a, c] = W[a, c] B + B`` for tiles that divide the weight evenly; differentiable.

    Args:
        weight: ``(out, in)``.
        tiles: ``(p, q, r, r)``, of the same dtype.
    """
    product = torch.einsum("apicqj,pqjk->apicqk", in_tiles(weight, tiles), tiles)
    return (product + tiles.transpose(1, 2)[None, :, :, None]).reshape(weight.shape)


def in_tiles(weight: Tensor, tiles: Tensor) -> Tensor:
    """Cut ``(out, in)`` into ``(out / pr, p, r, in / qr, q, r)``."""
    p, q, r, _ = tiles.shape
    return weight.reshape(weight.shape[0] // (p * r), p, r, weight.shape[1] // (q * r), q, r)


def _block_rows(weight: Tensor, block: Tensor, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor, Tensor, slice]]:
    """Yield block-rows ``(k, in, r)`` of the weight, their blocks, memory for as many, and which outputs they are."""
    count, r, _ = block.shape
    cut = weight.reshape(count, -1, r)
    k = max(1, _CACHED // cut[0].numel())
    made = torch.empty_like(cut[:k], dtype=dtype)
    for start in range(0, count, k):
        rows, b = cut[start : start + k].to(dtype), block[start : start + k].to(dtype)
        yield rows, b, made[: len(rows)], slice(start * r, (start + len(rows)) * r)


def _adapted(rows: Tensor, block: Tensor, out: Tensor) -> Tensor:
    """Compute ``W + W B + B`` of block-rows ``(k, in, r)`` into ``out``; returns it as ``(k r, in)``."""
    k, width, r = rows.shape
    torch.baddbmm(rows, rows, block, out=out)
    out.view(k, r, -1, r).add_(block.unsqueeze(2))
    return out.view(k * r, width)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight.to(x.dtype), bias if bias is None else bias.to(x.dtype))


def _slices(y: Tensor, m: int) -> Tensor:
    """View ``(N, width)`` as ``(N, width // m, m)``; a tail is left out."""
    tiles: Tensor = y[:, : y.shape[1] // m * m].unflatten(1, (-1, m))
    return tiles


def _by_slice(x: Tensor, r: int) -> Tensor:
    """View ``(N, in)`` as ``(in / r, N, r)``."""
    blocks: Tensor = x.unflatten(1, (-1, r))
    return blocks.transpose(0, 1)
