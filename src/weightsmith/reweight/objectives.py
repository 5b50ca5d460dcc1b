"""Weights of several rewards: fixed, moved by the hypervolume of validation points, or by the objectives' gradients.

All have ``weights`` ``(K,)``, by which the rewards are summed, and ``meta``, a factor of the whole, and a
``state_dict``. What changes them differs: `HypervolumeWeights` takes a validation point, `GradientWeights` how well
the objectives' gradients agree.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from weightsmith.core.errors import UsageError, WeightsmithWarning, unknown
from weightsmith.reweight.advantages import SCALE_INVARIANT
from weightsmith.reweight.hypervolume import hypervolume_contribution


class FixedWeights:
    """Weights of rewards that do not change, and the interface of those that do.

    Args:
        weights: ``(K,)``, at least 0, with sum 1.

    Attributes:
        weights: ``(K,)``, float64.
        meta: Factor of the advantages or rewards, 1 here.
        apply_to: What ``meta`` multiplies, ``"advantage"`` or ``"reward"``.

    Raises:
        UsageError: The weights are negative or do not sum to 1.
    """

    apply_to: Literal["advantage", "reward"] = "advantage"

    def __init__(self, weights: Sequence[float] | Tensor) -> None:
        self.weights = _checked_weights(weights)
        self.meta = 1.0

    @property
    def reward_weights(self) -> Tensor:
        """``(K,)``: what the rewards are multiplied by before they are summed."""
        return self.weights * self.meta if self.apply_to == "reward" else self.weights

    @property
    def advantage_factor(self) -> float:
        """What the advantages are multiplied by after they are normalized."""
        return self.meta if self.apply_to == "advantage" else 1.0

    def state_dict(self) -> dict[str, Any]:
        """The weights."""
        return {"weights": self.weights.tolist(), "meta": self.meta}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them back."""
        weights = _checked_weights(state["weights"], len(self.weights))
        self.weights, self.meta = weights, float(state["meta"])


class HypervolumeWeights(FixedWeights):
    r"""Raise the reward after a validation point that enlarges the Pareto front, lower it after one that does not.

    ``meta = base + gain tanh(d)`` with ``d`` the point's contribution to the hypervolume; ``weights`` stay.

    A common factor of all rewards cancels in GRPO with its division by the standard deviation and in REINFORCE++, so
    ``apply_to="reward"``, as in the authors' code, does nothing there; it acts with RLOO and Dr. GRPO. Multiplying the
    normalized advantage acts with every estimator, but weakly under Adam, which divides a slowly varying scale away,
    and under clipping of the gradient's norm.

    Args:
        weights: ``(K,)``, at least 0, with sum 1.
        maximize: Per objective of a validation point, whether larger is better; lengths are minimized.
        reference: Validation point of the initial model; ``None``: the first one given to `update`.
        base: Factor when nothing improved.
        gain: How much more it can become.
        apply_to: ``"advantage"`` or ``"reward"``.
        scale: Divides each coordinate of the points, for objectives of different units; ``None``: as they are.

    Attributes:
        front: Points that enlarged the hypervolume when they came.

    Raises:
        UsageError: An argument is out of range.

    Source:
        arXiv 2509.11452, hypervolume-guided weight adaptation.
    """

    def __init__(
        self,
        weights: Sequence[float] | Tensor,
        maximize: Sequence[bool],
        *,
        reference: Sequence[float] | None = None,
        base: float = 0.5,
        gain: float = 1.5,
        apply_to: Literal["advantage", "reward"] = "advantage",
        scale: Sequence[float] | None = None,
    ) -> None:
        super().__init__(weights)
        if apply_to not in ("advantage", "reward"):
            raise unknown("apply_to", str(apply_to), ("advantage", "reward"))
        if not 0 <= base < math.inf or not 0 <= gain < math.inf:
            raise UsageError(f"base and gain must be numbers of at least 0, got {base} and {gain}")
        self.maximize, self.base, self.gain, self.apply_to = [bool(flag) for flag in maximize], base, gain, apply_to
        if not self.maximize:
            raise UsageError("maximize must have an entry per objective, got none")
        self.scale = [1.0] * len(self.maximize) if scale is None else [float(unit) for unit in scale]
        if len(self.scale) != len(self.maximize) or not all(0 < unit < math.inf for unit in self.scale):
            raise UsageError(f"scale must hold {len(self.maximize)} numbers above 0, got {scale}")
        self.reference = None if reference is None else self._point(reference)
        self.front: list[list[float]] = []
        self._warned = False

    def update(self, point: Sequence[float]) -> float:
        """Take a validation point, made after the latest policy update.

        Args:
            point: ``(K,)``, in the objectives' own units.

        Returns:
            The factor for the next step. The first point becomes the reference when none was given, and leaves it.

        Raises:
            UsageError: The point is not finite or has another number of coordinates.
        """
        found = self._point(point)
        if self.reference is None:
            self.reference = found
            return self.meta
        scaled = [[x / unit for x, unit in zip(row, self.scale, strict=True)] for row in (found, self.reference)]
        front = [[x / unit for x, unit in zip(row, self.scale, strict=True)] for row in self.front]
        gained = hypervolume_contribution(scaled[0], front, scaled[1], self.maximize)
        self.meta = self.base + self.gain * math.tanh(gained)
        if gained > 0:
            self.front.append(found)
        return self.meta

    def check_estimator(self, method: str) -> None:
        """Warn once when the factor cancels in this estimator of advantages."""
        if self.apply_to == "reward" and method in SCALE_INVARIANT and not self._warned:
            self._warned = True
            warnings.warn(
                f"{method} divides a common factor of all rewards away, so HypervolumeWeights with apply_to='reward' "
                "does nothing: use apply_to='advantage', or an estimator without that division (rloo, dr_grpo)",
                WeightsmithWarning,
                stacklevel=2,
            )

    def state_dict(self) -> dict[str, Any]:
        """Weights, factor, reference and front."""
        return super().state_dict() | {"reference": self.reference, "front": [list(point) for point in self.front]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them back."""
        reference = None if state["reference"] is None else self._point(state["reference"])
        front = [self._point(point) for point in state["front"]]
        super().load_state_dict(state)
        self.reference, self.front = reference, front

    def _point(self, point: Sequence[float]) -> list[float]:
        found = [float(x) for x in point]
        if len(found) != len(self.maximize) or not all(math.isfinite(x) for x in found):
            raise UsageError(f"a validation point must be {len(self.maximize)} finite numbers, got {found}")
        return found


class GradientWeights(FixedWeights):
    r"""Move weight toward the objectives whose policy gradients agree with the sum of all.

    ``w <- softmax(log w + s)`` with ``s = lr_t I / mu`` and ``I_k = <g_k, sum_j g_j>`` from `objective_influence`,
    averaged over ``accumulation_steps``. It is a mirror step: no minimum and no maximum, computed in float64.

    Args:
        n_objectives: ``K``.
        weights: First weights, above 0, with sum 1; ``None``: all equal.
        step_size: The exponent is ``step_size * lr_t / lr_0 * I``, where ``lr_0`` is the learning rate before any
            schedule, see `update`.
        mu: The exponent is ``lr_t I / mu`` instead; the paper uses 1e-5 and 1e-4 with a learning rate of 1e-6.
        accumulation_steps: Update once in this many calls.
        allow_zero: Accept first weights of 0, which stay 0.

    Attributes:
        skipped: How many updates were left out because a number was not finite.

    Raises:
        UsageError: An argument is out of range.

    Source:
        arXiv 2509.11452, gradient-based weight optimization.
    """

    def __init__(
        self,
        n_objectives: int,
        *,
        weights: Sequence[float] | Tensor | None = None,
        step_size: float = 0.1,
        mu: float | None = None,
        accumulation_steps: int = 1,
        allow_zero: bool = False,
    ) -> None:
        if n_objectives < 1:
            raise UsageError(f"n_objectives must be at least 1, got {n_objectives}")
        super().__init__([1 / n_objectives] * n_objectives if weights is None else weights)
        if len(self.weights) != n_objectives:
            raise UsageError(f"weights must hold {n_objectives} numbers, got {self.weights.tolist()}")
        if not allow_zero and bool((self.weights == 0).any()):
            raise UsageError(
                f"weights hold a 0, which would stay 0 forever: {self.weights.tolist()}; pass allow_zero=True for that"
            )
        if not 0 <= step_size < math.inf:
            raise UsageError(f"step_size must be a number of at least 0, got {step_size}")
        if mu is not None and not mu > 0:
            raise UsageError(f"mu must be above 0, got {mu}")
        if accumulation_steps < 1:
            raise UsageError(f"accumulation_steps must be at least 1, got {accumulation_steps}")
        self.step_size, self.mu, self.accumulation_steps = step_size, mu, accumulation_steps
        self.skipped = 0
        self._sum, self._seen = torch.zeros_like(self.weights), 0
        self._first_lr: float | None = None

    def update(self, influence: Tensor | Sequence[float], lr: float = 1.0, *, base_lr: float | None = None) -> Tensor:
        """Take the influence of each objective, before the policy step that uses the new weights.

        Args:
            influence: ``(K,)``, from `objective_influence`.
            lr: Current learning rate of the policy.
            base_lr: ``lr_0``, the learning rate before any schedule; ``None``: the first ``lr`` above 0. Give it with a
                warm-up, whose first rate is much smaller. Unused with ``mu``.

        Returns:
            The weights, ``(K,)``, float64. One that is not finite is left out: it warns and is counted.

        Raises:
            UsageError: The influence has another length, or a learning rate is out of range.
        """
        found = torch.as_tensor(influence, dtype=torch.float64).detach().cpu()
        if found.shape != self.weights.shape:
            raise UsageError(f"influence must be ({len(self.weights)},), got {tuple(found.shape)}")
        if not lr >= 0 or lr == math.inf:
            raise UsageError(f"lr must be a number of at least 0, got {lr}")
        if base_lr is not None and not 0 < base_lr < math.inf:
            raise UsageError(f"base_lr must be a number above 0, got {base_lr}")
        if not bool(found.isfinite().all()):
            self.skipped += 1
            warnings.warn(
                f"the influence {found.tolist()} is not finite: the weights stay as they are", WeightsmithWarning,
                stacklevel=2,
            )  # fmt: skip
            return self.weights
        if self._first_lr is None and lr > 0:
            self._first_lr = lr
        self._sum, self._seen = self._sum + found, self._seen + 1
        if self._seen < self.accumulation_steps:
            return self.weights
        base_lr = base_lr or self._first_lr or 1.0
        per_unit = self.step_size * lr / base_lr if self.mu is None else lr / self.mu
        exponent = per_unit * self._sum / self._seen
        self._sum, self._seen = torch.zeros_like(self._sum), 0
        self.weights = (self.weights.log() + exponent).softmax(0)  # shifted by its maximum: cannot overflow
        return self.weights

    def state_dict(self) -> dict[str, Any]:
        """Weights, what has been summed since the last update, and the first learning rate."""
        own = {"sum": self._sum.tolist(), "seen": self._seen, "skipped": self.skipped, "first_lr": self._first_lr}
        return super().state_dict() | own

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them back."""
        total = torch.tensor(state["sum"], dtype=torch.float64)
        if total.shape != self.weights.shape:
            raise UsageError(f"the state is of {len(total)} objectives, this object has {len(self.weights)}")
        super().load_state_dict(state)
        self._sum, self._seen, self.skipped = total, int(state["seen"]), int(state["skipped"])
        self._first_lr = state["first_lr"]


def _checked_weights(weights: Sequence[float] | Tensor, length: int | None = None) -> Tensor:
    found = torch.as_tensor(weights, dtype=torch.float64).detach().cpu().clone()
    if found.dim() != 1 or not len(found) or (length is not None and len(found) != length):
        raise UsageError(f"weights must be one number per objective, got {found.tolist()}")
    if not bool((found >= 0).all()):
        raise UsageError(f"weights must be at least 0, got {found.tolist()}")
    # the scripts of the paper write thirds as 0.334, 0.333, 0.333
    if abs(float(found.sum()) - 1) > 1e-6:
        raise UsageError(f"weights must sum to 1, got {found.tolist()} with sum {float(found.sum()):g}")
    return found
