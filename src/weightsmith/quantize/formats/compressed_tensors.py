"""Folders in compressed-tensors' ``pack-quantized`` form, written and read through the ``compressed-tensors`` library.

``transformers`` 5 loads them without this package. Scales are stored in the precision in which they were found, and
``config.json`` asks ``transformers`` to dequantize while it loads, so that the loaded weights equal the saved ones bit
for bit, also in half precision. Left to dequantize in the first forward pass, it would compute in half precision, and
it cannot read zero-points per channel or per group (compressed-tensors 0.20 packs them, but expects them unpacked).
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weightsmith.core.checkpoint import Checkpoint
from weightsmith.core.errors import UsageError, require
from weightsmith.core.files import write_atomically
from weightsmith.core.json_files import read_json
from weightsmith.quantize.grid import QuantizedWeight

_FORMAT = "pack-quantized"
_SCHEME = {"num_bits": int, "symmetric": bool, "strategy": str, "group_size?": (int, None)}
_CONTENT = {"config_groups": {str: {"weights": _SCHEME}}}
_PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")


def obstacle(model: nn.Module, weights: dict[str, QuantizedWeight]) -> str | None:
    """Say why a model cannot be kept in this form, or ``None`` when it can."""
    if not hasattr(model, "save_pretrained"):
        return f"{type(model).__name__} is not a transformers model"
    for name, quantized in weights.items():
        layer = model.get_submodule(name.rpartition(".")[0])
        if not name.endswith(".weight") or not isinstance(layer, nn.Linear):
            return f"{name} belongs to a {type(layer).__name__}, not to a Linear"
        if quantized.offset:
            return f"{name} is on a grid of half integers"
    if len({(quantized.bits, quantized.symmetric, quantized.granularity) for quantized in weights.values()}) > 1:
        return "layers are on different kinds of grid"
    if any(isinstance(getattr(module, "input_quantizer", None), nn.Module) for module in model.modules()):
        return "activations are quantized as well"
    return None


def write(model: Any, weights: dict[str, QuantizedWeight], folder: Path) -> None:
    """Fill an empty folder."""
    quantization, compressors = _library("quantization"), _library("compressors")
    scheme = _library_scheme(next(iter(weights.values())))
    compressor = compressors.BaseCompressor.get_value_from_registry(_FORMAT)
    state = model.state_dict()
    for name, quantized in weights.items():
        parts = compressor.compress(_parts(quantized), scheme)
        state |= {f"{name.removesuffix('weight')}{part}": tensor for part, tensor in parts.items()}
        del state[name]
    model.save_pretrained(folder, state_dict=state, save_original_format=False)
    linear = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    config = quantization.QuantizationConfig(
        config_groups={"group_0": scheme},
        format=_FORMAT,
        quantization_status="compressed",
        ignore=[name for name in linear if f"{name}.weight" not in weights],
    )
    compressors.ModelCompressor(config).update_config(folder)
    file = folder / "config.json"
    settings = read_json(file, {"quantization_config": dict})
    settings["quantization_config"]["dequantize"] = True
    write_atomically(file, json.dumps(settings, indent=2, sort_keys=True) + "\n")


def read(folder: Path) -> tuple[dict[str, Tensor], dict[str, QuantizedWeight]]:
    """Return the tensors that are not quantized, and the quantized weights."""
    unpack = _library("compressors.pack_quantized").unpack_from_int32
    settings = read_json(folder / "config.json", {"quantization_config": _CONTENT})["quantization_config"]
    if len(settings["config_groups"]) != 1:
        raise UsageError(f"{folder}/config.json must have one group of quantized layers, as save_quantized writes it")
    (group,) = settings["config_groups"].values()
    facts = group["weights"]
    bits, symmetric, strategy = facts["num_bits"], facts["symmetric"], facts["strategy"]
    plain: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in Checkpoint(folder).items():
        layer, _, part = name.rpartition(".")
        if part in _PARTS:
            parts.setdefault(layer, {})[part] = tensor
        else:
            plain[name] = tensor
    weights = {}
    for layer, held in parts.items():
        shape = torch.Size(held["weight_shape"].tolist())
        scale = held["weight_scale"].reshape(len(held["weight_scale"]), -1)
        codes = unpack(held["weight_packed"], bits, shape)
        zero = torch.zeros_like(scale, dtype=torch.int8)
        if not symmetric and strategy == "tensor":
            zero = held["weight_zero_point"].reshape(scale.shape)
        elif not symmetric:
            zero = unpack(held["weight_zero_point"], bits, torch.Size((shape[0], scale.shape[1])), packed_dim=0)
        if not symmetric:
            codes, zero = ((tensor.short() + 2 ** (bits - 1)).to(torch.uint8) for tensor in (codes, zero))
        granularity = facts["group_size"] if strategy == "group" else strategy
        weights[f"{layer}.weight"] = QuantizedWeight(codes, scale, zero.contiguous(), bits, symmetric, granularity)
    return plain, weights


def _library(module: str) -> Any:
    return require(f"compressed_tensors.{module}", extra="hf", purpose="folders that transformers loads quantized")


def _library_scheme(quantized: QuantizedWeight) -> Any:
    quantization = _library("quantization")
    weights = quantization.QuantizationArgs(
        num_bits=quantized.bits,
        symmetric=quantized.symmetric,
        strategy=quantized.granularity if quantized.group_size is None else "group",
        group_size=quantized.group_size,
    )
    return quantization.QuantizationScheme(targets=["Linear"], weights=weights, format=_FORMAT)


def _parts(quantized: QuantizedWeight) -> dict[str, Tensor]:
    zero = quantized.zero_point
    if not quantized.symmetric:  # the library's codes are signed
        zero = (zero.short() - 2 ** (quantized.bits - 1)).to(torch.int8)
    scale = quantized.scale
    if quantized.granularity == "tensor":
        scale, zero = scale.flatten(), zero.flatten()
    return {"weight": quantized.dequantize().cpu(), "weight_scale": scale.cpu(), "weight_zero_point": zero.cpu()}
