"""Remove channels of which nothing is left, so that the network really gets smaller and faster.

Unstructured zeros cost as much as other numbers. Only where a whole output channel is zero, and its bias with it, can
the channel go, together with everything that reads it. Which layers those are is found by ``torch-pruning``, which
follows the model on an example; the result is compared with the original before anything is changed.
"""

import copy
from dataclasses import dataclass
from functools import partial
from itertools import starmap
from typing import Any

import torch
from torch import Tensor, nn

from weightsmith.core.errors import UsageError, require
from weightsmith.core.graph import leaves
from weightsmith.core.modes import evaluating
from weightsmith.core.outputs import call, logits_of
from weightsmith.core.weights import is_plain, owners

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, slots=True)
class Shrunk:
    """What was removed.

    Attributes:
        model: The model.
        removed: Output channels removed, by layer.
        left: Dead channels that stay, by layer, with the reason.
        parameters_before: Number of parameters.
        parameters_after: The same afterwards.
    """

    model: nn.Module
    removed: dict[str, int]
    left: dict[str, str]
    parameters_before: int
    parameters_after: int


def dead_channels(layer: nn.Module) -> Tensor:
    """Output channels ``(out,)`` whose weights and bias are all zero."""
    weight, bias = layer._parameters["weight"], layer._parameters.get("bias")
    assert weight is not None
    dead = (weight.detach().reshape(len(weight), -1) == 0).all(1)
    return dead if bias is None else dead & (bias.detach() == 0)


@torch.no_grad()
def shrink_(model: nn.Module, example: Any, *, tolerance: float = 1e-5) -> Shrunk:
    """Remove dead output channels where the outputs stay the same.

    A channel is dead if its weights and its bias are zero. What follows may still turn that into something else, such
    as a normalization's shift: each layer's removal is tried on a copy, and done only if the outputs agree, on the
    example and on noise in its place.

    Args:
        model: Changed in place, in evaluation mode while it is examined; optimizers have to be made anew.
        example: Inputs: a tensor, or a tuple of positional ones.
        tolerance: Largest difference of outputs, relative to the largest output.

    Returns:
        What was removed and what was left; ``.model`` is the model.

    Raises:
        MissingExtra: ``torch-pruning`` is not installed.
        UsageError: The example or the tolerance is none.
    """
    if not isinstance(example, Tensor | tuple | list):
        raise UsageError(f"example must be a tensor or a tuple of tensors, got {type(example).__name__}")
    if not 0 <= tolerance < 1:
        raise UsageError(f"tolerance must be between 0 and 1, got {tolerance}")
    pruning: Any = require("torch_pruning", extra="prune", purpose="removing channels")
    before = sum(parameter.numel() for parameter in model.parameters())
    removed: dict[str, int] = {}
    left: dict[str, str] = {}
    with evaluating(model):
        probes = _probes(example)
        wanted, ties = [_outputs(call(model, probe)) for probe in probes], _ties(model)
        names = [name for name, module in model.named_modules() if isinstance(module, _LAYERS) and is_plain(module)]
        for name in names:
            dead = dead_channels(model.get_submodule(name)).nonzero().flatten().tolist()
            if not dead:
                continue
            trial = copy.deepcopy(model)
            reason = _remove(pruning, trial, name, dead, example)
            if reason is None:
                reason = _difference(trial, probes, wanted, tolerance)
            if reason is None and _ties(trial) != ties:
                reason = "weights that are tied would come apart"
            if reason is None:
                _remove(pruning, model, name, dead, example)
                removed[name] = len(dead)
            else:
                left[name] = f"{len(dead)} channels stay: {reason}"
    return Shrunk(model, removed, left, before, sum(parameter.numel() for parameter in model.parameters()))


def _outputs(output: Any) -> list[Tensor]:
    """All tensors that a model returns, hidden states among them."""
    found = [leaf for leaf in leaves(output) if isinstance(leaf, Tensor)]
    return found or [logits_of(output)]


def _ties(model: nn.Module) -> list[list[str]]:
    return [[slot.name for slot in slots] for slots in owners(model).values() if len(slots) > 1]


def _difference(trial: nn.Module, probes: list[Any], wanted: list[list[Tensor]], tolerance: float) -> str | None:
    try:
        found = [_outputs(call(trial, probe)) for probe in probes]
    except Exception as error:  # sizes that the model's own code holds, such as those of attention heads
        return f"the model would not run ({type(error).__name__})"
    change = partial(_change, tolerance=tolerance)
    pairs = (pair for mine, theirs in zip(found, wanted, strict=True) for pair in zip(mine, theirs, strict=True))
    return next(filter(None, starmap(change, pairs)), None)


def _change(found: Tensor, wanted: Tensor, *, tolerance: float) -> str | None:
    if found.shape != wanted.shape:
        return "they are outputs of the model"
    if not wanted.is_floating_point():
        return None if torch.equal(found, wanted) else "the outputs would change"
    largest = max(1.0, wanted.abs().max().item()) if wanted.numel() else 1.0
    return None if torch.allclose(found, wanted, rtol=0, atol=tolerance * largest) else "the outputs would change"


def _remove(pruning: Any, model: nn.Module, name: str, channels: list[int], example: Any) -> str | None:
    """Remove channels and what depends on them; or say why not."""
    layer: Any = model.get_submodule(name)
    if len(channels) == len(layer.weight):
        return "nothing of the layer would remain"
    if getattr(layer, "groups", 1) != 1:
        return "the layer has groups"
    with torch.enable_grad():
        try:
            graph = pruning.DependencyGraph().build_dependency(model, example_inputs=example)
            prune = (
                pruning.prune_linear_out_channels if isinstance(layer, nn.Linear) else pruning.prune_conv_out_channels
            )
            group = graph.get_pruning_group(layer, prune, idxs=channels)
        except Exception as error:  # whatever tracing a stranger's model raises
            return f"torch-pruning cannot follow it ({type(error).__name__})"
        if not graph.check_pruning_group(group):
            return "a layer that reads them would be left with nothing"
        group.prune()
    return None


def _probes(example: Any) -> list[Any]:
    """The example, and noise in its place: a channel that one example leaves alone may matter to others."""
    generator = torch.Generator().manual_seed(0)

    def noise(value: Any) -> Any:
        if isinstance(value, tuple | list):
            return tuple(noise(item) for item in value)
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        drawn = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value)
        return drawn * value.std().nan_to_num(1.0) + value.mean()

    return [example, noise(example)]
