"""Merge a run's checkpoints when Hugging Face's ``Trainer`` has finished."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from weightsmith.average import MergeReport, find_checkpoints, merge_checkpoints
from weightsmith.core.errors import UsageError, WeightsmithWarning, require
from weightsmith.integrations.bone import merge_bone_checkpoints

TrainerCallback: Any = require("transformers", extra="hf", purpose="MergeCheckpointsCallback").TrainerCallback


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
