"""Adapters on disk: a folder of our own, and the folders of Hugging Face PEFT, written and read without PEFT.

| layout | what it holds |
|---|---|
| native | every form and every layer: ``bone_config.json``, ``bone.safetensors`` |
| peft | ``"miss"``, ``"mini"`` and ``"col"`` on linear layers, as PEFT >= 0.17 reads them (MISS) |
| lora | ``"miss"`` and ``"mini"`` as the LoRA that they are: ``B = D^T``, ``A[k, j] = [j % r = k]``, alpha = r |

Folders that PEFT 0.14 to 0.18 wrote as BONE, and which later versions cannot open, are read as well.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from glob import escape
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors.torch import save
from torch import Tensor, nn

from weightsmith.adapt.apply import apply_bone_
from weightsmith.adapt.bone import SHARED, BoneConfig, Variant, check_block
from weightsmith.adapt.layers import CONVOLUTIONS, BoneLayer, is_transposed, kind_of, plain_class, widths
from weightsmith.adapt.registry import Model, config_of, is_sharded, tensors_of
from weightsmith.adapt.state import bone_state_dict, load_bone_state_dict_
from weightsmith.adapt.targets import resolved_modules
from weightsmith.core.adapters import BONE_CONFIG, BONE_TENSORS
from weightsmith.core.checkpoint import Checkpoint
from weightsmith.core.errors import UsageError, brief, near, unknown
from weightsmith.core.files import say_where_link_leads, write_atomically
from weightsmith.core.json_files import read_json
from weightsmith.core.pickles import read_pickle
from weightsmith.core.ranks import on_first_rank

Format = Literal["native", "peft", "lora"]

_PREFIX = "base_model.model."
_PEFT_INIT: dict[str, bool | str] = {"miss": True, "mini": "mini", "col": "bat"}
_NATIVE = {
    "variant": str,
    "r": int,
    "rank_pattern": object,
    "dropout": float,
    "mini_r": (int, None),
    "tile": ([int], None),
    "modules_to_save": [str],
    "fused?": bool,
    "where?": [str],
}
_PEFT = {"peft_type": str, "bias?": str, "r": int, "miss_dropout?": float, "mini_r?": (int, None)}
_FIELDS = {item.name for item in fields(BoneConfig)}
_PEFT_FILES = ("adapter_model.safetensors", "adapter_model.bin")


def save_bone(
    model: nn.Module, folder: Path | str, *, format: Format = "native", adapter_name: str = "default"
) -> Path:
    """Write one adapter; other files of the folder stay.

    Of a model that FSDP2 has sharded, every process must call this: tensors are gathered, and the first one writes.

    Args:
        model: One with adapters, on any device; merged or not.
        folder: The folder to write into; it is made where it is missing.
        format: ``"native"``, ``"peft"`` (a MISS folder) or ``"lora"``; see the module docstring.
        adapter_name: Which adapter.

    Returns:
        ``folder``.

    Raises:
        UsageError: The format is unknown or cannot hold this adapter.
        OSError: The folder cannot be written.
    """
    if format not in ("native", "peft", "lora"):
        raise unknown("format", format, ("native", "peft", "lora"))
    config = config_of(model, adapter_name)
    state = bone_state_dict(model, adapter_name)
    if missing := [name for name in cast(list[str], config.where) if f"{name}.bone".lstrip(".") not in state]:
        raise UsageError(
            f"model must be the one that apply_bone_ was called on, not a wrapper around it: it has no {missing[0]}. "
            "Pass what is inside (of torch.compile: model._orig_mod); of the wrappers that shard, only FSDP2 "
            "(fully_shard) can be saved"
        )
    if not is_sharded(model):
        return _save(model, Path(folder), format, config, state)
    whole = {name: cast(Any, t).full_tensor() if hasattr(t, "full_tensor") else t for name, t in state.items()}
    on_first_rank(lambda: _save(model, Path(folder), format, config, whole))
    return Path(folder)


def _save(model: nn.Module, folder: Path, format: Format, config: BoneConfig, state: Mapping[str, Tensor]) -> Path:
    state = {name: tensor.cpu().contiguous() for name, tensor in state.items()}
    blocks = {name: state.pop(f"{name}.bone".lstrip(".")) for name in cast(list[str], config.where)}
    if format == "native":
        settings = {item.name: getattr(config, item.name) for item in fields(config)}
        tensors = {f"bone.{name}": block for name, block in blocks.items()}
        tensors |= {f"saved.{name}": tensor for name, tensor in state.items()}
        return _write(folder, BONE_CONFIG, settings, BONE_TENSORS, tensors)
    layers = {name: model.get_submodule(name) for name in blocks}
    own, settings = (_as_miss if format == "peft" else _as_lora)(config, blocks, layers)
    settings |= {
        "base_model_name_or_path": getattr(getattr(model, "config", None), "name_or_path", None) or None,
        "bias": "none",
        "inference_mode": True,
        "modules_to_save": _modules_for_peft(model, config) or None,
        "target_modules": _targets(model, list(blocks)),
        "task_type": None,
    }
    tensors = {_PREFIX + name: tensor for name, tensor in (own | state).items()}
    return _write(folder, "adapter_config.json", settings, _PEFT_FILES[0], tensors)


def load_bone(model: Model, folder: Path | str, *, adapter_name: str = "default", allow_pickle: bool = False) -> Model:
    """Read an adapter and put it on a model, in place; it becomes the only active one and can be trained on.

    Args:
        model: The model that the adapter was made for; changed after everything has been checked.
        folder: One of `save_bone`, or a MISS or BONE folder of PEFT.
        adapter_name: The name that it gets here.
        allow_pickle: Also read ``.bin`` files, and from those nothing but plain tensors.

    Returns:
        ``model`` itself.

    Raises:
        UsageError: The folder is none of these or is damaged, or the adapter does not fit the model.
    """
    stored = _read(Path(folder), allow_pickle)
    layers, known = dict(model.named_modules()), model.state_dict()
    for name, block in stored.blocks.items():
        if name not in layers or (kind_of(layers[name]) is None and not isinstance(layers[name], BoneLayer)):
            able = [near for near, module in layers.items() if kind_of(module) is not None]
            raise UsageError(f"{folder} adapts {brief(name)}, which is no layer of the model: {near(name, able)}")
        if block.dim() < 2 or not block.numel():
            raise UsageError(f"{folder} is damaged: the tensor of {brief(name)} has shape {tuple(block.shape)}")
        if not block.is_floating_point():
            raise UsageError(f"{folder} is damaged: the tensor of {brief(name)} is {block.dtype}")
        check_block(widths(layers[name]), tuple(block.shape), stored.variant)
    for name, tensor in stored.saved.items():
        if name not in known:
            raise UsageError(f"{folder} holds {brief(name)}, which the model does not have: {near(name, known)}")
        if known[name].shape != tensor.shape:
            raise UsageError(
                f"{name} must have shape {tuple(known[name].shape)}, got {tuple(tensor.shape)} in {folder}"
            )
    settings: dict[str, Any] = dict(stored.settings)
    whole = tensors_of(model, resolved_modules(model, settings["modules_to_save"]))
    for name in sorted(whole.keys() ^ stored.saved.keys()):
        fault = "holds" if name in stored.saved else "lacks"
        raise UsageError(f"{folder} {fault} {brief(name)}, and its modules_to_save are {settings['modules_to_save']}")
    ranks = {name: block.shape[0 if stored.variant in SHARED else -1] for name, block in stored.blocks.items()}
    config = BoneConfig(
        **settings,
        variant=stored.variant,
        where=lambda name, _: name in stored.blocks,
        rank_pattern={escape(name): rank for name, rank in ranks.items() if rank != settings["r"]},
    )
    apply_bone_(model, config, adapter_name)
    state = {f"{name}.bone".lstrip("."): block for name, block in stored.blocks.items()} | stored.saved
    return load_bone_state_dict_(model, state, adapter_name)


@dataclass(frozen=True, slots=True)
class _Stored:
    """What a folder holds: layers' tensors, whole modules' tensors, and arguments of `BoneConfig`."""

    variant: Variant
    settings: Mapping[str, Any]
    blocks: dict[str, Tensor]
    saved: dict[str, Tensor]


def _read(folder: Path, allow_pickle: bool) -> _Stored:
    if (folder / BONE_CONFIG).is_file():
        return _read_native(folder)
    if (folder / "adapter_config.json").is_file():
        return _read_peft(folder, allow_pickle)
    raise UsageError(f"{folder} holds no adapter: neither bone_config.json nor adapter_config.json is there")


def _read_native(folder: Path) -> _Stored:
    settings = read_json(say_where_link_leads(folder / BONE_CONFIG), _NATIVE)
    if unexpected := sorted(settings.keys() - _FIELDS):
        raise UsageError(f"{folder}/{BONE_CONFIG} has {brief(unexpected[0])}, which this version does not know")
    settings["tile"] = tuple(settings["tile"]) if settings["tile"] else None
    settings["modules_to_save"] = tuple(settings["modules_to_save"])
    del settings["rank_pattern"]  # the tensors tell
    adapted = settings.pop("where", None)  # older folders do not say
    parts: dict[str, dict[str, Tensor]] = {"bone": {}, "saved": {}}
    for key, tensor in Checkpoint(folder / BONE_TENSORS).items():
        part, _, name = key.partition(".")
        if part not in parts:
            raise UsageError(f"{folder}/{BONE_TENSORS} holds {brief(key)}, which is no part of an adapter")
        parts[part][name] = tensor
    if lacking := sorted(set(adapted or ()) - parts["bone"].keys()):
        raise UsageError(f"{folder}/{BONE_TENSORS} lacks the tensor of {brief(lacking[0])}: write the folder again")
    return _Stored(cast(Variant, settings.pop("variant")), settings, parts["bone"], parts["saved"])


def _read_peft(folder: Path, allow_pickle: bool) -> _Stored:
    found = read_json(say_where_link_leads(folder / "adapter_config.json"), _PEFT)
    if found["peft_type"] not in ("MISS", "BONE"):
        raise UsageError(
            f"{folder} holds a {brief(found['peft_type'])} adapter, not MISS or BONE: PEFT itself loads it"
        )
    if found.get("bias", "none") != "none":
        raise UsageError(f"{folder} holds biases as well (bias={brief(found['bias'])}), which cannot be loaded here")
    init = found.get("init_weights", True)
    variant: Variant = "col" if init == "bat" else "mini" if init == "mini" else "miss"
    file = next((folder / name for name in _PEFT_FILES if (folder / name).is_file()), None)
    if file is None:
        raise UsageError(f"{folder} has no {' or '.join(_PEFT_FILES)}")
    tensors: Mapping[str, Tensor] = (
        read_pickle(file, allow_pickle=allow_pickle) if file.suffix == ".bin" else Checkpoint(file)
    )
    blocks, saved = {}, {}
    for key, tensor in tensors.items():
        name = key.removeprefix(_PREFIX)
        layer, _, last = name.rpartition(".")
        if last in ("miss_block", "bone_block"):
            blocks[layer] = tensor
        else:
            saved[name] = tensor
    settings = {
        "r": found["r"],
        "dropout": 0.0 if variant == "col" else found.get("miss_dropout", 0.0),  # PEFT drops nothing there
        "mini_r": found.get("mini_r") if variant == "mini" else None,
        "modules_to_save": tuple(dict.fromkeys(name.rpartition(".")[0] for name in saved)),
    }
    return _Stored(variant, settings, blocks, saved)


def _as_miss(
    config: BoneConfig, blocks: Mapping[str, Tensor], layers: Mapping[str, nn.Module]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if config.variant not in _PEFT_INIT:
        raise UsageError(f"format 'peft' holds {', '.join(_PEFT_INIT)}, not {config.variant!r}: use format='native'")
    ranks = {block.shape[0 if config.variant in SHARED else -1] for block in blocks.values()}
    if len(ranks) > 1:
        raise UsageError("format 'peft' holds one r for all layers, not a rank_pattern: use format='native'")
    for name, layer in layers.items():
        if isinstance(layer, (*CONVOLUTIONS, nn.Embedding)) or is_transposed(layer):
            raise UsageError(
                f"format 'peft' holds linear layers, not {name}, a {_class_name(layer)}: use format='native'"
            )
    settings = {
        "peft_type": "MISS",
        "r": ranks.pop(),
        "miss_dropout": config.dropout,
        "mini_r": config.mini_r or 1,
        "init_weights": _PEFT_INIT[config.variant],
    }
    return {f"{name}.miss_block": block for name, block in blocks.items()}, settings


def _as_lora(
    config: BoneConfig, blocks: Mapping[str, Tensor], layers: Mapping[str, nn.Module]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if config.variant not in SHARED:
        raise UsageError(f"format 'lora' holds {' and '.join(SHARED)}, whose rank is at most r, not {config.variant!r}")
    tensors: dict[str, Tensor] = {}
    for name, block in blocks.items():
        layer = layers[name]
        if isinstance(layer, CONVOLUTIONS):
            raise UsageError(f"format 'lora' cannot hold {name}, a {_class_name(layer)}: use format='native'")
        out, width = widths(layer)
        pattern = torch.eye(len(block)).repeat(1, -(-width // len(block)))[:, :width].to(block)
        block = block.repeat(1, out // block.shape[1])
        if isinstance(layer, nn.Embedding):
            tensors |= {f"{name}.lora_embedding_A": block, f"{name}.lora_embedding_B": pattern.T.contiguous()}
        else:
            tensors |= {f"{name}.lora_A.weight": pattern, f"{name}.lora_B.weight": block.T.contiguous()}
    ranks = {name: len(block) for name, block in blocks.items() if len(block) != config.r}
    settings = {
        "peft_type": "LORA",
        "r": config.r,
        "lora_alpha": config.r,
        "lora_dropout": config.dropout,
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
        "fan_in_fan_out": all(is_transposed(layer) for layer in layers.values()),
    }
    return tensors, settings


def _targets(model: nn.Module, names: list[str]) -> list[str] | str:
    """Name layers as PEFT does, by the ends of their names where that means these and no others."""
    if "" in names:
        raise UsageError("PEFT cannot adapt a model that is a single layer: use format='native'")
    everything = [name for name, _ in model.named_modules()]
    for targets in ({name.rpartition(".")[2] for name in names}, set(names)):
        meant = {name for name in everything if any(name == t or name.endswith(f".{t}") for t in targets)}
        if meant == set(names):
            return sorted(targets)
    return "|".join(map(re.escape, names))


def _modules_for_peft(model: nn.Module, config: BoneConfig) -> list[str]:
    """Name modules in full: PEFT takes every module whose name ends so, also in the middle of a word."""
    names = list(resolved_modules(model, config.modules_to_save))
    others = [name for name, _ in model.named_modules() if name not in names and name.endswith(tuple(names))]
    if names and others:
        raise UsageError(
            f"PEFT would take {others[0]} for one of modules_to_save, as its name ends like one of {names}: use "
            "format='native'"
        )
    return names


def _write(
    folder: Path, config_name: str, settings: Mapping[str, Any], tensors_name: str, tensors: Mapping[str, Tensor]
) -> Path:
    # file by file, as the folder may hold other things; the configuration last, as it makes a folder an adapter's
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_atomically(folder / tensors_name, save(whole, metadata={"format": "pt"}))
    write_atomically(folder / config_name, json.dumps(settings, indent=2, sort_keys=True) + "\n")
    return folder


def _class_name(layer: nn.Module) -> str:
    return plain_class(layer).__name__
