"""``transformers.Trainer`` for classes that arrive in steps: a thin adapter of ``WeightAligning``."""

from typing import Any

from torch import Tensor, nn

from weightsmith.continual import WeightAligning, incremental_loss
from weightsmith.core.errors import UsageError, require
from weightsmith.core.outputs import logits_of

_transformers: Any = require("transformers", extra="hf", purpose="training with Trainer")
Trainer: Any = _transformers.Trainer
TrainerCallback: Any = _transformers.TrainerCallback


class WeightAligningTrainer(Trainer):
    """A ``Trainer`` for one incremental step: cross-entropy and distillation from the model of the step before.

    Make it after ``begin_step`` and call ``end_step`` after ``train``. Labels are head indices, in order of arrival.

    Args:
        wa: Holds the model and its teacher.
        args: ``TrainingArguments``.
        **options: As for ``Trainer``.

    Raises:
        UsageError: No step has begun.

    Example:
        >>> wa.begin_step(2)  # doctest: +SKIP
        >>> WeightAligningTrainer(wa, args, train_dataset=rows).train()  # doctest: +SKIP
        >>> wa.end_step(inputs, labels, features=features)  # doctest: +SKIP
    """

    def __init__(self, wa: WeightAligning, args: Any = None, **options: Any) -> None:
        if wa.step < 0:
            raise UsageError("no step has begun: call begin_step(n_new) before the trainer is made")
        super().__init__(wa.model, args, **options)
        self.wa = wa
        self.add_callback(_Restriction(wa))

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of the step; the mean over the batch, whatever the accumulation."""
        labels: Tensor = inputs["labels"]
        asked = {name: value for name, value in inputs.items() if name != "labels"}
        outputs = model(**asked)
        wa = self.wa
        loss = incremental_loss(
            logits_of(outputs), labels, wa.teacher_logits(asked), wa.n_old, temperature=wa.options.temperature
        )
        if num_items_in_batch is not None:  # Trainer then expects the share of an accumulated batch
            loss = loss * len(labels) / num_items_in_batch
            if self.args.average_tokens_across_devices:  # the number is of all processes, and DDP averages gradients
                loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss


class _Restriction(TrainerCallback):
    def __init__(self, wa: WeightAligning) -> None:
        self.wa = wa

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.wa.after_optimizer_step()
