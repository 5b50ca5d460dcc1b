"""One real batch through the model before the first job: what cannot run says so once, and at once."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from weightsmith.core.device import default_device
from weightsmith.core.errors import UsageError
from weightsmith.lab.machine import Stopwatch
from weightsmith.lab.progress import seed_everything
from weightsmith.lab.task import Batch, Task


@dataclass(frozen=True, slots=True)
class Probe:
    """What one training step costs.

    Attributes:
        seconds: Wall time of a step.
        memory: Peak memory of this process or of the GPU, bytes.
        parameters: How many numbers the model has.
    """

    seconds: float
    memory: int
    parameters: int


def probe(task: Task, batch_size: int | None = None) -> Probe:
    """Build the model and put a batch through it: forward, backward, a step of AdamW.

    Args:
        task: What is to be trained.
        batch_size: Of the step that is timed; ``None``: the task's example.

    Returns:
        What a step costs.

    Raises:
        UsageError: The data are empty, the model does not take them, the loss is not one finite number per example.
    """
    if not len(task.train):
        raise UsageError(f"task {task.name!r} has no training examples")
    seed_everything(0)
    model = task.build()
    model.to(default_device()).train()
    batch = first_batch(task, batch_size, model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0) if any(True for _ in model.parameters()) else None

    def step() -> None:
        losses = _losses(task, model, batch)
        if losses.requires_grad:
            losses.mean().backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    with Stopwatch() as watch:
        seconds = fastest(step)
    return Probe(seconds, watch.peak_memory, sum(parameter.numel() for parameter in model.parameters()))


def first_batch(task: Task, batch_size: int | None, model: nn.Module) -> Batch:
    """The first training examples, as many as there are up to ``batch_size``, where the model is.

    Args:
        task: Has the examples.
        batch_size: How many; ``None``: the task's example.
        model: Is to take them.
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    rows = list(range(min(batch_size, len(task.train)))) if batch_size else None
    return (task.example() if rows is None else task.train.__getitems__(rows)).to(device)


def fastest_loss(loss: Callable[[], Tensor]) -> float:
    """Seconds of the fastest of a few forward and backward passes."""
    return fastest(lambda: loss().backward())


def fastest(step: Callable[[], Any], times: int = 3) -> float:
    """Seconds of the fastest of a few calls; the first one allocates."""
    seconds = []
    for _ in range(times):
        begin = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def _losses(task: Task, model: nn.Module, batch: Batch) -> Tensor:
    try:
        losses = task.losses(model, batch)
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(
            f"the model of task {task.name!r} does not take a batch of its data: {type(error).__name__}: {error}"
        ) from error
    if tuple(losses.shape) != (len(batch),):
        raise UsageError(
            f"the losses of task {task.name!r} must be one per example, ({len(batch)},), got {tuple(losses.shape)}"
        )
    if not losses.isfinite().all():
        raise UsageError(f"the loss of task {task.name!r} is not finite before training")
    return losses
