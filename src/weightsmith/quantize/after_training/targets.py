"""Which parameters of a model are rounded, and how each of them is laid out.

These are the weights of linear layers and convolutions, the packed projections of ``nn.MultiheadAttention``, and the
experts of a mixture that are held in one tensor ``(experts, out, in)`` as in transformers 5: those are rounded expert
by expert, every expert with steps of its own.
"""

import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from weightsmith.core.errors import UsageError
from weightsmith.core.select import Where, select
from weightsmith.core.weights import Slot, check_plain, layouts, output_head, owners
from weightsmith.quantize.after_training.rtn import RoundToNearest
from weightsmith.quantize.grid import Grid, QuantizedWeight, write_quantized_
from weightsmith.quantize.report import LeftOut

Make = Callable[[Tensor, Grid, int, torch.Generator], RoundToNearest]

_LARGE = 0.001  # of all parameters


@dataclass(frozen=True, slots=True)
class Target:
    """One parameter to round.

    Attributes:
        name: Of the layer, or of the parameter where a module has others.
        module: Which it belongs to.
        tensor: Its attribute there.
        owner: Name of the module whose call uses it.
        axis: Where its output channels are.
        stacked: Whether its first axis counts matrices.
    """

    name: str
    module: nn.Module
    tensor: str
    owner: str
    axis: int
    stacked: bool = False

    @property
    def parameter(self) -> str:
        """Qualified name."""
        return self.name if self.tensor != "weight" else f"{self.name}.weight".lstrip(".")

    @property
    def weight(self) -> Tensor:
        """Its value."""
        weight = getattr(self.module, self.tensor)
        assert isinstance(weight, Tensor)
        return weight

    def view(self, weight: Tensor, grid: Grid) -> Tensor:
        """A weight as roundings take it: a stack is a matrix with a row per channel, or per expert for ``"tensor"``."""
        if not self.stacked:
            return weight
        stack = weight.movedim(self.axis, 1)
        return stack.flatten(1) if grid.granularity == "tensor" else stack.flatten(0, 1)

    def restore(self, view: Tensor) -> Tensor:
        """Undo `view`."""
        if not self.stacked:
            return view
        return view.reshape(self.weight.movedim(self.axis, 1).shape).movedim(1, self.axis)

    def rounding(self, make: Make, grid: Grid, generator: torch.Generator) -> RoundToNearest:
        """Begin a rounding of this weight."""
        weight = self.view(self.weight, grid)
        if not self.stacked:
            return make(weight, grid, self.axis, generator)
        return make(
            weight, replace(grid, granularity="channel") if grid.granularity == "tensor" else grid, 0, generator
        )

    def quantized(self, rounding: RoundToNearest, grid: Grid, *, learned: bool = True) -> QuantizedWeight:
        """Round for good, in this parameter's own layout."""
        found = rounding.quantized(self.view(self.weight.detach(), grid), learned=learned)
        if not self.stacked:
            return found
        codes = self.restore(found.codes).contiguous()
        return replace(found, codes=codes, axis=self.axis, stacked=True, granularity=grid.granularity)

    def write_(self, quantized: QuantizedWeight) -> None:
        """Put a quantized weight into the model."""
        write_quantized_(self.module, quantized, self.tensor)


def choose_targets(model: nn.Module, where: Where) -> dict[str, Target]:
    """Choose the parameters to round and check them.

    Args:
        model: Nothing in it is changed.
        where: Which modules; ``None``: every linear layer, convolution, ``nn.MultiheadAttention`` and module of
            experts, but neither the output embedding of a language model, nor weights that are tied, nor PEFT adapters.

    Returns:
        The chosen parameters by `Target.name`, in the model's order.

    Raises:
        TypeError: ``model`` is no module.
        UsageError: A chosen weight is tied to another module's, parametrized, not materialized, not floating point, an
            adapter's, or holds NaN or infinity; or nothing matches.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module, got {type(model).__name__}: the order is model, calibration, grid")
    held_by, head, modules = owners(model), output_head(model), dict(model.named_modules())

    def usual(name: str, module: nn.Module) -> bool:
        held = [module._parameters.get(tensor) for tensor, *_ in layouts(module)]
        tied = any(len(held_by.get(id(parameter), ())) > 1 for parameter in held)
        return module is not head and not tied and _adapted(name, modules) is None

    chosen = select(model, where, default=usual, supported=lambda _, module: any(True for _ in layouts(module)))
    targets = {}
    for name, module in chosen.items():
        if (layer := _adapted(name, modules)) is not None:
            raise UsageError(
                f"{name} belongs to a PEFT adapter of {layer}: leave it out of where=, or merge_and_unload() first and "
                "quantize the model that this returns"
            )
        for tensor, axis, stacked in layouts(module):
            _check(Slot(name, module, tensor), held_by)
            if not module.get_parameter(tensor).numel():
                continue  # there is nothing to round
            key = name if tensor == "weight" else f"{name}.{tensor}".lstrip(".")
            targets[key] = Target(key, module, tensor, _caller(name, modules), axis, stacked)
    if not targets:
        raise UsageError(f"where={where!r} matches weights without elements alone: there is nothing to round")
    return targets


def left_out(model: nn.Module, quantized: Collection[str]) -> tuple[LeftOut, ...]:
    """The large parameters that are not among the quantized ones, the largest first, and why."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    total = sum(parameter.numel() for parameter in model.parameters())
    modules, head = dict(model.named_modules()), output_head(model)
    left = []
    for name, parameter in model.named_parameters():
        share = parameter.numel() / total
        if parameter.ndim < 2 or share < _LARGE or not set(names[id(parameter)]).isdisjoint(quantized):
            continue
        owner, _, tensor = name.rpartition(".")
        module, others = modules[owner], [other for other in names[id(parameter)] if other != name]
        if others:
            why = f"tied to {', '.join(others)}"
        elif isinstance(module, nn.Embedding) or module is head:
            why = "embedding" if module is not head else "output embedding"
        elif _adapted(owner, modules) is not None or hasattr(modules[owner.rpartition(".")[0]], "bone_active"):
            why = "adapter"
        elif tensor in [held for held, *_ in layouts(module)]:
            why = "not chosen, or outside of the blocks"
        else:
            why = f"a parameter of {type(module).__name__}, whose weights are not known"
        left.append(LeftOut(name, parameter.numel(), share, why))
    return tuple(sorted(left, key=lambda one: -one.numel))


@contextmanager
def written(targets: Mapping[str, Target], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Let modules compute with other values of these parameters."""
    held = [(target, dict(target.module._parameters)) for target in targets.values()]
    try:
        for name, target in targets.items():
            target.module._parameters.pop(target.tensor, None)
            vars(target.module)[target.tensor] = values[name]
        yield
    finally:
        for target, parameters in reversed(held):
            vars(target.module).pop(target.tensor, None)
            target.module._parameters.clear()
            target.module._parameters.update(parameters)


@contextmanager
def plain_attention() -> Iterator[None]:
    """Keep torch's attention and transformer layers from a path of their own that calls no layer."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def _caller(name: str, modules: Mapping[str, nn.Module]) -> str:
    """``nn.MultiheadAttention`` reads the weight of its output projection without calling it."""
    parent = name.rpartition(".")[0]
    return parent if isinstance(modules.get(parent), nn.MultiheadAttention) else name


def adapted_layers(model: nn.Module) -> list[str]:
    """Names of the layers that carry an adapter of PEFT's or Bone."""
    peft = _peft_layer()
    return [
        name
        for name, module in model.named_modules()
        if hasattr(module, "bone_active") or (peft is not None and isinstance(module, peft))
    ]


def _peft_layer() -> Any:
    """PEFT's base class of adapted layers, if there can be any."""
    return getattr(sys.modules.get("peft.tuners.tuners_utils"), "BaseTunerLayer", None)


def _adapted(name: str, modules: Mapping[str, nn.Module]) -> str | None:
    """The layer whose PEFT adapter a module is part of; the layer that PEFT has wrapped is not."""
    layer = _peft_layer()
    parts = name.split(".")
    parents = [".".join(parts[:count]) for count in range(len(parts))]
    inside = [parent for parent in parents if layer is not None and isinstance(modules.get(parent), layer)]
    return next((parent for parent in inside if parts[len(parent.split(".")) if parent else 0] != "base_layer"), None)


def _check(slot: Slot, held_by: Mapping[int, list[Slot]]) -> None:
    weight = check_plain(slot.name, slot.module, slot.attribute, finite=True)
    others = [other.owner for other in held_by[id(weight)] if other.module is not slot.module]
    if others:
        raise UsageError(
            f"{slot.name} is tied to that of {', '.join(others)}, which would change with it: leave it out of where=, "
            "or untie the two first"
        )
