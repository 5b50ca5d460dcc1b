"""The supervised training loop that everything in the product shares.

It stands on Accelerate: the same call trains on a CPU, a GPU, or on many under ``accelerate launch`` (on CPUs:
``torchrun``), where every process takes its share of each batch, so that the batch size, the order of the data and the
result stay those of one process.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType, GradientAccumulationPlugin, broadcast, reduce
from torch import Tensor, nn

from weightsmith.core.errors import UsageError
from weightsmith.core.modes import evaluating
from weightsmith.lab.identity import function_words, optimizer_words, weights_digest
from weightsmith.lab.progress import Progress, seed_everything
from weightsmith.lab.reading import read
from weightsmith.lab.schedule import Schedule, check_schedule, factor, length, passes, row_steps
from weightsmith.lab.task import Batch, Batches, Outcome, Task

PRECISIONS = ("no", "fp16", "bf16")
Loss = Callable[[nn.Module, Batch], Tensor]
Row = Mapping[str, float]


class Stateful(Protocol):
    """Anything whose state belongs to a training run: an averager, an annealer, a memory."""

    def state_dict(self) -> dict[str, Any]:
        """Give the state as plain data."""

    def load_state_dict(self, state: dict[str, Any]) -> Any:
        """Take it back."""


@dataclass(frozen=True, slots=True)
class Hook:
    """What happens around the steps of a training run.

    Attributes:
        penalty: Gives a scalar whose gradient is added to those of the loss, after they are clipped.
        before_step: Called when gradients are complete, unscaled and clipped, before the optimizer's step.
        after_step: Called after it.
        after_row: Gives further numbers to record with every row, from the model without any wrapper; called on every
            process.
        state: What is saved with the run in flight and restored when it resumes.
    """

    penalty: Callable[[], Tensor] | None = None
    before_step: Callable[[], None] | None = None
    after_step: Callable[[], None] | None = None
    after_row: Callable[[nn.Module], Row] | None = None
    state: Stateful | None = None


@dataclass(frozen=True, slots=True)
class Fitted:
    """What came out of a training run.

    Attributes:
        model: The model that went in, trained, without any wrapper.
        diverged: The loss was not finite and training stopped there.
        steps: Optimizer steps taken.
        rows: One row per recorded period.
        seconds: Wall time of this call.
    """

    model: nn.Module
    diverged: bool
    steps: int
    rows: Sequence[Row]
    seconds: float


@torch.backends.cudnn.flags(enabled=True, deterministic=True)
def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    task: Task,
    *,
    loss: Loss | None = None,
    epochs: float | None = None,
    steps: int | None = None,
    batch_size: int,
    seed: int,
    schedule: Schedule = "cosine",
    warmup: float = 0,
    milestones: Sequence[float] = (),
    gamma: float = 0.1,
    clip_norm: float | None = None,
    mixed_precision: str | None = None,
    rows_at: int | Sequence[int] | None = None,
    validate: Literal["always", "last", "never"] = "always",
    hooks: Sequence[Hook] = (),
    record: Callable[[Row], None] | None = None,
    folder: Path | None = None,
    checkpoint_seconds: float = 30.0,
) -> Fitted:
    """Train a model on ``task.train``.

    The same seed, device and number of threads give the same weights to the last bit, also when a killed run resumes
    (with several processes the noise of dropout, not the data, differs after that).
    Batches follow from the seed alone, so all arms of an experiment see the same. A loss that is not finite ends the
    run and is not an error: a sweep of learning rates may well contain one. With several processes batch normalization
    sees each process's share of a batch only.

    Args:
        model: Trained in place.
        optimizer: Built on the model's parameters; its learning rates are where the schedule starts from.
        task: What to train on; its validation split is evaluated with every row.
        loss: ``(model, batch) -> scalar or (B,)``, instead of ``task.losses``; a scalar counts as the batch's mean.
        epochs: Passes over the data; or else
        steps: Optimizer steps.
        batch_size: Examples per step, over all processes; an incomplete last batch of an epoch is left out.
        seed: Orders and augments the data, and seeds the global generators.
        schedule: Learning rate per step: ``"cosine"`` to 0 (arXiv 1608.03983, equation 5, one cycle), ``"constant"``,
            or ``"step"``, times ``gamma`` at each milestone.
        warmup: Linear rise before that; like ``milestones`` in epochs, or in steps when ``steps`` is given.
        milestones: When ``"step"`` falls.
        gamma: Factor by which it falls.
        clip_norm: Largest L2 norm of all gradients together; ``None``: any.
        mixed_precision: ``"no"``, ``"fp16"`` or ``"bf16"``; ``None``: as ``accelerate launch`` was told.
        rows_at: Record a row every n steps, or after these steps; ``None``: after each epoch. The last step always
            has one.
        validate: Evaluate the validation split with every row, with the last one, or not at all.
        hooks: See `Hook`.
        record: Takes each row: step, epoch, lr (of the first group), train_loss since the row before, what the
            validation gave (with the prefix ``validation_``) and what the hooks gave; or the row of a divergence, with
            ``diverged`` 1. Called on the main process only; a resumed run gives it the rows before the kill again.
        folder: Where the run in flight is saved, about every ``checkpoint_seconds``, and where it resumes. It belongs
            to this call alone: one that differs in its data, first weights, optimizer, loss, hooks or settings is an
            error; ``None``: it is not saved.
        checkpoint_seconds: Time between two checkpoints, at least twenty times that of saving one.

    Returns:
        The trained model and how the run went.

    Raises:
        UsageError: An argument is out of range, the task has no training examples, or ``folder`` holds another run.
    """
    check_schedule(schedule)
    check_precision(mixed_precision)
    if clip_norm is not None and not clip_norm > 0:
        raise UsageError(f"clip_norm must be above 0, got {clip_norm}")
    if not len(task.train):
        raise UsageError(f"task {task.name!r} has no training examples")
    total, epoch_steps, batch_size = length(len(task.train), epochs, steps, batch_size)
    unit = 1 if steps is not None else epoch_steps
    times = factor(schedule, total, warmup * unit, [milestone * unit for milestone in milestones], gamma)
    recorded = row_steps(rows_at, total, epoch_steps)
    begin = time.perf_counter()
    base = [group["lr"] for group in optimizer.param_groups]
    losses = task.losses if loss is None else loss
    with _accelerated(mixed_precision) as accelerator:
        processes, rank, device = accelerator.num_processes, accelerator.process_index, accelerator.device
        if batch_size < processes:
            raise UsageError(f"batch_size must be at least the number of processes, {processes}, got {batch_size}")
        asked = {}
        if folder is not None:  # reading all weights takes its time
            asked = {
                "data": f"{task.name} {len(task.train)} {task.fingerprint}",
                "first weights": weights_digest(model),
                "optimizer": optimizer_words(optimizer),
                "loss": function_words(losses),
                "hooks": ", ".join(type(hook.state).__qualname__ for hook in hooks),
                "steps": total,
                "batch_size": batch_size,
                "seed": seed,
                "schedule": f"{schedule} {warmup * unit} {[m * unit for m in milestones]} {gamma}",
                "clip_norm": clip_norm,
                "rows_at": sorted(recorded) if rows_at is not None else None,
                "validate": validate,
                "mixed_precision": str(accelerator.mixed_precision),
                "processes": processes,
            }
        seed_everything(seed + rank)  # dropout is to differ between processes; batches follow from the seed alone
        wrapped, stepper = accelerator.prepare(model, optimizer)
        # its wrappers look for other libraries on disk at every step, which a small network would feel
        plain = accelerator.distributed_type == DistributedType.NO and accelerator.scaler is None
        take_step = optimizer.step if plain else stepper.step
        backward = torch.Tensor.backward if plain else accelerator.backward
        parts = {"model": model, "optimizer": stepper, "scaler": accelerator.scaler} | {
            f"hook {index}": hook.state for index, hook in enumerate(hooks)
        }
        try:
            progress = Progress(folder, asked, parts, seconds=checkpoint_seconds, writes=accelerator.is_main_process)
            if processes > 1:
                accelerator.wait_for_everyone()  # until all have read the checkpoint, none may replace it
                if progress.step:  # only the main process's generators were saved
                    seed_everything(seed + rank + processes * progress.step)
            record = record if record is not None and accelerator.is_main_process else _ignore
            for row in progress.rows:
                record(row)

            wrapped.train()
            left = passes(len(task.train), seed, progress.step, total, batch_size) if not progress.diverged else ()
            for batch in read(task.train, left, rank, processes, device):
                for group, lr in zip(optimizer.param_groups, base, strict=True):
                    group["lr"] = lr * times(progress.step)
                optimizer.zero_grad()
                scaled = _total(losses(wrapped, batch), batch) * (processes / batch_size)
                backward(scaled)
                value = reduce(scaled.detach(), "mean").item() if processes > 1 else scaled.item()
                if not math.isfinite(value):
                    progress.diverged = True
                    break
                if clip_norm is not None:
                    accelerator.clip_grad_norm_(wrapped.parameters(), clip_norm)
                elif hooks:
                    accelerator.unscale_gradients()
                for hook in hooks:
                    if hook.penalty is not None:
                        hook.penalty().backward()
                    if hook.before_step is not None:
                        hook.before_step()
                take_step()
                for hook in hooks:
                    if hook.after_step is not None:
                        hook.after_step()
                progress.count(value)
                if progress.step in recorded:
                    row = {"step": progress.step, "epoch": progress.step / epoch_steps}
                    row |= {"lr": float(optimizer.param_groups[0]["lr"]), "train_loss": progress.mean_loss()}
                    if processes > 1:
                        broadcast(list(model.buffers()))  # batch statistics, which every process gathers for itself
                    if validate == "always" or (validate == "last" and progress.step == total):
                        row |= _validation(task, model)
                    for hook in hooks:
                        row |= hook.after_row(model) if hook.after_row is not None else {}
                    progress.rows.append(row)
                    record(row)
                progress.save_if_due()

            # the loss of the last step was taken before it: its damage shows in the weights alone
            progress.diverged = progress.diverged or not all(map(_is_finite, model.parameters()))
            if progress.diverged and not (progress.rows and progress.rows[-1].get("diverged")):
                progress.rows.append({"step": progress.step, "epoch": progress.step / epoch_steps, "diverged": 1.0})
                record(progress.rows[-1])
            progress.save()
        finally:
            for group, lr in zip(optimizer.param_groups, base, strict=True):
                group["lr"] = lr  # so that the optimizer can be used again
            accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
    return Fitted(model, progress.diverged, progress.step, tuple(progress.rows), time.perf_counter() - begin)


def check_precision(mixed_precision: str | None) -> None:
    """Refuse a precision that is not known, or that this machine does not have.

    Raises:
        UsageError: Names it.
    """
    if mixed_precision is not None and mixed_precision not in PRECISIONS:
        raise UsageError(f"mixed_precision must be one of {', '.join(PRECISIONS)}, got {mixed_precision!r}")
    if mixed_precision == "fp16" and not torch.accelerator.is_available():
        raise UsageError("mixed_precision must be bf16 or no without a GPU, got 'fp16'")


@contextmanager
def _accelerated(mixed_precision: str | None) -> Iterator[Accelerator]:
    """An accelerator of this call's own.

    The states that all accelerators of a process share are as before afterwards: an earlier run may have had another
    precision, and the user may hold an accelerator.
    """
    shared = [(state._shared_state, dict(state._shared_state)) for state in (AcceleratorState, GradientState)]
    AcceleratorState._reset_state()
    try:
        # given explicitly, because a number of steps from the environment would divide the losses
        one = GradientAccumulationPlugin(num_steps=1)
        yield Accelerator(mixed_precision=mixed_precision, gradient_accumulation_plugin=one)
    finally:
        for state, before in shared:
            state.clear()
            state.update(before)


def _total(found: Tensor, batch: Batch) -> Tensor:
    """The losses of this process's share of a batch in one number; over processes their mean is exchanged."""
    if found.dim() and tuple(found.shape) != (len(batch),):
        raise UsageError(f"loss must be one number or one per example, ({len(batch)},), got {tuple(found.shape)}")
    found = found if found.dtype in (torch.float32, torch.float64) else found.float()
    return found.sum() if found.dim() else found * len(batch)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Batches,
    scores: Callable[[nn.Module, Batch], Mapping[str, Tensor]],
    batch_size: int = 512,
) -> Outcome:
    """Score every example of a split in evaluation mode; every module is in its former mode afterwards.

    Under several processes every process takes a share and must make the call.

    Args:
        model: What to measure.
        batches: On what.
        scores: ``(model, batch) -> (B,) per metric``.
        batch_size: Examples at a time, over all processes.

    Returns:
        Per metric the mean, and the scores ``(N,)``, float32, in the order of the split.

    Raises:
        UsageError: The split is empty, or a score is not one number per example.
    """
    if not len(batches):
        raise UsageError("the split to evaluate has no examples")
    state = PartialState()
    # fewer examples than processes: every process reads them all, so that all know the names of the scores
    processes, rank = (state.num_processes, state.process_index) if len(batches) >= state.num_processes else (1, 0)
    device = next((parameter.device for parameter in model.parameters()), state.device)
    found: dict[str, Tensor] = {}
    with evaluating(model):
        order = torch.arange(len(batches)).split(batch_size)
        for batch in read(batches, [(0, order)], rank, processes, device):
            if not len(batch):
                continue
            for name, values in scores(model, batch).items():
                if tuple(values.shape) != (len(batch),):
                    raise UsageError(
                        f"{name} must be one number per example, ({len(batch)},), got {tuple(values.shape)}"
                    )
                found.setdefault(name, torch.zeros(len(batches)))[batch.indices.cpu()] = values.float().cpu()
    if processes > 1:
        found = {name: reduce(values.to(state.device), "sum").cpu() for name, values in found.items()}
    return Outcome({name: values.double().mean().item() for name, values in found.items()}, found)


def _validation(task: Task, model: nn.Module) -> Row:
    if not task.rows.get("validation", 1):
        return {}
    return {f"validation_{name}": value for name, value in task.evaluate(model, "validation").metrics.items()}


def _is_finite(parameter: Tensor) -> bool:
    # by its norm: weights of 1e29 are numbers still, and no layer can compute with them
    values = parameter.detach()
    return bool(torch.linalg.vector_norm(values if values.dtype == torch.float64 else values.float()).isfinite())


def _ignore(_: Row) -> None:
    pass
