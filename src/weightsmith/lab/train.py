"""The supervised training loop that everything in the product shares.

It stands on Accelerate: the same call trains on a CPU, a GPU, or on many under ``accelerate launch`` (on CPUs:
``torchrun``), where every process takes its share of each batch, so that the batch size, the order of the data and the
result stay those of one process.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, broadcast, reduce
from torch import Tensor, nn

from weightsmith.core.errors import UsageError, unknown
from weightsmith.lab.progress import Progress, seed_everything
from weightsmith.lab.reading import Pass, read
from weightsmith.lab.task import Batch, Batches, Outcome, Task

Schedule = Literal["cosine", "constant", "step"]
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
        before_step: Called when gradients are complete, unscaled and clipped, before the optimizer's step.
        after_step: Called after it.
        after_row: Gives further numbers to record with every row, from the model without any wrapper; called on every
            process.
        state: What is saved with the run in flight and restored when it resumes.
    """

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

    The same seed, device and number of threads give the same weights to the last bit, also when a killed run resumes.
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
        hooks: See :class:`Hook`.
        record: Takes each row: step, epoch, lr (of the first group), train_loss since the row before, what the
            validation gave (with the prefix ``validation_``) and what the hooks gave; or the row of a divergence, with
            ``diverged`` 1. Called on the main process only; a resumed run gives it the rows before the kill again.
        folder: Where the run in flight is saved, about every ``checkpoint_seconds``, and where it resumes. It belongs
            to this call alone; ``None``: it is not saved.
        checkpoint_seconds: Time between two checkpoints, at least twenty times that of saving one.

    Returns:
        The trained model and how the run went.

    Raises:
        UsageError: An argument is out of range, the task has no training examples, or ``folder`` holds another run.
    """
    if schedule not in get_args(Schedule):
        raise unknown("schedule", schedule, get_args(Schedule))
    total, epoch_steps, batch_size = _length(task, epochs, steps, batch_size)
    unit = 1 if steps is not None else epoch_steps
    factor = _factor(schedule, total, warmup * unit, [milestone * unit for milestone in milestones], gamma)
    row_steps = _row_steps(rows_at, total, epoch_steps)
    begin = time.perf_counter()
    AcceleratorState._reset_state()  # an earlier run in this process may have had another precision
    accelerator = Accelerator(mixed_precision=mixed_precision)
    processes, rank, device = accelerator.num_processes, accelerator.process_index, accelerator.device
    seed_everything(seed + rank)  # dropout is to differ between processes; batches follow from the seed alone
    base = [group["lr"] for group in optimizer.param_groups]
    wrapped, stepper = accelerator.prepare(model, optimizer)
    # its wrapper looks for other libraries on disk at every step, which a small network would feel
    plain = accelerator.distributed_type == DistributedType.NO and accelerator.scaler is None
    take_step = optimizer.step if plain else stepper.step
    asked = {"steps": total, "batch_size": batch_size, "seed": seed, "schedule": schedule, "begin": _begin(model, base)}
    parts = {"model": model, "optimizer": stepper, "scaler": accelerator.scaler} | {
        f"hook {index}": hook.state for index, hook in enumerate(hooks)
    }
    progress = Progress(folder, asked, parts, seconds=checkpoint_seconds, writes=accelerator.is_main_process)
    losses = task.losses if loss is None else loss
    record = record if record is not None and accelerator.is_main_process else _ignore
    for row in progress.rows:
        record(row)

    wrapped.train()
    passes = _passes(len(task.train), seed, progress.step, total, batch_size) if not progress.diverged else ()
    for batch in read(task.train, passes, rank, processes, device):
        for group, lr in zip(optimizer.param_groups, base, strict=True):
            group["lr"] = lr * factor(progress.step)
        optimizer.zero_grad()
        found = losses(wrapped, batch)
        # makes the mean over processes, which is what they exchange, that over the whole batch
        scaled = (found.sum() if found.dim() else found * len(batch)) * (processes / batch_size)
        accelerator.backward(scaled)
        value = reduce(scaled.detach(), "mean").item() if processes > 1 else scaled.item()
        if not math.isfinite(value):
            progress.diverged = True
            break
        if clip_norm is not None:
            accelerator.clip_grad_norm_(wrapped.parameters(), clip_norm)
        elif hooks:
            accelerator.unscale_gradients()
        for hook in hooks:
            if hook.before_step is not None:
                hook.before_step()
        take_step()
        for hook in hooks:
            if hook.after_step is not None:
                hook.after_step()
        progress.count(value)
        if progress.step in row_steps:
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
    progress.diverged = progress.diverged or not all(bool(value.isfinite().all()) for value in model.parameters())
    if progress.diverged and not (progress.rows and progress.rows[-1].get("diverged")):
        progress.rows.append({"step": progress.step, "epoch": progress.step / epoch_steps, "diverged": 1.0})
        record(progress.rows[-1])
    progress.save()
    for group, lr in zip(optimizer.param_groups, base, strict=True):
        group["lr"] = lr  # so that the optimizer can be used again
    accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
    return Fitted(model, progress.diverged, progress.step, tuple(progress.rows), time.perf_counter() - begin)


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
        UsageError: The split is empty.
    """
    if not len(batches):
        raise UsageError("the split to evaluate has no examples")
    state = PartialState()
    device = next((parameter.device for parameter in model.parameters()), state.device)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    found: dict[str, Tensor] = {}
    try:
        order = torch.arange(len(batches)).split(batch_size)
        for batch in read(batches, [(0, order)], state.process_index, state.num_processes, device):
            if not len(batch):
                continue
            for name, values in scores(model, batch).items():
                found.setdefault(name, torch.zeros(len(batches)))[batch.indices.cpu()] = values.float().cpu()
    finally:
        for module, training in modes:
            module.training = training
    if state.num_processes > 1:
        found = {name: reduce(values.to(state.device), "sum").cpu() for name, values in found.items()}
    return Outcome({name: values.double().mean().item() for name, values in found.items()}, found)


def _begin(model: nn.Module, rates: Sequence[float]) -> list[float]:
    """Tells one run from another by its first weights and learning rates."""
    sums = [tensor.detach().double().sum().item() for tensor in model.parameters()]
    return [*map(float, rates), *sums[:3], math.fsum(sums)]


def _validation(task: Task, model: nn.Module) -> Row:
    if not task.rows.get("validation", 1):
        return {}
    return {f"validation_{name}": value for name, value in task.evaluate(model, "validation").metrics.items()}


def _ignore(_: Row) -> None:
    pass


def _length(task: Task, epochs: float | None, steps: int | None, batch_size: int) -> tuple[int, int, int]:
    """Steps in all, steps of an epoch, and the batch size, no larger than the data."""
    if (epochs is None) == (steps is None):
        raise UsageError(f"give either epochs or steps, got epochs={epochs} and steps={steps}")
    for argument, value in {"batch_size": batch_size, "epochs": epochs, "steps": steps}.items():
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise UsageError(f"{argument} must be above 0, got {value}")
    if not len(task.train):
        raise UsageError(f"task {task.name!r} has no training examples")
    batch_size = min(batch_size, len(task.train))
    epoch_steps = len(task.train) // batch_size
    return (max(1, round(epochs * epoch_steps)) if steps is None and epochs else steps or 1), epoch_steps, batch_size


def _row_steps(rows_at: int | Sequence[int] | None, total: int, epoch_steps: int) -> set[int]:
    if isinstance(rows_at, Sequence):
        return {*rows_at, total}
    if rows_at is not None and rows_at < 1:
        raise UsageError(f"rows_at must be at least 1, got {rows_at}")
    return {*range(rows_at or epoch_steps, total + 1, rows_at or epoch_steps), total}


def _passes(examples: int, seed: int, step: int, total: int, batch_size: int) -> Iterator[Pass]:
    """The epochs still to come; each follows from the seed and its number alone."""
    epoch_steps = examples // batch_size
    while step < total:
        epoch, done = divmod(step, epoch_steps)
        generator = torch.Generator().manual_seed((seed + epoch * 2_654_435_761) % 2**63)
        order = torch.randperm(examples, generator=generator).split(batch_size)
        chosen = order[done : min(epoch_steps, done + total - step)]
        yield int(torch.randint(2**62, (), generator=generator)), chosen
        step += len(chosen)


def _factor(
    schedule: Schedule, steps: int, warmup: float, milestones: Sequence[float], gamma: float
) -> Callable[[int], float]:
    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
        if schedule == "step":
            return gamma ** sum(step >= milestone for milestone in milestones)
        return 1.0

    return factor
