"""Put adapters on a model, choose among them, and take them off again."""

import contextlib
import itertools
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from weightsmith.adapt.bone import BoneConfig, block_shape
from weightsmith.adapt.layers import BoneLayer, Form, adopt, check_layer, is_plain, kind_of, widths
from weightsmith.core.adapters import BONE_MERGED
from weightsmith.core.errors import UsageError, WeightsmithWarning, brief, near, unknown
from weightsmith.core.select import Predicate, select
from weightsmith.core.weights import classifiers, output_head, output_layers, owners

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


class Trainable(NamedTuple):
    """How many numbers train, of how many."""

    trainable: int
    total: int

    def __str__(self) -> str:
        return f"{self.trainable:,} of {self.total:,} parameters train ({100 * self.trainable / self.total:.3g} %)"


def apply_bone_(model: Model, config: BoneConfig | None = None, adapter_name: str = "default") -> Model:
    """Freeze a model and put a new adapter on it, in place; outputs do not change at the start.

    The adapter becomes the only one that acts and trains. The model keeps its class and its keys, and gains
    ``<layer>.bone.<adapter_name>``; these are float32, or float64 where the weight is. Build the optimizer afterwards.

    Args:
        model: Any module; changed after everything has been checked.
        config: The adapter; ``None``: ``BoneConfig()``.
        adapter_name: Free to choose, without dots.

    Returns:
        ``model`` itself.

    Raises:
        UsageError: The name is taken, nothing matches, or the adapter does not fit a layer; the message names it.

    Warns:
        WeightsmithWarning: ``where`` is ``None``, and a classifier stays frozen.

    Example:
        >>> model = apply_bone_(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), BoneConfig(r=4, variant="row"))
        >>> print(trainable_parameters(model))
        64 of 172 parameters train (37.2 %)
    """
    config = config or BoneConfig()
    registry: Registry = getattr(model, "_bone", None) or Registry(
        trainable=tuple(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    )
    if not adapter_name or "." in adapter_name:
        raise UsageError(f"adapter_name must be a name without dots, got {adapter_name!r}")
    if adapter_name in registry.configs:
        raise UsageError(f"adapter_name {adapter_name!r} is taken: choose another, or unload_bone_ first")
    refuse_merged(model)
    refuse_sharded(model, "adapted")
    if peft := next((name for name, module in model.named_modules() if _is_peft(module)), None):
        raise UsageError(
            f"{peft} is a layer of PEFT, whose own factors would be adapted: call merge_and_unload() first, or use "
            "accelerate_peft_ on PEFT's MiSS"
        )
    saved = resolved_modules(model, config.modules_to_save)
    layers = _chosen(model, config, saved)
    shapes = {}
    for name, module in layers.items():
        check_layer(name, module, config)
        r = next((r for glob, r in config.rank_pattern.items() if fnmatchcase(name, glob)), config.r)
        shapes[name] = block_shape(config, widths(module), name, r)
        if config.dropout and isinstance(module, nn.Embedding):
            raise UsageError(f"dropout must be 0 for {name}, an embedding, got {config.dropout}")

    if config.where is None:
        _warn_of_frozen_heads(model, layers, saved)
    model._bone = registry  # type: ignore[assignment]
    registry.configs[adapter_name] = replace(config, where=list(layers))
    if saved:
        tensors = _tensors(model, saved)
        registry.original |= {n: t.detach().clone() for n, t in tensors.items() if n not in registry.original}
        registry.saved[adapter_name] = {n: registry.original[n].clone() for n in tensors}
    model.requires_grad_(False)
    for name, module in layers.items():
        home = next(itertools.chain(module.parameters(), module.buffers()), torch.empty(0))
        dtype = torch.float64 if home.dtype == torch.float64 else torch.float32
        layer = adopt(module)
        layer.bone[adapter_name] = nn.Parameter(torch.zeros(shapes[name], dtype=dtype, device=home.device))
        layer.bone_forms[adapter_name] = Form(config.variant, config.dropout, config.fused)
    _block_fast_path(model)
    if len(registry.configs) == 1:
        model.register_load_state_dict_pre_hook(_check_merged)  # type: ignore[no-untyped-call]
    set_adapter_(model, adapter_name)
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        model.enable_input_require_grads()  # type: ignore[operator]  # reentrant checkpoints need an input with one
    return model


def set_adapter_(model: Model, names: str | Sequence[str]) -> Model:
    """Choose the adapters that act, in place: they train, all others rest.

    On one layer, updates of ``"miss"``, ``"mini"`` and ``"row"`` add up; those of ``"col"`` and ``"free"`` are applied
    one to the result of the other in the order of ``names``, as PEFT does.

    Args:
        model: One with adapters, not merged.
        names: One name or several; an empty list lets all rest.

    Returns:
        ``model`` itself.

    Raises:
        UsageError: A name is unknown, the model is merged, or two of the adapters train modules in full.
    """
    registry = registry_of(model)
    refuse_merged(model)
    chosen = (names,) if isinstance(names, str) else tuple(names)
    for name in chosen:
        config_of(model, name)
    whole = [name for name in chosen if name in registry.saved]
    if len(whole) > 1:
        raise UsageError(f"names must hold one adapter with modules_to_save at most, got {whole}")
    swap_saved(model, whole[0] if whole else None)
    for _, layer in bone_layers(model):
        layer.bone_active = tuple(name for name in chosen if name in layer.bone)
        for name, block in layer.bone.items():
            block.requires_grad_(name in chosen)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name in registry.original.keys() & parameters.keys():
        parameters[name].requires_grad_(bool(whole) and name in registry.saved[whole[0]])
    return model


@contextlib.contextmanager
def bone_disabled(model: nn.Module) -> Iterator[None]:
    """Let a model compute as it did before any adapter, within the block.

    Args:
        model: One with adapters, not merged.

    Raises:
        UsageError: It is merged.
    """
    refuse_merged(model)
    live, acting = registry_of(model).live, [(layer, layer.bone_active) for _, layer in bone_layers(model)]
    swap_saved(model, None)
    for layer, _ in acting:
        layer.bone_active = ()
    try:
        yield
    finally:
        swap_saved(model, live)
        for layer, names in acting:
            layer.bone_active = names


def trainable_parameters(model: nn.Module) -> Trainable:
    """Count the parameters that train, and all; ``print`` it for a sentence."""
    sizes = [(parameter.requires_grad, parameter.numel()) for parameter in model.parameters()]
    return Trainable(sum(size for trains, size in sizes if trains), sum(size for _, size in sizes))


def bone_layers(model: nn.Module) -> Iterator[tuple[str, BoneLayer]]:
    """Yield every adapted layer with its name."""
    for name, module in model.named_modules():
        if isinstance(module, BoneLayer):
            yield name, module


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
        return state | {name: tensor.detach() for name, tensor in _tensors(model, registry.saved[adapter_name]).items()}
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
            tensor.copy_(_placed(state[name], tensor))
    return model


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
    tensors = _tensors(model, registry.original)
    if registry.live is not None:
        registry.saved[registry.live] = {name: tensors[name].detach().clone() for name in registry.saved[registry.live]}
    values = registry.original | (registry.saved[adapter_name] if adapter_name is not None else {})
    for name, tensor in tensors.items():
        tensor.copy_(_placed(values[name], tensor))
    registry.live = adapter_name


def remove_hooks(model: nn.Module) -> None:
    """Take away what `apply_bone_` has hooked onto a model, so that torch's encoder layers are fast again."""
    for key, held in list(model._load_state_dict_pre_hooks.items()):
        if getattr(held, "hook", None) is _check_merged:
            del model._load_state_dict_pre_hooks[key]
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if hook is _no_fast_path:
                del module._forward_pre_hooks[key]


def _chosen(model: nn.Module, config: BoneConfig, saved: Sequence[str]) -> dict[str, nn.Module]:
    heads, held_by = {id(module) for module in output_layers(model).values()}, owners(model)
    inside = {id(module) for name in saved for module in model.get_submodule(name).modules()}

    def can(_: str, module: nn.Module) -> bool:
        known = isinstance(module, BoneLayer) or kind_of(module) is not None
        return known and id(module) not in inside and not _is_empty(getattr(module, "weight", None))

    def usual(name: str, module: nn.Module) -> bool:
        flat = not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Embedding)
        return can(name, module) and flat and id(module) not in heads

    try:
        layers = select(model, config.where, default=cast(Predicate, usual), supported=can)
    except UsageError as error:
        if any(isinstance(module, nn.MultiheadAttention) for module in model.modules()):
            raise UsageError(
                f"{error}; nn.MultiheadAttention multiplies with in_proj_weight and out_proj itself: these never match"
            ) from error
        raise
    for parameter in {id(m.weight): m.weight for m in layers.values() if is_plain(m)}.values():
        both = [slot.owner for slot in held_by[id(parameter)] if slot.owner in layers]
        if len(both) > 1:
            raise UsageError(
                f"{' and '.join(both)} share one weight: adapt one of them, and leave the others out of where"
            )
    return layers


def _is_empty(weight: object) -> bool:
    """Whether this rank holds nothing of a sharded weight."""
    return isinstance(weight, Tensor) and not isinstance(weight, UninitializedParameter) and not weight.numel()


def _warn_of_frozen_heads(model: nn.Module, layers: Mapping[str, nn.Module], saved: Sequence[str]) -> None:
    """Say that a classifier does not train: if it is new, nothing can be learned through it."""
    if output_head(model) is not None:
        return
    heads = classifiers(model)
    outermost = [name for name in heads if not any(_is_in(name, other) for other in heads if other != name)]
    frozen = [
        head
        for head in outermost
        if next(heads[head].parameters(), None) is not None
        and not any(_is_in(name, head) for name in layers)
        and not any(_is_in(head, name) or _is_in(name, head) for name in saved)
    ]
    if frozen:
        warnings.warn(
            f"{', '.join(frozen)} will not train: where this head is new, train it in full with "
            f"modules_to_save={tuple(frozen)}",
            WeightsmithWarning,
            stacklevel=3,
        )


def _is_in(name: str, top: str) -> bool:
    """Whether a module is another one or part of it, by their names."""
    return name == top or name.startswith(f"{top}.")


def resolved_modules(model: nn.Module, wanted: Sequence[str]) -> tuple[str, ...]:
    """Full names of the modules that ``modules_to_save`` means.

    Raises:
        UsageError: One matches nothing, or shares a weight with a module that is not meant.
    """
    names = [name for name, _ in model.named_modules() if name]
    found: list[str] = []
    for target in wanted:
        matches = [name for name in names if name == target or name.endswith(f".{target}")]
        if not matches:
            raise UsageError(
                f"modules_to_save holds {brief(target)}, which is no module of the model: {near(target, names)}"
            )
        found += matches
    inside = {id(module) for name in found for module in model.get_submodule(name).modules()}
    for slots in owners(model).values():
        if 0 < sum(id(slot.module) in inside for slot in slots) < len(slots):
            names = [slot.owner for slot in slots]
            raise UsageError(f"modules_to_save must hold all or none of {', '.join(names)}: they share one weight")
    return tuple(found)


def _tensors(model: nn.Module, names: Sequence[str] | dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameters and buffers of the named modules, or the named tensors themselves, as they are in the model."""
    state = model.state_dict(keep_vars=True)
    return {key: t for key, t in state.items() if any(key == name or key.startswith(f"{name}.") for name in names)}


def _is_peft(module: nn.Module) -> bool:
    tuners = sys.modules.get("peft.tuners.tuners_utils")  # not imported: nothing of it can be here
    return tuners is not None and isinstance(module, tuners.BaseTunerLayer)


def _placed(value: Tensor, like: Any) -> Tensor:
    """Spread a whole tensor over processes as another one is, if that one is."""
    if not hasattr(like, "full_tensor") or hasattr(value, "full_tensor"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


def _block_fast_path(model: nn.Module) -> None:
    for module in model.modules():
        if not isinstance(module, nn.TransformerEncoderLayer) or _no_fast_path in module._forward_pre_hooks.values():
            continue
        if any(isinstance(part, BoneLayer) for part in module.modules()):
            # in evaluation it would take the weights of its layers without calling them; a hook makes it call
            module.register_forward_pre_hook(_no_fast_path)


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
