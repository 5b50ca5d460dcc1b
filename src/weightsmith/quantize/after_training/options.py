"""How a rounding is learned: what users choose, and what each method is to the reconstruction."""

from dataclasses import dataclass
from typing import Literal

import torch

from weightsmith.core.errors import UsageError, unknown
from weightsmith.quantize.after_training.activations import Activations
from weightsmith.quantize.after_training.targets import Make


@dataclass(frozen=True, slots=True)
class LearningOptions:
    """Details of learning a rounding; the defaults suit most models.

    Attributes:
        keep_best: Keep the best of round-to-nearest and the rounding after one half, three quarters and all of the
            steps, measured on ``measured_batches``. ``False``: keep the last one.
        loss_reduction: ``"sum_dim1"`` sums squared differences over dimension 1 and averages over the others, as the
            authors' code does. ``"mean"`` averages over all. AdaRound's penalty is relative to it.
        input_drop: Probability in (0, 1] with which an element of a block's input is taken from the quantized model
            rather than the trained one. QDrop takes 0.5.
        activations: Also quantize the inputs of the layers, statically, and learn their steps. ``None``: weights only.
        last_block: ``"output"``, or ``"logits"``: compare the last block by the divergence of the model's predictions.
        autocast: Compute blocks in this dtype. Weights are always rounded in float32 or float64. ``None``: no autocast.
        measured_batches: Number of calibration batches, evenly spaced, on which block errors are measured. ``None``:
            all of them, which takes longer than a few hundred steps.

    Raises:
        UsageError: A value is out of range.
    """

    keep_best: bool = True
    loss_reduction: Literal["sum_dim1", "mean"] = "sum_dim1"
    input_drop: float = 1.0
    activations: Activations | None = None
    last_block: Literal["output", "logits"] = "output"
    autocast: torch.dtype | None = None
    measured_batches: int | None = 8

    def __post_init__(self) -> None:
        if self.loss_reduction not in ("sum_dim1", "mean"):
            raise unknown("loss_reduction", self.loss_reduction, ["sum_dim1", "mean"])
        if self.last_block not in ("output", "logits"):
            raise unknown("last_block", self.last_block, ["output", "logits"])
        if not 0 < self.input_drop <= 1:
            raise UsageError(f"input_drop must be above 0 and at most 1, got {self.input_drop}")
        if self.measured_batches is not None and self.measured_batches < 1:
            raise UsageError(f"measured_batches must be at least 1, or None for all, got {self.measured_batches}")


@dataclass(frozen=True, slots=True)
class Recipe:
    """A rounding method as the reconstruction sees it.

    Attributes:
        name: For the report.
        make: ``(weight, grid, axis, generator) -> rounding`` of one weight.
        iterations: Steps per block.
        lr: Learning rate, or ``"auto"``.
        seed: Seed of everything random.
        cosine: Decay the learning rate to 0 along a cosine; else it is constant.
    """

    name: str
    make: Make
    iterations: int = 0
    lr: float | Literal["auto"] = 1e-3
    seed: int = 0
    cosine: bool = True

    def __post_init__(self) -> None:
        if self.iterations < 0:
            raise UsageError(f"iterations must not be negative, got {self.iterations}")
        if self.lr != "auto" and not (isinstance(self.lr, int | float) and self.lr > 0):
            raise UsageError(f"lr must be positive or 'auto', got {self.lr!r}")
