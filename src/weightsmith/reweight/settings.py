"""How a `weightsmith.reweight.MetaRescaler` works: its options and what a step gives."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from weightsmith.core.errors import UsageError
from weightsmith.reweight.meta_gradient import MetaGrad
from weightsmith.reweight.rescaler import Normalize
from weightsmith.reweight.signals import FEATURES

Mode = Literal["two_phase", "official"]
FeatureSet = Literal["all", "loss"]


@dataclass(frozen=True, slots=True)
class RescalingSettings:
    """Options of a meta-rescaler.

    Attributes:
        passes: Passes G of every batch; all but the first are without gradients and there for their dropout. Without
            dropout in the model take 1. Paper: 3.
        mode: ``"two_phase"``: the virtual step is one of gradient descent and is taken back; the optimizer then trains
            on losses with constant weights. ``"official"``: as the released code; the virtual step is Adam's first
            one (in effect a sign step), losses are summed, and the step is kept in place of the optimizer's.
        meta_grad: How the gradient through the virtual step is found: ``"finite_difference"``, ``"jvp"`` and
            ``"double_backward"`` are exact; ``"head"`` takes the last linear layer alone, at little cost; ``"none"``
            leaves it out, so that the rescaler learns from the weighted validation losses only.
        virtual_lr: Step size of the virtual step; ``None``: the optimizer's current one if it is a kind of SGD, in
            official mode always, else 0.1.
        outer: Whether the validation losses are weighted too, which is what teaches without clean data; ``False``
            makes sense with clean validation data.
        meta_every: Train the rescaler at every n-th step only.
        inner_steps: Virtual steps on the batch before the validation loss; the paper compares 1 and 2. Each further one
            costs two or three passes more with gradients.
        normalize: Factor on the weights of a batch: ``"mean"`` divides by their mean, ``"loss"`` keeps the summed
            loss, ``"none"``; ``None``: ``"mean"`` for a kind of SGD, whose effective step size it keeps, else
            ``"none"``.
        features: ``"all"`` 19, or ``"loss"``: the loss of pass 0 and the agreement.
        window: Batches that the memory of recent samples holds; 0: the current batch.
        clamp: Largest absolute value of a feature; ``None``: any, as in the released code.
        apply: Whether training uses the weights; ``False`` only learns them, to audit the labels.
        rescaler_lr: Learning rate of the rescaler's Adam.
    """

    passes: int = 3
    mode: Mode = "two_phase"
    meta_grad: MetaGrad = "finite_difference"
    virtual_lr: float | None = None
    outer: bool = True
    meta_every: int = 1
    inner_steps: int = 1
    normalize: Normalize | None = None
    features: FeatureSet = "all"
    window: int = 1
    clamp: float | None = 1e4
    apply: bool = True
    rescaler_lr: float = 1e-2

    def __post_init__(self) -> None:
        choices = {"mode": Mode, "meta_grad": MetaGrad, "normalize": Normalize, "features": FeatureSet}
        for name, kind in choices.items():
            value, known = getattr(self, name), get_args(kind)
            if value not in known and not (name == "normalize" and value is None):
                raise UsageError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        for name, least in (("passes", 1), ("meta_every", 1), ("inner_steps", 1), ("window", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise UsageError(f"{name} must be a whole number of at least {least}, got {value!r}")
        for name in ("virtual_lr", "rescaler_lr", "clamp"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise UsageError(f"{name} must be above 0, got {value}")
        if self.mode == "official" and self.meta_grad == "head":
            raise UsageError("mode='official' moves all weights: meta_grad must not be 'head'")
        if self.inner_steps > 1 and (self.mode == "official" or self.meta_grad == "head"):
            raise UsageError(f"inner_steps must be 1 with mode='official' or meta_grad='head', got {self.inner_steps}")
        if not self.apply and self.mode == "official":
            raise UsageError("mode='official' keeps the virtual step: apply must be True")
        if not self.outer and self.meta_grad == "none":
            raise UsageError("outer=False with meta_grad='none' leaves the rescaler nothing to learn from")

    @property
    def n_features(self) -> int:
        """Features per sample."""
        return FEATURES if self.features == "all" else 2


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step did.

    Attributes:
        loss: The weighted loss that was trained on, ``()``.
        losses: Loss of every sample, ``(B,)``; 0 where the label is ignored.
        weights: Weight of every sample in (0, 1) before any normalization, ``(B,)``; 0 where the label is ignored.
        agreement: Whether the model's predictions agree with the label, ``(B,)``, 0 or 1.
        meta_loss: Loss of the validation batch after the virtual step, ``()``; ``None`` at a step without one.
    """

    loss: Tensor
    losses: Tensor
    weights: Tensor
    agreement: Tensor
    meta_loss: Tensor | None = None
