"""A classifier whose classes arrive in steps: what each step trains on, what is kept, and how logits are read."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from weightsmith.continual import (
    ClassOrder,
    ExemplarMemory,
    WeightAligning,
    correct_bias,
    fit_bias_correction,
    incremental_loss,
)
from weightsmith.core.outputs import logits_of
from weightsmith.lab.data.views import View, labels_of
from weightsmith.lab.job import Job
from weightsmith.lab.reading import read
from weightsmith.lab.task import Batch, Task, forward
from weightsmith.lab.tasks import TrainConfig
from weightsmith.lab.train import Hook, evaluate

_HELD_OUT = 10  # BiC: every tenth exemplar teaches the two numbers


@dataclass(kw_only=True)
class ClassSteps:
    """What one job carries from step to step.

    Attributes:
        config: How long each step trains.
        job: The job.
        task: With all classes.
        order: Which classes arrive when.
        labels: Of the training rows, ``(N,)``.
        wa: The model, its head and the model before.
        memory: The exemplars.
        optimizer: That of a step, from 0.
        milestones: With the schedule step: when the learning rate falls, as shares of the epochs.
        bic: Whether each step ends with two numbers learned on exemplars that it was not trained on.
        lines: These numbers: old classes, seen classes, factor, offset.
    """

    config: TrainConfig
    job: Job
    task: Task
    order: ClassOrder
    labels: Tensor
    wa: WeightAligning
    memory: ExemplarMemory
    optimizer: Callable[[int], torch.optim.Optimizer]
    milestones: Sequence[float]
    bic: bool
    lines: list[tuple[int, int, float, float]] = field(default_factory=list)

    def take(self, step: int) -> bool:
        """Let the classes of a step arrive, train, align and keep exemplars; whether training stayed finite."""
        new = torch.isin(self.labels, torch.tensor(self.order.arriving(step))).nonzero().flatten()
        self.wa.begin_step(len(self.order.arriving(step)))
        rows, held_out = self._divided(new, step)
        if not self._train(step, rows):
            return False
        features = [self.wa.features(batch.inputs).cpu() for batch in self._batches(new)]
        self.wa.end_step(new, self.order.to_rows(self.labels[new]), features=torch.cat(features))
        if len(held_out):
            self._correct(step, held_out)
        return True

    def predictions(self, step: int) -> tuple[Tensor, Tensor]:
        """Predicted and true head rows of the test examples whose classes have been seen."""
        split = self.task.held_out["test"]
        labels = self.order.to_rows(labels_of(split))
        rows = (labels < self.order.n_seen(step)).nonzero().flatten()

        def predict(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
            return {"row": self.read_logits(logits_of(forward(model, batch))).argmax(1).float()}

        return evaluate(self.wa.model, View(split, rows), predict).scores["row"].long(), labels[rows]

    def read_logits(self, logits: Tensor) -> Tensor:
        """Logits as they are to be read."""
        for n_old, n_seen, alpha, beta in self.lines:
            if n_seen <= logits.shape[1]:
                logits = correct_bias(logits, n_old, alpha, beta, n_seen=n_seen)
        return logits

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy, and distillation from the model before where that is asked."""
        assert batch.targets is not None
        teacher = self.wa.teacher_logits(batch.inputs)
        logits = self.read_logits(logits_of(forward(model, batch)))
        return incremental_loss(
            logits, batch.targets, None if teacher is None else self.read_logits(teacher), self.wa.n_old
        )

    def _train(self, step: int, rows: Tensor) -> bool:
        task = replace(self.task, train=View(self.task.train, rows, self.order.to_rows))
        fitted = self.config.fit(
            self.wa.model, self.optimizer(step), task, self.job.seed + step, loss=self.loss, validate="never",
            record=partial(self.job.record, phase=f"step {step + 1}"), folder=self.job.folder / f"step-{step + 1}",
            hooks=[Hook(after_step=self.wa.after_optimizer_step)],
            milestones=[share * self.config.epochs for share in self.milestones],
        )  # fmt: skip
        return not fitted.diverged

    def _divided(self, new: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Rows to train a step on, and for BiC equally many rows of every class to learn the line on."""
        if not len(self.memory):
            return new, new[:0]
        old, classes = self.memory.tensors()
        rows = torch.cat([new, old])
        if not self.bic:
            return rows, rows[:0]
        each = max(1, min(self.memory.counts.values()) // _HELD_OUT)
        held = torch.cat([old[classes == label][-each:] for label in self.memory.counts])
        for label in self.order.arriving(step):
            held = torch.cat([held, new[self.labels[new] == label][:each]])
        return rows[~torch.isin(rows, held)], held

    def _correct(self, step: int, held_out: Tensor) -> None:
        """BiC: learn the line of the newest classes on examples that were not trained on."""
        model = self.wa.model.eval()
        with torch.no_grad():
            parts = [self.read_logits(logits_of(forward(model, batch))) for batch in self._batches(held_out)]
        logits, n_old, n_seen = torch.cat(parts), self.order.n_old(step), self.order.n_seen(step)
        rows = self.order.to_rows(self.labels[held_out]).to(logits.device)
        self.lines.append((n_old, n_seen, *fit_bias_correction(logits, rows, n_old)))

    def _batches(self, rows: Tensor) -> Iterable[Batch]:
        parts = [(0, list(torch.arange(len(rows)).split(256)))]
        return read(View(self.task.train, rows), parts, 0, 1, self.wa.head.weight.device)
