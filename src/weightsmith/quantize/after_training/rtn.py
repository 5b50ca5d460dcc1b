"""Round to nearest: every weight becomes the grid value closest to it.

``w_hat = s * clamp(round(w / s), low, high)`` with the step ``s`` and the range fixed. It is the baseline of every
learned rounding and what each of them begins with, so it is also the class that they derive from.
"""

from typing import Any

import torch
from torch import Tensor, nn

from weightsmith.core.rounding import round_ste
from weightsmith.quantize.after_training.ranges import find_step
from weightsmith.quantize.grid import Grid, QuantizedWeight


class RoundToNearest(nn.Module):
    """Round a weight to the nearest value of its grid; halves go to the even code.

    Usable as a parametrization: ``register_parametrization(layer, "weight", RoundToNearest(layer.weight))``.

    Args:
        weight: The trained weight; step and zero-point are found from it and stay fixed.
        grid: Where to.
        axis: Where its output channels are: 0, or 1 for transposed convolutions and GPT-2's ``Conv1D``.

    Raises:
        UsageError: The grid does not fit the weight.
    """

    scale: Tensor  # (C or 1, G, 1, 1), as the next three
    zero_point: Tensor

    def __init__(self, weight: Tensor, grid: Grid = Grid(), *, axis: int = 0) -> None:  # noqa: B008  (immutable)
        super().__init__()
        self.grid, self.axis = grid, axis
        split = grid.split(weight.detach().to(_precision(weight)), axis)
        rows = split.reshape(1, -1) if grid.granularity == "tensor" else split.flatten(2).flatten(0, 1)
        shape = (-1, split.shape[1], 1, 1)
        step, zero = find_step(rows, grid)
        self.register_buffer("scale", step.view(shape))
        self.register_buffer("zero_point", zero.view(shape))

    @property
    def step(self) -> Tensor:
        """The step that remains, ``(C or 1, G, 1, 1)``."""
        return self.scale

    @property
    def limits(self) -> tuple[Tensor, Tensor]:
        """Smallest and largest centered code (zero-point taken off), as `scale`."""
        low, high = self.grid.code_range
        return low - self.zero_point, high - self.zero_point

    def units(self, weight: Tensor) -> Tensor:
        """Express a weight in initial steps.

        Args:
            weight: Of the shape that this was made for.

        Returns:
            ``(C, groups, inputs per group, kernel)`` in float32, or float64 for float64 weights.
        """
        return self.grid.split(weight.detach().to(_precision(weight)), self.axis) / self.scale

    def nearest(self, units: Tensor) -> Tensor:
        """Centered codes of round-to-nearest, whatever has been learned."""
        return units.round().clamp(*self.limits)

    @torch.no_grad()
    def hard(self, units: Tensor) -> Tensor:
        """Centered codes that this rounding decides on."""
        return self.nearest(units)

    def soft(self, units: Tensor) -> Tensor:
        """The weight to optimize with, split as ``units``; differentiable in this module's parameters."""
        return self.step * round_ste(units).clamp(*self.limits)

    def forward(self, weight: Tensor) -> Tensor:
        """Map a weight to its rounded value, of the same shape and dtype."""
        return self.join(self.soft(self.units(weight)), weight)

    def join(self, split: Tensor, like: Tensor) -> Tensor:
        """Undo `Grid.split`: give ``split`` the shape and dtype of ``like``."""
        return split.reshape(like.movedim(self.axis, 0).shape).movedim(0, self.axis).to(like.dtype)

    @torch.no_grad()
    def quantized(self, weight: Tensor, *, learned: bool = True) -> QuantizedWeight:
        """Round for good.

        Args:
            weight: The trained weight.
            learned: ``False``: round to nearest with the initial step instead.
        """
        units = self.units(weight)
        centered, step = (self.hard(units), self.step) if learned else (self.nearest(units), self.scale)
        dtype = torch.int8 if self.grid.symmetric else torch.uint8
        codes = self.join(centered + self.zero_point, weight.new_empty(weight.shape, dtype=dtype, device="meta"))
        facts: dict[str, Any] = {name: getattr(self.grid, name) for name in ("bits", "symmetric", "granularity")}
        scale, zero = step.detach().clone().flatten(1), self.zero_point.flatten(1).to(dtype)
        return QuantizedWeight(codes.contiguous(), scale, zero, axis=self.axis, **facts)

    def regularizer(self, progress: float) -> Tensor | None:  # noqa: ARG002
        """What is added to the loss at a point in [0, 1] of the optimization, or ``None``."""
        return None

    def doubt(self) -> str | None:
        """Describe what is suspicious about the learned values and how to fix it, or return ``None``."""
        return None

    def project_(self) -> None:
        """Bring parameters back to where they are defined; called after every step."""


def _precision(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)
