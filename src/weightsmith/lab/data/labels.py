"""Classes and fair subsets: whatever is left out is left out by a seed, in the same share of every class."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from weightsmith.core.errors import UsageError

_SHOWN = 5
_TEST_SHARE = 0.2


@dataclass(frozen=True, slots=True)
class Part:
    """The rows to train on, or those to test on.

    Attributes:
        split: The split of the data that they belong to.
        rows: ``(N,)``, their numbers in that split, ascending.
        labels: ``(N,)``, int64.
    """

    split: str
    rows: Tensor
    labels: Tensor


def parts_of(
    name: str,
    labels: Mapping[str, Sequence[Any]],
    class_names: Sequence[str] | None = None,
    *,
    train_examples: int | None = None,
    test_examples: int | None = None,
) -> tuple[Part, Part, tuple[str, ...]]:
    """Number the classes and choose what is trained on and what is tested on, by a fixed seed.

    The test rows are those of the split ``test``, or of ``validation`` where there is none or its labels are withheld;
    otherwise training gives up a fifth of every class.

    Args:
        name: Of the data, for the error.
        labels: By split, a label per row.
        class_names: Names where the labels are their numbers; ``None``: classes are the labels of ``train``, sorted.
        train_examples: At most this many, validation included, in the share of every class.
        test_examples: Likewise.

    Returns:
        The two parts, and the names of the classes.

    Raises:
        UsageError: A label is missing or no class, there is one class only, or the test rows have one that training
            lacks.
    """
    tested = _tested(labels)
    train, numbers, names = _numbered(name, labels, class_names)
    first = torch.tensor([numbers[label] for label in train])
    if tested is None:
        kept, held = hold_out(len(first), _TEST_SHARE, first, seed=2)
        parts = Part("train", kept, first[kept]), Part("train", held, first[held])
    else:
        second = _known(name, "test", labels[tested], train, numbers, names)
        parts = Part("train", torch.arange(len(first)), first), Part(tested, torch.arange(len(second)), second)
    if not len(parts[1].rows):
        raise UsageError(f"data {name!r} has {len(first)} rows, too few to hold some out for testing")
    chosen = (
        (part, subset(len(part.rows), count, part.labels))
        for part, count in zip(parts, (train_examples, test_examples), strict=True)
    )
    smaller, smallest = (Part(part.split, part.rows[at], part.labels[at]) for part, at in chosen)
    return smaller, smallest, names


def own_validation(
    name: str,
    labels: Mapping[str, Sequence[Any]],
    class_names: Sequence[str] | None = None,
    *,
    examples: int | None = None,
) -> Part | None:
    """The rows of a validation split beside ``train`` and ``test``, numbered as `parts_of` numbers them.

    Args:
        name: Of the data, for the error.
        labels: By split, a label per row.
        class_names: Names where the labels are their numbers.
        examples: At most this many, in the share of every class.

    Returns:
        ``None``: there is no such split, its labels are withheld, or it stands for the missing test split.

    Raises:
        UsageError: A label is missing or no class, or is one that training lacks.
    """
    if _tested(labels) != "test" or _withheld(labels.get("validation", ())):
        return None
    train, numbers, names = _numbered(name, labels, class_names)
    found = _known(name, "validation", labels["validation"], train, numbers, names)
    rows = subset(len(found), examples, found)
    return Part("validation", rows, found[rows])


def unused_validation(labels: Mapping[str, Sequence[Any]]) -> str:
    """Why `own_validation` leaves a validation split out, in words; ``""`` where it does not."""
    if "validation" not in labels or (_tested(labels) == "test" and not _withheld(labels["validation"])):
        return ""
    return f"the validation split {'is the test data' if _tested(labels) == 'validation' else 'has no labels'}"


def validation_facts(own: int | None, unused: str = "") -> dict[str, str]:
    """What the report says about a validation split; nothing where the data have none.

    Args:
        own: Rows of the data's own validation split; ``None``: it is not used.
        unused: Why there is a split that is not used.
    """
    if own is not None:
        return {"validation": f"{own:,} rows of the data's own validation split; training keeps all of its rows"}
    return {"validation": f"held out from training; {unused}"} if unused else {}


def _tested(labels: Mapping[str, Sequence[Any]]) -> str | None:
    return next((split for split in ("test", "validation") if not _withheld(labels.get(split, ()))), None)


def _numbered(
    name: str, labels: Mapping[str, Sequence[Any]], class_names: Sequence[str] | None
) -> tuple[list[Any], dict[Any, int], tuple[str, ...]]:
    """The labels to train on, the number of each class, and the names of the classes."""
    train = _checked(name, labels["train"])
    known = sorted(set(train))
    if len(known) < 2:
        raise UsageError(f"data {name!r} has one class only ({known[0] if known else 'none'}); at least 2 are needed")
    # numbered already: a class that no row has keeps its number
    classes = known if class_names is None else list(range(len(class_names)))
    names = tuple(map(str, known if class_names is None else class_names))
    return train, {label: number for number, label in enumerate(classes)}, names


def _known(
    name: str, split: str, labels: Sequence[Any], train: Sequence[Any], numbers: Mapping[Any, int], names: Sequence[str]
) -> Tensor:
    """Labels of another split than ``train`` as numbers of classes."""
    found = _checked(name, labels)
    unseen = sorted(set(found) - set(train))
    if unseen:
        shown = ", ".join(names[numbers[label]] if label in numbers else str(label) for label in unseen[:_SHOWN])
        raise UsageError(f"data {name!r}: {split} rows have classes that training does not have: {shown}")
    return torch.tensor([numbers[label] for label in found])


def _withheld(labels: Sequence[Any]) -> bool:
    """Whether there are no labels: hubs withhold those of some test splits."""
    return all(label is None or (isinstance(label, int) and label < 0) for label in labels)


def _checked(name: str, labels: Sequence[Any]) -> list[Any]:
    missing = sum(label is None or label == "" or (isinstance(label, int) and label < 0) for label in labels)
    if missing:
        raise UsageError(f"data {name!r} has {missing} rows without a label")
    fractions = [label for label in labels if isinstance(label, float) and not label.is_integer()]
    if fractions:
        raise UsageError(
            f"data {name!r}: labels are numbers such as {fractions[0]}, not classes; "
            "train on them with a task of your own, module:function"
        )
    kinds = {type(label) for label in labels}
    if not kinds <= {str, int, float, bool}:
        raise UsageError(
            f"data {name!r}: labels must be strings or numbers, got {', '.join(k.__name__ for k in kinds)}"
        )
    if str in kinds and len(kinds) > 1:
        return [str(label) for label in labels]
    return [int(label) if isinstance(label, float) else label for label in labels]


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


def hold_out(rows: int, fraction: float, labels: Tensor | None = None, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Split rows into those to train on and those that are held out; the same at every call.

    Raises:
        UsageError: ``fraction`` is out of range.
    """
    if not 0 <= fraction < 1:
        raise UsageError(f"validation_fraction must be at least 0 and below 1, got {fraction}")
    held = subset(rows, min(round(fraction * rows), rows - 1), labels, seed)
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
