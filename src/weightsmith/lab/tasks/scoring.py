"""Losses and scores that tasks share: one number per example."""

import pickle
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weightsmith.core.checkpoint import Checkpoint
from weightsmith.core.errors import UsageError
from weightsmith.core.load import load_object
from weightsmith.core.outputs import logits_of
from weightsmith.lab.experiment import Metric
from weightsmith.lab.task import Batch, Batches, Outcome, Split, forward
from weightsmith.lab.train import evaluate

PerExample = Callable[[Any, Tensor], Tensor]


def cross_entropy(output: Any, targets: Tensor) -> Tensor:
    """``-log p(target)`` per example, ``(B,)``."""
    return F.cross_entropy(logits_of(output).float(), targets, reduction="none")


def accuracy(output: Any, targets: Tensor) -> Tensor:
    """1 per example whose largest logit is the target's, ``(B,)``."""
    return (logits_of(output).argmax(-1) == targets).float()


def losses(loss: PerExample, model: nn.Module, batch: Batch) -> Tensor:
    """Losses ``(B,)`` of a batch."""
    assert batch.targets is not None
    return loss(forward(model, batch), batch.targets)


def scores(named: Mapping[str, PerExample], model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Several numbers per example of a batch, from one forward pass."""
    assert batch.targets is not None
    output = forward(model, batch)
    return {name: score(output, batch.targets) for name, score in named.items()}


def supervised(
    splits: Mapping[str, Batches], loss: str, metric: str, *, classes: int, batch_size: int = 512
) -> dict[str, Any]:
    """The parts of a task with classes: its splits, ``losses``, ``evaluate`` and ``metric``.

    Args:
        splits: The examples by split.
        loss: The user's own, ``module:function``, or ``""``.
        metric: Likewise; the default is accuracy.
        classes: Number of classes.
        batch_size: Of the evaluation.

    Raises:
        UsageError: There is no such function.
    """
    own_loss = of_the_user(loss, "loss") if loss else cross_entropy
    name = metric.rpartition(":")[2] if metric else "accuracy"
    score = of_the_user(metric, "metric") if metric else accuracy
    named = {"loss": own_loss, name: score}
    first_batch = iter((True,))  # no flag: what the losses enclose tells one training run from another

    def check(output: Any, targets: Tensor) -> None:
        """Refuse, on the first batch, what would fail or mislead at the end of training."""
        if not (loss and metric):
            shape = tuple(logits_of(output).shape)
            if len(shape) != 2 or shape[1] < classes:
                raise UsageError(
                    f"the model has {shape[-1]} outputs per example, the data have {classes} classes"
                    if len(shape) == 2
                    else f"the model must return logits ({len(targets)}, {classes}), got {shape}"
                )
        with torch.no_grad():
            found = score(output, targets)
        if not isinstance(found, Tensor) or tuple(found.shape) != (len(targets),):
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise UsageError(f"metric {name!r} must give one number per example, ({len(targets)},), got {got}")

    def losses(model: nn.Module, batch: Batch) -> Tensor:
        assert batch.targets is not None
        output = forward(model, batch)
        if next(first_batch, False):
            check(output, batch.targets)
        return own_loss(output, batch.targets)

    def measure(model: nn.Module, split: Split) -> Outcome:
        return evaluate(model, splits[split], partial(scores, named), batch_size)

    label = "test accuracy" if not metric else name
    return {
        "losses": losses,
        "evaluate": measure,
        "metric": Metric(name, label, "higher", resolution=None if metric else 1 / max(1, len(splits["test"]))),
        "train": splits["train"],
        "held_out": {split: splits[split] for split in ("validation", "test")},
    }


def of_the_user(name: str, argument: str) -> PerExample:
    """Load ``module:function``; it is given the logits where the model returns an object that has them.

    Raises:
        UsageError: There is no such function.
    """
    function = load_object(name, argument)
    if not callable(function):
        raise UsageError(f"{argument} {name!r} must be a function (outputs, targets) -> one number per example")

    def called(output: Any, targets: Tensor) -> Tensor:
        losses: Tensor = function(_plain(output), targets)
        return losses

    called.__qualname__ = name  # tells one loss from another when a run resumes
    return called


def _plain(output: Any) -> Any:
    if isinstance(output, tuple) and len(output) == 1:
        return output[0]
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    return output if logits is None else logits


def load_weights(model: nn.Module, checkpoint: str) -> nn.Module:
    """Load a state dict into a model; without one it stays as it is.

    Args:
        model: Changed in place.
        checkpoint: A ``.safetensors`` or ``.pt`` file, a folder with safetensors files, or ``""``.

    Raises:
        UsageError: The file is missing, damaged, or holds other tensors than the model.
    """
    if not checkpoint:
        return model
    path = Path(checkpoint)
    if not path.exists():
        raise UsageError(f"checkpoint {checkpoint!r}: there is no such file")
    try:
        if path.is_dir() or path.suffix == ".safetensors":
            state: Any = dict(Checkpoint(path))
        else:
            state = torch.load(path, "cpu", weights_only=True)
            state = next((state[key] for key in ("state_dict", "model") if isinstance(state.get(key), Mapping)), state)
        model.load_state_dict(_unwrapped(state))
    except pickle.UnpicklingError as error:  # what a pickle raises that holds more than tensors
        raise UsageError(f"checkpoint {checkpoint!r} is not a plain state dict: {_short(error)}") from error
    except Exception as error:  # damaged files raise errors of many kinds
        raise UsageError(f"checkpoint {checkpoint!r} does not fit the model or is damaged: {_short(error)}") from error
    return model


def _unwrapped(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Without the prefix that a wrapper for several processes puts before every name."""
    prefix = "module."
    return (
        {name.removeprefix(prefix): v for name, v in state.items()}
        if all(n.startswith(prefix) for n in state)
        else state
    )


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:500]
