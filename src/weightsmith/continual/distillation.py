"""The loss of an incremental step: learn the new classes and keep what the earlier model said about the old ones."""

import torch
from torch import Tensor
from torch.nn import functional as F

from weightsmith.core.errors import UsageError


def distillation_loss(logits: Tensor, teacher_logits: Tensor, n_old: int, *, temperature: float = 2.0) -> Tensor:
    """Soft cross-entropy between the earlier model and this one, over old classes.

    ``L = -1/B sum_b sum_{j < n_old} softmax(teacher / T)_j log_softmax(logits[:, :n_old] / T)_j``

    Its gradient is that of the KL divergence; it is not multiplied by ``T^2``.

    Args:
        logits: ``(B, n)`` of the model that is trained.
        teacher_logits: ``(B, n_old)`` of the model of the step before; no gradient flows into it.
        n_old: Classes before this step, at least 1.
        temperature: ``T``.

    Returns:
        A scalar.

    Raises:
        UsageError: The shapes do not fit, or the temperature is not above 0.

    Source: the authors' ``iLearn.train_model``; PyCIL's ``_KD_loss``.
    """
    if not temperature > 0:
        raise UsageError(f"temperature must be above 0, got {temperature}")
    if not 0 < n_old <= logits.shape[1]:
        raise UsageError(f"n_old must be between 1 and the {logits.shape[1]} logits, got {n_old}")
    if tuple(teacher_logits.shape) != (len(logits), n_old):
        raise UsageError(f"teacher_logits must be ({len(logits)}, {n_old}), got {tuple(teacher_logits.shape)}")
    q = (teacher_logits.detach() / temperature).softmax(1)
    return -(q * (logits[:, :n_old] / temperature).log_softmax(1)).sum(1).mean()


def incremental_loss(
    logits: Tensor,
    labels: Tensor,
    teacher_logits: Tensor | None,
    n_old: int,
    *,
    share: float | None = None,
    temperature: float = 2.0,
) -> Tensor:
    """Cross-entropy over all classes and distillation over old ones: ``(1 - lambda) CE + lambda KD``.

    Args:
        logits: ``(B, n)``.
        labels: ``(B,)``, head indices below ``n``.
        teacher_logits: ``(B, n_old)``; ``None``: cross-entropy alone, as in the first step.
        n_old: Classes before this step.
        share: ``lambda``; ``None``: ``n_old / n``.
        temperature: Of the distillation.

    Returns:
        A scalar.

    Raises:
        UsageError: A label is none of the head's classes, or see `distillation_loss`.
    """
    n = logits.shape[1]
    if labels.dtype not in (torch.int64, torch.int32, torch.uint8) or tuple(labels.shape) != (len(logits),):
        raise UsageError(f"labels must be {len(logits)} integers, got {labels.dtype} {tuple(labels.shape)}")
    strange = labels[(labels < 0) | (labels >= n)]
    if len(strange):
        raise UsageError(f"label {strange[0].item()} is none of the head's {n} classes: map labels with ClassOrder")
    learn = F.cross_entropy(logits, labels.long())
    if teacher_logits is None or n_old == 0:
        return learn
    share = n_old / n if share is None else share
    if not 0 <= share <= 1:
        raise UsageError(f"share must be between 0 and 1, got {share}")
    return (1 - share) * learn + share * distillation_loss(logits, teacher_logits, n_old, temperature=temperature)
