"""This package's own layout, for whatever is on a grid: any layer, any of 1 to 8 bits, half-integer grids, mixed grids.

A folder holds

- ``quantization_config.json``: ``quant_method`` and ``version``; per quantized tensor its ``bits``, ``symmetric``,
  ``granularity``, ``axis``, ``offset``, ``stacked`` and ``shape``; ``tied``: names that are other names' tensors;
  ``activations``: the layers whose inputs are quantized, and how; ``ofq``: what `finish_ofq_` has left that is not in
  the model's class (attention, quantizers of activations), or null;
- ``weights/``: safetensors, for a tensor ``T`` on a grid ``T.codes`` and (asymmetric) ``T.zero_point`` as bytes, and
  ``T.scale``; everything else as it is;
- for a transformers model also ``config.json``. There is no ``model.safetensors`` at the top, so that nobody loads the
  folder with freshly drawn weights by mistake.

Codes are flattened to ``(rows, -1)``, rows being the first axis, and packed by `pack_rows`: a little-endian bit stream
per row, signed codes with ``2^(bits-1)`` added. Zero-points likewise, a row for each row of ``T.scale``.
"""

import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weightsmith.core.checkpoint import Checkpoint, write_checkpoint
from weightsmith.core.errors import UsageError, brief
from weightsmith.core.files import write_atomically
from weightsmith.core.json_files import read_json
from weightsmith.quantize.after_training.activations import DynamicActivation, StaticActivation
from weightsmith.quantize.formats.pack import pack_rows, unpack_rows
from weightsmith.quantize.grid import QuantizedWeight
from weightsmith.quantize.in_training.preparation import describe, restore_
from weightsmith.quantize.inputs import quantize_input_

CONFIG = "quantization_config.json"
METHOD = "weightsmith"

_VERSION = 1
_WEIGHTS = "weights"
_CONTENT = {
    "tensors": {
        str: {
            "bits": int,
            "symmetric": bool,
            "granularity": (int, str),
            "axis": int,
            "offset": float,
            "shape": [int],
            "stacked?": bool,
        }
    },
    "tied": {str: str},
    "activations": {str: [(str, int)]},
    "ofq?": (dict, None),
}
FACTS = ("bits", "symmetric", "granularity", "axis", "offset", "stacked")


def write(model: nn.Module, weights: dict[str, QuantizedWeight], folder: Path) -> None:
    """Fill an empty folder.

    Raises:
        UsageError: Outputs of layers are quantized, which the layout does not know.
    """
    if any(isinstance(getattr(module, "output_quantizer", None), nn.Module) for module in model.modules()):
        raise UsageError("quantized keys and values cannot be saved: save before quantize_activations_(kv_bits=...)")
    owners: dict[tuple[Any, ...], str] = {}
    tied: dict[str, str] = {}
    plain: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        view = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        owner = owners.setdefault(view, name) if tensor.numel() else name
        if owner != name:
            tied[name] = owner
        elif name not in weights:
            plain[name] = tensor
    packed, tensors = pack(weights)
    config = {
        "quant_method": METHOD,
        "version": _VERSION,
        "tensors": packed,
        "tied": tied,
        "activations": dict(_activations(model)),
        "ofq": describe(model),
    }
    write_checkpoint({**plain, **tensors}, folder / _WEIGHTS)
    write_atomically(folder / CONFIG, json.dumps(config, indent=2) + "\n")
    if hasattr(model, "save_pretrained"):
        settings: Any = copy.deepcopy(model.config)
        settings.dtype, settings.architectures = model.dtype, [type(model).__name__]
        settings.save_pretrained(folder)
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(folder)  # type: ignore[operator,union-attr]


def read(folder: Path) -> tuple[dict[str, Tensor], dict[str, QuantizedWeight]]:
    """Return the tensors that are not quantized, and the quantized weights; tied ones under their first name."""
    facts = _config(folder)["tensors"]
    checkpoint = Checkpoint(folder / _WEIGHTS)
    weights = unpack(facts, checkpoint)
    parts = {f"{name}.{part}" for name in facts for part in ("codes", "scale", "zero_point")}
    return {name: checkpoint[name] for name in checkpoint if name not in parts}, weights


def tied(folder: Path) -> dict[str, str]:
    """Which names are other names' tensors."""
    names: dict[str, str] = _config(folder)["tied"]
    return names


def changes_modules(folder: Path) -> bool:
    """Whether the model has other modules and parameters than its class makes."""
    return bool(_config(folder).get("ofq"))


def quantize_inputs_(model: nn.Module, folder: Path) -> None:
    """Give layers the activation quantizers that they were saved with; their values come with the state dict."""
    if changes_modules(folder):
        restore_(model, _config(folder)["ofq"])
    for name, pair in _config(folder)["activations"].items():
        if len(pair) != 2 or pair[0] not in ("static", "dynamic"):
            raise UsageError(f"{folder / CONFIG} is damaged: activations {brief(name)} must be a kind and bits")
        kind, bits = pair
        layer = model.get_submodule(name)
        like = next(layer.parameters())
        quantizer = DynamicActivation(bits) if kind == "dynamic" else StaticActivation(like.new_zeros(1), bits)
        quantize_input_(layer, quantizer)


def pack(weights: Mapping[str, QuantizedWeight]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Turn quantized weights into facts (for JSON) and tensors (for safetensors)."""
    facts, tensors = {}, {}
    for name, quantized in weights.items():
        facts[name] = {fact: getattr(quantized, fact) for fact in FACTS} | {"shape": list(quantized.shape)}
        tensors[f"{name}.codes"] = pack_rows(quantized.codes.cpu(), quantized.bits, signed=quantized.symmetric)
        tensors[f"{name}.scale"] = quantized.scale
        if not quantized.symmetric:
            tensors[f"{name}.zero_point"] = pack_rows(quantized.zero_point.cpu(), quantized.bits, signed=False)
    return facts, tensors


def unpack(facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, QuantizedWeight]:
    """Undo `pack`."""
    weights = {}
    for name, fact in facts.items():
        scale, bits, symmetric = tensors[f"{name}.scale"], fact["bits"], fact["symmetric"]
        zero = torch.zeros(scale.shape, dtype=torch.int8)
        if not symmetric:
            zero = unpack_rows(tensors[f"{name}.zero_point"], bits, scale.shape[1], signed=False)
        shape = torch.Size(fact["shape"])
        codes = unpack_rows(tensors[f"{name}.codes"], bits, shape[1:].numel(), signed=symmetric).reshape(shape)
        weights[name] = QuantizedWeight(codes, scale, zero, **{key: fact[key] for key in FACTS if key in fact})
    return weights


def _config(folder: Path) -> dict[str, Any]:
    config = read_json(folder / CONFIG, {"quant_method": str, "version": int})
    if config["quant_method"] == METHOD and config["version"] == _VERSION:
        content: dict[str, Any] = read_json(folder / CONFIG, _CONTENT)
        return content
    raise UsageError(
        f"{folder / CONFIG} is of quant_method {brief(config['quant_method'])}, version {config['version']}; "
        f"this version of the library reads {METHOD!r}, version {_VERSION}"
    )


def _activations(model: nn.Module) -> Iterator[tuple[str, tuple[str, int]]]:
    for name, module in model.named_modules():
        quantizer = getattr(module, "input_quantizer", None)
        if isinstance(quantizer, StaticActivation | DynamicActivation):
            yield name, ("static" if isinstance(quantizer, StaticActivation) else "dynamic", quantizer.bits)
