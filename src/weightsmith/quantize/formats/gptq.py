"""Folders in GPTQ's forms, which many inference engines read: ``"gptq"`` for symmetric grids, else ``"gptq_v2"``.

A Linear ``L`` of ``(in, out)`` on ``b`` bits is four tensors, its bias stays what it was:

- ``L.qweight``: int32 ``(in * b / 32, out)``; an output's codes are a little-endian bit stream down its column, so that
  input ``k`` of 2, 4 or 8 bits is at bits ``b * (k % (32/b))`` of word ``k // (32/b)``, and 32 inputs of 3 bits take 3
  words;
- ``L.qzeros``: int32 ``(groups, out * b / 32)``, the same stream along the outputs, of the zero-points ``z``, in the
  classic form of ``(z - 1) mod 2^b``;
- ``L.scales``: ``(groups, out)``;
- ``L.g_idx``: int32 ``(in,)``, the group of every input.

Signed codes are stored with ``2^(b-1)`` added, which is then their zero-point. The files of others have scales in half
precision; here they stay in the precision in which they were found, for otherwise the weights would change.

The classic form is not used for asymmetric grids, because readers that add 1 to all zero-points of a word at once
carry into the neighbor of a ``z = 0``; GPTQModel refuses such files of others.
"""

import json
import re
from collections.abc import Mapping
from math import gcd
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weightsmith.core.checkpoint import Checkpoint
from weightsmith.core.errors import UsageError, brief
from weightsmith.core.files import write_atomically
from weightsmith.core.json_files import read_json
from weightsmith.core.weights import output_head
from weightsmith.quantize.formats import compressed_tensors
from weightsmith.quantize.formats.pack import pack_rows, unpack_rows
from weightsmith.quantize.grid import QuantizedWeight

METHOD = "gptq"
_V2 = "gptq_v2"
BITS = (2, 3, 4, 8)

_FACTS = {"checkpoint_format?": str, "bits?": int, "group_size?": int, "sym?": bool}
_PARTS = ("qweight", "qzeros", "scales", "g_idx")
_SUBTRACTED = {METHOD: 1, _V2: 0}  # from zero-points, by form


def obstacle(model: nn.Module, weights: dict[str, QuantizedWeight]) -> str | None:
    """Say why a model cannot be kept in this form, or ``None`` when it can."""
    if found := compressed_tensors.obstacle(model, weights):
        return found
    for name, quantized in weights.items():
        if quantized.bits not in BITS:
            return f"{name} is on {quantized.bits} bits, and the format has 2, 3, 4 and 8"
        whole = 32 // gcd(32, quantized.bits)  # codes until a word ends where a code does
        for size, what in zip(quantized.shape, ("outputs", "inputs"), strict=True):
            if size % whole:
                return f"{name} has {size} {what}, which at {quantized.bits} bits must be a multiple of {whole}"
    return None


def write(model: Any, weights: dict[str, QuantizedWeight], folder: Path) -> None:
    """Fill an empty folder."""
    state = model.state_dict()
    first, head = next(iter(weights.values())), output_head(model)
    form = METHOD if first.symmetric else _V2
    for name, quantized in weights.items():
        parts = pack(quantized, form)
        state |= {f"{name.removesuffix('weight')}{part}": tensor for part, tensor in parts.items()}
        del state[name]
    model.save_pretrained(folder, state_dict=state, save_original_format=False)
    linear = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    facts = {
        "quant_method": METHOD,
        "checkpoint_format": form,
        "bits": first.bits,
        "group_size": first.group_size or -1,
        "desc_act": False,
        "sym": first.symmetric,
        "lm_head": any(model.get_submodule(name.removesuffix(".weight")) is head for name in weights),
        # readers expect every Linear of a block to be quantized unless a rule excludes it
        "dynamic": {f"-:^{re.escape(name)}$": {} for name in linear if f"{name}.weight" not in weights},
    }
    settings = read_json(folder / "config.json") | {"quantization_config": facts}
    for file, content in (("config.json", settings), ("quantize_config.json", facts)):
        write_atomically(folder / file, json.dumps(content, indent=2, sort_keys=True) + "\n")


def read(folder: Path) -> tuple[dict[str, Tensor], dict[str, QuantizedWeight]]:
    """Return the tensors that are not quantized, and the quantized weights.

    Raises:
        UsageError: The folder is of another form of GPTQ, or damaged.
    """
    facts = _facts(folder)
    checkpoint = Checkpoint(folder)
    weights = {}
    for layer in [name.removesuffix(".qweight") for name in checkpoint if name.endswith(".qweight")]:
        if lacking := [part for part in _PARTS if f"{layer}.{part}" not in checkpoint]:
            raise UsageError(f"{folder} is damaged: {layer} has no {', '.join(lacking)}")
        parts = {part: checkpoint[f"{layer}.{part}"] for part in _PARTS}
        try:
            weights[f"{layer}.weight"] = unpack(parts, **facts)
        except UsageError as error:
            raise UsageError(f"{layer} in {folder} does not fit its config.json: {error}") from error
    used = {f"{name.removesuffix('weight')}{part}" for name in weights for part in _PARTS}
    return {name: checkpoint[name] for name in checkpoint if name not in used}, weights


def pack(quantized: QuantizedWeight, form: str) -> dict[str, Tensor]:
    """Turn the weight of a Linear into the four tensors; one scale for all is repeated for every output."""
    bits, (rows, columns) = quantized.bits, quantized.shape
    zero = quantized.zero_point.short() + (2 ** (bits - 1) if quantized.symmetric else 0)
    stored = (zero.expand(rows, -1) - _SUBTRACTED[form]) & (2**bits - 1)
    return {
        "qweight": _words(quantized.codes, bits, signed=quantized.symmetric).T.contiguous(),
        "qzeros": _words(stored.T, bits, signed=False),
        "scales": quantized.scale.expand(rows, -1).T.contiguous().cpu(),
        "g_idx": torch.arange(columns, dtype=torch.int32) // (quantized.group_size or columns),
    }


def unpack(parts: Mapping[str, Tensor], form: str, bits: int, group_size: int, *, symmetric: bool) -> QuantizedWeight:
    """Undo `pack`; what had one scale for all comes back with equal ones per output.

    Args:
        parts: The four tensors.
        form: ``"gptq"`` or ``"gptq_v2"``.
        bits: Bit width.
        group_size: Inputs per scale; -1: all of them.
        symmetric: Make codes signed if the zero-points allow it.

    Raises:
        UsageError: The tensors are not of these bits and groups.
    """
    groups, scale = parts["g_idx"], parts["scales"].T.contiguous()
    size = len(groups) if group_size == -1 else group_size
    if not torch.equal(groups, torch.arange(len(groups), dtype=groups.dtype) // size):
        raise UsageError(
            f"g_idx does not count groups of {size} inputs in order (files made with desc_act=True cannot be read)"
        )
    zero = (_codes(parts["qzeros"], bits, len(scale), signed=False).T.short() + _SUBTRACTED[form]) & (2**bits - 1)
    signed = symmetric and bool((zero == 2 ** (bits - 1)).all())
    codes = _codes(parts["qweight"].T, bits, len(groups), signed=signed)
    zero = (zero - 2 ** (bits - 1) if signed else zero).to(codes.dtype).contiguous()
    return QuantizedWeight(codes, scale, zero, bits, signed, "channel" if group_size == -1 else group_size)


def _facts(folder: Path) -> dict[str, Any]:
    facts = read_json(folder / "config.json", {"quantization_config": _FACTS})["quantization_config"]
    if (form := facts.get("checkpoint_format", METHOD)) not in _SUBTRACTED:
        known = " and ".join(map(repr, _SUBTRACTED))
        raise UsageError(f"{folder} is of checkpoint_format {brief(form)}; this version of the library reads {known}")
    if lacking := [key for key in ("bits", "group_size", "sym") if key not in facts]:
        raise UsageError(f"{folder / 'config.json'} is damaged: quantization_config has no {', '.join(lacking)}")
    if facts["bits"] not in BITS:
        raise UsageError(f"{folder} is of {facts['bits']!r} bits; the format has 2, 3, 4 and 8")
    return {"form": form, "bits": facts["bits"], "group_size": facts["group_size"], "symmetric": facts["sym"]}


def _words(codes: Tensor, bits: int, *, signed: bool) -> Tensor:
    return pack_rows(codes.cpu(), bits, signed=signed).view(torch.int32)


def _codes(words: Tensor, bits: int, columns: int, *, signed: bool) -> Tensor:
    return unpack_rows(words.contiguous().view(torch.uint8), bits, columns, signed=signed)
