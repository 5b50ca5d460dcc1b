"""Tasks that arrive one after another, for one model: related images, or instructions."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from weightsmith.core.errors import UsageError
from weightsmith.core.outputs import call
from weightsmith.lab.data.instructions import SETS
from weightsmith.lab.data.tokens import Bytes, pad_of
from weightsmith.lab.data.views import View
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
    """The tasks in their order, as `images` or `instructions` makes them."""
    return images(config, kinds) if config.task == "images" else instructions(config, sets, prompts)


def check_names(task: str, names: Mapping[str, tuple[str, ...]]) -> None:
    """Refuse a task that makes no sequence, and sequences that are none.

    Raises:
        UsageError: Names what is wrong.
    """
    if task not in names:
        raise UsageError(f"task must be {' or '.join(names)}, got {task}")
    given = names[task]
    if len(set(given)) < max(2, len(given)):
        raise UsageError(f"kinds and sets must name at least two tasks, each once, got {', '.join(given) or 'none'}")


def images(config: TaskConfig, kinds: tuple[str, ...]) -> list[Stage]:
    """The same classes seen in other ways, each on its own part of the training rows.

    Args:
        config: Of a task of images.
        kinds: Degrees to turn by; with ``-`` before them, of the negative.
    """
    base = shared_task(config)
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


def instructions(config: TaskConfig, sets: tuple[str, ...], prompts: tuple[str, ...]) -> list[Stage]:
    """Sets of questions with answers.

    Args:
        config: Of a task of questions.
        sets: Names of data.
        prompts: The instruction of every set, for the router; the questions hold it already. Sets that are made here
            have their own.
    """
    own = all(name in SETS for name in sets)
    if not own and len(prompts) != len(sets):
        raise UsageError(f"prompts must name the instruction of each of the {len(sets)} sets, got {len(prompts)}")
    wordings = [SETS[name].wordings if own else (prompts[at],) for at, name in enumerate(sets)]
    tasks = [make_task(replace(config, data=name)) for name in sets]
    return [Stage(*parts) for parts in zip(sets, wordings, tasks, strict=True)]


def together(config: TaskConfig, stages: list[Stage]) -> Task:
    """One task of all: what training on everything at once sees."""
    first = stages[0].task
    if isinstance(first.train, Rows):
        pad = pad_of(tokenizer_of(config, Bytes()))
        rows: list[Rows] = [stage.task.train for stage in stages]  # type: ignore[misc]
        width = max(part.inputs.shape[1] for part in rows)
        train: Batches = Rows(
            torch.cat([_wide(part.inputs, width, pad) for part in rows]),
            torch.cat([_wide(part.targets, width, IGNORED) for part in rows]),
            torch.cat([part.lengths for part in rows]),
            mask=rows[0].mask,
        )
        return replace(first, train=train)
    return replace(first, train=_Joined([stage.task.train for stage in stages]))


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
