"""By how much one step on a token's loss is about to change the policy's entropy, to first order.

For logits ``z``, ``dH/dz_k = -p_k (log p_k + H)``. One ascent step on ``r A`` moves the logits of that position by
``w (1[k = a] - p_k)`` with ``w = I_clip r A``, up to the step size, which is left out. A positive value means that the
entropy is predicted to rise.
"""

from typing import Literal

import torch
from torch import Tensor

from weightsmith.core.errors import UsageError, unknown
from weightsmith.reweight.tokens import Clip, per_token

Estimator = Literal["released", "theorem", "exact"]
ESTIMATORS = ("released", "theorem", "exact")
_TINY = 1e-8


@torch.no_grad()
def entropy_change(
    logp: Tensor,
    entropy: Tensor,
    advantages: Tensor,
    *,
    old_logp: Tensor | None = None,
    second_moment: Tensor | None = None,
    estimator: Estimator = "released",
    clip: Clip = (0.2, 0.2),
) -> Tensor:
    r"""Estimate the entropy change of each sampled token's update.

    | estimator | prediction |
    |---|---|
    | `"released"` | `-(A / pi_old) pi (1 - pi) (log pi + H)`: what the authors' code computes |
    | `"theorem"` | `-I_clip r A pi (1 - pi) (log pi + H)`: Theorem 1, the sampled logit's own share |
    | `"exact"` | `-I_clip r A [pi (log pi + H) - S]`: all logits move, exact to first order |

    ``I_clip`` is 0 where the clipped loss has no gradient. Half precision is computed in float32.

    Args:
        logp: ``(...)``, log-probability of the sampled token.
        entropy: ``(...)``, in nats, at the same temperature.
        advantages: ``(...)``, or what broadcasts to it; ``(B,)`` beside ``logp`` of ``(B, T)`` is one per sequence.
        old_logp: ``(...)``, under the policy that sampled; ``None``: the same policy.
        second_moment: ``(...)``, ``S = sum_k p_k^2 (log p_k + H)``, for ``"exact"``; see `fused_linear_logprob`.
        estimator: Which of the above.
        clip: How far the ratio may fall below 1 and rise above it.

    Returns:
        ``(...)``, signed; positive: the entropy is predicted to rise.

    Raises:
        UsageError: The estimator is unknown, ``"exact"`` comes without ``second_moment``, or ``advantages`` of one
            dimension are not one per sequence.

    Source:
        arXiv 2510.10150, Theorem 1, and its published code; ``"exact"`` follows from the softmax's Jacobian.
    """
    if estimator not in ESTIMATORS:
        raise unknown("estimator", str(estimator), ESTIMATORS)
    if estimator == "exact" and second_moment is None:
        raise UsageError('estimator "exact" needs second_moment: take it from fused_linear_logprob')
    if logp.dim() == 2 and advantages.dim() == 1:
        advantages = per_token(advantages, logp)
    precise = torch.float64 if logp.dtype == torch.float64 else torch.float32
    logp, entropy, advantages = logp.to(precise), entropy.to(precise), advantages.to(precise)
    old_logp = logp if old_logp is None else old_logp.to(precise)
    if estimator == "released":
        pi = logp.exp().clamp(_TINY, 1 - _TINY)
        old_pi = old_logp.exp().clamp(_TINY, 1)
        return -(advantages / old_pi) * pi * (1 - pi) * (pi.log() + entropy)
    pi, ratio = logp.exp(), (logp - old_logp).exp()
    low, high = clip
    flat = ((advantages > 0) & (ratio > 1 + high)) | ((advantages < 0) & (ratio < 1 - low))
    step = torch.where(flat, 0.0, ratio * advantages)
    if second_moment is None or estimator == "theorem":
        return -step * pi * (1 - pi) * (logp + entropy)
    return -step * (pi * (logp + entropy) - second_moment.to(precise))
