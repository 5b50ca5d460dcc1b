"""Weight Aligning: make the rows of new classes as long, on average, as those of old ones.

A head that has seen many examples of new classes and few of old ones gives new classes longer rows, and so too many
predictions. One factor for all new rows corrects that; it needs no data:

    gamma = mean(|W_c|_p, c < n_old) / mean(|W_c|_p, c >= n_old);    W_c <- gamma W_c  for c >= n_old

Source: Zhao et al., "Maintaining Discrimination and Fairness in Class Incremental Learning", CVPR 2020.
"""

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from weightsmith.continual.head import check_head, check_own_weight, rows
from weightsmith.core.errors import UsageError, WeightsmithWarning

_EQUAL = 1e-6  # rows whose norms differ less, relative to their mean, were normalized


@dataclass(frozen=True, slots=True)
class WeightAlignment:
    """What aligning did.

    Attributes:
        model: The head that was aligned.
        n_old: Rows of old classes.
        gamma: Factor of the new rows; 1 where there was nothing to do.
        unclamped: The factor without ``gamma_max``.
        mean_norm_old: Mean norm of the old rows; NaN without old classes.
        mean_norm_new: Mean norm of the new rows, before.
    """

    model: nn.Module
    n_old: int
    gamma: float
    unclamped: float
    mean_norm_old: float
    mean_norm_new: float


def alignment_factor(weight: Tensor, n_old: int, *, p: float = 2) -> tuple[float, float]:
    """Mean norms of old and new rows, whose ratio is the factor ``gamma``.

    Args:
        weight: ``(n, d)`` or ``(n, d, 1, 1)``: one row per class, old classes first.
        n_old: How many rows are old, ``0 < n_old < n``.
        p: Which norm; the paper's code takes 1, most others 2.

    Returns:
        ``mean(|W_c|_p, c < n_old)`` and ``mean(|W_c|_p, c >= n_old)``, computed in float32 at least.

    Raises:
        UsageError: ``n_old`` or ``p`` is out of range, or a row is not finite.
    """
    n = len(weight)
    if isinstance(n_old, bool) or not isinstance(n_old, int) or not 0 < n_old < n:
        raise UsageError(f"n_old must be an integer between 1 and {n - 1}, for a head of {n} classes, got {n_old!r}")
    if not p > 0:
        raise UsageError(f"p must be above 0, got {p}")
    wide = weight.detach().flatten(1)
    wide = wide if wide.dtype == torch.float64 else wide.float()
    damaged = (~wide.isfinite()).any(1).nonzero()
    if len(damaged):
        raise UsageError(f"row {damaged[0].item()} of the head is not finite: training diverged")
    norms = wide.norm(p=p, dim=1)
    return norms[:n_old].mean().item(), norms[n_old:].mean().item()


@torch.no_grad()
def align_weights_(
    head: nn.Module,
    n_old: int,
    *,
    p: float = 2,
    gamma_max: float | None = 1.0,
    scale_bias: bool = True,
    fold: bool = True,
    model: nn.Module | None = None,
) -> WeightAlignment:
    """Multiply the rows of new classes so that their mean norm is that of old ones.

    Norms and factor are computed in float32 at least; old rows stay to the last bit. Aligned twice without a clamp in
    between, the second factor is 1.

    Args:
        head: ``nn.Linear`` or 1x1 convolution, weight ``(n, d, ...)``, rows in order of arrival.
        n_old: Classes before the newest step; 0: nothing is old, nothing happens.
        p: Which norm of a row: 2, or 1 as in the authors' code.
        gamma_max: Largest factor; ``None``: any, as in PyCIL.
        scale_bias: Also multiply the new classes' bias, as the authors' code does.
        fold: Write the factor into the weights; ``False``: only report it, for `align_logits`.
        model: What the head belongs to: a weight that is tied to another module of it is refused.

    Returns:
        The factor and the norms; ``.model`` is the head.

    Raises:
        TypeError: The head is no linear classifier.
        UsageError: ``n_old`` is not below the number of classes, a row is not finite, all old rows are zero, or the
            weight is parametrized or tied.

    Source: the authors' ``iLearn.learn``; PyCIL's ``weight_align``.
    """
    head = check_head(head)
    if n_old == 0 and not isinstance(n_old, bool):
        return WeightAlignment(head, 0, 1.0, 1.0, float("nan"), rows(head).float().norm(p=p, dim=1).mean().item())
    if gamma_max is not None and not gamma_max > 0:
        raise UsageError(f"gamma_max must be above 0, got {gamma_max}")
    if fold:
        check_own_weight(model if model is not None else head, head)
    old, new = alignment_factor(head.weight, n_old, p=p)
    if old == 0:
        raise UsageError(f"all {n_old} rows of old classes are zero: aligning would set the new ones to zero as well")
    if new == 0:
        warnings.warn("all rows of new classes are zero: they stay as they are", WeightsmithWarning, stacklevel=2)
        return WeightAlignment(head, n_old, 1.0, 1.0, old, new)
    norms = rows(head).float().norm(p=p, dim=1)
    if len(norms) > 2 and (norms - norms.mean()).abs().max() <= _EQUAL * norms.mean():
        warnings.warn(
            "all rows of the head have the same norm, as in a cosine or weight-normalized head: aligning does nothing",
            WeightsmithWarning,
            stacklevel=2,
        )
    gamma = old / new if gamma_max is None else min(old / new, gamma_max)
    if fold and gamma != 1:
        for tensor in (head.weight, head.bias if scale_bias else None):
            if tensor is not None:
                wide = tensor[n_old:] if tensor.dtype == torch.float64 else tensor[n_old:].float()
                tensor[n_old:] = (wide * gamma).to(tensor.dtype)
    return WeightAlignment(head, n_old, gamma, old / new, old, new)


def align_logits(logits: Tensor, n_old: int, gamma: float) -> Tensor:
    """Multiply the logits of new classes by ``gamma``: what aligning weights and bias does, without changing them.

    Args:
        logits: ``(B, n)``.
        n_old: Classes before the newest step.
        gamma: The factor.

    Returns:
        ``(B, n)``.

    Raises:
        UsageError: ``n_old`` is not between 0 and ``n``.

    Source: the authors' ``iLearn.NCS_forward``.
    """
    if not 0 <= n_old <= logits.shape[1]:
        raise UsageError(f"n_old must be between 0 and the {logits.shape[1]} logits, got {n_old}")
    return torch.cat([logits[:, :n_old], logits[:, n_old:] * gamma], dim=1)
