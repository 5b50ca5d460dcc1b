"""What is trained and how it is scored, separated from what is compared.

An experiment varies the technique; a task says what is trained. Neither knows the other, so that every technique can be
tried on every task, the user's own included. Ready-made tasks are in `weightsmith.lab.tasks`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from weightsmith.core.outputs import call
from weightsmith.lab.experiment import Metric

Split = Literal["train", "validation", "test"]


@dataclass(frozen=True, slots=True)
class Batch:
    """Some examples, as a model takes them.

    Attributes:
        inputs: What the model is called with: a tensor, a tuple of positional or a mapping of keyword arguments.
        targets: What the losses compare with, ``(B, ...)``; ``None`` where the inputs hold it.
        indices: ``(B,)``, which examples of the split these are.
    """

    inputs: Any
    targets: Tensor | None
    indices: Tensor

    def __len__(self) -> int:
        return len(self.indices)

    def to(self, device: torch.device) -> "Batch":
        """Copy to a device."""
        targets = None if self.targets is None else self.targets.to(device)
        return replace(self, inputs=_moved(self.inputs, device), targets=targets)


def forward(model: nn.Module, batch: Batch) -> Any:
    """Call ``model`` with the inputs of a batch, numbers in the precision of the model's first parameter."""
    inputs = _in_precision(batch.inputs, next((parameter.dtype for parameter in model.parameters()), None))
    return call(model, inputs)


class Batches(Protocol):
    """Examples of one split, read as whole batches.

    Everything random about a batch follows from ``seed`` and the indices, so that all arms see the same.

    Attributes:
        seed: What augmentation draws from; set anew before each epoch.
        slow: Reading is worth worker processes: images that are decoded on the way.
    """

    seed: int

    @property
    def slow(self) -> bool:
        """See above."""

    def __len__(self) -> int:
        """Number of examples."""

    def __getitems__(self, indices: Any) -> Batch:
        """Read the examples at ``indices``, ``(B,)``, a tensor or a list."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How well a model does on one split.

    Attributes:
        metrics: Numbers by name; one of them is the task's metric.
        scores: For metrics that are means over examples, one score per example ``(N,)`` in the order of the split.
    """

    metrics: Mapping[str, float]
    scores: Mapping[str, Tensor] = field(default_factory=dict)

    def value(self, name: str, scale: float = 1.0) -> float | Tensor:
        """The scores per example of a metric where there are any, else its number; times ``scale``."""
        return scale * (self.scores[name] if name in self.scores else self.metrics[name])


@dataclass(frozen=True, slots=True)
class Task:
    """What is trained, on what, and how it is scored.

    Attributes:
        build: Makes the model; its weights follow from torch's global generator alone.
        train: What is trained on.
        losses: ``(model, batch) -> (B,)``: one loss per example; training minimizes their mean.
        evaluate: ``(model, split) -> Outcome``; leaves every module in the mode it was in.
        example: Gives a small batch, for tracing, calibration and checks.
        metric: What decides: the name of a metric of ``evaluate`` and which direction is good.
        name: In words, for the report: ``"digits"``.
        held_out: The batches of ``"validation"`` and ``"test"``, for what needs more than their scores.
        fingerprint: Changes when the data or the user's code does; part of a run's identity.
        facts: What a reader wants to know, in words, for example ``{"model": "convnet"}``.
    """

    build: Callable[[], nn.Module]
    train: Batches
    losses: Callable[[nn.Module, Batch], Tensor]
    evaluate: Callable[[nn.Module, Split], Outcome]
    example: Callable[[], Batch]
    metric: Metric
    name: str = "task"
    held_out: Mapping[str, Batches] = field(default_factory=dict)
    fingerprint: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)

    @property
    def rows(self) -> dict[str, int]:
        """Number of examples by split, as far as known."""
        return {"train": len(self.train), **{split: len(batches) for split, batches in self.held_out.items()}}


def _moved(value: Any, device: torch.device) -> Any:
    return _mapped(value, lambda tensor: tensor.to(device))


def _in_precision(value: Any, dtype: torch.dtype | None) -> Any:
    if dtype is None or not dtype.is_floating_point or dtype.itemsize < 2:  # weights of 8 bits take other inputs
        return value
    return _mapped(value, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {name: _mapped(item, change) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_mapped(item, change) for item in value)
    return value
