"""Labels made wrong on purpose, how well something tells them apart, and how to read rows with them."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from weightsmith.core.errors import UsageError
from weightsmith.core.outputs import logits_of
from weightsmith.lab.data import views
from weightsmith.lab.data.views import View, has_classes
from weightsmith.lab.task import Batch, Batches, Task, forward
from weightsmith.lab.train import evaluate

NOISES = ("symmetric", "pair", "instance", "none")


def corrupt(
    labels: Tensor, noise: str, rate: float, generator: torch.Generator, probabilities: Tensor | None = None
) -> Tensor:
    """Make a share of labels wrong.

    Args:
        labels: ``(N,)``, int64.
        noise: ``"symmetric"``: each label with probability ``rate`` to any other class; ``"pair"``: likewise, to the
            next class; ``"instance"``: the ``rate`` hardest examples, to the class that a network takes them for;
            ``"none"``.
        rate: Share of wrong labels, in [0, 1).
        generator: Of the draws.
        probabilities: For ``"instance"``: what a network gives each class, ``(N, C)``.

    Returns:
        ``(N,)``, int64.
    """
    classes = int(labels.max()) + 1
    if noise == "none":
        return labels.clone()
    if noise == "instance":
        assert probabilities is not None
        own = probabilities.gather(1, labels[:, None]).squeeze(1)
        others = probabilities.scatter(1, labels[:, None], -1.0)
        hardest = (own - others.amax(1)).argsort(stable=True)[: round(rate * len(labels))]
        found = labels.clone()
        found[hardest] = others.argmax(1)[hardest]
        return found
    wrong = torch.rand(len(labels), generator=generator) < rate
    shift = torch.ones_like(labels)
    if noise == "symmetric":
        shift = torch.randint(1, classes, (len(labels),), generator=generator)
    return torch.where(wrong, (labels + shift) % classes, labels)


def redrawn(labels: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Labels, ``(N,)``, of which a share is drawn anew, uniformly from all classes: some of these stay right."""
    draws = torch.rand(len(labels), 2, generator=generator)
    return torch.where(draws[:, 0] < share, (draws[:, 1] * (int(labels.max()) + 1)).long(), labels)


def auc(trust: Tensor, right: Tensor) -> float:
    """Probability that a right label is trusted more than a wrong one; ties count half. NaN in ``trust`` is left out.

    Args:
        trust: ``(N,)``.
        right: ``(N,)``, bool.
    """
    known = ~trust.isnan()
    trust, right = trust[known].double(), right[known]
    _, at, counts = torch.unique(trust, return_inverse=True, return_counts=True)
    if bool(right.all()) or not bool(right.any()):
        return float("nan")
    ranks = (counts.cumsum(0) - (counts - 1) / 2)[at]  # from 1, the mean of those that are equal
    n, m = int(right.sum()), int((~right).sum())
    return float((ranks[right].sum() - n * (n + 1) / 2) / (n * m))


def labels_of(task: Task) -> Tensor:
    """The class of every training row, ``(N,)``.

    Raises:
        UsageError: A row has anything but one class.
    """
    if not has_classes(task):
        raise UsageError(f"task {task.name!r} must have one class per row: its labels can then be made wrong")
    return views.labels_of(task.train)


def probabilities_of(model: nn.Module, batches: Batches, classes: int) -> Tensor:
    """What a model gives each class of every row, ``(N, C)``.

    Args:
        model: Gives logits.
        batches: The rows.
        classes: How many classes to keep; 0: all.
    """

    def scores(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        p = logits_of(forward(model, batch)).float().softmax(-1)
        return {f"{c:05d}": p[:, c] for c in range(classes or p.shape[1])}

    found = evaluate(model, batches, scores).scores
    return torch.stack([found[name] for name in sorted(found)], dim=1)


class Relabeled(View):
    """The same rows with other labels, ``(N,)``."""

    def __init__(self, base: Batches, labels: Tensor) -> None:
        super().__init__(base, torch.arange(len(base)))
        self.labels = labels

    def __getitems__(self, indices: Any) -> Batch:
        """Read a batch."""
        batch = super().__getitems__(indices)
        return replace(batch, targets=self.labels[batch.indices])


class Draw:
    """Batches drawn uniformly with replacement from a split, or from the first rows of it."""

    def __init__(self, batches: Batches, size: int, seed: int, most: int | None, device: torch.device) -> None:
        self.batches, self.size, self.device = batches, size, device
        self.rows = min(len(batches), most or len(batches))
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self) -> Batch:
        """Draw a batch."""
        return self.batches.__getitems__(torch.randint(self.rows, (self.size,), generator=self.generator)).to(
            self.device
        )

    def state_dict(self) -> dict[str, Any]:
        """Where the draws are."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.generator.set_state(state["generator"])
