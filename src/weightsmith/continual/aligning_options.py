"""How Weight Aligning is done: the settings, and those of the authors and of PyCIL."""

from dataclasses import dataclass
from typing import Literal

from weightsmith.continual.head import HeadInit
from weightsmith.core.errors import UsageError, unknown


@dataclass(frozen=True, slots=True)
class AligningOptions:
    """How Weight Aligning is done.

    Attributes:
        p: Which norm of the head's rows is aligned.
        gamma_max: Largest factor; ``None``: any.
        scale_bias: The factor multiplies the new classes' bias too.
        apply: ``"fold"`` writes the factor into the head; ``"logits"`` leaves it, see `WeightAligning.aligned`.
        head_init: ``"reinit"``: the head starts anew at each step; ``"grow"``: old rows are copied.
        bias: Whether new heads have a bias; ``None``: as the model's own.
        restrict: Keep the head's weights at 0 or above after every optimizer step; for features behind a ReLU.
        distill: Distillation from the model of the step before.
        align: Align after each step; without it this is plain replay with distillation.
        temperature: Of the distillation.
    """

    p: float = 2
    gamma_max: float | None = 1.0
    scale_bias: bool = True
    apply: Literal["fold", "logits"] = "fold"
    head_init: HeadInit = "reinit"
    bias: bool | None = None
    restrict: bool = False
    distill: bool = True
    align: bool = True
    temperature: float = 2.0

    def __post_init__(self) -> None:
        if self.apply not in ("fold", "logits"):
            raise unknown("apply", self.apply, ["fold", "logits"])
        if self.head_init not in ("reinit", "grow"):
            raise unknown("head_init", self.head_init, ["reinit", "grow"])
        if self.apply == "logits" and self.head_init == "grow":
            raise UsageError("apply must be 'fold' with head_init 'grow': earlier factors would be lost, got 'logits'")
        if self.apply == "logits" and not self.scale_bias:
            raise UsageError("scale_bias must be True with apply 'logits': the factor multiplies whole logits")
        if not self.p > 0:
            raise UsageError(f"p must be above 0, got {self.p}")
        if self.gamma_max is not None and not self.gamma_max > 0:
            raise UsageError(f"gamma_max must be above 0, got {self.gamma_max}")
        if not self.temperature > 0:
            raise UsageError(f"temperature must be above 0, got {self.temperature}")


PRESETS = {
    "official": AligningOptions(p=1, bias=False, restrict=True),
    "pycil": AligningOptions(p=2, gamma_max=None, scale_bias=False, head_init="grow"),
}
"""The settings of the authors' code and of PyCIL."""
