"""Projected gradient descent (Madry et al. 2018, arXiv 1706.06083): how far an attack gets, beside what is proved."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weightsmith.certify.interval import Interval
from weightsmith.core.errors import UsageError
from weightsmith.core.modes import evaluating


def pgd(
    model: Callable[[Tensor], Tensor],
    box: Interval,
    labels: Tensor,
    *,
    steps: int = 40,
    step_size: float = 0.25,
    restarts: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Look for the input within a box on which a model is most wrong.

    Every restart begins at a random point and follows the sign of the gradient of ``max_{j != y} z_j - z_y``, whose
    maximum is above 0 exactly where an input is misclassified. Steps shrink by 10 at half and at three quarters of the
    way. Parameters get no gradients.

    Args:
        model: Gives logits ``(B, K)``.
        box: What inputs are allowed.
        labels: ``(B,)``.
        steps: Gradient steps.
        step_size: First step, as a share of the box's radius.
        restarts: Number of random starts.
        generator: Where they come from; ``None``: torch's global one.

    Returns:
        The worst input found for each example, within the box.

    Raises:
        UsageError: ``steps`` or ``restarts`` is below 1.
    """
    if steps < 1 or restarts < 1:
        raise UsageError(f"steps and restarts must be at least 1, got {steps} and {restarts}")
    low, high, size = box.lower.detach(), box.upper.detach(), box.radius.detach()
    found = box.center.detach()
    worst = _wrongness(model, found, labels)
    for _ in range(restarts):
        drawn = torch.rand(low.shape, dtype=low.dtype, device=low.device, generator=generator)
        x = low + drawn * (high - low)
        for step in range(steps):
            x = x.detach().requires_grad_()
            with torch.enable_grad():
                now = _margin_of_error(model(x), labels)
                (slope,) = torch.autograd.grad(now.sum(), x)
            x = x.detach()
            worst, found = _worse(x, now.detach(), worst, found)
            shrunk = 0.1 ** ((step >= steps / 2) + (step >= 3 * steps / 4))
            x = torch.minimum(torch.maximum(x + step_size * shrunk * size * slope.sign(), low), high)
        worst, found = _worse(x, _wrongness(model, x, labels), worst, found)
    return found


def _margin_of_error(logits: Tensor, labels: Tensor) -> Tensor:
    labels = labels.long()
    own = F.one_hot(labels, logits.shape[1]).bool()
    return logits.masked_fill(own, -torch.inf).amax(1) - logits.gather(1, labels[:, None])[:, 0]


@torch.no_grad()
def _wrongness(model: Callable[[Tensor], Tensor], x: Tensor, labels: Tensor) -> Tensor:
    return _margin_of_error(model(x), labels)


def _worse(x: Tensor, now: Tensor, worst: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
    better = now > worst
    chosen = better.view(-1, *[1] * (x.dim() - 1))
    return torch.where(better, now, worst), torch.where(chosen, x, found)


def adversarial(model: nn.Module, box: Interval, labels: Tensor, *, steps: int, step_size: float) -> Tensor:
    """A training attack: one start, evaluation mode, and no gradient left on the parameters."""
    with evaluating(model):
        return pgd(model, box, labels, steps=steps, step_size=step_size)
