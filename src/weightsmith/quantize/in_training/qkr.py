"""QKR, query-key reparameterization: train ``Wq`` and ``Wk``, quantize their product.

A logit of head ``h`` is ``x_i (Wq_h^T Wk_h) x_j``. Quantizing both matrices lets each see the other's rounding noise;
QKR quantizes the product, which is all that the logit depends on. Its price is a matrix per head where there were two
slices of one: ``heads * C * C`` codes instead of ``2 * C * C``.

    M_h     = Wq_h^T Wk_h                     (C, C), from the latent weights
    t[j, h] = StatsQ(M_h) x_j                 quantized in its turn, one step per token and head
    logit   = x_i . t[j, h] / sqrt(d)

Source: "Oscillation-free Quantization for Low-bit Vision Transformers", ICML 2023, arXiv 2302.02210.
"""

from typing import Any

import torch
from torch import Tensor, nn

from weightsmith.core.errors import UsageError
from weightsmith.quantize.in_training.cache import VersionCache
from weightsmith.quantize.in_training.weight_quantizer import WeightQuantizer


def query_key_product(wq: Tensor, wk: Tensor, heads: int) -> Tensor:
    """Multiply query and key weights head by head: ``M_h = Wq_h^T Wk_h``.

    Args:
        wq: ``(heads * d, Cq)``.
        wk: ``(groups * d, Ck)``; every one of ``groups`` key heads serves ``heads / groups`` query heads.
        heads: Number of query heads.

    Returns:
        ``(heads * Cq, Ck)``, row ``h * Cq + c``; the gradient reaches both.

    Raises:
        UsageError: The head counts and the shapes do not fit together.
    """
    q, k = _by_head(wq, wk, heads)
    return (q.transpose(1, 2) @ k).flatten(0, 1)


def query_key_bias(bias: Tensor, wk: Tensor, heads: int) -> Tensor:
    """What a query bias adds to the logits of token ``j`` is ``c_h . x_j`` with ``c_h = Wk_h^T bq_h``.

    Args:
        bias: ``(heads * d,)``.
        wk: ``(groups * d, C)``.
        heads: Number of query heads.

    Returns:
        ``c``, ``(heads, C)``.
    """
    return query_key_product(bias[:, None], wk, heads)


class QueryKeyProduct(nn.Module):
    """Makes and quantizes the product; within ``cached_weights`` once.

    Args:
        heads: Number of query heads.
        quantizer: Of the product, one step per row.
    """

    def __init__(self, heads: int, quantizer: WeightQuantizer) -> None:
        super().__init__()
        self.heads, self.quantizer = heads, quantizer
        self._cache = VersionCache()

    def forward(self, wq: Tensor, wk: Tensor) -> Tensor:
        """Return the quantized product ``(heads * C, C)`` of the latent weights, in float32 at least."""
        with torch.autocast(wq.device.type, enabled=False):
            kept = self._cache(lambda: self.latent(wq.detach(), wk.detach()), wq, wk)
            out: Tensor = self.quantizer(_Product.apply(wq, wk, self.heads, kept))  # type: ignore[no-untyped-call]
            return out

    def latent(self, wq: Tensor, wk: Tensor) -> Tensor:
        """Return the product before it is quantized, in float32 at least."""
        return query_key_product(_full(wq), _full(wk), self.heads)


class _Product(torch.autograd.Function):
    """Keeps the two weights, which live anyway, and no per-head copies."""

    @staticmethod
    def forward(ctx: Any, wq: Tensor, wk: Tensor, heads: int, value: Tensor) -> Tensor:
        ctx.save_for_backward(wq, wk)
        ctx.heads = heads
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        wq, wk = ctx.saved_tensors
        q, k = _by_head(_full(wq), _full(wk), ctx.heads)
        grad = grads[0].unflatten(0, (ctx.heads, -1))
        grad_q = (k @ grad.transpose(1, 2)).flatten(0, 1)
        repeats = ctx.heads * q.shape[1] // len(wk)
        grad_k = (q @ grad).unflatten(0, (-1, repeats)).sum(1).flatten(0, 1)
        return grad_q.to(wq.dtype), grad_k.to(wk.dtype), None, None


def _by_head(wq: Tensor, wk: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    if heads < 1 or len(wq) % heads:
        raise UsageError(f"heads must divide the {len(wq)} rows of the query weight, got {heads}")
    width = len(wq) // heads
    if len(wk) % width or heads % (len(wk) // width):
        raise UsageError(f"{len(wk)} key rows cannot serve {heads} query heads of {width}")
    q, k = wq.unflatten(0, (heads, width)), wk.unflatten(0, (-1, width))
    return q, k if len(k) == heads else k.repeat_interleave(heads // len(k), 0)


def _full(w: Tensor) -> Tensor:
    return w.to(torch.promote_types(w.dtype, torch.float32))
