"""Which modules of a model an adapter is put on, and which it trains in full."""

import warnings
from collections.abc import Mapping, Sequence
from typing import cast

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from weightsmith.adapt.bone import BoneConfig
from weightsmith.adapt.layers import BoneLayer, is_plain, kind_of
from weightsmith.core.errors import UsageError, WeightsmithWarning, brief, near
from weightsmith.core.select import Predicate, select
from weightsmith.core.weights import classifiers, is_linear, layouts, output_head, output_layers, owners


def chosen_layers(model: nn.Module, config: BoneConfig, saved: Sequence[str]) -> dict[str, nn.Module]:
    """The layers that an adapter is put on, by name: those that ``where`` means, outside the modules ``saved`` in full.

    Raises:
        UsageError: Nothing matches, or two of them share a weight.
    """
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


def warn_of_frozen_heads(model: nn.Module, layers: Mapping[str, nn.Module], saved: Sequence[str]) -> None:
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


def warn_of_packed(model: nn.Module, saved: Sequence[str]) -> None:
    """Say which matrices no adapter goes on, as their module multiplies with them itself: packed ones, experts."""
    packed = [
        f"{name}.{layout.attribute}".lstrip(".")
        for name, module in model.named_modules()
        if not is_linear(name, module) and not any(_is_in(name, top) for top in saved)
        for layout in layouts(module)
    ]
    if packed:
        warnings.warn(
            f"{', '.join(packed[:3])}{' ...' if len(packed) > 3 else ''} will not train: adapters go on layers that "
            "are called, and these matrices are multiplied with by their modules; modules_to_save trains these in full",
            WeightsmithWarning,
            stacklevel=3,
        )


def _is_empty(weight: object) -> bool:
    """Whether this rank holds nothing of a sharded weight."""
    return isinstance(weight, Tensor) and not isinstance(weight, UninitializedParameter) and not weight.numel()


def _is_in(name: str, top: str) -> bool:
    """Whether a module is another one or part of it, by their names."""
    return name == top or name.startswith(f"{top}.")
