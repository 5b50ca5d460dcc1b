"""The clipped policy loss of PPO and GRPO, with a token rule folded in."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from weightsmith.core.errors import UsageError, unknown
from weightsmith.reweight.covariance import UNCLIPPED
from weightsmith.reweight.tokens import Clip, TokenRule, Tokens, check_clip, masked_mean

Aggregate = Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
AGGREGATES = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")


@dataclass(frozen=True, slots=True)
class PolicyLoss:
    """A loss and what went into it.

    Attributes:
        loss: Scalar, to call ``backward`` on.
        weights: ``(B, T)``, the factors of the tokens' losses; ``None`` when there were none.
        metrics: Numbers to log, as tensors without dimensions: shares of tokens clipped (``clip/high``, ``clip/low``,
            ``clip/dual``) and what the rule reports.
    """

    loss: Tensor
    weights: Tensor | None = None
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


def policy_loss(
    logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    old_logp: Tensor | None = None,
    rule: TokenRule | None = None,
    entropy: Tensor | None = None,
    old_entropy: Tensor | None = None,
    second_moment: Tensor | None = None,
    rewards: Tensor | None = None,
    clip: Clip = (0.2, 0.2),
    dual_clip: float | None = 3.0,
    aggregate: Aggregate = "token-mean",
    normalizer: float | Tensor | None = None,
) -> PolicyLoss:
    r"""Compute the clipped policy loss of a batch of sampled tokens.

    With ``r = exp(logp - old_logp)``, the difference clamped to 20, and ``lambda`` from the rule:

    ``L = max(-A r, -A clamp(r, 1 - low, 1 + high))``, for ``A < 0`` at most ``-A dual_clip``;
    ``loss = aggregate(lambda L + drift |logp - old_logp|) - entropy_coef mean(H)``

    A loss that is the sum over micro-batches needs the same ``normalizer`` for all; so that a rule also sees the whole
    batch, call it beforehand with all tokens (`Tokens.of`) and multiply the advantages of each micro-batch by its share
    of the weights.

    Args:
        logp: ``(B, T)``, with gradient.
        advantages: ``(B,)``, ``(B, 1)`` or ``(B, T)``; see `group_advantages`.
        mask: ``(B, T)``, nonzero where a token counts.
        old_logp: ``(B, T)``, under the policy that sampled; ``None``: the same policy.
        rule: `Steer` or one of its rivals; ``None``: every token counts alike.
        entropy: ``(B, T)``, for rules that need it; with gradient for `EntropyBonus`.
        old_entropy: ``(B, T)``, of the policy that sampled.
        second_moment: ``(B, T)``, for ``Steer("exact")``.
        rewards: ``(B,)``, as the reward function gave them, for `WReinforce`.
        clip: How far the ratio may fall below 1 and rise above it; the rule's own range goes first.
        dual_clip: Bound on the ratio for negative advantages, above 1; ``None``: none.
        aggregate: How tokens become one number; ``"seq-mean-token-sum-norm"`` divides the sum by ``T``.
        normalizer: With ``"token-mean"``: divide by this instead of the number of tokens in this call.

    Returns:
        The loss, its weights and metrics.

    Raises:
        UsageError: A shape does not fit, an argument is out of range, or the rule needs what is not given.
    """
    if rule is not None and rule.clip is not None:
        clip = rule.clip
        dual_clip = None if clip == UNCLIPPED else dual_clip  # a rule that clips nothing, such as KLCov
    check_clip(clip)
    if dual_clip is not None and not dual_clip > 1:
        raise UsageError(f"dual_clip must be above 1, got {dual_clip}")
    if aggregate not in AGGREGATES:
        raise unknown("aggregate", str(aggregate), AGGREGATES)
    tokens = Tokens.of(
        logp, advantages, mask, old_logp=old_logp, entropy=entropy, old_entropy=old_entropy,
        second_moment=second_moment, rewards=rewards, clip=clip,
    )  # fmt: skip
    effect = None if rule is None else rule(tokens)
    scale = tokens.advantages if effect is None or effect.advantages is None else effect.advantages
    logp = logp.to(tokens.logp.dtype)
    # masked tokens may hold anything, infinities included; their gradient must be 0, not NaN
    drift = torch.where(tokens.mask, logp, 0.0) - torch.where(tokens.mask, tokens.old_logp, 0.0)
    ratio = drift.clamp(-20, 20).exp()
    low, high = clip
    unclipped, clipped = -scale * ratio, -scale * ratio.clamp(1 - low, 1 + high)
    losses = torch.maximum(unclipped, clipped)
    metrics = {
        "clip/high": masked_mean((clipped > unclipped) & (scale > 0), tokens.mask),
        "clip/low": masked_mean((clipped > unclipped) & (scale < 0), tokens.mask),
    }
    if dual_clip is not None:
        bound = -scale * dual_clip
        metrics["clip/dual"] = masked_mean((losses > bound) & (scale < 0), tokens.mask)
        losses = torch.where(scale < 0, torch.minimum(losses, bound), losses)
    weights = None if effect is None else effect.weights
    if weights is not None:
        losses = losses * weights
    if effect is not None and effect.drift is not None:
        losses = losses + effect.drift * drift.abs()
    loss = aggregate_tokens(losses, tokens.mask, aggregate, normalizer)
    if effect is not None:
        metrics.update(effect.metrics)
        if effect.entropy_coef:
            assert entropy is not None  # the rule has asked for it
            if torch.is_grad_enabled() and logp.requires_grad and not entropy.requires_grad:
                raise UsageError(
                    "entropy has no gradient, so its bonus would do nothing: compute it with gradient, as "
                    "fused_linear_logprob does with entropy_grad=True"
                )
            bonus = aggregate_tokens(entropy.to(losses.dtype), tokens.mask, aggregate, normalizer)
            loss = loss - effect.entropy_coef * bonus
    return PolicyLoss(loss, weights, {name: value.detach() for name, value in metrics.items()})


def aggregate_tokens(
    losses: Tensor, mask: Tensor, how: Aggregate = "token-mean", normalizer: float | Tensor | None = None
) -> Tensor:
    """Turn losses per token into one number; 0 when no token counts.

    Args:
        losses: ``(B, T)``.
        mask: ``(B, T)``, nonzero where a token counts.
        how: See `policy_loss`.
        normalizer: With ``"token-mean"``: divide by this instead of the number of tokens.

    Returns:
        Scalar.
    """
    if normalizer is not None and (how != "token-mean" or not math.isfinite(float(normalizer)) or normalizer <= 0):
        raise UsageError(f'normalizer must be above 0 and goes with aggregate "token-mean", got {normalizer}')
    chosen = mask > 0
    kept = torch.where(chosen, losses, 0.0)
    if how == "token-mean":
        return kept.sum() / (chosen.sum().clamp(min=1) if normalizer is None else normalizer)
    sums = kept.sum(1)
    if not losses.numel():
        return sums.sum()
    if how == "seq-mean-token-sum":
        return sums.mean()
    if how == "seq-mean-token-sum-norm":
        return sums.sum() / losses.shape[1]
    return (sums / chosen.sum(1).clamp(min=1)).mean()
