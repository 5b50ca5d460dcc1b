"""What is hooked onto a model with adapters: encoder layers that call their parts, states that are checked first."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from weightsmith.adapt.layers import BoneLayer
from weightsmith.adapt.registry import bone_layers
from weightsmith.core.adapters import BONE_MERGED
from weightsmith.core.errors import UsageError

_NESTED = "_bone_use_nested_tensor"  # what an encoder's ``use_nested_tensor`` was


def add_hooks(model: nn.Module) -> None:
    """Hook what is not yet there onto a model that has adapters."""
    if not any(getattr(held, "hook", None) is _check_merged for held in model._load_state_dict_pre_hooks.values()):
        model.register_load_state_dict_pre_hook(_check_merged)
    for module in model.modules():
        if not isinstance(module, nn.TransformerEncoder | nn.TransformerEncoderLayer):
            continue
        if not any(isinstance(part, BoneLayer) for part in module.modules()):
            continue
        if isinstance(module, nn.TransformerEncoder):
            # nested tensors, which it makes of a padding mask, only pass through layers on the fast path
            vars(module).setdefault(_NESTED, getattr(module, "use_nested_tensor", False))
            module.use_nested_tensor = False
        elif _no_fast_path not in module._forward_pre_hooks.values():
            # in evaluation it would take the weights of its layers without calling them; a hook makes it call
            module.register_forward_pre_hook(_no_fast_path)


def remove_hooks(model: nn.Module) -> None:
    """Take away what `add_hooks` has put there, so that torch's encoder layers are fast again."""
    for key, held in list(model._load_state_dict_pre_hooks.items()):
        if getattr(held, "hook", None) is _check_merged:
            del model._load_state_dict_pre_hooks[key]
    for module in model.modules():
        if _NESTED in vars(module):
            module.use_nested_tensor = vars(module).pop(_NESTED)
        for key, hook in list(module._forward_pre_hooks.items()):
            if hook is _no_fast_path:
                del module._forward_pre_hooks[key]


def _check_merged(module: nn.Module, state: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """Refuse weights that have other adapters in them than the model's have, before any is loaded."""
    stored: dict[str, set[str]] = {}
    for key in state:
        at, found, adapter = key.rpartition(f"{BONE_MERGED}.")
        if found:
            stored.setdefault(at, set()).add(adapter)
    for name, layer in bone_layers(module):
        at = f"{prefix}{name}." if name else prefix
        there = stored.get(at, set())
        if f"{at}weight" not in state or there == set(layer.bone_merged):
            continue
        if there:
            raise UsageError(
                f"the state has adapter {', '.join(sorted(there))} merged into the weight of {name or 'the model'}, "
                "and the model would apply it again: save the state after unmerge_bone_, or call merge_bone_ here first"
            )
        raise UsageError(
            f"the state holds the weight of {name or 'the model'} without adapters, and the model has merged "
            f"{', '.join(layer.bone_merged)} into its own: call unmerge_bone_ first"
        )


def _no_fast_path(module: nn.Module, arguments: object) -> None:
    del module, arguments
