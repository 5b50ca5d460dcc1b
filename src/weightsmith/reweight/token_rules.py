"""The rules that STEER is compared with, on the same interface: clipping, bonuses, selections and other advantages."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from weightsmith.core.errors import UsageError
from weightsmith.reweight.tokens import Effect, TokenRule, Tokens, check_clip, check_range, masked_mean


class ClipHigher(TokenRule):
    """Let the ratio rise further than it may fall, so that rare tokens can grow.

    Args:
        low: How far the ratio may fall below 1.
        high: How far it may rise above 1.

    Source:
        DAPO, arXiv 2503.14476.
    """

    def __init__(self, low: float = 0.2, high: float = 0.28) -> None:
        check_clip((low, high))
        self.clip = (low, high)

    def __call__(self, _: Tokens) -> Effect:
        """Nothing else changes."""
        return Effect()


class EntropyBonus(TokenRule):
    """Subtract ``coef`` times the mean entropy of the policy being trained from the loss.

    Args:
        coef: Weight of the bonus.
        target: Entropy in nats to hold: each call raises the weight by ``step`` while the mean entropy is at or
            below it, lowers it otherwise, and gives no bonus above it; ``None``: the weight is constant.
        step: How much the weight changes per call.
        largest: Largest weight.
    """

    needs = ("entropy",)

    def __init__(
        self, coef: float = 0.01, *, target: float | None = None, step: float = 0.005, largest: float = 1.0
    ) -> None:
        for name, value in (("coef", coef), ("step", step), ("largest", largest)):
            if not 0 <= value < math.inf:
                raise UsageError(f"{name} must be a number of at least 0, got {value}")
        if target is not None and not 0 <= target < math.inf:
            raise UsageError(f"target must be an entropy of at least 0, got {target}")
        self.coef, self.target, self.step, self.largest = coef, target, step, largest

    @torch.no_grad()
    def __call__(self, tokens: Tokens) -> Effect:
        """Give the weight of the bonus for this batch."""
        mean = masked_mean(tokens.need("entropy", "EntropyBonus"), tokens.mask)
        used = self.coef
        if self.target is not None:
            low = bool(mean <= self.target)
            used = self.coef if low else 0.0
            self.coef = min(self.largest, self.coef + self.step) if low else max(0.0, self.coef - self.step)
        return Effect(entropy_coef=used, metrics={"entropy_bonus/coef": mean.new_tensor(used)})

    def state_dict(self) -> dict[str, Any]:
        """The weight, which changes when there is a target."""
        return {"coef": self.coef}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it back."""
        self.coef = float(state["coef"])


class ForkTokens(TokenRule):
    """Train on the tokens of highest entropy alone.

    Args:
        fraction: Share of the tokens that stays.

    Source:
        "Beyond the 80/20 Rule", arXiv 2506.01939.
    """

    needs = ("entropy",)

    def __init__(self, fraction: float = 0.2) -> None:
        check_range("fraction", fraction, 0, 1, open_low=True)
        self.fraction = fraction

    @torch.no_grad()
    def __call__(self, tokens: Tokens) -> Effect:
        """Keep the tokens at or above the quantile; 0 for the others."""
        entropy = tokens.need("entropy", "ForkTokens")
        found = entropy[tokens.mask]
        if not len(found):
            return Effect(weights=torch.zeros_like(entropy))
        threshold = found.topk(max(1, round(self.fraction * len(found)))).values[-1]
        kept = tokens.mask & (entropy >= threshold)
        share = kept.sum() / tokens.mask.sum()
        return Effect(weights=kept.to(entropy.dtype), metrics={"fork_tokens/kept": share})


class WReinforce(TokenRule):
    """Advantage ``positive`` for right answers and ``-negative`` for wrong ones, without a baseline.

    It reads the rewards as the reward function gave them: after normalization in a group, a threshold would separate
    above from below the group's mean, not right from wrong.

    Args:
        positive: Weight of right answers; 0 is negative-sample reinforcement (NSR).
        negative: Weight of wrong answers; 0 with ``positive=1`` is positive-sample reinforcement (PSR).
        threshold: Rewards above this are right.

    Source:
        "The Surprising Effectiveness of Negative Reinforcement in LLM Reasoning", arXiv 2506.01347.
    """

    needs = ("rewards",)

    def __init__(self, positive: float = 0.1, negative: float = 1.0, *, threshold: float = 0.5) -> None:
        for name, value in (("positive", positive), ("negative", negative)):
            if not 0 <= value < math.inf:
                raise UsageError(f"{name} must be a number of at least 0, got {value}")
        self.positive, self.negative, self.threshold = positive, negative, threshold

    @torch.no_grad()
    def __call__(self, tokens: Tokens) -> Effect:
        """Give the advantages; a reward that is NaN has none."""
        rewards = tokens.need("rewards", "WReinforce")
        advantages = torch.where(rewards > self.threshold, self.positive, -self.negative).to(tokens.logp)
        advantages = torch.where(rewards.isnan(), 0.0, advantages)
        return Effect(advantages=advantages[:, None].expand(tokens.logp.shape))


class EntropyAdvantage(TokenRule):
    """Add ``min(alpha H, |A| / kappa)`` to each token's advantage.

    Args:
        alpha: Weight of the entropy.
        kappa: The addition is at most the advantage divided by this; above 1, so that no sign changes.

    Source:
        "Reasoning with Exploration: An Entropy Perspective", arXiv 2506.14758.
    """

    needs = ("entropy",)

    def __init__(self, alpha: float = 0.4, kappa: float = 2.0) -> None:
        if not 0 <= alpha < math.inf:
            raise UsageError(f"alpha must be a number of at least 0, got {alpha}")
        if not 1 < kappa < math.inf:
            raise UsageError(f"kappa must be above 1, so that no advantage changes its sign, got {kappa}")
        self.alpha, self.kappa = alpha, kappa

    @torch.no_grad()
    def __call__(self, tokens: Tokens) -> Effect:
        """Give the advantages."""
        entropy = tokens.need("entropy", "EntropyAdvantage")
        bonus = torch.minimum(self.alpha * entropy, tokens.advantages.abs() / self.kappa)
        return Effect(advantages=tokens.advantages + bonus)
