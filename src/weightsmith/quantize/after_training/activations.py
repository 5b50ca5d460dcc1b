"""Quantized activations: static per tensor with a learned step, or dynamic per token.

A quantizer is an ordinary submodule, ``input_quantizer`` (``output_quantizer`` for keys and values), that a hook
applies. Static: LSQ, "Learned Step Size Quantization", Esser et al. 2020, arXiv 1902.08153, asymmetric and with random
dropping as in QDrop, arXiv 2203.05740. Dynamic: as in the FlexRound authors' code.
"""

import warnings
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from weightsmith.core.errors import UsageError, WeightsmithWarning, unknown
from weightsmith.core.modes import evaluating
from weightsmith.core.rounding import round_ste
from weightsmith.core.select import Where, select
from weightsmith.core.weights import is_linear, output_head
from weightsmith.quantize.after_training.calibration import Batch, Calibration, make_batches
from weightsmith.quantize.after_training.ranges import SMALLEST_STEP, find_step
from weightsmith.quantize.grid import Grid
from weightsmith.quantize.inputs import INPUT, quantize_input_

Model = TypeVar("Model", bound=nn.Module)
_OUTPUT = "output_quantizer"


@dataclass(frozen=True, slots=True)
class Activations:
    """How activations are quantized while weights are being rounded (QDrop's protocol).

    Args:
        bits: Bit width of every chosen layer's input, 2 to 8.
        lr: Learning rate of the steps; cosine to 0.
        drop: How much of each activation is quantized during optimization; the rest stays as it is.
    """

    bits: int = 8
    lr: float = 4e-5
    drop: float = 0.5

    def __post_init__(self) -> None:
        Grid(self.bits)
        if not 0 < self.drop <= 1:
            raise UsageError(f"drop must be above 0 and at most 1, got {self.drop}")


class StaticActivation(nn.Module):
    """One step and zero-point per tensor: ``x_hat = s * (clamp(round(x / s) + z, 0, 2^bits - 1) - z)``.

    Args:
        x: Activations from which step and zero-point are found; the step can be learned further.
        bits: Bit width.
        drop: In training mode, the probability with which an element is quantized.
        generator: Draws what is quantized in training mode.
    """

    zero_point: Tensor

    def __init__(
        self, x: Tensor, bits: int = 8, *, drop: float = 1.0, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.bits, self.drop, self.generator = bits, drop, generator
        grid = Grid(bits, search="shrink")
        step, zero = find_step(x.detach().to(torch.promote_types(x.dtype, torch.float32)).reshape(1, -1), grid)
        self.scale = nn.Parameter(step.flatten()[0])
        self.register_buffer("zero_point", zero.flatten()[0])

    def forward(self, x: Tensor) -> Tensor:
        """Quantize ``x`` of any shape."""
        levels = 2**self.bits - 1
        step = self.scale.abs().clamp_min(torch.finfo(torch.float32).eps)
        slower = (max(1, x.numel()) * levels) ** -0.5  # an expert may get no tokens
        step = (step * slower + (step * (1 - slower)).detach()).to(x.dtype)
        zero = self.zero_point.to(x.dtype)
        # not in_training's `lsq`: here entries up to half a step past the range keep their gradient, as in QDrop's code
        quantized: Tensor = step * ((round_ste(x / step) + zero).clamp(0, levels) - zero)
        if not self.training or self.drop == 1:
            return quantized
        return torch.where(mask_like(x, self.drop, self.generator), quantized, x)

    def __getstate__(self) -> dict[str, Any]:
        # generators cannot be copied
        return {**super().__getstate__(), "generator": None}  # type: ignore[no-untyped-call]


class DynamicActivation(nn.Module):
    """Step and zero-point per token, computed in every forward pass from its smallest and largest entry.

    Args:
        bits: Bit width, 2 to 8.
        zero_in_range: Stretch each range to contain 0. ``False`` is the FlexRound authors' code, which saturates tokens
            whose entries all have one sign.
    """

    def __init__(self, bits: int = 8, *, zero_in_range: bool = True) -> None:
        super().__init__()
        self.bits, self.zero_in_range = Grid(bits).bits, zero_in_range

    def forward(self, x: Tensor) -> Tensor:
        """Quantize each row of the last dimension of ``x``, with the straight-through gradient."""
        levels, wide = 2**self.bits - 1, x.to(torch.promote_types(x.dtype, torch.float32))
        low, high = wide.amin(-1, keepdim=True).detach(), wide.amax(-1, keepdim=True).detach()
        if self.zero_in_range:
            low, high = low.clamp_max(0), high.clamp_min(0)
        step = ((high - low) / levels).clamp_min(SMALLEST_STEP)
        zero = (-low / step).round().clamp(0, levels)
        out: Tensor = (step * round_ste(wide / step).clamp(-zero, levels - zero)).to(x.dtype)
        return out


def mask_like(x: Tensor, probability: float, generator: torch.Generator | None) -> Tensor:
    """Draw a Boolean per element of ``x``; the same for every device that ``x`` may be on."""
    return (torch.rand(x.shape, generator=generator) < probability).to(x.device)


def quantize_activations_(
    model: Model,
    calibration: Calibration | None = None,
    *,
    bits: int = 8,
    mode: Literal["dynamic", "static"] = "dynamic",
    where: Where = None,
    kv_bits: int | None = None,
) -> Model:
    """Quantize the inputs of layers, and for good: they stay quantized in every later forward pass.

    Args:
        model: Gets a submodule ``input_quantizer`` on every chosen layer.
        calibration: Needed for ``mode="static"``: the step is found on the first batch that reaches the layer.
        bits: Bit width, 2 to 8.
        mode: ``"dynamic"`` per token, or ``"static"`` per tensor.
        where: Which layers; ``None``: every linear layer and convolution but the output embedding. Layers that cannot
            be quantized, because calibration data or ``nn.MultiheadAttention`` do not call them, are warned of.
        kv_bits: Also quantize, per token, what layers named ``k_proj`` and ``v_proj`` give.

    Returns:
        ``model`` itself.

    Raises:
        UsageError: An argument is out of range, nothing matches, or static quantization lacks calibration.
    """
    Grid(bits)
    if kv_bits is not None:
        Grid(kv_bits)
    if mode not in ("dynamic", "static"):
        raise unknown("mode", mode, ["dynamic", "static"])
    if mode == "static" and calibration is None:
        raise UsageError("calibration is needed for mode='static'")
    head = output_head(model)
    layers = select(
        model,
        where,
        default=lambda name, module: is_linear(name, module) and module is not head,
        supported=is_linear,
    )
    _refuse_trained(model, layers)
    keys_and_values = select(model, ["*k_proj", "*v_proj"], default=is_linear) if kv_bits is not None else {}
    inside = [name for name in layers if _is_read_only(model, name)]
    layers = {name: layer for name, layer in layers.items() if name not in inside}
    if not layers:
        raise UsageError(
            f"where={where!r} matches {', '.join(inside)} alone, which nn.MultiheadAttention does not call"
        )
    if inside:
        _warn_of_float(inside, "nn.MultiheadAttention reads the weight without calling the layer")
    if mode == "dynamic":
        for layer in layers.values():
            quantize_input_(layer, DynamicActivation(bits))
    else:
        assert calibration is not None
        device = next(model.parameters()).device
        seen = _inputs(model, layers, make_batches(calibration, None, device))
        for name, x in seen.items():
            quantize_input_(layers[name], StaticActivation(x, bits))
        if unseen := [name for name in layers if name not in seen]:
            _warn_of_float(unseen, "no calibration batch reaches it")
    for layer in keys_and_values.values():
        assert kv_bits is not None
        if not hasattr(layer, _OUTPUT):
            layer.register_forward_hook(_quantize_output)
        layer.add_module(_OUTPUT, DynamicActivation(kv_bits))
    return model


def _is_read_only(model: nn.Module, name: str) -> bool:
    parent = name.rpartition(".")[0]
    return name != "" and isinstance(model.get_submodule(parent), nn.MultiheadAttention)


def _warn_of_float(names: list[str], why: str) -> None:
    warnings.warn(f"the input of {', '.join(names)} stays in floating point: {why}", WeightsmithWarning, stacklevel=3)


def _refuse_trained(model: nn.Module, layers: dict[str, nn.Module]) -> None:
    """Layers whose inputs `prepare_ofq_` quantizes, or that quantized attention uses without calling them."""
    inside = {
        f"{name}.{part}": name
        for name, module in model.named_modules()
        if hasattr(module, "query_key_sites")
        for part in (child for child, _ in module.named_children())
    }
    for name, layer in layers.items():
        held = getattr(layer, INPUT, None)
        if held is not None and not isinstance(held, StaticActivation | DynamicActivation):
            raise UsageError(
                f"the input of {name} is quantized by prepare_ofq_ already: leave it out of where, or prepare with "
                "activation_bits=None"
            )
        if name in inside:
            raise UsageError(
                f"{name} belongs to attention that prepare_ofq_ has converted, which does not call it: leave it out of "
                "where, or prepare with activation_bits"
            )


def _quantize_output(layer: nn.Module, _: tuple[Any, ...], output: Tensor) -> Tensor:
    out: Tensor = layer.output_quantizer(output)  # type: ignore[operator]
    return out


@torch.no_grad()
def _inputs(model: nn.Module, layers: dict[str, nn.Module], batches: list[Batch]) -> dict[str, Tensor]:
    """What each layer is given first; a layer that no batch reaches is left out."""
    seen: dict[str, Tensor] = {}

    def look(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x: Tensor = next(iter((*args, *kwargs.values())))
        if x.numel():
            seen.setdefault(name, x)

    hooks = [
        layer.register_forward_pre_hook(lambda _, args, kwargs, name=name: look(name, args, kwargs), with_kwargs=True)
        for name, layer in layers.items()
    ]
    try:
        with evaluating(model):
            for batch in batches:
                if len(seen) == len(layers):
                    break
                batch.run(model)
    finally:
        for hook in hooks:
            hook.remove()
    return seen
