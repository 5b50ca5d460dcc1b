"""Files that shrink with the number of zeros: a bit per entry and the values that are kept.

A safetensors file with, for every sparse tensor ``NAME``, ``NAME.mask`` (bits, uint8) and ``NAME.values`` (in row-major
order); other tensors are stored as they are. Shapes are in the header. In float32 a sparse tensor takes ``1/32 +
density`` of its dense size. The mask, not the zeros, says what is kept: a kept value may be 0.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from weightsmith.core.errors import UsageError, reason
from weightsmith.core.files import file_atomically
from weightsmith.core.json_files import parse_json
from weightsmith.prune.bits import pack_bits, unpack_bits

_KEY = "weightsmith_sparse"


def save_sparse(
    model: nn.Module | Mapping[str, Tensor], path: Path | str, *, masks: Mapping[str, Tensor] | None = None
) -> Path:
    """Write a model's tensors, those with enough zeros as bits and values.

    Args:
        model: A module, or a state dict.
        path: The file, by convention ``.safetensors``.
        masks: Which entries are kept, by name, for example ``pruner.masks``; ``None``: those that are not 0.

    Returns:
        The path.

    Raises:
        UsageError: A mask has another shape than its tensor, or is of a tensor that there is not; the state holds
            something else than tensors; or the path is a folder.
    """
    if Path(path).is_dir():
        raise UsageError(f"path {str(path)!r} is a folder: give the file to write")
    state = model.state_dict() if isinstance(model, nn.Module) else dict(model)
    masks = dict(masks or {})
    strange = next((name for name, value in state.items() if not isinstance(value, Tensor)), None)
    if strange is not None:
        kind = type(state[strange]).__name__
        raise UsageError(
            f"model: {strange!r} must be a tensor to be stored, got {kind}; leave it out of the state dict"
        )
    for name, mask in masks.items():
        if name not in state or state[name].shape != mask.shape:
            got = tuple(state[name].shape) if name in state else "no such tensor"
            raise UsageError(f"masks: {name} has shape {tuple(mask.shape)}, the model has {got}")
    stored: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    seen: dict[tuple[int, tuple[int, ...], tuple[int, ...]], str] = {}
    tied: dict[str, str] = {}
    for name, tensor in state.items():
        place = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
        if tensor.numel() and place in seen:
            tied[name] = seen[place]
            continue
        seen[place] = name
        tensor = tensor.detach().cpu().contiguous()
        taken = [f"{name}.{part}" for part in ("mask", "values") if f"{name}.{part}" in state]
        if taken and name in masks:
            raise UsageError(f"masks: {name} cannot be stored as bits and values beside a tensor named {taken[0]!r}")
        mask = masks[name].cpu().bool() if name in masks else tensor != 0
        kept = int(mask.sum())
        if taken or (name not in masks and kept * tensor.element_size() + math.ceil(mask.numel() / 8) >= tensor.nbytes):
            stored[name] = tensor.clone()
            continue
        stored[f"{name}.mask"], stored[f"{name}.values"] = pack_bits(mask), tensor[mask]
        shapes[name] = list(tensor.shape)
    path = Path(path)
    header = {_KEY: json.dumps({"shapes": shapes, "tied": tied})}  # one key: their order in a file is not fixed
    with file_atomically(path) as fresh:
        save_file(stored, fresh, metadata=header)
    return path


def load_sparse(path: Path | str, model: nn.Module | None = None, *, strict: bool = True) -> dict[str, Tensor]:
    """Read what `save_sparse` wrote.

    Args:
        path: The file.
        model: Load into this module as well.
        strict: As in ``load_state_dict``.

    Returns:
        The dense state dict.

    Raises:
        UsageError: The file is missing, damaged, no sparse file, or does not fit the model, which then is as it was.
    """
    path = Path(path)
    header, stored = _read(path)
    if _KEY not in header:
        raise UsageError(f"path {str(path)!r} is no sparse file of this library: load it as plain safetensors")
    table = parse_json(header[_KEY], f"the header of {path}")
    shapes, tied = table.get("shapes"), table.get("tied")
    if not isinstance(shapes, dict) or not isinstance(tied, dict):
        raise UsageError(f"path {str(path)!r} is damaged: its header has no shapes")
    state: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        if not isinstance(shape, list) or not all(type(size) is int and 0 <= size < 2**40 for size in shape):
            raise UsageError(f"path {str(path)!r} is damaged: {name!r} has no shape")
        if not {f"{name}.mask", f"{name}.values"} <= stored.keys():
            raise UsageError(f"path {str(path)!r} is damaged: mask or values of {name!r} are missing")
        packed, values = stored.pop(f"{name}.mask"), stored.pop(f"{name}.values")
        mask = unpack_bits(packed, tuple(shape))
        if values.dim() != 1 or int(mask.sum()) != len(values):
            raise UsageError(
                f"path {str(path)!r} is damaged: {name!r} has {values.numel()} values for {int(mask.sum())} bits"
            )
        state[name] = torch.zeros(shape, dtype=values.dtype).masked_scatter_(mask, values)
    state |= stored
    for name, source in tied.items():
        if not isinstance(source, str) or source not in state:
            raise UsageError(f"path {str(path)!r} is damaged: {name!r} is tied to {source!r}, which is missing")
        state[name] = state[source]
    if model is not None:
        _check_fits(path, state, model, strict)
        model.load_state_dict(state, strict=strict)
    return state


def sparse_masks(path: Path | str) -> dict[str, Tensor]:
    """The masks of a sparse file as bits, by name.

    Raises:
        UsageError: The file is missing or damaged.
    """
    header, stored = _read(Path(path), only=".mask")
    shapes = parse_json(header.get(_KEY, "{}"), f"the header of {path}").get("shapes")
    names = shapes if isinstance(shapes, dict) else {}
    return {name: stored[f"{name}.mask"] for name in names if f"{name}.mask" in stored}


def _read(path: Path, only: str = "") -> tuple[dict[str, str], dict[str, Tensor]]:
    """Header and tensors of a safetensors file, those whose names end in ``only``."""
    if not path.is_file():
        raise UsageError(f"path {str(path)!r}: there is no such file")
    try:
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name.endswith(only)]  # noqa: SIM118
            return file.metadata() or {}, {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise UsageError(f"path {str(path)!r} cannot be read: {reason(error)}") from error


def _check_fits(path: Path, state: Mapping[str, Tensor], model: nn.Module, strict: bool) -> None:
    """Refuse before anything is loaded: torch copies what fits and then complains."""
    own = model.state_dict()
    for name, tensor in own.items():
        if name in state and isinstance(tensor, Tensor) and state[name].shape != tensor.shape:
            shapes = f"{tuple(state[name].shape)}, the model {tuple(tensor.shape)}"
            raise UsageError(f"path {str(path)!r} does not fit the model: its {name} is {shapes}")
    if strict and (odd := sorted(own.keys() ^ state.keys())):
        where = "the file" if odd[0] in own else "the model"
        raise UsageError(f"path {str(path)!r} does not fit the model: {where} has no {odd[0]!r}")
