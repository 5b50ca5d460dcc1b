"""LRQ: FlexRound with the factors of a matrix written as a low-rank product, so that far fewer numbers are learned.

``log S = log s1 + L U + r + c`` with ``L (C_out, rank)``, ``U (rank, C_in)``, a row and a column vector. "LRQ:
Optimizing Post-Training Quantization for Large Language Models by Learning Low-Rank Weight-Scaling Matrices", NAACL
2025, arXiv 2407.11534.
"""

import math

import torch
from torch import Tensor, nn

from weightsmith.core.errors import UsageError
from weightsmith.quantize.after_training.flexround import FAR, FlexRound
from weightsmith.quantize.grid import Grid


class LRQ(FlexRound):
    """Learn low-rank factors of one matrix; begins as exactly round-to-nearest.

    Args:
        weight: A matrix.
        grid: Where to.
        axis: Where its output channels are.
        rank: Of the product; the paper takes 1024, or 2048 where both sides are 8192 or more.
        generator: Draws ``U``; ``None``: torch's global one.
        compiled: As in `FlexRound`.

    Raises:
        UsageError: The weight is no matrix, or the rank saves nothing (`saves`).
    """

    log_left: Tensor
    log_right: Tensor
    log_column: Tensor

    def __init__(
        self,
        weight: Tensor,
        grid: Grid = Grid(),  # noqa: B008  (immutable)
        *,
        axis: int = 0,
        rank: int,
        generator: torch.Generator | None = None,
        compiled: bool = False,
    ) -> None:
        if not saves(weight, rank):
            raise UsageError(f"rank={rank} saves nothing for a weight of shape {tuple(weight.shape)}: use FlexRound")
        self.rank, self._generator = rank, generator
        super().__init__(weight, grid, axis=axis, compiled=compiled)
        self._generator = None  # cannot be pickled, and has served

    def _learn_elements(self, shape: tuple[int, int, int, int]) -> None:
        channels, groups, inputs, _ = shape
        self._learn("left", (channels, self.rank))
        self._learn("right", (self.rank, groups * inputs))
        self._learn("column", (1, groups, inputs, 1))
        self._shape = shape
        bound = 1 / math.sqrt(groups * inputs)  # what kaiming_uniform_ with a = sqrt(5) comes to
        nn.init.uniform_(self.log_right, -bound, bound, generator=self._generator)

    def log_factors(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Logarithms per weight and per output channel; columns are among the former, which groups may split."""
        product = (self.log_left @ self.log_right).view(self._shape)
        return product + self.log_column, self._log("s3"), None

    def doubt(self) -> str | None:
        """Report factors that are implausibly far from 1."""
        return f"factors lie beyond exp(±{FAR:g}): lower lr" if self.strain() > FAR else None


def saves(weight: Tensor, rank: int) -> bool:
    """Whether a product of this rank has fewer numbers than the weight, which must be a matrix."""
    return weight.ndim == 2 and 1 <= rank < weight.numel() / sum(weight.shape)
