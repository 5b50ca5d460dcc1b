"""How much of the live weights goes into their average: the balance weight of LCIA.

The paper minimizes the loss of the average and its movement together, which gives a weight from the gradient, its
change and the distance to the average. The authors' code replaces one of the paper's factors by a constant.

Source: Qiao et al., ICML 2025, arXiv 2410.10868, equations 13, 14 and 45; the authors' ``ema_update``.
"""

from typing import Literal

import torch
from torch import Tensor

Mode = Literal["official", "paper", "fixed"]


def balance_weight(
    distance: Tensor,
    gradient: Tensor,
    change: Tensor,
    *,
    kappa: float | Tensor = 2.0,
    fallback_beta: float = 0.99,
    mode: Mode = "official",
) -> Tensor:
    r"""The weight ``alpha`` of the live parameters in the average, from L1 norms.

    ``alpha = kappa (1 + gradient) / (distance * change)``; ``1 - fallback_beta`` where that is not in (0, 1).

    Args:
        distance: ``||theta_t - theta*_{t-1}||``, any shape: an entry per tensor.
        gradient: ``||g_t||``, the same shape.
        change: ``||g_t - g_{t-1}||``, the same shape; 0 where there is no previous gradient.
        kappa: A number (``"official"``), or ``||theta_{t-1} - theta*_{t-1}||`` per tensor (``"paper"``).
        fallback_beta: Weight of the average where the formula gives none.
        mode: ``"official"`` tests ``alpha`` itself; ``"paper"`` tests ``1 - alpha``; ``"fixed"`` always falls back.

    Returns:
        ``alpha``, in the shape and dtype of ``distance``.

    Source: arXiv 2410.10868, equation 45, with ``1 + ||g||`` for ``||g + 1||``; the authors' ``ema_update``.
    """
    fallback = torch.full_like(distance, 1 - fallback_beta)
    if mode == "fixed":
        return fallback
    alpha = kappa * (1 + gradient) / (distance * change)
    tested = alpha if mode == "official" else 1 - alpha
    return torch.where((tested > 0) & (tested < 1), alpha, fallback)
