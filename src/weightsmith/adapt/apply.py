"""Put adapters on a model, and choose among them."""

import contextlib
import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import nn

from weightsmith.adapt.bone import BoneConfig, block_shape
from weightsmith.adapt.hooks import add_hooks
from weightsmith.adapt.layers import Form, adopt, check_layer, widths
from weightsmith.adapt.registry import (
    Model,
    Registry,
    bone_layers,
    config_of,
    refuse_merged,
    refuse_sharded,
    registry_of,
    swap_saved,
    tensors_of,
)
from weightsmith.adapt.targets import chosen_layers, resolved_modules, warn_of_frozen_heads, warn_of_packed
from weightsmith.core.errors import UsageError


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
        WeightsmithWarning: ``where`` is ``None``, and a classifier stays frozen, or packed projections or experts do.

    Example:
        >>> model = apply_bone_(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), BoneConfig(r=4, variant="row"))
        >>> print(trainable_parameters(model))
        64 of 172 parameters train (37.2 %)
    """
    config = config or BoneConfig()
    registry: Registry = getattr(model, "_bone", None) or Registry(
        # a tied weight by all its names: merging with untie=True gives each a parameter of its own
        trainable=tuple(name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad)
    )
    if not adapter_name or "." in adapter_name:
        raise UsageError(f"adapter_name must be a name without dots, got {adapter_name!r}")
    if hasattr(nn.ParameterDict(), adapter_name):
        raise UsageError(f"adapter_name must not be an attribute of torch's modules, got {adapter_name!r}: add a digit")
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
    layers = chosen_layers(model, config, saved)
    shapes = {}
    for name, module in layers.items():
        check_layer(name, module, config)
        r = next((r for glob, r in config.rank_pattern.items() if fnmatchcase(name, glob)), config.r)
        shapes[name] = block_shape(config, widths(module), name, r)
        if config.dropout and isinstance(module, nn.Embedding):
            raise UsageError(f"dropout must be 0 for {name}, an embedding, got {config.dropout}")

    if config.where is None:
        warn_of_frozen_heads(model, layers, saved)
        warn_of_packed(model, saved)
    model._bone = registry  # type: ignore[assignment]
    registry.configs[adapter_name] = replace(config, where=list(layers))
    if saved:
        tensors = tensors_of(model, saved)
        registry.original |= {n: t.detach().clone() for n, t in tensors.items() if n not in registry.original}
        registry.saved[adapter_name] = {n: registry.original[n].clone() for n in tensors}
    model.requires_grad_(False)
    for name, module in layers.items():
        home = next(itertools.chain(module.parameters(), module.buffers()), torch.empty(0))
        dtype = torch.float64 if home.dtype == torch.float64 else torch.float32
        layer = adopt(module)
        layer.bone[adapter_name] = nn.Parameter(torch.zeros(shapes[name], dtype=dtype, device=home.device))
        layer.bone_forms[adapter_name] = Form(config.variant, config.dropout, config.fused)
    add_hooks(model)
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


def _is_peft(module: nn.Module) -> bool:
    tuners = sys.modules.get("peft.tuners.tuners_utils")  # not imported: nothing of it can be here
    return tuners is not None and isinstance(module, tuners.BaseTunerLayer)
