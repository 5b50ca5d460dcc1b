"""How well each objective's policy gradient agrees with the sum of all: ``I_k = <g_k, sum_j g_j>``."""

from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from weightsmith.core.errors import UsageError, unknown
from weightsmith.reweight.sequence_influence import LogProbs, sequence_influence
from weightsmith.reweight.tokens import per_token

_METHODS = ("backward", "sequence", "jvp")


def objective_influence(
    logp: Tensor | LogProbs,
    advantages: Tensor,
    mask: Tensor,
    params: Sequence[Tensor],
    *,
    method: Literal["backward", "sequence", "jvp"] = "backward",
    max_norm: float | None = 1.0,
    norm_params: Sequence[Tensor] | None = None,
    normalizer: float | None = None,
    retain_graph: bool = False,
) -> Tensor:
    r"""Compute the influence of each objective on rollouts of the current policy.

    At ratio 1 the gradient of an objective's loss is ``g_k = -sum_t mask A_k d logp_t / n``.

    - ``"backward"``: one vector-Jacobian product per objective, through one graph; gradients can be clipped.
    - ``"sequence"``: the same from one backward pass over activations, where advantages are constant within a sequence;
      without clipping its cost does not depend on the number of objectives.
      Exact when the sequences of a batch do not act on each other (no batch normalization) and are the first dimension
      of every layer's input. Parameters outside of linear layers, `layer_norm` and `rms_norm` take the way of
      ``"backward"``.
    - ``"jvp"``: ``u = sum_k g_k`` from one backward pass, then one forward-mode product ``d_t`` along ``u``, and
      ``I_k = -sum_t mask A_k d_t / n`` for all objectives at once. The same number, without clipping.

    ``.grad`` of the parameters is left alone. Forward mode computes torch's attention by its plain formula, because the
    fast kernels lack it.

    Args:
        logp: ``(B, T)`` with gradient, or for ``"sequence"`` and ``"jvp"`` a function that computes it from ``params``,
            for example through `torch.func.functional_call`.
        advantages: ``(K, B)`` or ``(K, B, T)``, each objective normalized on its own.
        mask: ``(B, T)``, nonzero where a token counts.
        params: What the influence is measured on; the paper takes the middle layers. Those that the policy does not
            use count as 0.
        method: See above.
        max_norm: Clip each objective's gradient to this norm; must be ``None`` for ``"jvp"``.
        norm_params: What the norm is taken over, in the paper all parameters; ``None``: ``params``.
        normalizer: Divides the sums over tokens; ``None``: the number of tokens.
        retain_graph: Keep the graph of ``logp``, so that the loss of the same step needs no forward pass of its own;
            for ``"backward"``. ``"sequence"`` always leaves the graph of what the function returned.

    Returns:
        ``(K,)``, float64 on the CPU when the parameters are double, else float32 at least.

    Raises:
        UsageError: Shapes do not fit, the method is unknown, ``"jvp"`` or ``"sequence"`` comes without a function,
            ``"jvp"`` with ``max_norm``, or ``"sequence"`` with advantages that differ within a sequence.

    Source:
        arXiv 2509.11452; the forward-mode form follows from the chain rule.
    """
    if method not in _METHODS:
        raise unknown("method", str(method), _METHODS)
    if not params:
        raise UsageError("params must hold at least one tensor, got none")
    if max_norm is not None and not max_norm > 0:
        raise UsageError(f"max_norm must be above 0, got {max_norm}")
    if method != "backward" and isinstance(logp, Tensor):
        raise UsageError(f"method {method!r} needs logp as a function of params, so that it can follow its layers")
    if method == "sequence" and not isinstance(logp, Tensor):
        slopes = partial(_slopes, advantages, mask, normalizer=normalizer)
        return sequence_influence(logp, slopes, mask, params, _others(params, norm_params), max_norm)
    if method == "jvp" and not isinstance(logp, Tensor):
        if max_norm is not None:
            raise UsageError(f'method "jvp" never sees single gradients: pass max_norm=None, got {max_norm}')
        return _forward_mode(logp, advantages, mask, tuple(params), normalizer)
    found = logp if isinstance(logp, Tensor) else logp(tuple(params))
    everything = [*params, *_others(params, norm_params)]
    gradients = objective_gradients(
        found, advantages, mask, everything, normalizer=normalizer, retain_graph=retain_graph
    )
    return influence_of(gradients, max_norm=max_norm, targets=len(params))


def objective_gradients(
    logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    params: Sequence[Tensor],
    *,
    normalizer: float | None = None,
    retain_graph: bool = False,
) -> list[list[Tensor]]:
    """Compute the gradient of each objective's loss at ratio 1; add those of several micro-batches up.

    Args:
        logp: ``(B, T)``, with gradient.
        advantages: ``(K, B)`` or ``(K, B, T)``.
        mask: ``(B, T)``.
        params: What to differentiate with respect to.
        normalizer: Divides the sums over tokens; over micro-batches the number of all tokens. ``None``: the tokens of
            this call, whose sum over micro-batches is what the authors' code computes.
        retain_graph: Keep the graph of ``logp``.

    Returns:
        Per objective the gradients, in the order and shape of ``params``; half precision as float32.
    """
    slopes = _slopes(advantages, mask, logp, normalizer)
    # an objective without advantages, such as a saturated one, has no gradient: nothing to compute
    acting = [bool(slope.any()) for slope in slopes]
    last = max((index for index, acts in enumerate(acting) if acts), default=-1)
    found = []
    for index, slope in enumerate(slopes):
        parts: Sequence[Tensor | None] = [None] * len(params)
        if acting[index]:
            keep = retain_graph or index != last
            parts = torch.autograd.grad(logp, params, slope.to(logp.dtype), retain_graph=keep, allow_unused=True)
        found.append(
            [
                torch.zeros_like(p, dtype=_precise(p)) if part is None else part.to(_precise(p))
                for p, part in zip(params, parts, strict=True)
            ]
        )
    return found


@torch.no_grad()
def influence_of(
    gradients: Sequence[Sequence[Tensor]], *, max_norm: float | None = 1.0, targets: int | None = None
) -> Tensor:
    """Compute ``I_k = <g_k, sum_j g_j>`` from gradients, clipped to a norm first.

    Args:
        gradients: Per objective a list of tensors.
        max_norm: Clip the norm over all tensors of an objective; ``None``: do not.
        targets: Only so many tensors, from the first, enter the products; ``None``: all.

    Returns:
        ``(K,)``.
    """
    scaled = []
    for parts in gradients:
        scale = torch.ones((), dtype=parts[0].dtype, device=parts[0].device)
        if max_norm is not None:
            norm = torch.stack([part.norm() for part in parts]).norm()
            scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        scaled.append([scale * part for part in parts[:targets]])
    total = [torch.stack(parts).sum(0) for parts in zip(*scaled, strict=True)]
    rows = [torch.stack([(g * u).sum() for g, u in zip(parts, total, strict=True)]).sum() for parts in scaled]
    return torch.stack(rows)


def _forward_mode(
    logp: LogProbs, advantages: Tensor, mask: Tensor, params: tuple[Tensor, ...], normalizer: float | None
) -> Tensor:
    # detached leaves: neither .grad nor the caller's graph is touched
    leaves = tuple(p.detach().requires_grad_() for p in params)
    found = logp(leaves)
    slopes = _slopes(advantages, mask, found, normalizer)
    parts = torch.autograd.grad(found, leaves, slopes.sum(0).to(found.dtype), allow_unused=True)
    direction = tuple(torch.zeros_like(p) if part is None else part for p, part in zip(leaves, parts, strict=True))
    # torch's fast attention kernels cannot be differentiated forward
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        moved = torch.func.jvp(lambda *values: logp(values), tuple(p.detach() for p in leaves), direction)[1]
    effect: Tensor = (slopes * moved.detach().to(slopes.dtype)).sum((1, 2))
    return effect


def _slopes(advantages: Tensor, mask: Tensor, logp: Tensor, normalizer: float | None) -> Tensor:
    """``(K, B, T)``: the derivative of each objective's loss with respect to each log-probability."""
    if advantages.dim() not in (2, 3) or logp.dim() != 2 or mask.shape != logp.shape:
        raise UsageError(
            f"advantages must be (K, B) or (K, B, T), logp and mask (B, T), got {tuple(advantages.shape)}, "
            f"{tuple(logp.shape)} and {tuple(mask.shape)}"
        )
    if normalizer is not None and not normalizer > 0:
        raise UsageError(f"normalizer must be above 0, got {normalizer}")
    counted = mask > 0
    count = float(counted.sum().clamp(min=1)) if normalizer is None else normalizer
    rows = torch.stack([per_token(row, logp) for row in advantages]).to(_precise(logp))
    return torch.where(counted, -rows.nan_to_num(0.0) / count, 0.0)


def _others(params: Sequence[Tensor], norm_params: Sequence[Tensor] | None) -> list[Tensor]:
    known = {id(p) for p in params}
    return [p for p in norm_params or () if id(p) not in known]


def _precise(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
