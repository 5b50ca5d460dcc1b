"""Some examples of a split, under other labels: for classes that arrive in steps."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from weightsmith.lab.task import Batch, Batches, Task


class View:
    """Chosen examples of a split, as `weightsmith.lab.task.Batches`.

    Args:
        base: The split.
        rows: ``(n,)``: which of its examples, in order.
        relabel: ``(B,) -> (B,)``: the labels that the view gives; ``None``: those of the split.
    """

    def __init__(self, base: Batches, rows: Tensor, relabel: Callable[[Tensor], Tensor] | None = None) -> None:
        self.base, self.rows, self.relabel = base, rows, relabel

    @property
    def seed(self) -> int:
        """What augmentation draws from: the split's own."""
        return self.base.seed

    @seed.setter
    def seed(self, value: int) -> None:
        self.base.seed = value

    @property
    def slow(self) -> bool:
        """Whether the split is read by workers."""
        return self.base.slow

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: Sequence[int] | Tensor) -> Batch:
        """Read the examples at ``indices``, ``(B,)``, positions within the view."""
        at = torch.as_tensor(indices, dtype=torch.int64)
        batch = self.base.__getitems__(self.rows[at])
        targets = batch.targets if self.relabel is None or batch.targets is None else self.relabel(batch.targets)
        return replace(batch, targets=targets, indices=at)


def labels_of(batches: Batches, *, chunk: int = 1024) -> Tensor:
    """The labels of all examples, ``(N,)``, in order; images that are decoded when they are read are decoded once."""
    found = [batches.__getitems__(part).targets for part in torch.split(torch.arange(len(batches)), chunk)]
    return torch.cat([targets for targets in found if targets is not None])


def has_classes(task: Task) -> bool:
    """Whether a task tells one class per example."""
    targets = task.example().targets
    return targets is not None and targets.dim() == 1 and not targets.is_floating_point()


def classes_of(task: Task) -> int:
    """How many classes a task tells apart; 0 where it predicts something else, for example tokens."""
    return int(labels_of(task.train).max()) + 1 if has_classes(task) else 0
