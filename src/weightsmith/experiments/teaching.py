"""Training with a teacher's probabilities beside the task's own loss."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from weightsmith.core.outputs import logits_of
from weightsmith.lab.task import Batch, Task, forward
from weightsmith.quantize.in_training.distillation import teacher_loss

Loss = Callable[[nn.Module, Batch], Tensor]


@contextmanager
def taught(student: nn.Module, teacher: nn.Module, task: Task) -> Iterator[Loss]:
    """The task's loss plus the cross-entropy with the teacher's probabilities, from one forward pass of the student."""
    seen: dict[str, Tensor] = {}
    handle = student.register_forward_hook(lambda _, __, output: seen.update(logits=logits_of(output)))

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        own = task.losses(model, batch)
        with torch.no_grad():
            goal = logits_of(forward(teacher, batch))
        return own.mean() + teacher_loss(seen["logits"].flatten(0, -2), goal.flatten(0, -2))

    try:
        yield loss
    finally:
        handle.remove()
