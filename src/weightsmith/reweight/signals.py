"""What a model's own behavior says of a label: 19 numbers per sample, compared with recent samples of the same class.

A sample is passed through the model several times with dropout. Its losses and confidences, how much they vary, and
whether the predictions agree with the label are compared with those of the samples of the same label and the same
agreement that were seen last.

Source: arXiv 2412.12955, equation 4 and table 1; where paper and authors' code differ, the code.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from weightsmith.core.errors import UsageError
from weightsmith.reweight.memory import SampleStatsMemory

FEATURES = 19
_TINY = 1e-8


@dataclass(frozen=True, slots=True)
class Signals:
    """What G passes say of B samples; all ``(B,)``.

    Attributes:
        loss: Loss of pass 0.
        loss_mean: Mean loss over the passes.
        loss_std: Unbiased standard deviation of it; 0 for one pass.
        confidence_mean: Mean of the largest class probability, whatever the label is.
        confidence_std: Unbiased standard deviation of it; 0 for one pass.
        agreement: 1 where at least half of the predictions equal the label (of a tie, pass 0 decides), else 0.
    """

    loss: Tensor
    loss_mean: Tensor
    loss_std: Tensor
    confidence_mean: Tensor
    confidence_std: Tensor
    agreement: Tensor

    def stored(self) -> Tensor:
        """What a memory keeps, ``(B, 5)``."""
        return torch.stack(
            [self.loss_mean, self.loss_std, self.confidence_mean, self.confidence_std, self.agreement], dim=1
        )


@torch.no_grad()
def signals(losses: Tensor, logits: Tensor, labels: Tensor) -> Signals:
    """Summarize the passes.

    Args:
        losses: ``(G, B)``.
        logits: ``(G, B, C)``.
        labels: ``(B,)``, int64, in [0, C).

    Returns:
        In float64 if the losses are, else in float32.
    """
    dtype = torch.promote_types(losses.dtype, torch.float32)
    losses, logits = losses.to(dtype), logits.to(dtype)
    confidence = logits.softmax(-1).amax(-1)
    right = logits.argmax(-1) == labels
    passes, hits = len(right), right.sum(0)
    agreement = torch.where(2 * hits == passes, right[0], 2 * hits > passes)
    return Signals(losses[0], losses.mean(0), _std(losses), confidence.mean(0), _std(confidence), agreement.to(dtype))


def _std(values: Tensor) -> Tensor:
    return values.std(0) if len(values) > 1 and values[0].numel() else torch.zeros_like(values[0])


@torch.no_grad()
def rescaler_features(
    losses: Tensor, logits: Tensor, labels: Tensor, memory: SampleStatsMemory, *, clamp: float | None = None
) -> Tensor:
    """Features of a batch; its samples enter the memory first, so that no sample's group is empty.

    With ``q`` the stored samples of the same label and agreement, the columns are each sample's mean loss, std of the
    loss, mean confidence and std of the confidence over the passes, each followed by its mean and std over ``q``;
    ``KL_i`` and ``OVL_i`` of the normal distributions of the sample's loss and of the losses of ``q``, likewise; and
    the agreement (arXiv 2412.12955, equation 4 and table 1).

    Args:
        losses: ``(G, B)``, one per pass and sample.
        logits: ``(G, B, C)``.
        labels: ``(B,)``, int64, in [0, C).
        memory: Of the data that the batch comes from; changed.
        clamp: Largest absolute value of a feature; ``None``: any.

    Returns:
        ``(B, 19)``, in float64 if the losses are, else in float32.

    Raises:
        UsageError: Shapes or labels do not fit.
    """
    check_batch(logits[0], labels, memory.num_classes)
    if losses.shape != logits.shape[:2]:
        raise UsageError(
            f"losses must be {tuple(logits.shape[:2])}, one per pass and sample, got {tuple(losses.shape)}"
        )
    return features_of(signals(losses, logits, labels), labels, memory, clamp=clamp)


def features_of(found: Signals, labels: Tensor, memory: SampleStatsMemory, *, clamp: float | None = None) -> Tensor:
    """`rescaler_features` of signals that are already there."""
    own = found.stored()
    places = memory.add(own, labels)
    keys, at = torch.unique(2 * memory.groups(labels) + found.agreement.long(), return_inverse=True)
    values, counted = memory.members(keys // 2, keys % 2)
    mean, std = _moments(values, counted)
    losses = (values[..., 0], values[..., 1], mean[:, :1], mean[:, 1:2])
    more = torch.stack([kl_normal(*losses), overlap_normal(*losses)], dim=-1)
    more_mean, more_std = _moments(more, counted)
    mine = torch.cat([values[at, places], more[at, places]], dim=1)  # every sample is a member of its group
    means, stds = torch.cat([mean, more_mean], dim=1)[at], torch.cat([std, more_std], dim=1)[at]
    table = torch.cat([torch.stack([mine, means, stds], dim=2).flatten(1), own[:, 4:]], dim=1)
    return table if clamp is None else table.clamp(-clamp, clamp)


def _moments(values: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased std ``(U, M)`` of the counted ones of ``(U, N, M)``; of a single one the std is 1e-8."""
    count, counted = counted.sum(1, keepdim=True).to(values.dtype), counted[..., None]
    mean = torch.where(counted, values, 0.0).sum(1) / count
    squares = torch.where(counted, (values - mean[:, None]).square(), 0.0).sum(1)
    return mean, torch.where(count > 1, (squares / (count - 1).clamp(min=1)).sqrt(), _TINY)


def kl_normal(m: Tensor, s: Tensor, center: Tensor, spread: Tensor) -> Tensor:
    """``KL(N(m, s) || N(center, spread)) = ln(S/s) + (s² + (m-M)²) / (2 S²) - 1/2``; 0 where a std is 0."""
    degenerate = (s == 0) | (spread == 0)
    small, large = torch.where(degenerate, 1.0, s), torch.where(degenerate, 1.0, spread)
    # ratios before squares: a tiny std must not underflow
    found = (large / small).log() + 0.5 * ((small / large).square() + ((m - center) / large).square()) - 0.5
    return torch.where(degenerate, 0.0, found)


def overlap_normal(m: Tensor, s: Tensor, center: Tensor, spread: Tensor) -> Tensor:
    """Area under the smaller of the densities of ``N(m, s)`` and ``N(center, spread)``; stds of 1e-8 at least.

    The densities are equal at the roots of ``(S² - s²) x² + 2 d s² x - s² (d² + S² ln(S²/s²)) = 0``, with ``x`` counted
    from the first mean and ``d`` the distance of the means; between the roots the distribution functions give the area.
    """
    s, spread, m, center = torch.broadcast_tensors(s.clamp(min=_TINY), spread.clamp(min=_TINY), m, center)
    unit = torch.maximum(s, spread)  # in units of the larger std, nothing under- or overflows when squared
    d, s, big = (m - center).abs() / unit, s / unit, spread / unit
    difference = (big - s) * (big + s)
    log_ratio = 2 * (big / s).log()
    equal = (difference == 0) | (log_ratio == 0)
    # the larger root first, the other one from their product: no cancellation
    q = -(d * s.square() + s * big * (d.square() + difference * log_ratio).clamp(min=0).sqrt())
    q = torch.where(equal | (q == 0), -1.0, q)
    x1 = q / torch.where(equal, 1.0, difference)
    x2 = -s.square() * (d.square() + big.square() * log_ratio) / q
    area = 1 - (_cdf_gap(x1, d, s, big) + _cdf_gap(x2, d, s, big))
    return torch.where(equal, torch.special.erfc(d / (2 * math.sqrt(2) * s)), area).clamp(0, 1)


def _cdf_gap(x: Tensor, d: Tensor, s: Tensor, big: Tensor) -> Tensor:
    gap: Tensor = (torch.special.ndtr((x - d) / big) - torch.special.ndtr(x / s)).abs()
    return gap


def check_batch(logits: Tensor, labels: Tensor, num_classes: int) -> None:
    """Refuse what is not one class per sample.

    Raises:
        UsageError: Names the argument and how to fix it.
    """
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool or labels.dim() != 1:
        raise UsageError(
            f"labels must be one class number per sample, (B,) int64, got {tuple(labels.shape)} {labels.dtype}; "
            "regression and several labels per sample are not supported"
        )
    if logits.dim() != 2 or len(logits) != len(labels):
        hint = "; for labels per token, make one loss per sequence first" if logits.dim() > 2 else ""
        raise UsageError(f"logits must be ({len(labels)}, {num_classes}), got {tuple(logits.shape)}{hint}")
    if logits.shape[1] != num_classes:
        raise UsageError(f"num_classes is {num_classes}, but the logits have {logits.shape[1]} classes")
    if len(labels) and int(labels.max()) >= num_classes:
        raise UsageError(f"labels must be below num_classes, {num_classes}, got {int(labels.max())}")
