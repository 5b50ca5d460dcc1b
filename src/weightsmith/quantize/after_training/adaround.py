"""AdaRound: choose between floor and ceiling for every weight, by a soft choice that a regularizer makes hard.

``w_hat = s * clamp(floor(w / s) + h(a), low, high)`` with ``h(a) = clamp(1.2 * sigmoid(a) - 0.1, 0, 1)``; the loss gets
``weight * sum(1 - |2h - 1|^beta)`` with ``beta`` falling from 20 to 2. "Up or Down? Adaptive Rounding for Post-Training
Quantization", Nagel et al. 2020, arXiv 2004.10568.
"""

import torch
from torch import Tensor, nn

from weightsmith.quantize.after_training.rtn import RoundToNearest
from weightsmith.quantize.grid import Grid

_ZETA, _GAMMA = 1.1, -0.1
_WARM_UP = 0.2
_BETAS = (20.0, 2.0)


class AdaRound(RoundToNearest):
    """Learn the choice for one weight; the soft weight begins as the trained one.

    Args:
        weight: The trained weight.
        grid: Where to; its step is not learned.
        axis: Where its output channels are.
        penalty: Weight of the regularizer.
    """

    def __init__(
        self,
        weight: Tensor,
        grid: Grid = Grid(),  # noqa: B008  (immutable)
        *,
        axis: int = 0,
        penalty: float = 0.01,
    ) -> None:
        super().__init__(weight, grid, axis=axis)
        units = self.units(weight)
        rest = units - units.floor()
        self.penalty = penalty
        self.alpha = nn.Parameter(-torch.log((_ZETA - _GAMMA) / (rest - _GAMMA) - 1))

    def up(self) -> Tensor:
        """How far each weight is rounded up, in [0, 1]."""
        return (self.alpha.sigmoid() * (_ZETA - _GAMMA) + _GAMMA).clamp(0, 1)

    def soft(self, units: Tensor) -> Tensor:
        """The weight between floor and ceiling."""
        return self.scale * (units.floor() + self.up()).clamp(*self.limits)

    @torch.no_grad()
    def hard(self, units: Tensor) -> Tensor:
        """Centered codes."""
        return (units.floor() + (self.alpha >= 0)).clamp(*self.limits)

    def regularizer(self, progress: float) -> Tensor | None:
        """Push every choice to one side; nothing in the first fifth of the optimization."""
        if progress < _WARM_UP:
            return None
        return self.penalty * (1 - (2 * self.up() - 1).abs().pow(temperature(progress))).sum()


def temperature(progress: float) -> float:
    """The exponent ``beta``: 20 in the first fifth, then linearly down to 2.

    Args:
        progress: Step over number of steps, in (0, 1].
    """
    start, end = _BETAS
    return end + (start - end) * min(1.0, (1 - progress) / (1 - _WARM_UP))
