"""Tasks that arrive one after another, for one model: a data set each, or related images."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from weightsmith.core.errors import UsageError
from weightsmith.core.outputs import call
from weightsmith.lab.data.instructions import SETS
from weightsmith.lab.data.tokens import Bytes, Words, pad_of
from weightsmith.lab.data.views import View, classes_of
from weightsmith.lab.task import Batch, Batches, Outcome, Split, Task
from weightsmith.lab.tasks import TaskConfig, make_task, shared_task
from weightsmith.lab.tasks.tokenized import IGNORED, Rows, tokenizer_of


@dataclass(frozen=True, slots=True)
class Stage:
    """A task of the sequence.

    Attributes:
        name: In tables.
        instructions: What the router sees.
        task: What is trained and scored.
    """

    name: str
    instructions: tuple[str, ...]
    task: Task


def stages_of(
    config: TaskConfig, *, kinds: tuple[str, ...], sets: tuple[str, ...], prompts: tuple[str, ...]
) -> list[Stage]:
    """The tasks in their order: one per data set where there are any, else the same images seen in several ways.

    Raises:
        UsageError: The sequence is none, or a task has nothing to predict that is a class or a token.
    """
    check_sequence(config, kinds=kinds, sets=sets)
    found = data_sets(config, sets, prompts) if sets else images(config, kinds)
    for stage in found:
        targets = stage.task.example().targets
        if targets is None or targets.is_floating_point():
            raise UsageError(f"task must predict classes or tokens, and {config.task} does not")
    return found


def check_sequence(config: TaskConfig, *, kinds: tuple[str, ...], sets: tuple[str, ...]) -> None:
    """Refuse names that make no sequence, before any data is read.

    Raises:
        UsageError: Names what is wrong.
    """
    if sets and config.data:
        raise UsageError(f"data must be empty where sets names the data of every task, got {config.data!r}")
    for name, given in (("sets", sets), ("kinds", () if sets else kinds)):
        if given and len(set(given)) < max(2, len(given)):
            raise UsageError(f"{name} must name at least two tasks, each once, got {', '.join(given)}")


def images(config: TaskConfig, kinds: tuple[str, ...]) -> list[Stage]:
    """The same classes seen in other ways, each on its own part of the training rows.

    Args:
        config: Of a task of images.
        kinds: Degrees to turn by; with ``-`` before them, of the negative.
    """
    base = shared_task(config)
    inputs = base.example().inputs
    if not (isinstance(inputs, Tensor) and inputs.dim() == 4 and inputs.is_floating_point()):
        raise UsageError(f"sets must name the data of at least two tasks: {config.task} has no images to turn")
    if not kinds:
        raise UsageError("kinds must name at least two tasks, got none")
    found = []
    for at, kind in enumerate(kinds):
        try:
            turn = partial(_seen, angle=float(kind.removeprefix("-")), negative=kind.startswith("-"))
        except ValueError:
            raise UsageError(f"kinds must be degrees, with - before them for the negative, got {kind!r}") from None
        rows = torch.arange(at, len(base.train), len(kinds))
        text = "Read this photographic negative" if kind.startswith("-") else "Classify the picture"
        found.append(Stage(kind, (text,), _changed(base, rows, turn)))
    return found


def data_sets(config: TaskConfig, sets: tuple[str, ...], prompts: tuple[str, ...]) -> list[Stage]:
    """A task per data set, of the kind that the configuration names.

    Args:
        config: Of the tasks.
        sets: Names of data.
        prompts: The instruction of every set that is not made here, for the router; questions hold it already.
    """
    foreign = [name for name in sets if name not in SETS]
    if len(prompts) != len(foreign):
        wanted = f"each of the {len(foreign)} sets of your own" if foreign else "sets of your own alone"
        raise UsageError(f"prompts must name the instruction of {wanted}, got {len(prompts)}")
    given = dict(zip(foreign, prompts, strict=True))
    wordings = [(given[name],) if name in given else SETS[name].wordings for name in sets]
    tasks = [make_task(replace(config, data=name)) for name in sets]
    classes = [classes_of(task) for task in tasks]
    if len(set(classes)) > 1:
        raise UsageError(f"sets must have equally many classes, got {', '.join(map(str, classes))}")
    return [Stage(*parts) for parts in zip(sets, wordings, tasks, strict=True)]


def together(config: TaskConfig, parts: Sequence[tuple[Task, Tensor]]) -> Task:
    """One task of chosen training rows of several.

    Args:
        config: Of the tasks.
        parts: Tasks, and ``(n,)`` rows of each; the first one's losses and scores are taken.
    """
    first = parts[0][0]
    if not isinstance(first.train, Rows):
        return replace(first, train=_Joined([View(task.train, rows) for task, rows in parts]))
    token_targets = first.train.targets.dim() == 2
    pad = pad_of(tokenizer_of(config, Bytes() if token_targets else Words()))
    held: list[tuple[Rows, Tensor]] = [(task.train, rows) for task, rows in parts]  # type: ignore[misc]
    width = max(rows.inputs.shape[1] for rows, _ in held)
    train = Rows(
        torch.cat([_wide(rows.inputs[at], width, pad) for rows, at in held]),
        torch.cat(
            [_wide(rows.targets[at], width, IGNORED) if token_targets else rows.targets[at] for rows, at in held]
        ),
        torch.cat([rows.lengths[at] for rows, at in held]),
        mask=first.train.mask,
    )
    return replace(first, train=train)


def bytes_per_example(task: Task) -> float:
    """What a stored example takes: a byte per pixel, four per token."""
    if isinstance(task.train, Rows):
        return 4 * task.train.lengths.double().mean().item()
    inputs = task.example().inputs
    first = next(iter(inputs.values())) if isinstance(inputs, Mapping) else inputs
    return float(first[0].numel() * (1 if first.is_floating_point() else 4))


def mean_score(score: float | Tensor) -> float:
    """A score, or the mean of scores per example."""
    return float(score.double().mean()) if isinstance(score, Tensor) else float(score)


def pooled(scores: list[float | Tensor], mean: float) -> float | Tensor:
    """Scores per example of all tasks, if equally many, so that every task counts the same; else ``mean``."""
    found = [score for score in scores if isinstance(score, Tensor)]
    equal = len(found) == len(scores) and len({len(score) for score in found}) == 1
    return torch.cat(found) if equal else mean


class _Joined:
    """Splits one after the other."""

    def __init__(self, parts: list[Batches]) -> None:
        self.parts, self.slow, self.seed = parts, any(part.slow for part in parts), 0
        self.first = torch.tensor([0, *(len(part) for part in parts)]).cumsum(0)

    def __len__(self) -> int:
        return int(self.first[-1])

    def __getitems__(self, indices: Any) -> Batch:
        at = torch.as_tensor(indices, dtype=torch.int64)
        owner = torch.bucketize(at, self.first, right=True) - 1
        found: dict[int, tuple[Tensor, Tensor]] = {}
        for part in owner.unique().tolist():
            mine = (owner == part).nonzero().flatten()
            self.parts[part].seed = self.seed
            batch = self.parts[part].__getitems__(at[mine] - self.first[part])
            assert batch.targets is not None
            found |= {i: (x, y) for i, x, y in zip(mine.tolist(), batch.inputs, batch.targets, strict=True)}
        inputs, targets = zip(*(found[i] for i in range(len(at))), strict=True)
        return Batch(torch.stack(inputs), torch.stack(targets), at)


class _Seen(View):
    """Chosen images, as they are seen."""

    def __init__(self, base: Batches, rows: Tensor, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__(base, rows)
        self.change = change

    def __getitems__(self, indices: Any) -> Batch:
        batch = super().__getitems__(indices)
        return replace(batch, inputs=self.change(batch.inputs))


class _Reader(nn.Module):
    """A classifier whose images are changed first."""

    def __init__(self, model: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.change = model, change

    def forward(self, x: Tensor) -> Any:
        return call(self.model, self.change(x))


def _changed(base: Task, rows: Tensor, change: Callable[[Tensor], Tensor]) -> Task:
    def evaluate(model: nn.Module, split: Split) -> Outcome:
        return base.evaluate(_Reader(model, change), split)

    return replace(base, train=_Seen(base.train, rows, change), evaluate=evaluate)


def _seen(images: Tensor, angle: float, negative: bool) -> Tensor:
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    turn = torch.tensor([[[cos, -sin, 0], [sin, cos, 0]]], device=images.device, dtype=images.dtype)
    grid = nn.functional.affine_grid(turn.expand(len(images), -1, -1), list(images.shape), align_corners=False)
    turned = nn.functional.grid_sample(images, grid, padding_mode="border", align_corners=False) if angle else images
    return -turned if negative else turned


def _wide(rows: Tensor, width: int, fill: int) -> Tensor:
    return nn.functional.pad(rows, (0, width - rows.shape[1]), value=fill)
