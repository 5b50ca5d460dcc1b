"""The plain training loop that experiments share.

It stands on Accelerate: the same call trains on a CPU, a GPU, or on many under ``accelerate launch`` (on CPUs:
``torchrun``), where every process takes its share of each batch, so that the batch size, the order of the data and the
result stay those of one process.
"""

import math
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, broadcast, reduce
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from weightsmith.core.errors import UsageError, unknown
from weightsmith.lab.images import Images, OnDisk, Split

Schedule = Literal["cosine", "constant", "step"]


@dataclass(frozen=True, slots=True)
class Fitted:
    """What came out of a training run.

    Attributes:
        model: The model that went in, trained, without any wrapper.
        diverged: The loss ceased to be finite and training stopped there.
        steps: Optimiser steps taken.
        seconds: Wall time, evaluation included.
    """

    model: nn.Module
    diverged: bool
    steps: int
    seconds: float


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch on every device.

    Args:
        seed: At least 0.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@torch.backends.cudnn.flags(enabled=True, deterministic=True)
def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Images,
    *,
    epochs: int,
    batch_size: int,
    seed: int,
    schedule: Schedule = "cosine",
    warmup_epochs: float = 0,
    milestones: Sequence[float] = (),
    gamma: float = 0.1,
    label_smoothing: float = 0.0,
    clip_norm: float | None = None,
    mixed_precision: str | None = None,
    before_step: Callable[[], None] | None = None,
    after_epoch: Callable[[nn.Module], Mapping[str, float]] | None = None,
    record: Callable[[Mapping[str, float]], None] | None = None,
    evaluate_each_epoch: bool = True,
) -> Fitted:
    """Train a classifier on ``data.train`` by cross-entropy.

    The same seed, device and number of threads give the same weights to the last bit. Batches follow from the seed
    alone, so all arms of an experiment see the same. A loss that is not finite ends the run and is no error: a sweep of
    learning rates may well contain one. With several processes batch norm sees each one's share of a batch only.

    Args:
        model: Maps ``(B, C, H, W)`` to logits ``(B, classes)``; trained in place.
        optimizer: Built on the model's parameters; its learning rates are where the schedule starts from.
        data: What to train on; ``data.validation`` is evaluated after each epoch.
        epochs: Passes over the data.
        batch_size: Examples per step, over all processes; a last batch that is smaller is left out.
        seed: Orders and augments the data, and seeds the global generators.
        schedule: Learning rate per step: ``"cosine"`` to 0 (arXiv 1608.03983, equation 5, one cycle), ``"constant"``,
            or ``"step"``, times ``gamma`` at each milestone.
        warmup_epochs: Linear rise before that.
        milestones: Epochs at which ``"step"`` falls.
        gamma: By what it falls.
        label_smoothing: Probability spread over all classes (arXiv 1512.00567, section 7).
        clip_norm: Largest L2 norm of all gradients together; ``None``: any.
        mixed_precision: ``"no"``, ``"fp16"`` or ``"bf16"``; ``None``: as ``accelerate launch`` was told.
        before_step: Called when gradients are complete, unscaled and clipped, before the optimiser's step.
        after_epoch: Gives further numbers to record, from the model without any wrapper; called on every process.
        record: Takes one row per epoch: epoch, step, lr (of the first group), train_loss and train_accuracy (running),
            validation_loss and validation_accuracy, and what ``after_epoch`` gave; or the row of a divergence, with
            ``diverged`` 1. Called on the main process only.
        evaluate_each_epoch: ``False`` evaluates after the last epoch only.

    Returns:
        The trained model and how the run went.

    Raises:
        UsageError: An argument is out of range.
    """
    if schedule not in get_args(Schedule):
        raise unknown("schedule", schedule, get_args(Schedule))
    for argument, value in {"epochs": epochs, "batch_size": batch_size}.items():
        if value < 1:
            raise UsageError(f"{argument} must be at least 1, got {value}")
    start = time.perf_counter()
    AcceleratorState._reset_state()  # an earlier run in this process may have had another precision
    accelerator = Accelerator(mixed_precision=mixed_precision)
    processes, rank, device = accelerator.num_processes, accelerator.process_index, accelerator.device
    seed_everything(seed + rank)  # dropout is to differ between processes; batches have a generator of their own
    generator = torch.Generator().manual_seed(seed)
    wrapped, stepper = accelerator.prepare(model, optimizer)
    wrapped.train()
    # its wrapper looks for other libraries on disk at every step, which a small network would feel
    plain = accelerator.distributed_type == DistributedType.NO and accelerator.scaler is None
    take_step = optimizer.step if plain else stepper.step
    batch_size = min(batch_size, len(data.train))
    epoch_steps = len(data.train) // batch_size
    factor = _factor(
        schedule, epochs * epoch_steps, warmup_epochs * epoch_steps, [m * epoch_steps for m in milestones], gamma
    )
    scale = processes / batch_size  # makes the mean over processes, which is what they exchange, that over the batch
    base = [group["lr"] for group in optimizer.param_groups]
    step, diverged = 0, False

    for epoch in range(1, epochs + 1):
        order = torch.randperm(len(data.train), generator=generator)[: epoch_steps * batch_size]
        data.train.seed = int(torch.randint(2**62, (), generator=generator))
        loss_sum, correct = 0.0, torch.zeros((), device=device)
        for x, y in _load(data.train, order.split(batch_size), rank, processes, device):
            for group, lr in zip(optimizer.param_groups, base, strict=True):
                group["lr"] = lr * factor(step)
            optimizer.zero_grad()
            logits = wrapped(x)
            loss = F.cross_entropy(logits, y, reduction="sum", label_smoothing=label_smoothing) * scale
            accelerator.backward(loss)
            batch_loss = reduce(loss.detach(), "mean").item() if processes > 1 else loss.item()
            diverged = not math.isfinite(batch_loss)
            if diverged:
                break
            if clip_norm is not None:
                accelerator.clip_grad_norm_(wrapped.parameters(), clip_norm)
            elif before_step is not None:
                accelerator.unscale_gradients()
            if before_step is not None:
                before_step()
            take_step()
            step += 1
            loss_sum += batch_loss
            correct += (logits.detach().argmax(1) == y).sum()

        row = {"epoch": epoch, "step": step, "lr": float(optimizer.param_groups[0]["lr"])}
        if diverged:
            row["diverged"] = 1.0
        else:
            row["train_loss"] = loss_sum / epoch_steps
            row["train_accuracy"] = reduce(correct, "sum").item() / (epoch_steps * batch_size)
            if processes > 1:
                broadcast(list(model.buffers()))  # batch norm statistics, which every process gathers for itself
            if len(data.validation) and (evaluate_each_epoch or epoch == epochs):
                row |= {f"validation_{key}": value for key, value in evaluate(model, data.validation).items()}
            row |= after_epoch(model) if after_epoch is not None else {}
        if record is not None and accelerator.is_main_process:
            record(row)
        if diverged:
            break

    for group, lr in zip(optimizer.param_groups, base, strict=True):
        group["lr"] = lr  # so that the optimiser can be used again
    accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
    return Fitted(model, diverged=diverged, steps=step, seconds=time.perf_counter() - start)


@torch.no_grad()
def evaluate(model: nn.Module, split: Split, batch_size: int = 512) -> dict[str, float]:
    """Measure a classifier in evaluation mode; every module is in its former mode afterwards.

    Under ``accelerate launch`` every process takes a share and must make the call.

    Args:
        model: Maps ``(B, C, H, W)`` to logits ``(B, classes)``.
        split: What to measure on.
        batch_size: Examples at a time, over all processes.

    Returns:
        ``loss``, the mean cross-entropy, and ``accuracy``, in [0, 1].

    Raises:
        UsageError: The split is empty.
    """
    if not len(split):
        raise UsageError("split must not be empty")
    state = PartialState()
    device = next((parameter.device for parameter in model.parameters()), state.device)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64)
    try:
        batches = torch.arange(len(split)).split(batch_size)
        for x, y in _load(split, batches, state.process_index, state.num_processes, device):
            logits = model(x)
            loss, correct = F.cross_entropy(logits, y, reduction="sum"), (logits.argmax(1) == y).sum()
            sums += torch.stack([loss, correct]).double().cpu()
    finally:
        for module, training in modes:
            module.training = training
    loss, correct = reduce(sums.to(state.device), "sum").tolist()
    return {"loss": loss / len(split), "accuracy": correct / len(split)}


def _load(
    split: Split, batches: Sequence[Tensor], rank: int, processes: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    loader = DataLoader(
        split,
        batch_sampler=[batch[rank::processes].tolist() for batch in batches],
        collate_fn=_as_it_is,
        num_workers=min(8, (os.cpu_count() or 1) // processes) if isinstance(split.read, OnDisk) else 0,
        generator=torch.Generator(),  # keeps its hands off the global one
    )
    for x, y in loader:
        yield x.to(device), y.to(device)


def _as_it_is(batch: Any) -> Any:
    return batch


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
