"""What `prepare_ofq_` was asked for, and the quantizers that follow from it."""

from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from weightsmith.core.errors import unknown
from weightsmith.core.weights import CONVOLUTIONS, output_axis
from weightsmith.quantize.grid import check_bits
from weightsmith.quantize.in_training.lsq import ActivationQuantizer, LSQWeight
from weightsmith.quantize.in_training.statsq import StatsQ
from weightsmith.quantize.in_training.weight_quantizer import WeightQuantizer

WeightMethod = Literal["statsq", "lsq"]

_GRANULARITIES = ("token", "channel", "tensor")


class Plan(NamedTuple):
    """The arguments of `prepare_ofq_` that decide which quantizers there are."""

    weight_bits: int
    activation_bits: int | None
    ends_bits: int
    weight: WeightMethod
    granularity: str
    keep_query_bias: bool

    @property
    def token_axis(self) -> int | None:
        """The axis of ``(B, T, C)`` whose entries each have a step."""
        return {"token": -2, "channel": -1, "tensor": None}[self.granularity]

    def weight_quantizer(self, w: Tensor, axis: int = 0, first_row: int = 0) -> WeightQuantizer:
        """The quantizer of a weight within the network."""
        if self.weight == "lsq":
            return LSQWeight(w, self.weight_bits, axis, first_row)
        return StatsQ(self.weight_bits, axis, first_row)

    def slot_quantizer(self, module: nn.Module, weight: Tensor, *, end: bool) -> WeightQuantizer:
        """The quantizer of a weight of a module; the ends of a network learn their scale."""
        axis = output_axis(module)
        return LSQWeight(weight, self.ends_bits, axis) if end else self.weight_quantizer(weight, axis)


def make_plan(
    weight_bits: int, activation_bits: int | None, ends_bits: int | None, weight: str, granularity: str, keep: bool
) -> Plan:
    """Check the arguments.

    Raises:
        UsageError: One is out of range.
    """
    check_bits(weight_bits, "weight_bits")
    for argument, bits in {"activation_bits": activation_bits, "ends_bits": ends_bits}.items():
        if bits is not None:
            check_bits(bits, argument)
    if weight not in ("statsq", "lsq"):
        raise unknown("weight", weight, ("statsq", "lsq"))
    if granularity not in _GRANULARITIES:
        raise unknown("granularity", granularity, _GRANULARITIES)
    return Plan(weight_bits, activation_bits, ends_bits or weight_bits, cast(WeightMethod, weight), granularity, keep)


def is_layer(_name: str, module: nn.Module) -> bool:
    """Whether a module is exactly a linear layer or a convolution."""
    # a subclass of Linear may use its weight in its own way, as the output projection of nn.MultiheadAttention does
    kind = type(module)
    return kind in (nn.Linear, *CONVOLUTIONS) or (
        parametrize.is_parametrized(module) and kind.__bases__[0] in (nn.Linear, *CONVOLUTIONS)
    )


def activation_quantizer(
    name: str,
    beside: nn.Module,
    bits: int,
    axis: int | None,
    signed: bool | None,
    shifts: tuple[int, ...] | None = None,
) -> ActivationQuantizer:
    """Make a quantizer where the parameters of ``beside`` are; its steps come from the first batch."""
    like = next(beside.parameters())
    dtype = torch.promote_types(like.dtype, torch.float32)
    quantizer = ActivationQuantizer(bits, axis, signed=signed, shifts=shifts, dtype=dtype, device=like.device)
    quantizer.name = name
    return quantizer
