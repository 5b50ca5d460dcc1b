"""A group of trained parameters on disk: as a PEFT adapter where the model is one, else as a checkpoint."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from weightsmith.core.checkpoint import Checkpoint
from weightsmith.core.errors import UsageError, near, require
from weightsmith.core.files import folder_atomically

_ADAPTER = "adapter_model.safetensors"
_OTHER = "model.safetensors"


def save_group(model: nn.Module, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write a group; ``PeftModel.from_pretrained`` reads the folder where ``model`` is a PEFT model.

    Args:
        model: The model that the group belongs to; its own weights do not matter.
        tensors: Trained parameters by name.
        folder: The folder to make or replace, as a whole.
    """
    stored, names = _adapter(model)
    in_adapter = {key: tensors[name] for name, key in names.items() if name in tensors}
    rest = {name: tensor for name, tensor in tensors.items() if name not in names}
    with folder_atomically(folder) as fresh:
        if stored:
            save_file({key: _plain(tensor) for key, tensor in (stored | in_adapter).items()}, fresh / _ADAPTER)
            configs: Any = model.peft_config
            config = configs[adapter_name(model)]
            was, config.inference_mode = config.inference_mode, True
            config.save_pretrained(fresh)
            config.inference_mode = was
        if rest:
            save_file({name: _plain(tensor) for name, tensor in rest.items()}, fresh / _OTHER)


def load_group(model: nn.Module, shapes: Mapping[str, tuple[int, ...]], folder: Path) -> dict[str, Tensor]:
    """Read what `save_group` wrote; the model is left as it is.

    Args:
        model: The model that the group belongs to.
        shapes: Of its trainable parameters.
        folder: The folder.

    Raises:
        UsageError: A file is missing or damaged, or of other parameters.
    """
    _, names = _adapter(model)
    found: dict[str, Tensor] = {}
    for file, wanted in (
        (_ADAPTER, {name: key for name, key in names.items() if name in shapes}),
        (_OTHER, {name: name for name in shapes if name not in names}),
    ):
        if not wanted:
            continue
        held = Checkpoint(folder / file)
        stored = held.shapes()
        for name, key in wanted.items():
            if key not in stored:
                raise UsageError(f"{folder / file} has no {key}, which the model trains; {near(key, stored)}")
            if stored[key] != shapes[name]:
                raise UsageError(f"{folder / file} has {key} as {stored[key]}, the model as {shapes[name]}")
            found[name] = held[key]
    return found


def adapter_name(model: nn.Module) -> str | None:
    """The active adapter of a PEFT model; ``None`` for other models.

    Raises:
        UsageError: Several are active.
    """
    if not isinstance(getattr(model, "peft_config", None), dict) or not hasattr(model, "active_adapter"):
        return None
    active: Any = model.active_adapter
    names = [active] if isinstance(active, str) else list(active)
    if len(names) != 1:
        raise UsageError(f"the model must have one active adapter, got {names}: call set_adapter")
    return str(names[0])


def _adapter(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What PEFT stores of the active adapter, and under which key it stores each parameter."""
    adapter = adapter_name(model)
    if adapter is None:
        return {}, {}
    peft: Any = require("peft", extra="hf", purpose="saving a PEFT adapter")
    stored = peft.get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    places = {(tensor.data_ptr(), tensor.shape): key for key, tensor in stored.items()}
    names = {}
    for name, parameter in model.named_parameters():
        key = places.get((parameter.data_ptr(), parameter.shape))
        if key is not None and parameter.numel():
            names[name] = key
    return stored, names


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()
