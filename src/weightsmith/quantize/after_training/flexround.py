"""FlexRound: divide every weight by a factor of its own before rounding, and learn the factors and the step.

``w_hat = s1 * clamp(round(w / (s1 * S2 * s3 * s4)), low, high)`` with a factor per weight (``S2``), per output channel
(``s3``) and, in convolutions, per input channel (``s4``), all 1 at the start. A weight may so move by more than one
grid step, and large weights more readily than small ones (Prop. 3.1). At inference only ``s1`` and the codes are left.

"FlexRound: Learnable Rounding based on Element-wise Division for Post-Training Quantization", Lee, Kim, Kwon, Lee, ICML
2023, arXiv 2306.00317. Positivity by logarithms and a step per channel as in the authors' code,
github.com/onliwad101/FlexRound_LRQ.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from weightsmith.core.errors import unknown
from weightsmith.quantize.after_training.ranges import SMALLEST_STEP
from weightsmith.quantize.after_training.rtn import RoundToNearest
from weightsmith.quantize.grid import Grid

FAR = 4.0
"""Logarithm of a factor beyond which it is suspicious, and clamped by ``safe=True``."""


class FlexRound(RoundToNearest):
    """Learn the factors of one weight; begins as exactly round-to-nearest.

    Args:
        weight: The trained weight.
        grid: Where to.
        axis: Where its output channels are.
        parametrization: ``"log"`` learns logarithms (the authors' code), ``"direct"`` the factors, kept above 1e-8.
        learn_s1: Learn the step.
        use_s3: Learn a factor per output channel.
        use_s4: Learn a factor per input channel of convolutions; depthwise ones have none.
        safe: Keep factors within ``exp(-4)`` and ``exp(4)``; not in the paper.
        compiled: Let torch.compile fuse the passes over the weight; on a processor that needs a C++ compiler.

    Raises:
        UsageError: The grid does not fit the weight, or ``parametrization`` is not known.
    """

    def __init__(
        self,
        weight: Tensor,
        grid: Grid = Grid(),  # noqa: B008  (immutable)
        *,
        axis: int = 0,
        parametrization: Literal["log", "direct"] = "log",
        learn_s1: bool = True,
        use_s3: bool = True,
        use_s4: bool = True,
        safe: bool = False,
        compiled: bool = False,
    ) -> None:
        super().__init__(weight, grid, axis=axis)
        if parametrization not in ("log", "direct"):
            raise unknown("parametrization", parametrization, ["log", "direct"])
        self.direct, self.safe, self.compiled = parametrization == "direct", safe, compiled
        channels, groups, inputs, kernel = grid.split(weight.detach(), axis).shape
        self._learn("s1", self.scale.shape, learn_s1)
        self._learn_elements((channels, groups, inputs, kernel))
        self._learn("s3", (channels, 1, 1, 1), use_s3)
        self._learn("s4", (1, 1, inputs, 1), use_s4 and weight.ndim > 2 and inputs > 1)

    def _learn(self, name: str, shape: Any, learn: bool = True) -> None:
        """Make a factor, relative to its initial value: that keeps the start exact."""
        one = torch.ones if self.direct else torch.zeros
        value = one(shape, dtype=self.scale.dtype, device=self.scale.device)
        self.register_parameter(f"log_{name}" if not self.direct else name, nn.Parameter(value) if learn else None)

    def _learn_elements(self, shape: tuple[int, int, int, int]) -> None:
        self._learn("S2", shape)

    def _log(self, name: str) -> Tensor | None:
        if self.direct:
            factor: Tensor | None = getattr(self, name)
            return None if factor is None else factor.log()
        logarithm: Tensor | None = getattr(self, f"log_{name}")
        return logarithm

    @property
    def step(self) -> Tensor:
        """The learned step ``s1``, ``(C or 1, G, 1, 1)``."""
        log_s1 = self._log("s1")
        return self.scale if log_s1 is None else self.scale * log_s1.exp()

    def log_factors(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Logarithms per weight, per output channel and per input channel, without that of the step."""
        elements = self._log("S2")
        assert elements is not None
        return elements, self._log("s3"), self._log("s4")

    def soft(self, units: Tensor) -> Tensor:
        """The rounded weight: hard-rounded, with the straight-through gradient."""
        rounded: Tensor = _Divide.apply(units, *self._arguments(), *self.limits, self.compiled)  # type: ignore[no-untyped-call]
        return rounded

    @torch.no_grad()
    def hard(self, units: Tensor) -> Tensor:
        """Centered codes."""
        elements, row, column, _ = self._arguments()
        divisor = _total(elements, row, column).exp_()
        return torch.div(units, divisor, out=divisor).round_().clamp_(*self.limits)

    def _arguments(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        elements, s3, column = self.log_factors()
        log_s1 = self._log("s1")
        row = torch.zeros_like(self.scale) if log_s1 is None else log_s1
        return elements, row if s3 is None else row + s3, column, self.step

    @torch.no_grad()
    def project_(self) -> None:
        """Keep direct factors positive, and all of them near 1 when ``safe``."""
        if self.direct:
            for parameter in self.parameters():
                parameter.clamp_(min=SMALLEST_STEP)
        if self.safe:
            elements, row, column = self.log_factors()
            others = sum((part for part in (row, column) if part is not None), torch.zeros_like(self.scale))
            low, high = -FAR - others, FAR - others
            if self.direct:
                self.get_parameter("S2").clamp_(low.exp(), high.exp())
            else:
                elements.clamp_(low, high)

    @torch.no_grad()
    def strain(self) -> float:
        """Largest absolute logarithm of a factor ``S2 * s3 * s4``."""
        elements, row, column = self.log_factors()
        total = _total(elements, row, column)
        return total.abs_().max().item() if total.numel() else 0.0

    def doubt(self) -> str | None:
        """Report factors that are implausibly far from 1."""
        return f"factors lie beyond exp(±{FAR:g}): lower lr, or pass safe=True" if self.strain() > FAR else None


class _Divide(torch.autograd.Function):
    """The forward pass of FlexRound and its gradient as a few passes over the weight, or one each when compiled.

    With ``x`` the weight in factors, ``m = 1[low <= round(x) <= high]`` and ``G`` the gradient of the result, the
    gradient of each logarithm is the sum of ``E = -s1 * m * x * G`` over what shares it; the step adds ``G * w_hat``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        units: Tensor,
        elements: Tensor,
        row: Tensor,
        column: Tensor | None,
        step: Tensor,
        low: Tensor,
        high: Tensor,
        compiled: bool,
    ) -> Tensor:
        result: Tensor
        x, result = _pick(_divide, compiled)(units, elements, row, column, step, low, high)
        ctx.save_for_backward(x, result, step)
        ctx.row_shape, ctx.has_column, ctx.compiled = row.shape, column is not None, compiled
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, result, step = ctx.saved_tensors
        elements, by_row, along = _pick(_divide_backward, ctx.compiled)(grads[0], x, result, step)
        column = elements.sum((0, 1, 3), keepdim=True) if ctx.has_column else None
        row, step = by_row.sum_to_size(ctx.row_shape), along.sum_to_size(step.shape) / step
        return None, elements, row, column, step, None, None, None


def _divide(
    units: Tensor, elements: Tensor, row: Tensor, column: Tensor | None, step: Tensor, low: Tensor, high: Tensor
) -> tuple[Tensor, Tensor]:
    divisor = _total(elements, row, column).exp_()
    x = torch.div(units, divisor, out=divisor)
    nearest = x.round()
    codes = torch.clamp(nearest, low, high)
    return x.masked_fill_(nearest != codes, 0), codes.mul_(step)


def _divide_backward(grad: Tensor, x: Tensor, result: Tensor, step: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    elements = (grad * x).mul_(-step)
    return elements, elements.sum((2, 3), keepdim=True), (grad * result).sum((2, 3), keepdim=True)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)


def _pick(function: Callable[..., Any], compiled: bool) -> Callable[..., Any]:
    return _compiled(function) if compiled else function


def _total(elements: Tensor, row: Tensor | None, column: Tensor | None) -> Tensor:
    if row is None:
        return elements.clone() if column is None else elements + column
    total = elements + row
    return total if column is None else total.add_(column)
