"""Classes and fair subsets: whatever is left out is left out by a seed, in the same share of every class."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from weightsmith.core.errors import UsageError

_SHOWN = 5


def classes_of(name: str, train: Sequence[Any], test: Sequence[Any]) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Number the classes that training has, in sorted order.

    Args:
        name: Of the data, for the error.
        train: A label per row, strings or numbers.
        test: Likewise.

    Returns:
        Labels of train and test rows, int64, and the names of the classes.

    Raises:
        UsageError: A label is missing, there is one class only, or the test rows have a class that training lacks.
    """
    missing = sum(label is None for label in [*train, *test])
    if missing:
        raise UsageError(f"data {name!r} has {missing} rows without a label")
    known = sorted(set(train))
    if len(known) < 2:
        raise UsageError(f"data {name!r} has one class only ({known[0] if known else 'none'}); at least 2 are needed")
    unseen = sorted(set(test) - set(known))
    if unseen:
        shown = ", ".join(map(str, unseen[:_SHOWN]))
        raise UsageError(f"data {name!r}: test rows have classes that training does not have: {shown}")
    numbers = {label: number for number, label in enumerate(known)}
    return (
        torch.tensor([numbers[label] for label in train]),
        torch.tensor([numbers[label] for label in test], dtype=torch.int64),
        tuple(map(str, known)),
    )


def subset(rows: int, count: int | None, labels: Tensor | None = None, seed: int = 0) -> Tensor:
    """Choose rows by a seed, every class in the share that it has.

    Args:
        rows: How many there are.
        count: How many to choose; ``None`` or more than there are: all.
        labels: ``(rows,)``, int64; ``None``: no classes.
        seed: Of the choice.

    Returns:
        ``(count,)``, row numbers in ascending order.
    """
    if count is None or count >= rows:
        return torch.arange(rows)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(rows, generator=generator)
    if labels is None:
        return order[:count].sort().values
    # the k-th of n rows of a class gets the place (k + 1/2) / n: the first places hold every class in its share
    labels = labels[order]
    place = torch.empty(rows, dtype=torch.float64)
    for label in labels.unique():
        at = (labels == label).nonzero().flatten()
        place[at] = (torch.arange(len(at), dtype=torch.float64) + 0.5) / len(at)
    return order[place.argsort(stable=True)[:count]].sort().values


def hold_out(rows: int, fraction: float, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Split rows into those to train on and those to choose by; the same at every call.

    Raises:
        UsageError: ``fraction`` is out of range.
    """
    if not 0 <= fraction < 1:
        raise UsageError(f"validation_fraction must be at least 0 and below 1, got {fraction}")
    held = subset(rows, min(round(fraction * rows), rows - 1), labels, seed=1)
    kept = torch.ones(rows, dtype=torch.bool)
    kept[held] = False
    return kept.nonzero().flatten(), held


def check_counts(**counts: int | None) -> None:
    """Refuse numbers of rows, pixels or tokens below 1.

    Raises:
        UsageError: Names the argument.
    """
    for argument, value in counts.items():
        if value is not None and value < 1:
            raise UsageError(f"{argument} must be at least 1, got {value}")
