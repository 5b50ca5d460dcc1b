"""In which order classes arrive, and which row of the head each one has."""

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from weightsmith.core.errors import UsageError


class ClassOrder:
    """Labels of the data in the order of arrival: the head has its rows in this order.

    Args:
        order: The labels, each once.
        sizes: How many arrive at each step; or one number for all steps, which must divide their number.

    Raises:
        UsageError: A label occurs twice, or the sizes do not add up.
    """

    def __init__(self, order: Sequence[int], sizes: int | Sequence[int]) -> None:
        self.order = tuple(int(label) for label in order)
        if len(set(self.order)) != len(self.order) or not self.order or min(self.order) < 0:
            raise UsageError(f"order must hold every label once, as integers from 0, got {list(order)}")
        if isinstance(sizes, int):
            if sizes < 1 or len(self.order) % sizes:
                raise UsageError(f"sizes must divide the {len(self.order)} classes, got {sizes}")
            sizes = [sizes] * (len(self.order) // sizes)
        self.sizes = tuple(int(size) for size in sizes)
        if sum(self.sizes) != len(self.order) or min(self.sizes) < 1:
            raise UsageError(f"sizes must add up to the {len(self.order)} classes, got {list(self.sizes)}")
        self._seen = (0, *accumulate(self.sizes))
        self._row = torch.full((max(self.order) + 1,), -1)
        self._row[list(self.order)] = torch.arange(len(self.order))

    @classmethod
    def shuffled(cls, classes: int, sizes: int | Sequence[int], *, seed: int = 1993) -> "ClassOrder":
        """The published orders: numpy's old generator with a seed, 1993 in most papers."""
        order = np.arange(classes)
        np.random.RandomState(seed).shuffle(order)
        return cls(order.tolist(), sizes)

    @property
    def steps(self) -> int:
        """Number of steps."""
        return len(self.sizes)

    def n_old(self, step: int) -> int:
        """Classes before a step, counted from 0."""
        return self._seen[self._at(step)]

    def n_seen(self, step: int) -> int:
        """Classes when a step is over."""
        return self._seen[self._at(step) + 1]

    def arriving(self, step: int) -> tuple[int, ...]:
        """Labels of the data that arrive at a step."""
        return self.order[self.n_old(step) : self.n_seen(step)]

    def to_rows(self, labels: Tensor) -> Tensor:
        """Labels of the data into rows of the head.

        Raises:
            UsageError: A label is not in the order.
            TypeError: The labels are no integers.
        """
        check_integers(labels)
        inside = (labels >= 0) & (labels < len(self._row))
        found = self._row.to(labels.device)[labels.long() * inside].where(inside, -1)
        if bool((found < 0).any()):
            raise UsageError(f"label {labels[found < 0][0].item()} is not in the order {list(self.order)}")
        return found

    def to_labels(self, rows: Tensor) -> Tensor:
        """Rows of the head into labels of the data."""
        return torch.tensor(self.order, device=rows.device)[rows]

    def _at(self, step: int) -> int:
        if not 0 <= step < self.steps:
            raise UsageError(f"step must be between 0 and {self.steps - 1}, got {step}")
        return step


def check_integers(labels: Tensor) -> None:
    """Refuse labels that would be rounded.

    Raises:
        TypeError: They are no integers.
    """
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels must be integers, got {labels.dtype}: call labels.long() if that is what they are")
