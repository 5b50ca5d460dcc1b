"""Log-probabilities and entropies of sampled tokens straight from hidden states, without logits of a whole batch.

The reference, in four lines, holds ``(N, V)`` several times:

    logits = (hidden @ weight.T + bias) / temperature
    log_p = logits.log_softmax(-1)
    logp = log_p.gather(-1, targets[:, None])[:, 0]
    entropy = -(log_p.exp() * log_p).sum(-1)

`fused_linear_logprob` gives the same from a buffer of ``chunk_rows`` rows; the backward pass computes each chunk of
logits once more.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from weightsmith.core.errors import UsageError

_CACHED = 2**18


def fused_linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    chunk_rows: int = 256,
    return_second_moment: bool = False,
    entropy_grad: bool = False,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor, Tensor | None]:
    r"""Compute ``log softmax(hidden weight^T / temperature)`` at the targets, and the entropy of the distribution.

    Args:
        hidden: ``(..., D)``.
        weight: ``(V, D)``, the output head.
        targets: ``(...)`` integers.
        bias: ``(V,)``.
        temperature: Divides the logits; log-probability, entropy and second moment are all at this temperature.
        mask: ``(...)``; rows where it is 0 are not computed, and give 0.
        chunk_rows: Rows of logits held at once.
        return_second_moment: Also give ``S = sum_k p_k^2 (log p_k + H)``, for ``Steer("exact")``.
        entropy_grad: Let gradients flow through the entropy, for an entropy bonus.
        ignore_index: Rows with this target are not computed, and give 0.

    Returns:
        ``(logp, entropy, second_moment)``, each ``(...)`` in float32, or float64 when ``weight`` is; the last is
        ``None`` unless asked for and never carries a gradient.

    Raises:
        UsageError: Shapes do not fit, a target is out of range, or an argument is.
    """
    _check(hidden, weight, targets, bias, temperature, mask, chunk_rows)
    shape = targets.shape
    rows, wanted = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    scored = wanted != ignore_index
    if mask is not None:
        scored = scored & (mask.reshape(-1) > 0)
    whole = bool(scored.all())
    if not whole:
        chosen = scored.nonzero()[:, 0]
        rows, wanted = rows.index_select(0, chosen), wanted.index_select(0, chosen)
    if wanted.device.type != "cuda" and len(wanted) and not 0 <= int(wanted.min()) <= int(wanted.max()) < len(weight):
        raise UsageError(
            f"targets must be between 0 and {len(weight) - 1} or ignore_index, {ignore_index}, got "
            f"{int(wanted.min())} to {int(wanted.max())}"
        )
    options = (float(temperature), int(chunk_rows), bool(return_second_moment), bool(entropy_grad))
    found = _LinearLogprob.apply(rows, weight, bias, wanted, *options)  # type: ignore[no-untyped-call]
    if not whole:
        found = tuple(
            part if part is None else part.new_zeros(shape.numel()).index_copy(0, chosen, part) for part in found
        )
    logp, entropy, second = found
    return logp.reshape(shape), entropy.reshape(shape), None if second is None else second.reshape(shape)


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_rows: int,
        moment: bool,
        entropy_grad: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        precise = torch.float64 if weight.dtype == torch.float64 else torch.float32
        n = len(hidden)
        logp, entropy, lse = (torch.empty(n, dtype=precise, device=hidden.device) for _ in range(3))
        second = torch.empty_like(logp) if moment else None
        with torch.autocast(hidden.device.type, enabled=False):
            logits = _Logits(hidden, weight, bias, temperature, chunk_rows)
            e_buffer, product = (torch.empty_like(logits.buffer[: _block(weight)]) for _ in range(2))
            for part, z in logits.blocks():
                # unshifted, ln Z - sum(p z) would cancel for large logits
                top = z.amax(1, keepdim=True)
                z.sub_(top)
                e = torch.exp(z, out=e_buffer[: len(z)])
                total = e.sum(1)
                log_total = total.log()
                picked = z.gather(1, targets[part, None])[:, 0]
                logp[part] = picked - log_total
                # a logit of -inf has probability 0 and adds nothing
                z.clamp_(min=torch.finfo(precise).min / 4)
                h = log_total - torch.mul(e, z, out=product[: len(z)]).sum(1) / total
                entropy[part] = h
                lse[part] = top[:, 0] + log_total
                if second is not None:
                    norm = total.square()
                    squares = e.square_().sum(1) / norm
                    second[part] = e.mul_(z).sum(1) / norm + (h - log_total) * squares
        ctx.save_for_backward(hidden, weight, bias, targets, lse, entropy)
        ctx.options = temperature, chunk_rows, entropy_grad
        constant = [second] if entropy_grad else [entropy, second]
        ctx.mark_non_differentiable(*[part for part in constant if part is not None])  # a second call would undo it
        return logp, entropy, second

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logp: Tensor, grad_entropy: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, lse, entropy = ctx.saved_tensors
        temperature, chunk_rows, entropy_grad = ctx.options
        want_hidden, want_weight, want_bias = ctx.needs_input_grad[:3]
        precise = lse.dtype
        grad_hidden = torch.empty_like(hidden) if want_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=precise, device=weight.device) if want_weight else None
        grad_bias = torch.zeros(len(weight), dtype=precise, device=weight.device) if want_bias else None
        with torch.autocast(hidden.device.type, enabled=False):
            logits = _Logits(hidden, weight, bias, temperature, chunk_rows)
            for start in range(0, len(hidden), chunk_rows):
                part = slice(start, min(len(hidden), start + chunk_rows))
                dz = logits(part)
                for rows in _blocks(part, weight):
                    log_p = dz[rows.start - start : rows.stop - start].sub_(lse[rows, None])
                    g = grad_logp[rows, None].to(precise) / temperature
                    if entropy_grad:
                        p = log_p.exp()
                        log_p.clamp_(min=-1e4)  # p is 0 there; a larger number could overflow in products
                        pull = grad_entropy[rows, None].to(precise) / temperature
                        log_p.add_(entropy[rows, None]).mul_(pull).add_(g).mul_(p).neg_()
                    else:
                        log_p.exp_().mul_(-g)
                    log_p.scatter_add_(1, targets[rows, None], g)
                low = dz.to(weight.dtype)
                if grad_hidden is not None:
                    grad_hidden[part] = low @ weight
                if grad_weight is not None:
                    if weight.dtype == precise:
                        grad_weight.addmm_(low.t(), hidden[part].to(weight.dtype))
                    else:
                        grad_weight += low.t() @ hidden[part].to(weight.dtype)
                if grad_bias is not None:
                    grad_bias += dz.sum(0)
        given = None if grad_weight is None else grad_weight.to(weight.dtype)
        return grad_hidden, given, None if grad_bias is None else grad_bias.to(bias.dtype), *[None] * 5


class _Logits:
    """Chunks of logits, each written over the last."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, chunk_rows: int
    ) -> None:
        self._hidden, self._weight, self._bias, self._temperature = hidden, weight, bias, temperature
        precise = torch.float64 if weight.dtype == torch.float64 else torch.float32
        rows = min(len(hidden), chunk_rows)
        self.buffer = torch.empty(rows, len(weight), dtype=precise, device=hidden.device)

    def __call__(self, part: slice) -> Tensor:
        h = self._hidden[part].to(self._weight.dtype)
        z = self.buffer[: len(h)]
        if self._weight.dtype == z.dtype:
            torch.mm(h, self._weight.t(), out=z)
        else:
            z.copy_(h @ self._weight.t())
        if self._bias is not None:
            z.add_(self._bias)
        return z if self._temperature == 1 else z.div_(self._temperature)

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """All rows, a few at a time."""
        n, chunk = len(self._hidden), max(1, len(self.buffer))
        for start in range(0, n, chunk):
            part = slice(start, min(n, start + chunk))
            z = self(part)
            for rows in _blocks(part, self._weight):
                yield rows, z[rows.start - start : rows.stop - start]


def _block(weight: Tensor) -> int:
    """Rows whose logits stay in a core's cache while they are read several times; on a GPU all of a chunk."""
    return max(1, _CACHED // len(weight)) if weight.device.type == "cpu" else _CACHED


def _blocks(part: slice, weight: Tensor) -> Iterator[slice]:
    step = _block(weight)
    for start in range(part.start, part.stop, step):
        yield slice(start, min(part.stop, start + step))


def _check(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    mask: Tensor | None,
    chunk_rows: int,
) -> None:
    if weight.dim() != 2 or hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise UsageError(
            f"hidden must be (..., D) and weight (V, D), got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if targets.shape != hidden.shape[:-1]:
        raise UsageError(
            f"targets must be {tuple(hidden.shape[:-1])}, one per row of hidden, got {tuple(targets.shape)}"
        )
    if targets.is_floating_point() or targets.dtype == torch.bool:
        raise UsageError(f"targets must be integers, got {targets.dtype}")
    if mask is not None and mask.shape != targets.shape:
        raise UsageError(f"mask must have the shape of targets, {tuple(targets.shape)}, got {tuple(mask.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise UsageError(f"bias must be ({len(weight)},), got {tuple(bias.shape)}")
    if not 0 < temperature < float("inf"):
        raise UsageError(f"temperature must be above 0, got {temperature}")
    if chunk_rows < 1:
        raise UsageError(f"chunk_rows must be at least 1, got {chunk_rows}")
