"""Curves of laziness while ``transformers.Trainer`` trains."""

from typing import Any

from torch import nn

from weightsmith.core.errors import UsageError, require
from weightsmith.diagnose import LazinessProbe, LazinessReport, Snapshot

TrainerCallback: Any = require("transformers", extra="hf", purpose="trainer callbacks").TrainerCallback


class LazinessCallback(TrainerCallback):
    """Compare the model with its first state every few steps, on the main process.

    Args:
        probe: Made for the model that is trained, unwrapped.
        every: Steps between two looks; each takes a snapshot.

    Attributes:
        rows: One per look: ``step`` and the numbers of `LazinessReport.curves`.
        report: The last comparison; ``None`` before the first.

    Raises:
        UsageError: ``every`` is below 1.

    Example:
        >>> callback = LazinessCallback(LazinessProbe(model, batch), every=100)  # doctest: +SKIP
        >>> Trainer(model, args, callbacks=[callback])  # doctest: +SKIP
    """

    def __init__(self, probe: LazinessProbe, *, every: int = 500) -> None:
        if every < 1:
            raise UsageError(f"every must be at least 1, got {every}")
        self.probe, self.every = probe, every
        self.rows: list[dict[str, float]] = []
        self.report: LazinessReport | None = None
        self.before: Snapshot | None = None

    def on_train_begin(self, _args: Any, state: Any, _control: Any, model: nn.Module | None = None, **_: Any) -> None:
        """Look at the first weights."""
        if state.is_world_process_zero and self.before is None:
            self.before = self.probe.snapshot(_plain(model))

    def on_step_end(self, _args: Any, state: Any, _control: Any, model: nn.Module | None = None, **_: Any) -> None:
        """Look again."""
        if state.global_step % self.every == 0:
            self._look(state, model)

    def on_train_end(self, _args: Any, state: Any, _control: Any, model: nn.Module | None = None, **_: Any) -> None:
        """Look at the end."""
        if not self.rows or self.rows[-1]["step"] != state.global_step:
            self._look(state, model)

    def _look(self, state: Any, model: nn.Module | None) -> None:
        if not state.is_world_process_zero or self.before is None:
            return
        self.report = self.probe.compare(self.before, _plain(model))
        self.rows.append({"step": float(state.global_step), **self.report.curves()})


def _plain(model: Any) -> nn.Module:
    """The model without what Trainer has put around it."""
    while isinstance(model, nn.parallel.DistributedDataParallel) or hasattr(model, "_orig_mod"):
        model = getattr(model, "_orig_mod", None) or model.module
    found: nn.Module = model
    return found
