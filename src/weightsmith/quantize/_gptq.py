"""Folders in GPTQ's classic form (``checkpoint_format: "gptq"``), which many inference engines read.

A Linear ``L`` of ``(in, out)`` on ``b`` bits is four tensors, its bias stays what it was:

- ``L.qweight``: int32 ``(in * b / 32, out)``; an output's codes are a little-endian bit stream down its column, so that
  input ``k`` of 2, 4 or 8 bits is at bits ``b * (k % (32/b))`` of word ``k // (32/b)``, and 32 inputs of 3 bits take 3
  words;
- ``L.qzeros``: int32 ``(groups, out * b / 32)``, the same stream along the outputs, of ``(z - 1) mod 2^b``;
- ``L.scales``: ``(groups, out)``;
- ``L.g_idx``: int32 ``(in,)``, the group of every input.

Signed codes are stored with ``2^(b-1)`` added, which is then their zero-point. The files of others have scales in half
precision; here they stay in the precision in which they were found, for otherwise the weights would change.

Checked: the layout against reference values made independently of this code, and what `write` writes against `read`. No
other reader has been run on it. Those that decode each zero-point, add 1 and mask, as the form asks, get ``z = 0``
right; those that add 1 to all zero-points of a word at once carry into the neighbour of a ``z = 0``, which symmetric
grids never have.
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
from weightsmith.core.errors import UsageError
from weightsmith.core.files import write_atomically
from weightsmith.quantize import _compressed
from weightsmith.quantize.grid import QuantizedWeight
from weightsmith.quantize.layers import output_head
from weightsmith.quantize.pack import pack_rows, unpack_rows

METHOD = "gptq"
BITS = (2, 3, 4, 8)

_PARTS = ("qweight", "qzeros", "scales", "g_idx")


def obstacle(model: nn.Module, weights: dict[str, QuantizedWeight]) -> str | None:
    """Say why a model cannot be kept in this form, or ``None`` when it can."""
    if found := _compressed.obstacle(model, weights):
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
    for name, quantized in weights.items():
        state |= {f"{name.removesuffix('weight')}{part}": tensor for part, tensor in pack(quantized).items()}
        del state[name]
    model.save_pretrained(folder, state_dict=state, save_original_format=False)
    first, head = next(iter(weights.values())), output_head(model)
    linear = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    facts = {
        "quant_method": METHOD,
        "checkpoint_format": METHOD,
        "bits": first.bits,
        "group_size": first.group_size or -1,
        "desc_act": False,
        "sym": first.symmetric,
        "lm_head": any(model.get_submodule(name.removesuffix(".weight")) is head for name in weights),
        # readers expect every Linear of a block to be quantised unless a rule excludes it
        "dynamic": {f"-:^{re.escape(name)}$": {} for name in linear if f"{name}.weight" not in weights},
    }
    settings = json.loads((folder / "config.json").read_text()) | {"quantization_config": facts}
    for file, content in (("config.json", settings), ("quantize_config.json", facts)):
        write_atomically(folder / file, json.dumps(content, indent=2, sort_keys=True) + "\n")


def read(folder: Path) -> tuple[dict[str, Tensor], dict[str, QuantizedWeight]]:
    """Return the tensors that are not quantised, and the quantised weights.

    Raises:
        UsageError: The folder is of another form of GPTQ, or damaged.
    """
    bits, group_size, symmetric = _facts(folder)
    checkpoint = Checkpoint(folder)
    weights = {}
    for layer in [name.removesuffix(".qweight") for name in checkpoint if name.endswith(".qweight")]:
        if lacking := [part for part in _PARTS if f"{layer}.{part}" not in checkpoint]:
            raise UsageError(f"{folder} is damaged: {layer} has no {', '.join(lacking)}")
        parts = {part: checkpoint[f"{layer}.{part}"] for part in _PARTS}
        try:
            weights[f"{layer}.weight"] = unpack(parts, bits, group_size, symmetric=symmetric)
        except UsageError as error:
            raise UsageError(f"{layer} in {folder} does not fit its config.json: {error}") from error
    used = {f"{name.removesuffix('weight')}{part}" for name in weights for part in _PARTS}
    return {name: checkpoint[name] for name in checkpoint if name not in used}, weights


def pack(quantized: QuantizedWeight) -> dict[str, Tensor]:
    """Turn the weight of a Linear into the four tensors; one scale for all is repeated for every output."""
    bits, (rows, columns) = quantized.bits, quantized.shape
    zero = quantized.zero_point.short() + (2 ** (bits - 1) if quantized.symmetric else 0)
    stored = (zero.expand(rows, -1) - 1) & (2**bits - 1)
    return {
        "qweight": _words(quantized.codes, bits, signed=quantized.symmetric).T.contiguous(),
        "qzeros": _words(stored.T, bits, signed=False),
        "scales": quantized.scale.expand(rows, -1).T.contiguous().cpu(),
        "g_idx": torch.arange(columns, dtype=torch.int32) // (quantized.group_size or columns),
    }


def unpack(parts: Mapping[str, Tensor], bits: int, group_size: int, *, symmetric: bool) -> QuantizedWeight:
    """Undo `pack`; what had one scale for all comes back with equal ones per output.

    Args:
        parts: The four tensors.
        bits: Word length.
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
    zero = (_codes(parts["qzeros"], bits, len(scale), signed=False).T.short() + 1) & (2**bits - 1)
    signed = symmetric and bool((zero == 2 ** (bits - 1)).all())
    codes = _codes(parts["qweight"].T, bits, len(groups), signed=signed)
    zero = (zero - 2 ** (bits - 1) if signed else zero).to(codes.dtype).contiguous()
    return QuantizedWeight(codes, scale, zero, bits, signed, "channel" if group_size == -1 else group_size)


def _facts(folder: Path) -> tuple[int, int, bool]:
    facts = json.loads((folder / "config.json").read_text())["quantization_config"]
    if (form := facts.get("checkpoint_format", METHOD)) != METHOD:
        raise UsageError(f"{folder} is of checkpoint_format {form!r}; this version of the library reads {METHOD!r}")
    if lacking := [key for key in ("bits", "group_size", "sym") if key not in facts]:
        raise UsageError(f"{folder / 'config.json'} is damaged: quantization_config has no {', '.join(lacking)}")
    if facts["bits"] not in BITS:
        raise UsageError(f"{folder} is of {facts['bits']!r} bits; the format has 2, 3, 4 and 8")
    return facts["bits"], facts["group_size"], facts["sym"]


def _words(codes: Tensor, bits: int, *, signed: bool) -> Tensor:
    return pack_rows(codes.cpu(), bits, signed=signed).view(torch.int32)


def _codes(words: Tensor, bits: int, columns: int, *, signed: bool) -> Tensor:
    return unpack_rows(words.contiguous().view(torch.uint8), bits, columns, signed=signed)
