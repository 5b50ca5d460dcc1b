"""Continual tuning under Hugging Face's ``Trainer``: the average of LCIA, and what is forgotten."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from weightsmith.continual import ContinualTuner, DynamicEMA, ForgettingMeter
from weightsmith.core.errors import UsageError, reason, require
from weightsmith.core.files import file_atomically

transformers: Any = require("transformers", extra="hf", purpose="continual tuning under a Trainer")

_STATE = "lcia.pt"
_SAMPLE = 16  # values of each parameter by which a checkpoint is known
# attributes of the Trainer's state, which all callbacks of one training share: the average, and whose it is
_AVERAGE, _OWNER = "weightsmith_average", "weightsmith_average_of"


class LCIACallback(transformers.TrainerCallback):
    """Average the trainable parameters with a balance weight; the average is the model when training ends.

    With a tuner, its task in progress is averaged, or not for a new group, and the tuner's ``end`` makes the average
    the model: use it inside ``tuner.task`` or ``tuner.fit``. Checkpoints hold the live weights and, in ``lcia.pt``, the
    average; a run that resumes from one goes on exactly.

    Args:
        tuner: A tuner with a task in progress; ``None``: this one task, from the model as it is.
        swap_on_evaluate: Evaluate the average instead of the live weights.
        **ema: Arguments of `weightsmith.continual.DynamicEMA`, without a tuner.

    Attributes:
        ema: The average, from the beginning of training on; ``None`` for a tuner's new group.

    Example:
        >>> Trainer(model, args, train_dataset=data, callbacks=[LCIACallback(kappa=0.01)]).train()  # doctest: +SKIP
    """

    def __init__(self, tuner: ContinualTuner | None = None, *, swap_on_evaluate: bool = False, **ema: Any) -> None:
        if tuner is not None and ema:
            raise UsageError(f"{next(iter(ema))} must be given to the tuner, not to the callback as well")
        if not ema.keys() <= _EMA_ARGUMENTS:
            raise TypeError(f"unknown argument {min(ema.keys() - _EMA_ARGUMENTS)}; known: {', '.join(_EMA_ARGUMENTS)}")
        self.tuner, self.swap_on_evaluate, self._options = tuner, swap_on_evaluate, ema
        self.ema: DynamicEMA | None = None
        self._swapped = self._evaluating = False

    def on_train_begin(self, args: Any, state: Any, *_: Any, model: Any = None, **__: Any) -> None:
        """Start the average, or restore that of the checkpoint which training resumes from."""
        if getattr(args, "deepspeed", None) or getattr(args, "fsdp", None):
            raise UsageError("LCIACallback needs whole parameters on every process: train with DDP, not FSDP or ZeRO")
        if args.load_best_model_at_end:
            raise UsageError(
                "load_best_model_at_end must be False with LCIACallback: what training ends with is the average, and "
                "the best checkpoint would be overwritten by it"
            )
        if getattr(state, _OWNER, self) is not self:
            raise UsageError("callbacks hold LCIACallback twice, and the second would overwrite the first: give one")
        self._swapped = self._evaluating = False
        if self.tuner is not None:
            if self.tuner.assignment is None or not self.tuner.in_task:
                raise UsageError("the tuner has no task in progress: train inside tuner.task or tuner.fit")
            self.tuner.check_model(model)
            self.ema = self.tuner.ema
        else:
            self.ema = DynamicEMA(model, **self._options)
        if state.global_step and (self.ema is not None or self.tuner is not None):
            self._resume(Path(_resumed(args, state), _STATE), model)
        setattr(state, _OWNER, self)
        setattr(state, _AVERAGE, self.ema)

    def _resume(self, file: Path, model: Any) -> None:
        if not file.is_file():
            raise UsageError(f"{file} is missing, so the average of the run to resume is unknown: start it anew")
        held = _read(file)
        if held.get("task", self._task()) != self._task():
            raise UsageError(
                f"{file} is of another task, {held['task']}, and this is {self._task()}: resume from a checkpoint of "
                "this task, and give every task an output_dir of its own"
            )
        now = _sample(model)
        # PEFT loads adapters of half precision as float32
        if any(
            name in now and not torch.equal(now[name].double(), kept.double())
            for name, kept in held.get("live", {}).items()
        ):
            raise UsageError(
                f"{file} is not of the weights that training resumes from: set resume_from_checkpoint of the "
                "TrainingArguments to the checkpoint that train() is given"
            )
        if self.ema is not None:
            self.ema.load_state_dict(held)

    def _task(self) -> list[Any] | None:
        return None if self.tuner is None else [self.tuner.tasks + 1, *(self.tuner.instructions or ())]

    def on_optimizer_step(self, *_: Any, optimizer: Any = None, **__: Any) -> None:
        """Gradients are still there; a step that the gradient scaler skipped does not count."""
        if self.ema is not None and not getattr(optimizer, "step_was_skipped", False):
            self.ema.step()

    def on_step_end(self, _args: Any, _state: Any, control: Any, **_: Any) -> None:
        """Evaluation may come next."""
        self._swap(control)

    def on_epoch_end(self, _args: Any, _state: Any, control: Any, **_: Any) -> None:
        """Evaluation may come next."""
        self._swap(control)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Evaluation is over for sure."""
        self._evaluating = False

    def _swap(self, control: Any) -> None:
        if self.swap_on_evaluate and self.ema is not None and control.should_evaluate and not self._swapped:
            self.ema.swap()
            self._swapped = self._evaluating = True

    def on_evaluate(self, *_: Any, **__: Any) -> None:
        """Evaluation is over."""
        if self._swapped and self.ema is not None:
            self.ema.restore()
            self._swapped = False
        elif self._evaluating:  # a Trainer tells no callback how many sets there are
            raise UsageError(
                "swap_on_evaluate evaluates the average on one set, and eval_dataset holds several: give one, or "
                "swap_on_evaluate=False and a ForgettingCallback"
            )

    def on_save(self, args: Any, state: Any, *_: Any, model: Any = None, **__: Any) -> None:
        """Write the average beside the checkpoint, and what tells this checkpoint from others."""
        if state.is_world_process_zero and (self.ema is not None or self.tuner is not None):
            average = {"tensors": {}} if self.ema is None else self.ema.state_dict()
            held = {**average, "live": _sample(model), **({} if self.tuner is None else {"task": self._task()})}
            with file_atomically(Path(args.output_dir, f"checkpoint-{state.global_step}", _STATE)) as fresh:
                torch.save(held, fresh)

    def on_train_end(self, _args: Any, state: Any, *_: Any, **__: Any) -> None:
        """The average becomes the model; with a tuner, its ``end`` does that."""
        self._evaluating = False
        if self.tuner is None and self.ema is not None:
            self.ema.copy_to_model()
            setattr(state, _AVERAGE, None)


class ForgettingCallback(transformers.TrainerCallback):
    """Record after every training run what the model can do on all held-out sets, and show what was lost and gained.

    Independent of how the model is trained: give the same meter to the Trainer of every task. Callbacks run in order:
    put it after one that changes the model at the end of training; of `LCIACallback` it takes the average in any order.

    Args:
        meter: Collects the results.
        task: Name of the task that this Trainer trains, one of the meter's held-out sets.
        before: Measure the model before the first task as well.
        show: Takes the table after the task; ``None``: nobody does.

    Example:
        >>> meter = ForgettingMeter({"sums": sums, "names": names}, path="forgetting.csv")  # doctest: +SKIP
        >>> Trainer(model, args, callbacks=[ForgettingCallback(meter, "sums")]).train()  # doctest: +SKIP
    """

    def __init__(
        self, meter: ForgettingMeter, task: str, *, before: bool = True, show: Callable[[str], Any] | None = print
    ) -> None:
        meter.check_task(task)
        self.meter, self.task, self.before, self.show = meter, task, before, show

    def on_train_begin(self, _args: Any, state: Any, *_: Any, model: Any = None, **__: Any) -> None:
        """Measure what the model can do before it has learnt anything."""
        if self.before and self.meter.empty and not state.global_step:
            self.meter.start(model, write=state.is_world_process_zero)

    def on_train_end(self, _args: Any, state: Any, *_: Any, model: Any = None, **__: Any) -> None:
        """Measure, and show it on one process."""
        average = getattr(state, _AVERAGE, None)  # which is about to become the model
        with average.swapped() if average is not None and average.step_count else nullcontext():
            self.meter.record(model, self.task, write=state.is_world_process_zero)
        if self.show is not None and state.is_world_process_zero:
            self.show(str(self.meter.report()))


_EMA_ARGUMENTS = frozenset({"mode", "kappa", "fallback_beta", "init", "dtype", "offload", "strict"})


def _read(file: Path) -> dict[str, Any]:
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged pickles fail in any way
        raise UsageError(f"{file} cannot be read: {reason(error)}") from error
    if not isinstance(state, dict) or not isinstance(state.get("tensors"), dict):
        raise UsageError(f"{file} does not hold the state of an average")
    return state


def _sample(model: Any) -> dict[str, torch.Tensor]:
    """A few values of each trainable parameter."""
    return {
        name: p.detach().reshape(-1)[:_SAMPLE].to("cpu", copy=True)
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def _resumed(args: Any, state: Any) -> Path:
    """The checkpoint that training resumes from."""
    given = getattr(args, "resume_from_checkpoint", None)
    if isinstance(given, str) and Path(given).is_dir():
        return Path(given)
    return Path(args.output_dir, f"checkpoint-{state.global_step}")
