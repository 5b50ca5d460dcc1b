"""STEER: damp the tokens whose update would change the policy's entropy most.

Every token's loss is multiplied by a weight in ``[lambda_min, 1]`` that falls with the predicted entropy change of its
update. There is no further network, forward pass or change of the reward.
"""

import math
import warnings
from typing import Any, Literal

import torch
from torch import Tensor

from weightsmith.core.errors import UsageError, WeightsmithWarning, unknown
from weightsmith.reweight.entropy_change import ESTIMATORS, Estimator, entropy_change
from weightsmith.reweight.tokens import Effect, TokenRule, Tokens, check_range, masked_mean

Mapping_ = Literal["exp", "linear"]
Mode = Literal["symmetric", "asymmetric"]


@torch.no_grad()
def token_weights(
    omega: Tensor,
    mask: Tensor,
    *,
    mapping: Mapping_ = "exp",
    mode: Mode = "symmetric",
    lambda_min: float = 0.7,
    lambda_max: float = 1.2,
    floor: float = 0.02,
    scale_quantile: float | None = None,
    renormalize: bool = False,
) -> Tensor:
    r"""Turn predicted entropy changes into weights of the tokens' losses.

    With ``u = |omega|``, and its largest value over the tokens of the mask:

    - ``"exp"``: ``exp(-k u)`` with ``k = -ln(lambda_min) / max(u_max, floor)``, clamped to ``[lambda_min, 1]``
    - ``"linear"``: from ``lambda_max`` at the smallest ``u`` down to ``lambda_min`` at the largest; the midpoint when
      all are equal

    ``mode="asymmetric"`` reads the sign: it damps only falling entropy. Then ``"exp"`` is ``exp(k omega)`` clamped to
    ``[lambda_min, lambda_max]``, and ``"linear"`` rises from ``lambda_min`` at the smallest ``omega``.

    Half precision is computed in float32.

    Args:
        omega: ``(B, T)``, from `entropy_change`; what is not finite counts as 0.
        mask: ``(B, T)``, nonzero where a token counts.
        mapping: See above.
        mode: See above.
        lambda_min: Smallest weight, above 0 and at most 1.
        lambda_max: Largest weight of ``"linear"`` and of ``"asymmetric"``.
        floor: A predicted change below this is damped as if it were the largest.
        scale_quantile: This quantile of ``u`` takes the place of the largest, so that one rare token does not set the
            scale of all others; ``None``: the largest.
        renormalize: Divide by the mean weight.

    Returns:
        ``(B, T)``, 0 outside the mask.

    Raises:
        UsageError: An argument is out of range, or the mask has another shape.

    Source:
        arXiv 2510.10150 and its published code (``compute_token_weights``).
    """
    _check(mapping, mode, lambda_min, lambda_max, floor, scale_quantile)
    if mask.shape != omega.shape:
        raise UsageError(f"mask must have the shape of omega, {tuple(omega.shape)}, got {tuple(mask.shape)}")
    omega = omega.to(torch.float64 if omega.dtype == torch.float64 else torch.float32)
    valid = mask > 0
    omega = torch.where(valid & omega.isfinite(), omega, 0.0)
    u = omega.abs()
    largest = torch.where(valid, u, 0.0).amax() if omega.numel() else omega.new_zeros(())
    if scale_quantile is not None and omega.numel():
        largest = torch.where(valid, u, torch.nan).nanquantile(scale_quantile).nan_to_num(0.0)
    if mapping == "exp":
        k = -math.log(lambda_min) / largest.clamp(min=floor)
        if mode == "symmetric":
            weights = (-k * u).exp().clamp(lambda_min, 1.0)
        else:
            weights = (k * omega).exp().clamp(lambda_min, lambda_max)
    else:
        signed = -u if mode == "symmetric" else omega
        low, high = _ends(signed, valid, largest if mode == "symmetric" and scale_quantile is not None else None)
        share = (signed - low) / (high - low)
        # all equal: the midpoint; only the quantile equal to the smallest: what is above it gets the smallest weight
        equal = torch.where(valid, signed, high).amin() >= high if signed.numel() else high >= low
        share = torch.where(high > low, share, torch.where(equal, 0.5, (signed >= high).to(share)))
        weights = (lambda_min + share * (lambda_max - lambda_min)).clamp(lambda_min, lambda_max)
    if renormalize:
        mean = masked_mean(weights, valid)
        weights = weights / torch.where(mean > 0, mean, 1.0)
    return torch.where(valid, weights, 0.0)


class Steer(TokenRule):
    """Multiply each token's loss by a weight that falls with the predicted change of the policy's entropy.

    Weights are taken over the batch that the rule is called with: the more tokens it sees at once, the larger the
    largest change, and the closer to 1 the weights of all others.

    Args:
        estimator: How the change is predicted, see `entropy_change`; ``"exact"`` is the better predictor,
            ``"released"`` what the authors' code does.
        mapping: See `token_weights`.
        mode: See `token_weights`.
        lambda_min: See `token_weights`.
        lambda_max: See `token_weights`.
        floor: See `token_weights`.
        scale_quantile: See `token_weights`.
        renormalize: See `token_weights`.
        entropy_source: ``"old"``: the entropy of the policy that sampled, as in the authors' code, where it is given;
            ``"current"``: that of the policy being trained.

    Raises:
        UsageError: An argument is out of range.

    Source:
        "Rethinking Entropy Interventions in RLVR: An Entropy Change Perspective", arXiv 2510.10150.
    """

    def __init__(
        self,
        estimator: Estimator = "released",
        *,
        mapping: Mapping_ = "exp",
        mode: Mode = "symmetric",
        lambda_min: float = 0.7,
        lambda_max: float = 1.2,
        floor: float = 0.02,
        scale_quantile: float | None = None,
        renormalize: bool = False,
        entropy_source: Literal["old", "current"] = "old",
    ) -> None:
        if estimator not in ESTIMATORS:
            raise unknown("estimator", str(estimator), ESTIMATORS)
        if entropy_source not in ("old", "current"):
            raise unknown("entropy_source", str(entropy_source), ("old", "current"))
        _check(mapping, mode, lambda_min, lambda_max, floor, scale_quantile)
        self.estimator: Estimator = estimator
        self.entropy_source = entropy_source
        self.options: dict[str, Any] = {
            "mapping": mapping, "mode": mode, "lambda_min": lambda_min, "lambda_max": lambda_max, "floor": floor,
            "scale_quantile": scale_quantile, "renormalize": renormalize,
        }  # fmt: skip
        self.needs = ("entropy", "second_moment") if estimator == "exact" else ("entropy",)  # type: ignore[misc]
        self._warned = False

    @torch.no_grad()
    def __call__(self, tokens: Tokens) -> Effect:
        """Weigh the tokens of a batch."""
        old = tokens.old_entropy if self.entropy_source == "old" else None
        entropy = tokens.need("entropy", "Steer") if old is None else old
        omega = entropy_change(
            tokens.logp, entropy, tokens.advantages, old_logp=tokens.old_logp,
            second_moment=tokens.need("second_moment", 'Steer("exact")') if self.estimator == "exact" else None,
            estimator=self.estimator, clip=tokens.clip,
        )  # fmt: skip
        broken = tokens.mask & ~omega.isfinite()
        if not self._warned and bool(broken.any()):
            self._warned = True
            warnings.warn(
                f"the predicted entropy change of {int(broken.sum())} tokens is not finite and counts as 0: look for "
                "infinite advantages, log-probabilities or entropies (this is said once)",
                WeightsmithWarning,
                stacklevel=2,
            )
        weights = token_weights(omega, tokens.mask, **self.options)
        return Effect(weights=weights, metrics=_metrics(weights, omega, tokens.mask))


def _ends(signed: Tensor, valid: Tensor, largest: Tensor | None) -> tuple[Tensor, Tensor]:
    if not signed.numel():
        return signed.new_zeros(()), signed.new_zeros(())
    low = torch.where(valid, signed, torch.inf).amin()
    return low if largest is None else -largest, torch.where(valid, signed, -torch.inf).amax()


def _metrics(weights: Tensor, omega: Tensor, mask: Tensor) -> dict[str, Tensor]:
    if not bool(mask.any()):
        return {}
    found, change = weights[mask], omega[mask].nan_to_num(0.0, 0.0, 0.0)
    rank = max(1, math.ceil(0.01 * len(found)))
    return {
        "steer/weight_mean": found.mean(),
        "steer/weight_min": found.min(),
        "steer/weight_max": found.max(),
        "steer/weight_p01": found.kthvalue(rank).values,
        "steer/omega_mean_signed": change.mean(),
        "steer/frac_entropy_down": (change < 0).to(found.dtype).mean(),
    }


def _check(
    mapping: str, mode: str, lambda_min: float, lambda_max: float, floor: float, scale_quantile: float | None
) -> None:
    if mapping not in ("exp", "linear"):
        raise unknown("mapping", str(mapping), ("exp", "linear"))
    if mode not in ("symmetric", "asymmetric"):
        raise unknown("mode", str(mode), ("symmetric", "asymmetric"))
    check_range("lambda_min", lambda_min, 0, 1, open_low=True)
    if not lambda_min <= lambda_max < math.inf:
        raise UsageError(f"lambda_max must be at least lambda_min, {lambda_min:g}, and finite, got {lambda_max}")
    if not 0 < floor < math.inf:
        raise UsageError(f"floor must be above 0, got {floor}")
    if scale_quantile is not None:
        check_range("scale_quantile", scale_quantile, 0, 1, open_low=True)
