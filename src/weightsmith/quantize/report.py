"""What quantization did to a model, layer by layer and block by block."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from weightsmith.quantize.grid import Grid, QuantizedWeight


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One quantized weight.

    Attributes:
        name: Of the parameter.
        bits: Bit width.
        numel: Number of weights.
        weight_error_rtn: ``||w_hat - w||^2 / ||w||^2`` of round-to-nearest.
        weight_error: The same of what was kept; learned rounding lets it grow so that outputs come closer.
        moved: Share of codes that differ from those of round-to-nearest.
    """

    name: str
    bits: int
    numel: int
    weight_error_rtn: float
    weight_error: float
    moved: float


@dataclass(frozen=True, slots=True)
class BlockReport:
    """One reconstructed block.

    Attributes:
        name: Of the module.
        error_rtn: Of round-to-nearest: ``||q - fp||^2 / ||fp||^2`` of the block's output over the calibration data (for
            ``last_block="logits"`` the mean Kullback-Leibler divergence of the predictions); ``None`` without data.
        error: The same of what was kept.
        iterations: Steps that were made.
        kept: ``"rtn"``, ``"iteration 5000"``, or ``"done"`` for a block that was given.
        seconds: Wall time.
        layers: Its layers.
    """

    name: str
    error_rtn: float | None
    error: float | None
    iterations: int
    kept: str
    seconds: float
    layers: tuple[LayerReport, ...]


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A large parameter that stays as it was.

    Attributes:
        name: Of the parameter.
        numel: Number of weights.
        share: Of all parameters of the model.
        why: For example ``"embedding"``.
    """

    name: str
    numel: int
    share: float
    why: str


@dataclass(frozen=True, slots=True)
class Report:
    """A quantized model.

    Attributes:
        model: The model itself, changed in place.
        method: ``"flexround"``, ``"rtn"``, ...
        grid: What the layers were put on.
        blocks: In the order of the model.
        seconds: Wall time.
        bytes_before: All parameters of the model.
        bytes_after: The same with the quantized ones packed.
        unseen: Layers, or experts such as ``"mlp.experts.down_proj[3]"``, that no calibration sample reached: they are
            rounded to nearest.
        left: Parameters with two axes or more that stay as they were, if they are a thousandth of the model or more.
    """

    model: nn.Module = field(repr=False, compare=False)
    method: str
    grid: Grid
    blocks: tuple[BlockReport, ...]
    seconds: float
    bytes_before: int
    bytes_after: int
    unseen: tuple[str, ...] = ()
    left: tuple[LeftOut, ...] = ()

    @property
    def layers(self) -> tuple[LayerReport, ...]:
        """Of all blocks."""
        return tuple(layer for block in self.blocks for layer in block.layers)

    def facts(self) -> dict[str, Any]:
        """Everything but the model, as plain dictionaries."""
        facts = asdict(replace(self, model=nn.Identity()))  # asdict would copy the model
        del facts["model"]
        return facts


@torch.no_grad()
def report_layer(name: str, weight: Tensor, rtn: QuantizedWeight, kept: QuantizedWeight) -> LayerReport:
    """Compare a trained weight with what round-to-nearest makes of it and with what was kept."""
    size = weight.square().sum().clamp_min(torch.finfo(weight.dtype).tiny)
    errors = [((quantized.dequantize(weight.dtype) - weight).square().sum() / size).item() for quantized in (rtn, kept)]
    moved = (rtn.codes != kept.codes).float().mean().item() if weight.numel() else 0.0
    return LayerReport(name, kept.bits, weight.numel(), errors[0], errors[1], moved)


def count_bytes(model: nn.Module, packed: Mapping[str, int]) -> tuple[int, int]:
    """Bytes of all parameters before and after packing those that ``packed`` gives the bytes of."""
    before = _bytes(model.parameters())
    return before, before - _bytes(map(model.get_parameter, packed)) + sum(packed.values())


def _bytes(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.nbytes for parameter in parameters)
