"""A task of the user's own: a function that returns a `weightsmith.lab.task.Task`, or a model and datasets.

    def my_task():
        return make_network, train_set, test_set     # or: make_network, train_set, validation_set, test_set

    def my_other_task(config):                       # given the settings if it takes an argument
        return from_datasets(make_network, train_set, test_set, loss=my_loss, metric=my_metric, better="lower")

``weightsmith run adamp --task my_file.py:my_task`` then runs on it.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Subset, default_collate

from weightsmith.core.errors import UsageError
from weightsmith.core.load import load_object
from weightsmith.core.own_code import digest
from weightsmith.lab.data.labels import hold_out, subset
from weightsmith.lab.experiment import Better, Metric
from weightsmith.lab.identity import tensors_digest
from weightsmith.lab.progress import drawing_from
from weightsmith.lab.task import Batch, Batches, Outcome, Split, Task
from weightsmith.lab.tasks.code import code_of
from weightsmith.lab.tasks.config import TaskConfig
from weightsmith.lab.tasks.scoring import PerExample, accuracy, cross_entropy, losses, of_the_user, scores
from weightsmith.lab.train import evaluate

_TARGETS = ("labels", "label", "targets", "target", "y")
_SAMPLE = 512  # examples that identify a dataset, together with the code that makes it


def make(config: TaskConfig) -> Task:
    """Call the function that ``config.task`` names.

    Raises:
        UsageError: There is none, or it returns something else than a task or ``(model, train, [validation,] test)``.
    """
    made = load_object(config.task, "task")
    if callable(made):
        made = made(config) if _takes_one(made) else made()
    if isinstance(made, tuple | list) and len(made) in (3, 4):
        made = _from_parts(config, *made)
    if not isinstance(made, Task):
        raise UsageError(
            f"task {config.task!r} must return a weightsmith.lab.task.Task, or (function that makes the model, train, "
            f"test) with a validation part before test if there is one, got {type(made).__name__}"
        )
    fingerprint = made.fingerprint or digest(*(_identity(made.train), *map(_identity, made.held_out.values())))
    code = code_of(config.task, config.loss, config.metric)
    name = config.task.rpartition(":")[2] if made.name in ("", "task") else made.name
    return replace(made, name=name, fingerprint=digest(fingerprint, code))


def _takes_one(function: Callable[..., Any]) -> bool:
    needed = [p for p in inspect.signature(function).parameters.values() if p.default is p.empty]
    return any(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in needed)


def _from_parts(config: TaskConfig, build: Any, train: Any, *others: Any) -> Task:
    if isinstance(build, nn.Module) or not callable(build):
        raise UsageError(
            f"task {config.task!r} must return a function that makes the model, so that every seed has first weights "
            f"of its own, got {type(build).__name__}; for trained weights give lambda: copy.deepcopy(model)"
        )
    for dataset in (train, others[-1]):
        _check_dataset(config.task, dataset)
    chosen = [
        Subset(dataset, subset(len(dataset), count).tolist())
        for dataset, count in ((train, config.train_examples), (others[-1], config.test_examples))
    ]
    given: dict[str, Any] = {"loss": of_the_user(config.loss, "loss")} if config.loss else {}
    if config.metric:
        given |= {"metric": of_the_user(config.metric, "metric"), "metric_name": config.metric.rpartition(":")[2]}
    return from_datasets(
        build,
        chosen[0],
        chosen[1],
        others[0] if len(others) == 2 else None,
        validation_fraction=config.validation_fraction,
        name=config.task.rpartition(":")[2],
        **given,
    )


class Collated:
    """Batches of a map-style dataset; see `weightsmith.lab.task.Batches`.

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
        """Read and collate a batch; random transforms draw from ``seed`` and the indices alone."""
        at = torch.as_tensor(indices, dtype=torch.int64)
        with drawing_from(self.seed + int(at[0]) if len(at) else self.seed):
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
        train: Map-style dataset; see `Collated`.
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
        _check_dataset(argument, dataset)
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


def _check_dataset(argument: str, dataset: Any) -> None:
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__") or not len(dataset):
        raise UsageError(f"{argument} must be a map-style dataset with at least one example")


def _identity(batches: Batches) -> str:
    """Digest of the length and of examples spread over the dataset."""
    at = torch.linspace(0, len(batches) - 1, min(_SAMPLE, len(batches))).long().tolist() if len(batches) else []
    batches.seed = 0
    items = (batches.__getitems__([index]) for index in at)
    return digest(str(len(batches)), *(_content((item.inputs, item.targets)) for item in items))


def _content(item: Any) -> bytes:
    if isinstance(item, Tensor):
        return tensors_digest({"": item}).encode()
    if isinstance(item, Mapping):
        return b"".join(str(key).encode() + _content(value) for key, value in item.items())
    if isinstance(item, tuple | list):
        return b"".join(map(_content, item))
    return repr(item).encode()
