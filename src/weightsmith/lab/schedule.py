"""How long a training run is, which batches it reads, when it records, and how its learning rate goes."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, get_args

import torch

from weightsmith.core.errors import UsageError, unknown
from weightsmith.lab.reading import Pass

Schedule = Literal["cosine", "constant", "step"]


def check_schedule(schedule: str) -> None:
    """Refuse a name that is none.

    Raises:
        UsageError: Lists the known ones.
    """
    if schedule not in get_args(Schedule):
        raise unknown("schedule", schedule, get_args(Schedule))


def length(examples: int, epochs: float | None, steps: int | None, batch_size: int) -> tuple[int, int, int]:
    """Steps in all, steps of an epoch, and the batch size, no larger than the data.

    Raises:
        UsageError: A number is out of range, or not exactly one of ``epochs`` and ``steps`` is given.
    """
    if (epochs is None) == (steps is None):
        raise UsageError(f"give either epochs or steps, got epochs={epochs} and steps={steps}")
    for argument, value in {"batch_size": batch_size, "epochs": epochs, "steps": steps}.items():
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise UsageError(f"{argument} must be above 0, got {value}")
    batch_size = min(batch_size, examples)
    epoch_steps = examples // batch_size
    return (max(1, round(epochs * epoch_steps)) if steps is None and epochs else steps or 1), epoch_steps, batch_size


def row_steps(rows_at: int | Sequence[int] | None, total: int, epoch_steps: int) -> set[int]:
    """The steps after which a row is recorded; the last one always.

    Raises:
        UsageError: A number is below 1.
    """
    asked = rows_at if isinstance(rows_at, Sequence) else [rows_at or epoch_steps] if rows_at != 0 else [0]
    if any(step < 1 for step in asked):
        raise UsageError(f"rows_at must be at least 1, got {rows_at}")
    if isinstance(rows_at, Sequence):
        return {*asked, total}
    return {*range(asked[0], total + 1, asked[0]), total}


def passes(examples: int, seed: int, step: int, total: int, batch_size: int) -> Iterator[Pass]:
    """The epochs still to come; each follows from the seed and its number alone."""
    epoch_steps = examples // batch_size
    while step < total:
        epoch, done = divmod(step, epoch_steps)
        generator = torch.Generator().manual_seed((seed + epoch * 2_654_435_761) % 2**63)
        order = torch.randperm(examples, generator=generator).split(batch_size)
        chosen = order[done : min(epoch_steps, done + total - step)]
        yield int(torch.randint(2**62, (), generator=generator)), chosen
        step += len(chosen)


def factor(
    schedule: Schedule, steps: int, warmup: float, milestones: Sequence[float], gamma: float
) -> Callable[[int], float]:
    """By what the learning rate is multiplied at a step, counted from 0.

    Raises:
        UsageError: ``warmup`` is below 0.
    """
    if not warmup >= 0:
        raise UsageError(f"warmup must be at least 0, got {warmup}")

    def at(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
        if schedule == "step":
            return gamma ** sum(step >= milestone for milestone in milestones)
        return 1.0

    return at
