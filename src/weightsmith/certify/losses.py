"""Losses on proved margins, and the loss fusion that bounds them with one row in place of one per class."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from weightsmith.certify.bounding import BoundOptions
from weightsmith.certify.box import margins_of
from weightsmith.certify.crown import Backward
from weightsmith.certify.elision import elided
from weightsmith.certify.passes import Pass
from weightsmith.certify.traced import Traced

Reduction = Literal["mean", "sum", "none"]


def robust_cross_entropy(margins: Tensor, reduction: Reduction = "mean") -> Tensor:
    """``log(1 + sum_j exp(-m_j))``: an upper bound of the cross-entropy over the box.

    Args:
        margins: ``(B, K - 1)``, lower ends of ``z_y - z_j``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` over examples.

    Returns:
        One number, or ``(B,)``.
    """
    logits = F.pad(-margins, (1, 0))
    return F.cross_entropy(logits, logits.new_zeros(len(logits), dtype=torch.long), reduction=reduction)


def fused_log_bound(
    traced: Traced, done: Pass, labels: Tensor, *, weight: float = 1.0, options: BoundOptions | None = None
) -> Tensor:
    """Upper bound of ``log sum_j exp(z_j - z_y)`` over the box, from one backward pass with a single row.

    With IBP bounds ``L_j <= z_j - z_y <= U_j`` and ``m = max_j U_j`` every ``exp(z_j - z_y - m)`` lies below its
    chord, and the sum of the chords is one linear function of the logits (arXiv 2103.17268, loss fusion of
    2002.12920). Nothing positive is ever exponentiated.

    Args:
        traced: The model.
        done: A forward pass of it by IBP.
        labels: ``(B,)``.
        weight: ``w`` in ``log(w crown + (1 - w) ibp)``, in [0, 1].
        options: Of the backward pass.

    Returns:
        ``(B,)``.
    """
    output, options = done.output, options or BoundOptions()
    spec = margins_of(labels, output.shape[1], output.sample)
    ends = elided(done, spec)
    low, high = F.pad(-ends.upper, (1, 0)), F.pad(-ends.lower, (1, 0))  # of z_j - z_y, the label itself first
    m = high.amax(1, keepdim=True)
    interval = (high - m).exp().sum(1)
    if weight == 0:
        return interval.log() + m[:, 0]
    fixed = m.detach()
    start, end = low - fixed, high - fixed
    slope = ((end.exp() - start.exp()) / (end - start).clamp_min(1e-8)).clamp_min(1e-8)
    constant = start.exp() - start * slope - slope * fixed
    row = (slope[:, 1:].unsqueeze(1) @ -spec).squeeze(1)  # sum of slope_j (e_j - e_y)
    backward = Backward(done, traced.axes(done.graph, done.inputs), len(labels), options.relu)
    crown = -backward.lower(done.graph.output, -row[None])[:, 0] + constant.sum(1)
    return (weight * crown + (1 - weight) * interval).log() + fixed[:, 0]
