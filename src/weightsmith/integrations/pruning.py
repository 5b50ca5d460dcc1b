"""``transformers.Trainer`` with pruned weights: a thin adapter of ``MagnitudePruner``."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from weightsmith.core.errors import require
from weightsmith.core.files import file_atomically
from weightsmith.prune import MagnitudePruner

TrainerCallback: Any = require("transformers", extra="hf", purpose="trainer callbacks").TrainerCallback
_FILE = "pruning_masks.safetensors"


class PruningCallback(TrainerCallback):
    """Keep pruned weights at zero while a ``Trainer`` trains.

    Prune and rewind between trainings. The masks are saved in every checkpoint, and loaded from the one that a training
    resumes from.

    Args:
        pruner: Of the model that is trained.

    Example:
        >>> pruner.prune_(0.2), pruner.rewind_()  # doctest: +SKIP
        >>> Trainer(model, args, train_dataset=rows, callbacks=[PruningCallback(pruner)]).train()  # doctest: +SKIP
    """

    def __init__(self, pruner: MagnitudePruner) -> None:
        self.pruner = pruner

    def on_train_begin(self, args: Any, state: Any, _control: Any, **_: Any) -> None:
        """Load the masks of a checkpoint that is resumed."""
        held = Path(args.output_dir, f"checkpoint-{state.global_step}", _FILE)
        if state.global_step and held.is_file():
            self.pruner.load_state_dict({**self.pruner.state_dict(), "masks": load_file(held), "snapshots": {}})
        self.pruner.apply_()

    def on_pre_optimizer_step(self, *_: Any, optimizer: Any = None, **__: Any) -> None:
        """Gradients are complete; an optimizer that is not elementwise would let those of pruned weights count."""
        if self.pruner.wants_masked_gradients(getattr(optimizer, "optimizer", optimizer)):
            self.pruner.mask_gradients_()

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        """The step is done."""
        self.pruner.apply_()

    def on_save(self, args: Any, state: Any, _control: Any, **_: Any) -> None:
        """Write the masks beside the checkpoint's weights."""
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        if state.is_world_process_zero and folder.is_dir():
            masks: dict[str, torch.Tensor] = self.pruner.state_dict()["masks"]
            with file_atomically(folder / _FILE) as fresh:
                save_file(masks, fresh)
