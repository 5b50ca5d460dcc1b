"""What is checked before the first block changes: grids, finished weights, and what the calibration data reach."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from weightsmith.core.errors import UsageError, unknown
from weightsmith.quantize.after_training.blocks import Walk, targets_of
from weightsmith.quantize.after_training.calibration import Batch
from weightsmith.quantize.after_training.targets import Target
from weightsmith.quantize.grid import Grid, QuantizedWeight, as_grid

Done = Mapping[str, Mapping[str, QuantizedWeight]]
_TRACED_TOKENS = 8


def choose_grids(targets: Mapping[str, Target], grid: Grid, overrides: Mapping[str, Grid | int]) -> dict[str, Grid]:
    """The grid of each weight, checked to fit it.

    Args:
        targets: By name.
        grid: Of weights that no override names.
        overrides: Grids by glob; the first match counts.

    Raises:
        UsageError: A grid does not fit, or a glob matches no weight.
    """
    for glob in overrides:
        if not any(fnmatchcase(name, glob) for name in targets):
            raise unknown("glob in overrides", glob, targets)
    grids = {}
    for name, target in targets.items():
        grids[name] = as_grid(next((other for glob, other in overrides.items() if fnmatchcase(name, glob)), grid))
        try:
            grids[name].split(target.view(target.weight, grids[name]), 0 if target.stacked else target.axis)
        except UsageError as error:
            raise UsageError(f"{name}: {error}") from error
    return grids


def check_done(done: Done, blocks: Mapping[str, nn.Module], targets: Mapping[str, Target]) -> None:
    """Refuse finished weights that do not fit the model."""
    for block, weights in done.items():
        if block not in blocks:
            raise unknown("block in done", block, blocks)
        for target in targets_of(block, targets).values():
            found = weights.get(target.parameter)
            if found is None or found.shape != target.weight.shape:
                raise UsageError(f"done holds no {target.parameter} of this shape for block {block!r}")


def check_called(targets: Mapping[str, Target]) -> None:
    """Inputs are quantized where a layer is called with them; packed or stacked weights have no layer of their own."""
    if inside := [name for name, target in targets.items() if name != target.owner]:
        raise UsageError(
            f"activations cannot be quantized for {', '.join(inside)}, which have no layer of their own: leave these "
            "out with where=, or leave out activations"
        )


def example(model: nn.Module, batch: Batch) -> Batch:
    """Something small to trace a model with; transformers models take sequences of any length."""
    of_transformers = hasattr(getattr(model, "config", None), "model_type")
    return batch.head(2, _TRACED_TOKENS if of_transformers else None)


def survey(model: nn.Module, walk: Walk, targets: Mapping[str, Target], batches: list[Batch]) -> tuple[str, ...]:
    """Run the trained blocks once: refuse activations that are not finite, and find weights that see nothing."""
    called: set[str] = set()
    chosen: dict[str, set[int]] = {}  # by modules that are told which of their experts to use, the experts

    def look(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = [*args, *(value for key, value in kwargs.items() if "mask" not in key)]
        tensors = [leaf for leaf in pytree.tree_leaves(given[:3]) if isinstance(leaf, Tensor)]  # a mask may be infinite
        if not all(tensor.isfinite().all() for tensor in tensors):
            raise UsageError(f"the input of {name} holds NaN or infinity for the calibration data: nothing has changed")
        if not any(tensor.numel() for tensor in tensors):
            return
        called.add(name)
        for tensor in tensors:
            if tensor.dtype in (torch.int32, torch.int64):
                chosen.setdefault(name, set()).update(tensor.unique().tolist())

    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, kwargs, name=name: look(name, args, kwargs), with_kwargs=True
        )
        for name in dict.fromkeys(target.owner for target in targets.values())
    ]
    try:
        for batch in batches:
            walk.through(batch)
    finally:
        for hook in hooks:
            hook.remove()
    unseen = []
    for name, target in targets.items():
        if target.owner not in called:
            unseen.append(name)
        elif target.stacked and target.owner in chosen:
            unseen += [f"{name}[{i}]" for i in range(len(target.weight)) if i not in chosen[target.owner]]
    return tuple(unseen)
