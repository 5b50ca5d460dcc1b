"""Write adapters into the weights, and take them out again to the last bit."""

import warnings
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from weightsmith.adapt.bone import SHARED, as_tiles, bone_delta
from weightsmith.adapt.fused import in_tiles
from weightsmith.adapt.hooks import remove_hooks
from weightsmith.adapt.layers import BoneLayer, Form, is_plain, needs_weight, release
from weightsmith.adapt.registry import Model, bone_layers, is_merged, refuse_sharded, registry_of, swap_saved
from weightsmith.core.errors import UsageError, WeightsmithWarning
from weightsmith.core.weights import owners


@torch.no_grad()
def merge_bone_(
    model: Model, *, keep_base: bool | Literal["cpu"] = True, safe_merge: bool = True, untie: bool = False
) -> Model:
    """Write the active adapters into the weights, in place, so that the model costs what it did without them.

    Computed in float32 at least and rounded once, layer by layer.

    Args:
        model: One with adapters.
        keep_base: Keep the former weights, so that `unmerge_bone_` restores every bit; ``"cpu"`` keeps them in main
            memory; ``False`` saves the memory and unmerges by formula, to rounding.
        safe_merge: Compute everything once beforehand, and refuse values that are not finite.
        untie: Give layers whose weight is tied to another module's a weight of their own.

    Returns:
        ``model`` itself; nothing happens, with a warning, if it is merged already.

    Raises:
        UsageError: A weight is tied, is no plain float tensor, or would not be finite; nothing has been changed.
    """
    registry_of(model)
    if is_merged(model):
        warnings.warn("the adapters are merged already: nothing to do", WeightsmithWarning, stacklevel=2)
        return model
    refuse_sharded(model, "merged")
    layers = [(name, layer) for name, layer in bone_layers(model) if layer.bone_active]
    if not layers:
        warnings.warn("no adapter is active: nothing to merge", WeightsmithWarning, stacklevel=2)
    shared = owners(model)
    _refuse_parametrized(layers)
    for name, layer in layers:
        if not is_plain(layer):
            raise UsageError(f"the weight of {name} is no plain float tensor: an adapter cannot be merged into it")
        others = [slot.owner for slot in shared[id(layer.weight)] if slot.module is not layer]
        if others and not untie:
            raise UsageError(
                f"the weight of {name} is tied to that of {', '.join(others)}, which merging would change as well: "
                "pass untie=True to give it a weight of its own"
            )
    if safe_merge:
        for name, layer in layers:
            if not _merged(layer).isfinite().all():
                raise UsageError(f"merging {name} gives values that are not finite; the model is unchanged")
    for _, layer in layers:
        former = layer.weight
        layer.weight = nn.Parameter(_merged(layer), requires_grad=former.requires_grad)
        if keep_base == "cpu" and len(shared[id(former)]) == 1:
            former.data = former.data.cpu()
        layer.bone_kept = (former,) if keep_base else ()
        layer.bone_merged = layer.bone_active
    return model


@torch.no_grad()
def unmerge_bone_(model: Model) -> Model:
    """Take merged adapters out of the weights again, in place.

    Args:
        model: One whose adapters are merged.

    Returns:
        ``model`` itself; nothing happens, with a warning, if it is not merged.

    Raises:
        UsageError: The former weights were not kept and cannot be computed; nothing has been changed.
    """
    registry_of(model)
    if not is_merged(model):
        warnings.warn("the adapters are not merged: nothing to do", WeightsmithWarning, stacklevel=2)
        return model
    layers = [(name, layer) for name, layer in bone_layers(model) if layer.bone_merged]
    inverses = {name: _inverses(name, layer) for name, layer in layers if not layer.bone_kept}
    for name, layer in layers:
        now = layer.weight
        if layer.bone_kept:
            (former,) = layer.bone_kept
            former.data = former.data.to(now.device, now.dtype)
        else:
            former = nn.Parameter(_unmerged(layer, inverses[name]), requires_grad=now.requires_grad)
        layer.weight, layer.bone_merged, layer.bone_kept = former, (), ()
    return model


def unload_bone_(model: Model, *, merge: bool = False) -> Model:
    """Take all adapters off, in place: every layer is of its former class, and trains if it did before.

    Args:
        model: One with adapters.
        merge: Leave what the active adapters do in the weights; otherwise weights are what they were.

    Returns:
        ``model`` itself.

    Raises:
        UsageError: There are no adapters, or they cannot be merged or taken out.
    """
    registry, merged = registry_of(model), is_merged(model)
    refuse_sharded(model, "unloaded")
    _refuse_parametrized(bone_layers(model))
    if merge and not merged:
        merge_bone_(model, keep_base=False)
    if not merge:
        if merged:
            unmerge_bone_(model)
        swap_saved(model, None)
    for _, layer in list(bone_layers(model)):
        release(layer)
    remove_hooks(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in registry.trainable)
    del model._bone
    return model


def _refuse_parametrized(layers: Iterable[tuple[str, BoneLayer]]) -> None:
    # the layer's class is torch's by now, and to make it the former one would leave it without its weight
    for name, layer in layers:
        if parametrize.is_parametrized(layer):
            raise UsageError(f"{name} has been parametrized since it was adapted: call fold_ on the model first")


def _merged(layer: BoneLayer) -> Tensor:
    weight = layer.weight
    wide = layer.oriented(weight).to(torch.promote_types(weight.dtype, torch.float32))
    return torch.empty_like(weight).copy_(layer.oriented(layer.sequenced(wide, list(layer.acting()))))


def _inverses(name: str, layer: BoneLayer) -> list[tuple[Tensor, Tensor]]:
    """What undoes the guided adapters, the last one first: their tiles, and the inverses of ``I`` plus these."""
    guided = [(form, layer.bone[n]) for n in layer.bone_merged if (form := layer.bone_forms[n]).variant not in SHARED]
    if len(guided) > 1 and not all(needs_weight(form.variant, block) for form, block in guided):
        raise UsageError(
            f"several adapters act on {name}, one of them a 'row', which no formula undoes: keep_base=True does"
        )
    found = []
    for form, block in reversed(guided):
        tiles = as_tiles(block.double(), form.variant, *layer.oriented(layer.weight).shape)
        inverse, failed = torch.linalg.inv_ex(tiles + torch.eye(tiles.shape[-1]).to(tiles))
        if failed.any() or not inverse.isfinite().all():
            raise UsageError(
                f"the adapter on {name} cannot be taken out: I + B is singular, and the former weight was not kept: "
                "merge with keep_base=True"
            )
        found.append((tiles, inverse))
    return found


def _unmerged(layer: BoneLayer, inverses: list[tuple[Tensor, Tensor]]) -> Tensor:
    weight = layer.oriented(layer.weight).double()
    for name in layer.bone_merged:
        form: Form = layer.bone_forms[name]
        if form.variant in SHARED:
            weight = weight - bone_delta(weight, layer.bone[name].double(), form.variant)
    for tiles, inverse in inverses:
        cut = in_tiles(weight, tiles) - tiles.transpose(1, 2)[None, :, :, None]
        weight = torch.einsum("apicqj,pqjk->apicqk", cut, inverse).reshape(weight.shape)
    return torch.empty_like(layer.weight).copy_(layer.oriented(weight))
