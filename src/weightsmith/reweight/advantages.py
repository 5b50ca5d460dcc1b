"""Advantages from the rewards of groups of samples: GRPO, Dr. GRPO, RLOO, REINFORCE++ and OPO."""

from typing import Literal

import torch
from torch import Tensor

from weightsmith.core.errors import UsageError, unknown

Method = Literal["grpo", "dr_grpo", "rloo", "reinforce_pp", "opo"]
METHODS = ("grpo", "dr_grpo", "rloo", "reinforce_pp", "opo")
SCALE_INVARIANT = ("grpo", "reinforce_pp")
"""Methods whose advantages do not change when all rewards are multiplied by the same number."""


@torch.no_grad()
def group_advantages(
    rewards: Tensor, group: Tensor, *, method: Method = "grpo", mask: Tensor | None = None, eps: float = 1e-6
) -> Tensor:
    r"""Compute advantages of samples that share a prompt.

    | method | advantage |
    |---|---|
    | `"grpo"` | `(R - mean) / (std + eps)` in the group, sample standard deviation |
    | `"dr_grpo"` | `R - mean` |
    | `"rloo"` | `R - mean of the others` |
    | `"reinforce_pp"` | whitened over all tokens of the batch: `(R - mean) / sqrt(var + 1e-8)` |
    | `"opo"` | `R - sum_j len_j R_j / sum_j len_j` in the group |

    A group of one keeps its reward. A reward that is NaN (not applicable) is left out of means and deviations and gets
    advantage 0.

    Args:
        rewards: ``(B,)``.
        group: ``(B,)`` integers: which samples share a prompt.
        method: See above.
        mask: ``(B, T)``, nonzero where a token counts; needed for ``"reinforce_pp"`` and ``"opo"``.
        eps: Added to the standard deviation of ``"grpo"``; 1e-6 in verl, 1e-4 in TRL.

    Returns:
        ``(B,)``, or with a mask ``(B, T)``, 0 outside it.

    Raises:
        UsageError: Shapes do not fit, the method is unknown, or it needs a mask.
    """
    if method not in METHODS:
        raise unknown("method", str(method), METHODS)
    if rewards.dim() != 1 or group.shape != rewards.shape:
        raise UsageError(f"rewards and group must be (B,), got {tuple(rewards.shape)} and {tuple(group.shape)}")
    if mask is not None and (mask.dim() != 2 or len(mask) != len(rewards)):
        raise UsageError(f"mask must be ({len(rewards)}, T), got {tuple(mask.shape)}")
    if mask is None and method in ("reinforce_pp", "opo"):
        raise UsageError(f"method {method!r} needs mask: it counts tokens")
    rewards = rewards.detach() if rewards.dtype == torch.float64 else rewards.detach().float()
    known = ~rewards.isnan()
    filled = torch.where(known, rewards, 0.0)
    tokens = None if mask is None else (mask > 0) & known[:, None]
    if method == "reinforce_pp":
        assert tokens is not None
        found = _whitened(filled, tokens.sum(1).to(filled))
    else:
        found = _in_groups(filled, known.to(filled), group, method, tokens, eps)
    found = torch.where(known, found, 0.0)
    return found if mask is None else found[:, None] * (mask > 0)


@torch.no_grad()
def objective_advantages(
    scores: Tensor,
    weights: Tensor,
    group: Tensor,
    *,
    method: Method = "grpo",
    mask: Tensor | None = None,
    aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize",
    eps: float = 1e-6,
) -> Tensor:
    """Compute advantages from several rewards.

    Args:
        scores: ``(B, K)``; NaN where a reward does not apply.
        weights: ``(K,)``.
        group: See `group_advantages`.
        method: See `group_advantages`.
        mask: See `group_advantages`.
        aggregation: ``"sum_then_normalize"``: advantages of the weighted sum; ``"normalize_then_sum"``: the weighted
            sum of each reward's advantages (GDPO without its last normalization over the batch).
        eps: See `group_advantages`.

    Returns:
        As `group_advantages`.

    Raises:
        UsageError: As `group_advantages`, or the aggregation is unknown.
    """
    if aggregation not in ("sum_then_normalize", "normalize_then_sum"):
        raise unknown("aggregation", str(aggregation), ("sum_then_normalize", "normalize_then_sum"))
    if scores.dim() != 2 or weights.shape != scores.shape[1:]:
        raise UsageError(f"scores must be (B, K) and weights (K,), got {tuple(scores.shape)}, {tuple(weights.shape)}")
    scores = scores if scores.dtype == torch.float64 else scores.float()  # a sum in half precision would round it
    weights = weights.to(scores)
    if aggregation == "sum_then_normalize":
        missing = scores.isnan().all(1)
        total = torch.where(missing, torch.nan, (scores * weights).nansum(1))
        return group_advantages(total, group, method=method, mask=mask, eps=eps)
    each = [group_advantages(column, group, method=method, mask=mask, eps=eps) for column in scores.T]
    return torch.stack([weight * found for weight, found in zip(weights, each, strict=True)]).sum(0)


def informative_groups(scores: Tensor, group: Tensor) -> Tensor:
    """Tell which samples belong to a group whose rewards differ, so that it has a gradient.

    It compares the rewards as they are, objective by objective, and has no threshold: a filter on the deviation of
    weighted or normalized rewards drops groups because of their scale, or because two objectives cancel.

    Args:
        scores: ``(B,)`` or ``(B, K)``, before weighting and normalization; NaN is left out.
        group: ``(B,)``.

    Returns:
        ``(B,)``, boolean.
    """
    if group.shape != scores.shape[:1]:
        raise UsageError(f"group must be ({len(scores)},), got {tuple(group.shape)}")
    scores = scores.detach().reshape(len(scores), -1)
    scores = scores if scores.is_floating_point() else scores.double()  # whole numbers have no infinity
    number, count = _numbered(group)
    index = number[:, None].expand(scores.shape)
    shape = (count, scores.shape[1])
    high = scores.new_full(shape, -torch.inf).scatter_reduce(0, index, scores.nan_to_num(-torch.inf), "amax")
    low = scores.new_full(shape, torch.inf).scatter_reduce(0, index, scores.nan_to_num(torch.inf), "amin")
    return (high > low).any(1)[number]


def _numbered(group: Tensor) -> tuple[Tensor, int]:
    found, number = torch.unique(group, return_inverse=True)
    return number, len(found)


def _in_groups(rewards: Tensor, known: Tensor, group: Tensor, method: str, tokens: Tensor | None, eps: float) -> Tensor:
    number, count = _numbered(group)

    def total(values: Tensor) -> Tensor:
        return values.new_zeros(count).index_add(0, number, values)[number]

    n = total(known)
    # from the smallest one: rounding must not give equal rewards an advantage, which a tiny deviation would enlarge
    low = rewards.new_full((count,), torch.inf)
    low = low.scatter_reduce(0, number, torch.where(known > 0, rewards, torch.inf), "amin")[number]
    above = torch.where(known > 0, rewards - low, 0.0)
    if method == "opo":
        assert tokens is not None
        length = tokens.sum(1).to(rewards)
        baseline = total(length * above) / total(length).clamp(min=1)
    else:
        baseline = total(above) / n.clamp(min=1)
    alone = n <= 1
    centered = torch.where(alone, rewards, above - baseline)
    if method == "rloo":
        return torch.where(alone, rewards, centered * n / (n - 1).clamp(min=1))
    if method == "grpo":
        variance = total(known * centered.square()) / (n - 1).clamp(min=1)
        return centered / (torch.where(alone, 1.0, variance.sqrt()) + eps)
    return centered


def _whitened(rewards: Tensor, lengths: Tensor) -> Tensor:
    n = lengths.sum()
    if not len(rewards):
        return rewards
    rewards = rewards - torch.where(lengths > 0, rewards, torch.inf).amin().nan_to_num(0.0, 0.0)  # as in a group
    mean = (lengths * rewards).sum() / n.clamp(min=1)
    variance = (lengths * (rewards - mean).square()).sum() / (n - 1).clamp(min=1)
    return (rewards - mean) * torch.rsqrt(variance + 1e-8)
