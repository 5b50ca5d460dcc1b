"""Rivals that remember earlier tasks in other ways: by stored examples, by the model before, by important weights."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from weightsmith.core.outputs import logits_of
from weightsmith.experiments.streams import bytes_per_example, together
from weightsmith.lab.reading import read
from weightsmith.lab.task import Batch, Task, forward
from weightsmith.lab.tasks import TaskConfig
from weightsmith.lab.tasks.tokenized import IGNORED


@dataclass
class Replay:
    """Examples of earlier tasks within a number of bytes, equally many of each.

    Attributes:
        budget: Bytes.
        held: Tasks, and the rows that are kept of each, in a random order.
    """

    budget: float
    held: list[tuple[Task, Tensor]]

    @property
    def nbytes(self) -> float:
        """Bytes of the examples."""
        return sum(len(rows) * bytes_per_example(task) for task, rows in self.held)

    def with_new(self, config: TaskConfig, task: Task) -> Task:
        """A task with the kept examples added to its own."""
        return together(config, [(task, torch.arange(len(task.train))), *self.held])

    def add(self, task: Task, seed: int) -> None:
        """Keep examples of a task that has ended, and fewer of the others."""
        rows = torch.randperm(len(task.train), generator=torch.Generator().manual_seed(seed))
        held = [*self.held, (task, rows)]
        self.held = [(one, at[: int(self.budget / len(held) / bytes_per_example(one))]) for one, at in held]


def distilled(task: Task, teacher: nn.Module, strength: float, model: nn.Module, batch: Batch) -> Tensor:
    """LwF: the new task's loss, and what the model before it would have said to the new inputs.

    Args:
        task: The new task.
        teacher: The model before it, in evaluation mode.
        strength: Of the distillation, at temperature 2.
        model: The model that is trained.
        batch: Of the new task.

    Returns:
        A scalar.
    """
    with torch.no_grad():
        before = logits_of(forward(teacher, batch)).float()
    now = logits_of(forward(model, batch)).float()
    soft = -((before / 2).softmax(-1) * (now / 2).log_softmax(-1)).sum(-1)
    if soft.dim() == 2 and batch.targets is not None:  # of answers alone: position t predicts token t + 1
        soft = soft[:, :-1][batch.targets[:, 1:] != IGNORED]
    return task.losses(model, batch).mean() + strength * 4 * soft.mean()


def losses_of_examples(task: Task, model: nn.Module, count: int, seed: int) -> Iterator[Tensor]:
    """Losses of ``count`` single examples of a task, chosen by ``seed``, for EWC."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(task.train), generator=generator)[:count]
    for batch in read(task.train, [(0, list(chosen.split(1)))], 0, 1, next(model.parameters()).device):
        yield task.losses(model, batch).mean()
