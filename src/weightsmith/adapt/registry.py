"""What a model remembers of its adapters."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from weightsmith.adapt.bone import BoneConfig
from weightsmith.adapt.layers import BoneLayer
from weightsmith.core.errors import UsageError, unknown

Model = TypeVar("Model", bound=nn.Module)


@dataclass(slots=True)
class Registry:
    """What a model remembers of its adapters; an attribute of the model, so that it is copied and pickled along.

    Attributes:
        configs: By adapter name; ``where`` holds the names of the layers.
        saved: Values of the modules trained in full, by adapter and tensor name, of adapters that are not active.
        original: The values that these modules came with.
        live: The adapter whose values are in these modules now.
        trainable: Parameters that required a gradient before.
    """

    configs: dict[str, BoneConfig] = field(default_factory=dict)
    saved: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    original: dict[str, Tensor] = field(default_factory=dict)
    live: str | None = None
    trainable: tuple[str, ...] = ()


def registry_of(model: nn.Module) -> Registry:
    """What the model remembers of its adapters.

    Raises:
        UsageError: It has none.
    """
    registry = getattr(model, "_bone", None)
    if registry is None:
        raise UsageError(f"model must carry adapters, and this {type(model).__name__} does not: call apply_bone_ on it")
    return cast(Registry, registry)


def config_of(model: nn.Module, adapter_name: str) -> BoneConfig:
    """Look up an adapter.

    Raises:
        UsageError: There is none of this name.
    """
    configs = registry_of(model).configs
    if adapter_name not in configs:
        raise unknown("adapter", adapter_name, configs)
    return configs[adapter_name]


def bone_layers(model: nn.Module) -> Iterator[tuple[str, BoneLayer]]:
    """Yield every adapted layer with its name."""
    for name, module in model.named_modules():
        if isinstance(module, BoneLayer):
            yield name, module


def is_merged(model: nn.Module) -> bool:
    """Whether adapters are in the weights at the moment."""
    return any(layer.bone_merged for _, layer in bone_layers(model))


def refuse_merged(model: nn.Module) -> None:
    """Raise unless the weights are free of adapters."""
    if is_merged(model):
        raise UsageError("the adapters are merged into the weights: call unmerge_bone_ first")


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 has spread the model's parameters over processes."""
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


def refuse_sharded(model: nn.Module, what: str) -> None:
    """Raise if FSDP2 has sharded a model, whose layers are then also of its classes."""
    if is_sharded(model):
        raise UsageError(
            f"a model that FSDP2 has sharded cannot be {what}: call apply_bone_ before fully_shard; after training, "
            "save_bone gathers the adapter, and load_bone puts it on a whole model"
        )


@torch.no_grad()
def swap_saved(model: nn.Module, adapter_name: str | None) -> None:
    """Give modules trained in full the values of an adapter, or those that they came with; keep what they hold now."""
    registry = registry_of(model)
    if registry.live == adapter_name:
        return
    tensors = tensors_of(model, registry.original)
    if registry.live is not None:
        registry.saved[registry.live] = {name: tensors[name].detach().clone() for name in registry.saved[registry.live]}
    values = registry.original | (registry.saved[adapter_name] if adapter_name is not None else {})
    for name, tensor in tensors.items():
        tensor.copy_(placed(values[name], tensor))
    registry.live = adapter_name


def tensors_of(model: nn.Module, names: Sequence[str] | dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameters and buffers of the named modules, or the named tensors themselves, as they are in the model."""
    state = model.state_dict(keep_vars=True)
    return {key: t for key, t in state.items() if any(key == name or key.startswith(f"{name}.") for name in names)}


def placed(value: Tensor, like: Any) -> Tensor:
    """Spread a whole tensor over processes as another one is, if that one is."""
    if not hasattr(like, "full_tensor") or hasattr(value, "full_tensor"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
