"""Clip-Cov and KL-Cov: restrain the few tokens whose log-probability and advantage vary together most.

The covariance of a token is ``(A - mean A)(log pi - mean log pi)``, means over the batch. Under a softmax policy its
sum drives the fall of the entropy.
"""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from weightsmith.core.errors import UsageError, WeightsmithWarning
from weightsmith.reweight.tokens import Effect, TokenRule, Tokens, check_range, masked_mean

_PATIENCE = 64
UNCLIPPED = (1e6, 1e6)


@torch.no_grad()
def token_covariance(logp: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """Covariance of each token, ``(A - mean A)(logp - mean logp)``, 0 outside the mask.

    Args:
        logp: ``(B, T)``.
        advantages: ``(B, T)``.
        mask: ``(B, T)``.

    Returns:
        ``(B, T)``.

    Source:
        "The Entropy Mechanism of Reinforcement Learning for Reasoning Language Models", arXiv 2505.22617.
    """
    product = (advantages - masked_mean(advantages, mask)) * (logp - masked_mean(logp, mask))
    return torch.where(mask > 0, product, 0.0)


class ClipCov(TokenRule):
    """Drop a few random tokens whose covariance lies in a band; the ratio's clipping stays.

    Args:
        ratio: Share of the tokens to drop, at least one token.
        low: Lower end of the band.
        high: Upper end of the band.
        seed: Starts the rule's own random generator; under several processes all draw the same.

    Source:
        arXiv 2505.22617; defaults of verl.
    """

    def __init__(self, ratio: float = 2e-4, *, low: float = 1.0, high: float = 5.0, seed: int = 0) -> None:
        check_range("ratio", ratio, 0, 1, open_low=True)
        if not low < high:
            raise UsageError(f"high must be above low, {low:g}, got {high}")
        self.ratio, self.low, self.high = ratio, low, high
        self._generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def __call__(self, tokens: Tokens) -> Effect:
        """Weight 0 for the tokens dropped, 1 for the others."""
        covariance = token_covariance(tokens.logp, tokens.advantages, tokens.mask)
        ratio = (tokens.logp - tokens.old_logp).exp()
        below, above = tokens.clip
        gain, loss = tokens.advantages > 0, tokens.advantages < 0
        clipped = (gain & (ratio > 1 + above)) | (loss & (ratio < 1 - below))
        band = tokens.mask & (covariance > self.low) & (covariance < self.high) & ~clipped
        weights = tokens.mask.to(tokens.logp.dtype)
        candidates = band.flatten().nonzero()[:, 0]
        quota = max(1, int(self.ratio * int(tokens.mask.sum())))
        order = torch.randperm(len(candidates), generator=self._generator)[:quota]
        chosen = candidates[order.to(candidates.device)]
        weights.view(-1)[chosen] = 0.0
        metrics = {"clip_cov/dropped": weights.new_tensor(len(chosen)), "clip_cov/in_band": band.sum()}
        return Effect(weights=weights, metrics=metrics)

    def state_dict(self) -> dict[str, Any]:
        """The random generator."""
        return {"generator": self._generator.get_state().tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it back."""
        self._generator.set_state(torch.tensor(state["generator"], dtype=torch.uint8))


class KLCov(TokenRule):
    """Add ``beta |log pi - log pi_old|`` to the tokens of largest covariance; the ratio is not clipped.

    It acts only off-policy: while the policy being trained is the one that sampled, both terms and their gradients are
    0. Take several steps per rollout. A rule that has seen no difference in its first 64 calls says so.

    Args:
        ratio: Share of the tokens, at least one; the authors use 2e-3 for 7B models and 2e-4 for 32B.
        beta: Weight of the penalty; the authors use 1, newer configurations of verl 0.1.

    Source:
        arXiv 2505.22617.
    """

    clip = UNCLIPPED

    def __init__(self, ratio: float = 2e-4, *, beta: float = 1.0) -> None:
        check_range("ratio", ratio, 0, 1, open_low=True)
        if not 0 <= beta < float("inf"):
            raise UsageError(f"beta must be a number of at least 0, got {beta}")
        self.ratio, self.beta = ratio, beta
        self._idle = 0

    @torch.no_grad()
    def __call__(self, tokens: Tokens) -> Effect:
        """Give the factors of the penalty."""
        self._watch(tokens)
        covariance = token_covariance(tokens.logp, tokens.advantages, tokens.mask)
        drift = torch.zeros_like(covariance)
        if bool(tokens.mask.any()):
            quota = max(1, int(self.ratio * int(tokens.mask.sum())))
            valid = tokens.mask.flatten().nonzero()[:, 0]
            drift.view(-1)[valid[covariance[tokens.mask].topk(quota).indices]] = self.beta
        return Effect(drift=drift, metrics={"kl_cov/chosen": (drift > 0).sum()})

    def state_dict(self) -> dict[str, Any]:
        """How many calls have seen no difference between the policies; -1 once one has."""
        return {"idle": self._idle}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it back."""
        self._idle = int(state["idle"])

    def _watch(self, tokens: Tokens) -> None:
        if self._idle < 0 or self._idle >= _PATIENCE:
            return
        moved = bool((tokens.mask & (tokens.logp != tokens.old_logp)).any())
        self._idle = -1 if moved else self._idle + 1
        if self._idle == _PATIENCE:
            warnings.warn(
                f"KLCov has done nothing in {_PATIENCE} calls: logp equals old_logp, so its penalty and gradient are "
                "0. Take several optimizer steps per rollout, and pass the log-probabilities of the rollout",
                WeightsmithWarning,
                stacklevel=3,
            )
