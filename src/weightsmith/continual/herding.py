"""Which examples of a class to keep: those whose mean stays closest to the class's own."""

import torch
from torch import Tensor

from weightsmith.core.errors import UsageError

_GUARD = 1e-8


@torch.no_grad()
def herding(features: Tensor, m: int) -> Tensor:
    """Choose ``m`` examples of one class in order: any first part of them is a good choice as well.

    On ``v_i = f_i / (|f_i| + 1e-8)`` with mean ``mu``: ``w = mu``; then repeatedly take the example with the largest
    ``<w, v_i>`` that is not chosen yet, and set ``w <- w + mu - v_i``. For unit vectors this is iCaRL's rule, at one
    matrix-vector product per choice.

    Args:
        features: ``(N, d)``, what the head takes; computed in float32 at least.
        m: How many; all of them if there are fewer.

    Returns:
        ``(min(m, N),)`` int64: indices in the order of choice, each once.

    Raises:
        UsageError: The features are not a finite matrix, or ``m`` is below 1.

    Source: Rebuffi et al., "iCaRL", CVPR 2017, algorithm 4.
    """
    if features.dim() != 2 or not features.is_floating_point() or not bool(features.isfinite().all()):
        raise UsageError(f"features must be finite numbers (N, d), got {features.dtype} {tuple(features.shape)}")
    if isinstance(m, bool) or not isinstance(m, int) or m < 1:
        raise UsageError(f"m must be an integer of at least 1, got {m!r}")
    wide = features if features.dtype == torch.float64 else features.float()
    v = wide / (wide.norm(dim=1, keepdim=True) + _GUARD)
    mu = v.mean(0)
    w = mu.clone()
    taken = torch.zeros(len(v), dtype=v.dtype, device=v.device)
    chosen = torch.empty(min(m, len(v)), dtype=torch.int64, device=v.device)
    for k in range(len(chosen)):
        index = torch.addmv(taken, v, w).argmax()
        chosen[k] = index
        taken[index] = -torch.inf
        w += mu - v[index]
    return chosen
