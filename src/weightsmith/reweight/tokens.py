"""What a rule sees of the sampled tokens, what it does to them, and the interface that all rules share.

A rule looks at a batch of sampled tokens once and answers with an `Effect`: other advantages, a factor per token, a
penalty on tokens that drift from the policy that sampled them, or an entropy bonus. `policy_loss` applies it in a
loop of one's own, `weightsmith.integrations.trl` in TRL's trainer.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from weightsmith.core.errors import UsageError

Clip = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Tokens:
    """A batch of sampled tokens, without gradient and in float32 at least; make one with `Tokens.of`.

    Attributes:
        logp: ``(B, T)``, log-probability of each sampled token under the policy being trained.
        old_logp: ``(B, T)``, the same under the policy that sampled it.
        advantages: ``(B, T)``.
        mask: ``(B, T)``, boolean: which tokens are trained on.
        entropy: ``(B, T)``, entropy in nats of the next-token distribution of the policy being trained.
        old_entropy: ``(B, T)``, the same of the policy that sampled.
        second_moment: ``(B, T)``, ``sum_k p_k^2 (log p_k + H)``, as `fused_linear_logprob` gives it.
        rewards: ``(B,)``, as the reward function gave them, before any normalization.
        clip: How far the ratio may fall below 1 and rise above it before the loss is clipped.
    """

    logp: Tensor
    old_logp: Tensor
    advantages: Tensor
    mask: Tensor
    entropy: Tensor | None = None
    old_entropy: Tensor | None = None
    second_moment: Tensor | None = None
    rewards: Tensor | None = None
    clip: Clip = (0.2, 0.2)

    @staticmethod
    @torch.no_grad()
    def of(
        logp: Tensor,
        advantages: Tensor,
        mask: Tensor,
        *,
        old_logp: Tensor | None = None,
        entropy: Tensor | None = None,
        old_entropy: Tensor | None = None,
        second_moment: Tensor | None = None,
        rewards: Tensor | None = None,
        clip: Clip = (0.2, 0.2),
    ) -> "Tokens":
        """Check shapes, detach, and bring half precision to float32; float64 stays.

        Args:
            logp: ``(B, T)``.
            advantages: ``(B,)``, ``(B, 1)`` or ``(B, T)``.
            mask: ``(B, T)``, nonzero where a token counts.
            old_logp: ``(B, T)``; ``None``: the policy that sampled is the one being trained.
            entropy: See `Tokens`.
            old_entropy: See `Tokens`.
            second_moment: See `Tokens`.
            rewards: See `Tokens`.
            clip: See `Tokens`.

        Raises:
            UsageError: A shape does not fit.
        """
        if logp.dim() != 2:
            raise UsageError(f"logp must be (B, T), got {tuple(logp.shape)}")
        precise = torch.float64 if logp.dtype == torch.float64 else torch.float32
        given = {
            "old_logp": logp if old_logp is None else old_logp,
            "mask": mask,
            "entropy": entropy,
            "old_entropy": old_entropy,
            "second_moment": second_moment,
        }
        ready: dict[str, Any] = {}
        for name, value in given.items():
            if value is not None and value.shape != logp.shape:
                raise UsageError(f"{name} must have the shape of logp, {tuple(logp.shape)}, got {tuple(value.shape)}")
            ready[name] = None if value is None else value.detach().to(precise)
        ready["mask"] = mask > 0
        if rewards is not None and rewards.shape != logp.shape[:1]:
            raise UsageError(f"rewards must be ({len(logp)},), one per sequence, got {tuple(rewards.shape)}")
        return Tokens(
            logp=logp.detach().to(precise),
            advantages=per_token(advantages, logp).to(precise),
            rewards=None if rewards is None else rewards.detach().to(precise),
            clip=clip,
            **ready,
        )

    def need(self, name: str, rule: str) -> Tensor:
        """The attribute ``name``, or an error that says who needs it."""
        value: Tensor | None = getattr(self, name)
        if value is None:
            raise UsageError(f"{rule} needs {name}: hand it in beside logp")
        return value


@dataclass(frozen=True, slots=True)
class Effect:
    """What a rule does to the loss of a batch of tokens; what is ``None`` stays as it is.

    Attributes:
        advantages: ``(B, T)``, instead of the ones given.
        weights: ``(B, T)``, factor of each token's policy loss; 0 where the mask is 0.
        drift: ``(B, T)``, factor of ``|logp - old_logp|``, added to each token's loss.
        entropy_coef: Factor of the mean entropy, subtracted from the loss.
        metrics: Numbers to log, as tensors without dimensions.
    """

    advantages: Tensor | None = None
    weights: Tensor | None = None
    drift: Tensor | None = None
    entropy_coef: float = 0.0
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


class TokenRule:
    """Base of all rules: called with `Tokens`, it answers with an `Effect`.

    Attributes:
        clip: The clipping range that the rule wants, ``None``: that of the caller.
        needs: Attributes of `Tokens` that must be given beside ``logp``, ``advantages`` and ``mask``.
    """

    clip: Clip | None = None
    needs: ClassVar[tuple[str, ...]] = ()

    def __call__(self, tokens: Tokens, /) -> Effect:
        """Look at the tokens of a whole training batch."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """What changes while training, as plain data; most rules have nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it back."""


def per_token(values: Tensor, like: Tensor) -> Tensor:
    """Spread ``(B,)``, ``(B, 1)`` or ``(B, T)`` over the tokens of ``like``, ``(B, T)``.

    Raises:
        UsageError: None of these shapes.
    """
    values = values.detach()
    if values.dim() == 1:
        values = values[:, None]
    if values.dim() != 2 or values.shape[0] != like.shape[0] or values.shape[1] not in (1, like.shape[1]):
        b, t = like.shape
        raise UsageError(f"advantages must be ({b},), ({b}, 1) or ({b}, {t}), got {tuple(values.shape)}")
    return values.expand(like.shape)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of the values whose mask is nonzero; 0 when there are none. What is masked may be NaN."""
    chosen = mask > 0
    return torch.where(chosen, values, 0.0).sum() / chosen.sum().clamp(min=1)


def check_range(name: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    """Refuse a number outside ``low`` to ``high``.

    Raises:
        UsageError: Names the argument, its value and the range.
    """
    inside = low < value <= high if open_low else low <= value <= high
    if not inside:
        words = f"above {low:g} and at most {high:g}" if open_low else f"between {low:g} and {high:g}"
        raise UsageError(f"{name} must be {words}, got {value}")


def check_clip(clip: Clip) -> None:
    """Refuse a clipping range that is none.

    Raises:
        UsageError: A bound is negative or not a number.
    """
    if len(clip) != 2 or not all(bound >= 0 for bound in clip):
        raise UsageError(f"clip must be two numbers of at least 0, how far below and above 1, got {clip}")
