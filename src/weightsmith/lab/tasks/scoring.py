"""Losses and scores that tasks share: one number per example."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from weightsmith.core.errors import UsageError
from weightsmith.core.load import load_object
from weightsmith.lab.experiment import Metric
from weightsmith.lab.task import Batch, Batches, Outcome, Split, forward
from weightsmith.lab.train import evaluate

PerExample = Callable[[Any, Tensor], Tensor]


def logits_of(output: Any) -> Tensor:
    """The logits of whatever a model returns: a tensor, an object or mapping with ``logits``, a tuple of them first."""
    if isinstance(output, Tensor):
        return output
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if found is None and isinstance(output, tuple | list) and output:
        found = output[0]
    if not isinstance(found, Tensor):
        raise UsageError(f"the model returns {type(output).__name__}, which holds no logits")
    return found


def cross_entropy(output: Any, targets: Tensor) -> Tensor:
    """``-log p(target)`` per example, ``(B,)``."""
    logits = logits_of(output)
    if targets.numel() and logits.dim() == 2 and int(targets.max()) >= logits.shape[1]:
        raise UsageError(f"the model has {logits.shape[1]} outputs, the data have a class number {int(targets.max())}")
    return F.cross_entropy(logits.float(), targets, reduction="none")


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
    splits: Mapping[str, Batches],
    loss: str,
    metric: str,
    *,
    batch_size: int = 512,
    default_loss: PerExample = cross_entropy,
) -> dict[str, Any]:
    """The parts of a task with targets: its splits, ``losses``, ``evaluate`` and ``metric``.

    Args:
        splits: The examples by split.
        loss: The user's own, ``module:function``, or ``""``.
        metric: Likewise; the default is accuracy.
        batch_size: Of the evaluation.
        default_loss: What is trained without a loss of the user's.
    """
    own_loss = load_object(loss, "loss") if loss else default_loss
    name = metric.rpartition(":")[2] if metric else "accuracy"
    named = {"loss": own_loss, name: load_object(metric, "metric") if metric else accuracy}

    def measure(model: nn.Module, split: Split) -> Outcome:
        return evaluate(model, splits[split], partial(scores, named), batch_size)

    label = "test accuracy" if not metric else name
    return {
        "losses": partial(losses, own_loss),
        "evaluate": measure,
        "metric": Metric(name, label, "higher", resolution=None if metric else 1 / max(1, len(splits["test"]))),
        "train": splits["train"],
        "held_out": {split: splits[split] for split in ("validation", "test")},
    }


def load_weights(model: nn.Module, checkpoint: str) -> nn.Module:
    """Load a state dict into a model; without one it stays as it is.

    Raises:
        UsageError: The file is missing, damaged, or holds other tensors than the model.
    """
    if not checkpoint:
        return model
    path = Path(checkpoint)
    try:
        state: Any = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
        state = state.get("state_dict", state)
        model.load_state_dict(state)
    except FileNotFoundError as error:
        raise UsageError(f"checkpoint {checkpoint!r}: there is no such file") from error
    except (SafetensorError, RuntimeError, ValueError, AttributeError, EOFError, OSError) as error:
        reason = " ".join(str(error).split())[:500]
        raise UsageError(f"checkpoint {checkpoint!r} does not fit the model or is damaged: {reason}") from error
    except Exception as error:  # what a pickle that is not a state dict raises
        raise UsageError(f"checkpoint {checkpoint!r} is not a plain state dict: {type(error).__name__}") from error
    return model
