"""A task from datasets of the user's own: any map-style ``torch.utils.data.Dataset``.

::

    def my_task():
        return from_datasets(make_network, train_set, test_set, loss=my_loss)

``weightsmith run adamp --task my_file.py:my_task`` then runs on it.
"""

import pickle
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Subset, default_collate

from weightsmith.core.errors import UsageError
from weightsmith.lab.data.labels import hold_out
from weightsmith.lab.experiment import Better, Metric
from weightsmith.lab.fingerprint import digest
from weightsmith.lab.task import Batch, Outcome, Split, Task
from weightsmith.lab.tasks.scoring import PerExample, accuracy, cross_entropy, losses, scores
from weightsmith.lab.train import evaluate

_TARGETS = ("labels", "label", "targets", "target", "y")
_SAMPLE = 64  # examples that identify a dataset


class Collated:
    """Batches of a map-style dataset; see :class:`weightsmith.lab.task.Batches`.

    Args:
        dataset: Its items are ``(input, ..., target)``, lists of those, or mappings with a key such as ``label``.
    """

    seed = 0
    slow = False

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: Sequence[int] | Tensor) -> Batch:
        """Read and collate a batch."""
        at = torch.as_tensor(indices, dtype=torch.int64)
        items = default_collate([self.dataset[index] for index in at.tolist()])
        if isinstance(items, Mapping):
            key = next((key for key in _TARGETS if key in items), None)
            if key is None:
                raise UsageError(
                    f"an item of the dataset needs one of the keys {', '.join(_TARGETS)}, has {list(items)}"
                )
            return Batch({name: value for name, value in items.items() if name != key}, items[key], at)
        if not isinstance(items, tuple | list) or len(items) < 2:
            raise UsageError("an item of the dataset must be (input, ..., target) or a mapping")
        return Batch(items[0] if len(items) == 2 else tuple(items[:-1]), items[-1], at)


def from_datasets(
    build: Callable[[], nn.Module],
    train: Any,
    test: Any,
    validation: Any = None,
    *,
    loss: PerExample = cross_entropy,
    metric: PerExample = accuracy,
    metric_name: str = "",
    better: Better = "higher",
    name: str = "",
    validation_fraction: float = 0.2,
    batch_size: int = 256,
) -> Task:
    """Make a task from a function that builds a model and datasets.

    Args:
        build: Makes the model, from torch's global generator.
        train: Map-style dataset; see :class:`Collated`.
        test: Likewise.
        validation: Likewise; ``None``: a part of ``train``, chosen by a fixed seed.
        loss: ``(output, targets) -> (B,)``.
        metric: ``(output, targets) -> (B,)``.
        metric_name: What reports call it; ``""``: the function's name.
        better: Which direction of the metric is good.
        name: What reports call the task; ``""``: the name of ``build``.
        validation_fraction: Share of ``train`` that is held out where there is no ``validation``.
        batch_size: Of the evaluation.

    Raises:
        UsageError: A dataset is empty or has no length.
    """
    for argument, dataset in {"train": train, "test": test}.items():
        if not hasattr(dataset, "__len__") or not len(dataset):
            raise UsageError(f"{argument} must be a map-style dataset with at least one example")
    if validation is None:
        kept, held = hold_out(len(train), validation_fraction)
        train, validation = Subset(train, kept.tolist()), Subset(train, held.tolist())
    splits = {"train": Collated(train), "validation": Collated(validation), "test": Collated(test)}
    title = metric_name or getattr(metric, "__name__", "metric")
    named = {"loss": loss, title: metric}

    def measure(model: nn.Module, split: Split) -> Outcome:
        return evaluate(model, splits[split], partial(scores, named), batch_size)

    return Task(
        name=name or getattr(build, "__name__", "own task"),
        build=build,
        train=splits["train"],
        losses=partial(losses, loss),
        evaluate=measure,
        example=partial(splits["train"].__getitems__, list(range(min(8, len(train))))),
        metric=Metric(title, title, better),
        held_out={split: splits[split] for split in ("validation", "test")},
        fingerprint=digest(*(_identity(batches) for batches in splits.values())),
        facts={"data": name or "your own", "model": getattr(build, "__name__", "your own")},
    )


def _identity(batches: Collated) -> str:
    """Digest of the length and of examples spread over the dataset."""
    at = torch.linspace(0, len(batches) - 1, min(_SAMPLE, len(batches))).long() if len(batches) else torch.tensor([])
    return digest(str(len(batches)), *(_content(batches.dataset[index]) for index in at.tolist()))


def _content(item: Any) -> bytes:
    if isinstance(item, Tensor):
        return str(item.dtype).encode() + str(item.tolist()).encode()
    if isinstance(item, Mapping):
        return b"".join(str(key).encode() + _content(value) for key, value in item.items())
    if isinstance(item, tuple | list):
        return b"".join(map(_content, item))
    return pickle.dumps(item)
