"""Callbacks for ``transformers.Trainer``: thin adapters, the ideas are elsewhere."""

from typing import Any

from torch.optim import Optimizer

from weightsmith.core.errors import UsageError, require
from weightsmith.quantize.in_training.annealing import ConfidenceGuidedAnnealing

TrainerCallback: Any = require("transformers", extra="hf", purpose="trainer callbacks").TrainerCallback


class AnnealingCallback(TrainerCallback):
    """Confidence-guided annealing in the last part of a training run.

    Args:
        annealing: Of the model that is trained.
        start: The part of all optimiser steps after which it begins, in [0, 1]; the default anneals the last tenth.
        lr: Learning rate of all parameter groups from then on; ``None``: that of the schedule.

    Raises:
        UsageError: ``start`` or ``lr`` is out of range.

    Example:
        >>> annealing = ConfidenceGuidedAnnealing(model)  # doctest: +SKIP
        >>> Trainer(model, args, callbacks=[AnnealingCallback(annealing, lr=1e-5)])  # doctest: +SKIP
    """

    def __init__(self, annealing: ConfidenceGuidedAnnealing, *, start: float = 0.9, lr: float | None = None) -> None:
        if not 0 <= start <= 1:
            raise UsageError(f"start must be between 0 and 1, got {start}")
        if lr is not None and lr <= 0:
            raise UsageError(f"lr must be above 0, got {lr}")
        self.annealing, self.start, self.lr = annealing, start, lr

    def on_pre_optimizer_step(
        self, _args: Any, state: Any, _control: Any, optimizer: Optimizer | None = None, **_: Any
    ) -> None:
        """Gradients are complete, unscaled and clipped."""
        if state.global_step < self.start * state.max_steps:
            return
        for group in optimizer.param_groups if self.lr is not None and optimizer is not None else []:
            group["lr"] = self.lr
        self.annealing.pre_step()

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        """The step is done."""
        self.annealing.post_step()
