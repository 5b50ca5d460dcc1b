"""AdaQuant: learn an additive correction of every weight, and the step.

``w_hat = s * clamp(round((w + v) / s), low, high)``, with the straight-through gradient. "Improving Post Training
Neural Quantization: Layer-wise Calibration and Integer Programming", Hubara et al. 2020, arXiv 2006.10518.
"""

import torch
from torch import Tensor, nn

from weightsmith.core.rounding import round_ste
from weightsmith.quantize.after_training.rtn import RoundToNearest
from weightsmith.quantize.grid import Grid


class AdaQuant(RoundToNearest):
    """Learn the correction of one weight, in units of its initial step, and the logarithm of the step.

    Args:
        weight: The trained weight.
        grid: Where to.
        axis: Where its output channels are.
    """

    def __init__(self, weight: Tensor, grid: Grid = Grid(), *, axis: int = 0) -> None:  # noqa: B008  (immutable)
        super().__init__(weight, grid, axis=axis)
        self.correction = nn.Parameter(torch.zeros_like(self.units(weight)))
        self.log_s1 = nn.Parameter(torch.zeros_like(self.scale))

    @property
    def step(self) -> Tensor:
        """The learned step."""
        return self.scale * self.log_s1.exp()

    def soft(self, units: Tensor) -> Tensor:
        """The rounded weight."""
        return self.step * round_ste(self._moved(units)).clamp(*self.limits)

    @torch.no_grad()
    def hard(self, units: Tensor) -> Tensor:
        """Centered codes."""
        return self.nearest(self._moved(units))

    def _moved(self, units: Tensor) -> Tensor:
        return (units + self.correction) / self.log_s1.exp()
