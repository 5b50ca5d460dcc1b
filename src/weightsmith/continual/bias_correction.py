"""BiC, the rival of Weight Aligning: learn a line through the new classes' logits on held-out, balanced examples.

Source: Wu et al., "Large Scale Incremental Learning", CVPR 2019, section 3.3.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from weightsmith.core.errors import UsageError


def fit_bias_correction(logits: Tensor, labels: Tensor, n_old: int, *, steps: int = 50) -> tuple[float, float]:
    """Learn ``alpha`` and ``beta`` of ``alpha o_k + beta`` for new classes by cross-entropy; old logits stay.

    Args:
        logits: ``(N, n)`` of held-out examples, equally many of every class.
        labels: ``(N,)``.
        n_old: Classes before the newest step.
        steps: Most iterations of L-BFGS; two numbers need few.

    Returns:
        ``alpha`` and ``beta``.

    Raises:
        UsageError: ``n_old`` is not between 1 and ``n - 1``.
    """
    if not 0 < n_old < logits.shape[1]:
        raise UsageError(f"n_old must be between 1 and {logits.shape[1] - 1}, got {n_old}")
    fixed = logits.detach().double()
    line = torch.tensor([1.0, 0.0], dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([line], max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(correct_bias(fixed, n_old, line[0], line[1]), labels)
        torch.autograd.backward(loss)
        return loss

    with torch.enable_grad():
        solver.step(closure)
    alpha, beta = line.tolist()
    return alpha, beta


def correct_bias(
    logits: Tensor, n_old: int, alpha: Tensor | float, beta: Tensor | float, *, n_seen: int | None = None
) -> Tensor:
    """Apply the line to the logits of one step's classes, ``n_old`` up to ``n_seen`` (by default all later ones).

    Returns:
        ``(B, n)``.
    """
    end = logits.shape[1] if n_seen is None else n_seen
    return torch.cat([logits[:, :n_old], logits[:, n_old:end] * alpha + beta, logits[:, end:]], dim=1)
