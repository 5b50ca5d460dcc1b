"""Trainings on labels of which some are wrong: with a robust loss, without suspicious rows, with learned weights."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from weightsmith.core.errors import require
from weightsmith.core.outputs import logits_of
from weightsmith.experiments.label_noise import Draw, auc, labels_of, probabilities_of
from weightsmith.lab.data.views import View
from weightsmith.lab.experiment import Value
from weightsmith.lab.job import Job
from weightsmith.lab.task import Batch, Task, forward
from weightsmith.lab.tasks import TrainConfig
from weightsmith.lab.tasks.scoring import cross_entropy
from weightsmith.lab.train import Hook
from weightsmith.reweight import LossRescaler, MetaRescaler, RescalingSettings

Q = 0.7  # of the generalized cross-entropy
FOLDS = 3  # that rows are judged in by a network that has not seen them


class Trained(NamedTuple):
    """What a training came to.

    Attributes:
        score: On the test rows, at the end.
        best: The best validation score on the way.
        last: The validation score at the end.
        trust: In every training label, ``(N,)``; NaN where nothing is known.
    """

    score: Value
    best: float
    last: float
    trust: Tensor


@dataclass(slots=True, kw_only=True)
class NoisyTraining:
    """A training by Adam of one arm on one kind of wrong labels.

    Attributes:
        config: What is trained, and for how long.
        job: The job that it belongs to.
        task: With the wrong labels.
        right: Where the label is what it was, ``(N,)``, bool.
        phase: Of the rows that are recorded.
        folder: For checkpoints.
        lr: Learning rate.
        dropout: In front of linear layers, in models that have none.
    """

    config: TrainConfig
    job: Job
    task: Task
    right: Tensor
    phase: str
    folder: Path
    lr: float
    dropout: float

    def with_loss(self, loss: Callable[[nn.Module, Batch], Tensor] | None) -> Trained:
        """Train with a loss, the task's by default; a label is trusted as far as the network believes it."""
        model, found = self._fit(self.task, "main", loss=loss)
        p = probabilities_of(model, self.task.train, 0)
        return Trained(*found, p.gather(1, labels_of(self.task)[:, None]).squeeze(1))

    def pruned(self) -> Trained:
        """Judge every row by a network that has not seen it, leave out what cleanlab finds, and train on the rest."""
        filters: Any = require("cleanlab.filter", extra="noise", purpose="the arm cleanlab")
        ranks: Any = require("cleanlab.rank", extra="noise", purpose="the arm cleanlab")
        labels, rows = labels_of(self.task), len(self.right)
        classes = int(labels.max()) + 1
        fold = torch.randperm(rows, generator=torch.Generator().manual_seed(self.job.seed)) % FOLDS
        p = torch.zeros(rows, classes)
        for number in range(FOLDS):
            inside, outside = (fold != number).nonzero().flatten(), (fold == number).nonzero().flatten()
            model, _ = self._fit(self._part(inside, f"fold {number}"), f"fold {number}")
            p[outside] = probabilities_of(model, View(self.task.train, outside), classes)
        if not bool(p.isfinite().all()):
            return Trained(math.nan, math.nan, math.nan, p[:, 0])
        y, pred = labels.numpy(), p.double().numpy()
        issues = torch.from_numpy(filters.find_label_issues(y, pred, n_jobs=1))
        trust = torch.from_numpy(ranks.get_label_quality_scores(y, pred))
        kept = (~issues).nonzero().flatten()
        _, found = self._fit(self._part(kept, "pruned"), "main", steps=self.config.total_steps(self.task))
        return Trained(*found, trust.float())

    def rescaled(self, settings: RescalingSettings, *, class_separation: bool, trusted: int | None) -> Trained:
        """Train with the weights of a rescaler, which also say how far a label is trusted.

        Args:
            settings: Of the rescaler.
            class_separation: A rescaler per class.
            trusted: So many clean validation rows teach it; ``None``: the noisy training rows do.
        """
        device = self.job.device
        model = self._model().to(device)
        optimizer = torch.optim.Adam(model.parameters(), lr=self.lr)
        classes = int(labels_of(self.task).max()) + 1
        # the recorded results are of these first weights
        rescaler = LossRescaler(classes, settings.n_features, class_separation, init="linear", seed=self.job.seed)
        source = self.task.train if trusted is None else self.task.held_out["validation"]
        draw = Draw(source, self.config.batch_size, self.job.seed, trusted, device)
        meta = MetaRescaler(model, optimizer, rescaler, _forward, val_sampler=draw, settings=settings)
        epoch = max(1, len(self.task.train) // self.config.batch_size)

        def loss(wrapped: nn.Module, batch: Batch) -> Tensor:
            if meta.steps % epoch == 0:
                meta.start_epoch()
            try:
                return meta.loss(batch, ids=batch.indices, model=wrapped)
            except FloatingPointError:  # fit takes it from there
                return self.task.losses(wrapped, batch).mean() * math.nan

        def look(_: nn.Module) -> dict[str, float]:
            w = self._trust(meta)
            means = {"weight_right": w[self.right].nanmean(), "weight_wrong": w[~self.right].nanmean()}
            found = {"auc": auc(w, self.right)} | {name: float(mean) for name, mean in means.items()}
            return {name: value for name, value in found.items() if math.isfinite(value)}

        def teach() -> None:
            meta.update()

        hook = Hook(before_step=teach, after_row=look, state=meta)
        _, found = self._fit(self.task, "main", model=model, optimizer=optimizer, loss=loss, hooks=[hook])
        return Trained(*found, self._trust(meta))

    def _model(self) -> nn.Module:
        return add_dropout_(self.config.network(self.task, self.job.seed), self.dropout)

    def _part(self, rows: Tensor, name: str) -> Task:
        return replace(self.task, train=View(self.task.train, rows), name=f"{self.task.name} {name}")

    def _fit(
        self, task: Task, name: str, *, model: nn.Module | None = None, optimizer: torch.optim.Optimizer | None = None,
        hooks: Sequence[Hook] = (), **more: Any,
    ) -> tuple[nn.Module, tuple[Value, float, float]]:  # fmt: skip
        model = self._model() if model is None else model
        optimizer = optimizer or torch.optim.Adam(model.parameters(), lr=self.lr)
        record = partial(self.job.record, phase=self.phase if name == "main" else f"{self.phase} {name}")
        fitted = self.config.fit(
            model, optimizer, task, self.job.seed, hooks=hooks, folder=self.folder / name, record=record, **more
        )
        if fitted.diverged:
            self.job.diverged = True
            return model, (math.nan, math.nan, math.nan)
        scale = 100.0 if self.config.in_points else 1.0
        key = f"validation_{task.metric.name}"
        scores = [scale * row[key] for row in fitted.rows if key in row]
        return model, (self.config.score(task, model), max(scores), scores[-1])

    def _trust(self, meta: MetaRescaler) -> Tensor:
        known = meta.weights_by_id
        trust = torch.full((len(self.right),), math.nan)
        trust[torch.tensor(list(known), dtype=torch.int64)] = torch.tensor(list(known.values()))
        return trust


def small_loss(task: Task, rate: float, model: nn.Module, batch: Batch) -> Tensor:
    """The mean without the largest losses of a batch, as many as the rate of wrong labels says."""
    losses = task.losses(model, batch)
    kept = max(1, round((1 - rate) * len(losses)))
    return losses.topk(kept, largest=False).values.mean()


def generalized(model: nn.Module, batch: Batch) -> Tensor:
    """Generalized cross-entropy per example, ``(B,)``: arXiv 1805.07836, equation 5."""
    assert batch.targets is not None
    p = (-cross_entropy(forward(model, batch), batch.targets)).exp()
    return (1 - p**Q) / Q


def only_right(task: Task, right: Tensor, model: nn.Module, batch: Batch) -> Tensor:
    """The mean over examples whose label is right."""
    w = right[batch.indices.cpu()].to(batch.targets.device if batch.targets is not None else "cpu").float()
    return (w * task.losses(model, batch)).sum() / w.sum().clamp(min=1)


def add_dropout_(model: nn.Module, p: float) -> nn.Module:
    """Dropout on the inputs of linear layers, but not on the data; models that have some stay as they are."""
    if any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules()):
        return model
    first = next((module for module in model.modules() if list(module.parameters(recurse=False))), None)
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not first:
            module.register_forward_pre_hook(partial(_drop, p))
    return model


def _drop(p: float, layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (nn.functional.dropout(inputs[0], p, layer.training), *inputs[1:])


def _forward(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    assert batch.targets is not None
    return logits_of(forward(model, batch)), batch.targets
