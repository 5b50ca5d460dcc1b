"""The integer grid that weights are put on, and what a weight on it consists of: codes, steps and zero-points.

A grid value is ``scale * (code - zero_point + offset)``. One scale serves a whole tensor, an output channel, or a
group of neighboring inputs of one output channel.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from weightsmith.core.errors import UsageError, unknown
from weightsmith.core.rounding import integer_range

Granularity = Literal["channel", "tensor"] | int
Search = Literal["minmax", "search", "shrink"]

_ATTACHED = "_quantized_tensors"


@dataclass(frozen=True, slots=True, init=False)
class Grid:
    """How finely weights are kept.

    Args:
        bits: Bit width, 2 to 8.
        symmetric: ``True``: signed codes around 0, no zero-point; ``False``: codes from 0 and an integer zero-point.
        granularity: One scale per output ``"channel"``, per ``"tensor"``, or per group of n inputs (matrices).
        search: How the step is found. ``"minmax"`` covers the largest weights; ``"shrink"`` also tries to shorten both
            ends together, ``"search"`` each on its own; both minimize the mean of ``|w - w_hat|^2.4``. ``None``:
            ``"search"`` below 8 bits, ``"minmax"`` at 8.
        narrow: Symmetric grids only: let the largest weight land on the largest code. By default the range is
            divided by ``2^bits - 1`` as in the FlexRound authors' code, which costs the largest weight half a step.

    Raises:
        UsageError: An argument is out of range.
    """

    bits: int
    symmetric: bool
    granularity: Granularity
    search: Search
    narrow: bool

    def __init__(
        self,
        bits: int = 4,
        *,
        symmetric: bool = False,
        granularity: Granularity = "channel",
        search: Search | None = None,
        narrow: bool = False,
    ) -> None:
        if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
            raise UsageError(f"bits must be between 2 and 8, got {bits!r}")
        if isinstance(granularity, str) and granularity not in ("channel", "tensor"):
            raise unknown("granularity", granularity, ["channel", "tensor", "a group size such as 128"])
        if isinstance(granularity, int) and (isinstance(granularity, bool) or granularity < 1):
            raise UsageError(f"granularity as a group size must be a positive integer, got {granularity!r}")
        if search not in (None, "minmax", "search", "shrink"):
            raise unknown("search", str(search), ["minmax", "search", "shrink"])
        if narrow and not symmetric:
            raise UsageError("narrow=True is for symmetric grids: pass symmetric=True as well")
        chosen = search or ("search" if bits < 8 else "minmax")
        for name, value in zip(self.__slots__, (bits, symmetric, granularity, chosen, narrow), strict=True):
            object.__setattr__(self, name, value)

    @property
    def levels(self) -> int:
        """Largest code minus smallest code, ``2^bits - 1``."""
        return (1 << self.bits) - 1

    @property
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest code."""
        return integer_range(self.bits, signed=self.symmetric)

    def split(self, weight: Tensor, axis: int = 0) -> Tensor:
        """View a weight as ``(output channels, groups, inputs per group, kernel)``.

        Args:
            weight: Two dimensions or more.
            axis: Where its output channels are.

        Raises:
            UsageError: The group size does not divide the inputs, or the weight is no matrix.
        """
        rows = weight.movedim(axis, 0)
        if isinstance(self.granularity, str):
            return rows.reshape(len(rows), 1, rows.shape[1], rows.shape[2:].numel())
        if weight.ndim > 2:
            raise UsageError(
                f"granularity={self.granularity} groups the inputs of a matrix, got a weight of shape "
                f"{tuple(weight.shape)}: use 'channel' or 'tensor' for convolutions"
            )
        if rows.shape[1] % self.granularity:
            raise UsageError(f"granularity={self.granularity} does not divide the {rows.shape[1]} inputs of the weight")
        return rows.reshape(len(rows), rows.shape[1] // self.granularity, self.granularity, 1)


def check_bits(bits: int, argument: str = "bits") -> None:
    """Refuse bit widths outside 1 to 8."""
    if not isinstance(bits, int) or not 1 <= bits <= 8:
        raise UsageError(f"{argument} must be an integer between 1 and 8, got {bits}")


def as_grid(grid: Grid | int) -> Grid:
    """A grid, or the default one of that many bits.

    Raises:
        TypeError: It is neither.
    """
    if isinstance(grid, Grid):
        return grid
    if isinstance(grid, bool) or not isinstance(grid, int):
        raise TypeError(f"grid must be a Grid or a number of bits, got {grid!r}: for example Grid(4, granularity=128)")
    return Grid(grid)


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedWeight:
    """A weight on a grid: ``w = scale * (codes - zero_point + offset)``.

    Attributes:
        codes: Integers, of the weight's own shape: uint8 in ``[0, 2^bits - 1]``, or int8 in
            ``[-2^(bits-1), 2^(bits-1) - 1]`` when symmetric.
        scale: ``(rows, groups)``; one row for ``"tensor"``, else one per output channel; one group unless group-wise.
        zero_point: As ``scale``, in the dtype of ``codes``; zeros when symmetric.
        bits: Bit width.
        symmetric: Whether codes are signed.
        granularity: ``"channel"``, ``"tensor"`` or the group size.
        axis: Where the output channels are in ``codes``.
        offset: 0, or 0.5 for grids of half integers.
        stacked: Whether the first axis counts matrices (the experts of a mixture), each with scales of its own:
            ``scale`` then has a row per matrix for ``"tensor"``, else one per output channel of each matrix.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    bits: int
    symmetric: bool
    granularity: Granularity
    axis: int = 0
    offset: float = 0.0
    stacked: bool = False

    @property
    def shape(self) -> torch.Size:
        """Of the weight."""
        return self.codes.shape

    @property
    def group_size(self) -> int | None:
        """Inputs per scale, or ``None`` when grids are not group-wise."""
        return self.granularity if isinstance(self.granularity, int) else None

    @property
    def nbytes(self) -> int:
        """Bytes when packed: codes and zero-points of ``bits``, scales of 16 bits."""
        numbers = self.codes.numel() + (0 if self.symmetric else self.zero_point.numel())
        return (numbers * self.bits + 7) // 8 + 2 * self.scale.numel()

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Compute the weight in the precision of ``scale``, then cast it.

        Args:
            dtype: Of the result; ``None``: that of ``scale``.

        Returns:
            A tensor of the shape of ``codes``; bit for bit what stays in the model.
        """
        integers = self._rows(self.codes).to(self.scale.dtype) - self.zero_point[..., None].to(self.scale.dtype)
        rows = (integers + self.offset if self.offset else integers) * self.scale[..., None]
        moved = self.codes.movedim(self.axis, int(self.stacked)).shape
        return rows.reshape(moved).movedim(int(self.stacked), self.axis).contiguous().to(dtype or self.scale.dtype)

    def matches(self, weight: Tensor) -> bool:
        """Whether a weight is still exactly what these codes stand for in its dtype.

        That its entries would round to the same codes is not enough: a few steps of training, or a merged adapter, stay
        below half a grid step and would be dropped without a word when the codes are saved.
        """
        return weight.shape == self.shape and torch.equal(
            weight.detach(), self.dequantize(weight.dtype).to(weight.device)
        )

    def _rows(self, tensor: Tensor) -> Tensor:
        groups = self.scale.shape[:2]  # a shard may have none of the rows
        return tensor.movedim(self.axis, int(self.stacked)).reshape(*groups, tensor.numel() // max(1, groups.numel()))


@torch.no_grad()
def write_quantized_(module: nn.Module, quantized: QuantizedWeight, tensor: str = "weight") -> None:
    """Put a quantized weight into a module: its values into the parameter, itself beside it.

    Args:
        module: Has a plain parameter of the same shape.
        quantized: What to write.
        tensor: Name of the parameter.
    """
    weight = module.get_parameter(tensor)
    weight.copy_(quantized.dequantize(weight.dtype))
    attach_quantized_(module, quantized, tensor)


def attach_quantized_(module: nn.Module, quantized: QuantizedWeight, tensor: str = "weight") -> None:
    """Remember of which codes a module's parameter consists; not part of its ``state_dict()``.

    Args:
        module: Whose parameter it is.
        quantized: Its codes and scales.
        tensor: Name of the parameter.
    """
    held: dict[str, Any] = {**vars(module).get(_ATTACHED, {}), tensor: quantized}
    setattr(module, _ATTACHED, held)


def quantized_weights(model: nn.Module) -> dict[str, QuantizedWeight]:
    """Collect the quantized weights of a model, by parameter name and in the model's order.

    Raises:
        UsageError: A weight has been changed since it was quantized.
    """
    found = dict(_attached(model))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, quantized in found.items():
        if name not in parameters:
            raise UsageError(
                f"{name} was quantized and is no longer a plain parameter: take off what has replaced it (fold_ bakes "
                "parametrizations in), then quantize again"
            )
        if not quantized.matches(parameters[name]):
            raise UsageError(
                f"{name} has been changed since it was quantized (by training, a merged adapter, an average, or a cast "
                "to another precision and back), and its codes no longer give it: quantize it again. To train on a "
                "grid, use prepare_ofq_; to train an adapter beside quantized weights, keep it apart and save it "
                "itself"
            )
    return found


def _attached(model: nn.Module) -> Iterator[tuple[str, QuantizedWeight]]:
    for name, module in model.named_modules():
        for tensor, quantized in vars(module).get(_ATTACHED, {}).items():
            yield f"{name}.{tensor}".lstrip("."), quantized
