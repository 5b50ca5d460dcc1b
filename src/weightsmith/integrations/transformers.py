"""Callbacks for ``transformers.Trainer``: thin adapters, the ideas are elsewhere."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.optim import Optimizer

from weightsmith.average import MergeReport, find_checkpoints, merge_checkpoints
from weightsmith.core.errors import UsageError, WeightsmithWarning, require
from weightsmith.integrations.bone import merge_bone_checkpoints
from weightsmith.quantize.in_training.annealing import ConfidenceGuidedAnnealing

TrainerCallback: Any = require("transformers", extra="hf", purpose="trainer callbacks").TrainerCallback


class AnnealingCallback(TrainerCallback):
    """Confidence-guided annealing in the last part of a training run.

    Args:
        annealing: Of the model that is trained.
        start: The part of all optimizer steps after which it begins, in [0, 1]; the default anneals the last tenth.
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


class MergeCheckpointsCallback(TrainerCallback):
    """Merge the newest checkpoints into ``output_dir/merged`` at the end of training.

    ``save_total_limit`` of the ``TrainingArguments`` must leave enough of them. A merge that fails is a warning: the
    trained model is worth more.

    Args:
        last: How many of the newest checkpoints.
        every: Take every n-th of them.
        folder: Name of the new folder in ``output_dir``; replaced if it exists.
        **options: Further arguments of `weightsmith.average.merge_checkpoints`.

    Attributes:
        report: What was merged; ``None`` before that, and after a merge that failed.

    Example:
        >>> trainer = Trainer(..., callbacks=[MergeCheckpointsCallback(last=4, metric="loss")])  # doctest: +SKIP
    """

    def __init__(self, last: int = 4, every: int = 1, folder: str = "merged", **options: Any) -> None:
        self.last, self.every, self.folder, self.options = last, every, folder, options
        self.report: MergeReport | None = None

    def on_train_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        """Merge, on one process."""
        if not state.is_world_process_zero:
            return
        out = Path(args.output_dir, self.folder)
        try:
            found = find_checkpoints(args.output_dir, last=self.last, every=self.every)
            options = dict(self.options)
            merge: Callable[..., MergeReport] = merge_checkpoints
            if found[-1].kind == "bone" and options.get("lora_mode") == "dense":
                del options["lora_mode"]
                merge = merge_bone_checkpoints
            self.report = merge(found, out, overwrite=True, **options)
        except (UsageError, OSError) as error:
            warnings.warn(f"the checkpoints were not merged: {error}", WeightsmithWarning, stacklevel=2)
