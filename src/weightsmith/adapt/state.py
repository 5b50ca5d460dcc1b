"""What an adapter has trained, as a state dict."""

import torch
from torch import Tensor, nn

from weightsmith.adapt.registry import Model, bone_layers, config_of, placed, refuse_merged, registry_of, tensors_of
from weightsmith.core.errors import UsageError, near


def bone_state_dict(model: nn.Module, adapter_name: str = "default") -> dict[str, Tensor]:
    """Everything that an adapter has trained, and nothing else.

    Args:
        model: One with adapters.
        adapter_name: Which.

    Returns:
        ``<layer>.bone``, and what ``modules_to_save`` holds, under its own names; detached, not copied.

    Raises:
        UsageError: There is no such adapter.
    """
    config_of(model, adapter_name)
    registry = registry_of(model)
    state = {
        f"{name}.bone".lstrip("."): layer.bone[adapter_name].detach()
        for name, layer in bone_layers(model)
        if adapter_name in layer.bone
    }
    if registry.live == adapter_name:
        return state | {
            name: tensor.detach() for name, tensor in tensors_of(model, registry.saved[adapter_name]).items()
        }
    return state | registry.saved.get(adapter_name, {})


def load_bone_state_dict_(model: Model, state: dict[str, Tensor], adapter_name: str = "default") -> Model:
    """Put back what `bone_state_dict` gave, in place.

    Args:
        model: One with the same adapter.
        state: The tensors.
        adapter_name: Which adapter they belong to.

    Returns:
        ``model`` itself.

    Raises:
        UsageError: A tensor is missing, left over, or of another shape; or adapters are merged. Nothing has changed.
    """
    refuse_merged(model)
    own = bone_state_dict(model, adapter_name)
    if missing := own.keys() - state.keys():
        raise UsageError(f"state lacks {', '.join(sorted(missing)[:5])}, which adapter {adapter_name!r} has")
    for name, tensor in state.items():
        if name not in own:
            raise UsageError(f"state holds {name!r}, which adapter {adapter_name!r} does not have: {near(name, own)}")
        if tensor.shape != own[name].shape:
            raise UsageError(f"{name} must have shape {tuple(own[name].shape)}, got {tuple(tensor.shape)}")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(placed(state[name], tensor))
    return model
