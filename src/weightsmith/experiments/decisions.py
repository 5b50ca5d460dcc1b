"""Decision tasks for recurrent networks, and the network: what the paper on rich and lazy learning trains.

A trial has 8 steps of 100 ms. A fixation input is on during the first 7, where the label is 0; at the last step the
label is the choice. Inputs carry noise of standard deviation 0.1. The tasks are those of arXiv 2310.08513 (after
neurogym 0.0.2), written anew from their description.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weightsmith.core.outputs import logits_of
from weightsmith.lab.data.image_sets import load_images
from weightsmith.lab.experiment import Metric
from weightsmith.lab.task import Batch, Batches, Outcome, Split, Task, forward
from weightsmith.lab.train import evaluate

STEPS, NOISE, IGNORED = 8, 0.1, -100
_HELD_OUT = 1000
Trials = tuple[Tensor, Tensor]


class Rnn(nn.Module):
    """A recurrent network without biases: ``h = relu((1 - a) h + a (W_x x + W_h h))``, ``y = W_o h``.

    Args:
        inputs: Channels.
        units: Hidden units.
        outputs: Choices.
        alpha: ``a``, the step over the time constant; 1 in the paper.
    """

    def __init__(self, inputs: int, units: int, outputs: int, alpha: float = 1.0) -> None:
        super().__init__()
        self.alpha = alpha
        self.input, self.hidden = nn.Linear(inputs, units, bias=False), nn.Linear(units, units, bias=False)
        self.states, self.readout = nn.Identity(), nn.Linear(units, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, T, inputs)`` to logits ``(B, T, outputs)``."""
        h = x.new_zeros(len(x), self.hidden.in_features)
        states = []
        for now in self.input(x).unbind(1):
            h = torch.relu((1 - self.alpha) * h + self.alpha * (now + self.hidden(h)))
            states.append(h)
        logits: Tensor = self.readout(self.states(torch.stack(states, 1)))
        return logits


class Stored:
    """Trials in memory.

    Args:
        inputs: ``(N, T, channels)``.
        targets: ``(N, T)``; steps with -100 do not count.
    """

    slow = False

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        self.seed = 0
        self.inputs, self.targets = inputs, targets

    def __len__(self) -> int:
        return len(self.targets)

    def __getitems__(self, indices: Any) -> Batch:
        """Read some trials."""
        chosen = torch.as_tensor(indices, dtype=torch.long)
        return Batch(self.inputs[chosen], self.targets[chosen], chosen)


def two_alternatives(config: Any) -> Task:
    """Which of two stimuli is stronger? (2AF)"""
    return _task(config, "2AF", _two_alternatives)


def matching(config: Any) -> Task:
    """Is the stimulus at the end that of the beginning? (DMS)"""
    return _task(config, "DMS", _matching)


def context(config: Any) -> Task:
    """Which stimulus is stronger, in the modality that a context input names? (CXT)"""
    return _task(config, "CXT", _context)


def rows_of_images(config: Any) -> Task:
    """Which class is an image whose rows arrive one after the other? (sMNIST with ``data="mnist"``; else digits)"""
    images = load_images(
        config.data or "digits",
        train_examples=config.train_examples,
        test_examples=config.test_examples,
        validation_fraction=config.validation_fraction,
    )

    def stored(split: Any) -> Stored:
        batch = split.__getitems__(list(range(len(split))))
        inputs = batch.inputs.flatten(1).view(len(batch), images.size, -1)
        targets = torch.full(inputs.shape[:2], IGNORED)
        targets[:, -1] = batch.targets
        return Stored(inputs, targets)

    splits = {name: stored(getattr(images, name)) for name in ("train", "validation", "test")}
    return _made(config, f"rows of {images.name}", splits, images.classes, images.fingerprint)


def last_alone(task: Task) -> bool:
    """Whether the last step is the only one that counts in any example."""
    targets = task.example().targets
    return targets is not None and targets.dim() == 2 and bool((targets[:, :-1] == IGNORED).all())


def _task(config: Any, name: str, draw: Callable[[int, torch.Generator], Trials]) -> Task:
    fresh = config.batch_size * (config.steps or 1000)  # no trial is seen twice
    counts = {
        "train": config.train_examples or fresh,
        "validation": _HELD_OUT,
        "test": config.test_examples or _HELD_OUT,
    }
    splits = {
        split: Stored(*draw(count, torch.Generator().manual_seed(index)))
        for index, (split, count) in enumerate(counts.items())
    }
    return _made(config, name, splits, 3, f"{name} {counts}")


def _made(config: Any, name: str, splits: dict[str, Stored], outputs: int, fingerprint: str) -> Task:
    held_out: dict[str, Batches] = {split: splits[split] for split in ("validation", "test")}
    channels, units = splits["train"].inputs.shape[2], getattr(config, "units", 100)
    return Task(
        build=partial(Rnn, channels, units, outputs, getattr(config, "alpha", 1.0)),
        train=splits["train"],
        losses=_losses,
        evaluate=partial(_evaluate, held_out | {"train": splits["train"]}),
        example=partial(splits["train"].__getitems__, list(range(min(8, len(splits["train"]))))),
        metric=Metric("accuracy", "right decisions %", "higher", ".2f"),
        name=name,
        held_out=held_out,
        fingerprint=fingerprint,
        facts={"data": name, "model": f"recurrent network of {units} units"},
    )


def _losses(model: nn.Module, batch: Batch) -> Tensor:
    assert batch.targets is not None
    logits = logits_of(forward(model, batch))
    per_step = F.cross_entropy(logits.transpose(1, 2), batch.targets, reduction="none", ignore_index=IGNORED)
    return per_step.sum(1) / (batch.targets != IGNORED).sum(1)


def _evaluate(splits: dict[str, Batches], model: nn.Module, split: Split) -> Outcome:
    def scores(network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        assert batch.targets is not None
        right = logits_of(forward(network, batch))[:, -1].argmax(-1) == batch.targets[:, -1]
        return {"loss": _losses(network, batch), "accuracy": 100 * right.float()}

    return evaluate(model, splits[split], scores)


def _empty(count: int, channels: int) -> Trials:
    inputs = torch.zeros(count, STEPS, channels)
    inputs[:, : STEPS - 1, 0] = 1.0
    return inputs, torch.zeros(count, STEPS, dtype=torch.long)


def _noise(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return NOISE * torch.randn(shape, generator=generator)


def _of(values: tuple[float, ...], count: int, generator: torch.Generator) -> Tensor:
    return torch.tensor(values)[torch.randint(len(values), (count,), generator=generator)]


def _two_alternatives(count: int, generator: torch.Generator) -> Trials:
    inputs, targets = _empty(count, 3)
    choice = torch.randint(2, (count,), generator=generator)
    strength = _of((0.0, 6.4, 12.8, 25.6, 51.2), count, generator)
    side = torch.cos((torch.arange(2)[None] - choice[:, None]) * math.pi)  # 1 for the choice, -1 for the other
    stimulus = side * strength[:, None] / 200 + 0.5
    inputs[:, :-1, 1:] = stimulus[:, None] + _noise((count, STEPS - 1, 2), generator)
    targets[:, -1] = choice + 1
    return inputs, targets


def _matching(count: int, generator: torch.Generator) -> Trials:
    inputs, targets = _empty(count, 3)
    sample = torch.randint(2, (count,), generator=generator)
    other = torch.randint(2, (count,), generator=generator)
    for step, angle in ((0, sample), (STEPS - 2, (sample + other) % 2)):
        stimulus = torch.cos((torch.arange(2)[None] - angle[:, None]) * math.pi) * 0.5 + 0.5
        inputs[:, step, 1:] = stimulus + _noise((count, 2), generator)
    targets[:, -1] = other + 1
    return inputs, targets


def _context(count: int, generator: torch.Generator) -> Trials:
    inputs, targets = _empty(count, 7)
    relevant = torch.randint(2, (count,), generator=generator)
    choices = torch.randint(1, 3, (count, 2), generator=generator)
    for modality in range(2):
        strength = _of((5.0, 15.0, 50.0), count, generator)
        signed = torch.where(choices[:, modality] == 1, strength, -strength) / 100
        inputs[:, :2, 1 + 2 * modality] = ((1 + signed) / 2)[:, None]
        inputs[:, :2, 2 + 2 * modality] = ((1 - signed) / 2)[:, None]
    inputs[torch.arange(count), :, 5 + relevant] = 1.0
    inputs[:, :2] += _noise((count, 2, 7), generator)
    targets[:, -1] = choices[torch.arange(count), relevant]
    return inputs, targets
