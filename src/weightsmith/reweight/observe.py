"""A batch as the model and the rescaler see it."""

import contextlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from weightsmith.core.errors import UsageError, WeightsmithWarning
from weightsmith.reweight.memory import SampleStatsMemory
from weightsmith.reweight.passes import Forward, Head, LossFn, without_traces
from weightsmith.reweight.rescaler import LossRescaler, Normalize, normalizer
from weightsmith.reweight.settings import RescalingSettings
from weightsmith.reweight.signals import Signals, check_batch, features_of, signals


@dataclass(slots=True)
class Seen:
    """A batch as the model and the rescaler saw it; ``n`` of its samples have a label."""

    batch: Any
    labels: Tensor  # (B,)
    rows: Tensor  # (n,), samples that have a label
    losses: Tensor  # (n,), with the graph to the model where gradients were on
    weights: Tensor  # (n,), with the graph to the rescaler
    factor: Tensor  # (), the normalization of the weights
    signals: Signals
    suggested: Tensor  # (n,)
    rescaled: bool  # False for a single sample, which has weight 1
    logit_gradients: Tensor | None = None  # (n, C), for the head
    head_inputs: Tensor | None = None  # (n, D)


class Observer:
    """Passes batches through a model, remembers what it saw, and lets the rescaler weigh them.

    Args:
        module: The classifier, without any wrapper.
        rescaler: What weighs.
        forward_fn: ``(model, batch) -> (logits (B, C), labels (B,))``.
        loss_fn: ``(logits, labels) -> (B,)``.
        settings: Of the meta-rescaler.
        normalize: How the weights of a batch are normalized.

    Attributes:
        memories: Recent samples of the training and of the validation batches.
        head: The last linear layer, where ``meta_grad`` is ``"head"``.
    """

    def __init__(
        self,
        module: nn.Module,
        rescaler: LossRescaler,
        forward_fn: Forward,
        loss_fn: LossFn,
        settings: RescalingSettings,
        normalize: Normalize,
    ) -> None:
        self.module, self.rescaler, self.settings = module, rescaler, settings
        self.forward_fn, self.loss_fn, self.normalize = forward_fn, loss_fn, normalize
        self.memories = {
            name: SampleStatsMemory(rescaler.num_classes, settings.window, class_separation=rescaler.class_separation)
            for name in ("training", "validation")
        }
        self.head = Head() if settings.meta_grad == "head" else None
        self._varies = False

    def look(
        self,
        batch: Any,
        purpose: Literal["training", "validation"],
        *,
        through: nn.Module | None = None,
        ids: Tensor | None = None,
        autocast: Callable[[], Any] = contextlib.nullcontext,
    ) -> Seen:
        """Pass a batch through the model and weigh it.

        Args:
            batch: As ``forward_fn`` takes it.
            purpose: Which memory it enters; named in errors.
            through: A wrapper of the model for the pass with gradients.
            ids: Names of the samples for errors, ``(B,)``.
            autocast: Precision of the passes without gradients.

        Raises:
            UsageError: Labels, logits or losses do not have the form of a classifier's.
            FloatingPointError: A loss is not finite.
        """
        # before the pass with gradients, whose graph they could otherwise disturb; a cast of the weights that autocast
        # cached here would have no gradient
        with torch.no_grad(), without_traces(self.module), autocast():
            more = [self.forward_fn(self.module, batch)[0] for _ in range(self.settings.passes - 1)]
        call = self.module if through is None else through
        if self.head is None:
            logits, labels = self.forward_fn(call, batch)
        else:
            logits, labels = self.head.watched(self.module, lambda: self.forward_fn(call, batch))
        check_batch(logits, labels, self.rescaler.num_classes)
        if ids is not None and len(ids) != len(labels):
            raise UsageError(f"ids must name every sample of the batch, ({len(labels)},), got ({len(ids)},)")
        rows = (labels >= 0).nonzero().squeeze(1)
        kept, target = logits[rows], labels[rows]
        losses = self._losses(kept, target)
        with torch.no_grad():
            logits_of_all = torch.stack([kept.detach(), *(z[rows] for z in more)]).to(losses.dtype)
            losses_of_all = torch.stack([losses.detach(), *(self._losses(z[rows], target) for z in more)])
            found = signals(losses_of_all, logits_of_all, target)
            suggested = logits_of_all.softmax(-1).mean(0).argmax(-1)
        _check_finite(found, rows, purpose, ids)
        self._warn_without_dropout(found)
        rescaled = len(rows) > 1  # one sample has no statistics
        with torch.enable_grad(), torch.autocast(losses.device.type, enabled=False):
            if rescaled:
                weights = self.rescaler(self._features(found, target, purpose), target)
            else:
                weights = losses.new_ones(len(rows), dtype=self.rescaler.first.dtype)
        factor = normalizer(weights, losses, self.normalize)
        seen = Seen(batch, labels, rows, losses, weights, factor, found, suggested, rescaled)
        if self.head is not None and self.head.inputs is not None:
            with torch.enable_grad():
                z = kept.detach().requires_grad_()
                slopes = torch.autograd.grad(self.loss_fn(z, target).sum(), z)[0]
            seen.logit_gradients = slopes.to(losses.dtype)
            seen.head_inputs = self.head.inputs[rows].to(losses.dtype)
        return seen

    def _losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        losses = self.loss_fn(logits, labels)
        if losses.shape != labels.shape:
            raise UsageError(f"loss_fn must give one loss per sample, ({len(labels)},), got {tuple(losses.shape)}")
        return losses.to(torch.promote_types(losses.dtype, torch.float32))

    def _features(self, found: Signals, labels: Tensor, purpose: str) -> Tensor:
        if self.settings.features == "loss":
            return torch.stack([found.loss, found.agreement], dim=1)
        return features_of(found, labels, self.memories[purpose], clamp=self.settings.clamp)

    def _warn_without_dropout(self, found: Signals) -> None:
        if self._varies or self.settings.passes == 1 or not len(found.loss_std):
            return
        self._varies = True  # looked at once
        if not bool(found.loss_std.any()):
            warnings.warn(
                f"{self.settings.passes} passes of a batch gave the same losses: the model has no dropout that is on; "
                "take passes=1, which costs less",
                WeightsmithWarning,
                stacklevel=4,
            )


def _check_finite(found: Signals, rows: Tensor, purpose: str, ids: Tensor | None) -> None:
    """Refuse what would spoil the rescaler's statistics, from whichever pass it comes."""
    wrong = ~found.stored().isfinite().all(1)
    if not bool(wrong.any()):
        return
    at = rows[wrong]
    names = (at if ids is None else ids.to(at.device)[at]).tolist()
    kind = "positions in the batch" if ids is None else "ids"
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    raise FloatingPointError(
        f"the {purpose} loss is not finite for the samples with {kind} {', '.join(map(str, names[:10]))}{more}: "
        "look at their data, or lower the learning rate"
    )
