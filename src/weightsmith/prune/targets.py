"""Which parameters are pruned."""

from collections.abc import Callable, Iterable

import torch
from torch import nn

from weightsmith.core.errors import UsageError
from weightsmith.core.select import Where, select
from weightsmith.core.weights import Slot, check_plain, is_plain, layouts, owners, why_computed, why_unusual


def find_weights(model: nn.Module, where: Where, *, frozen: bool = False) -> tuple[dict[str, Slot], dict[str, str]]:
    """Find the matrices and kernels to prune; a tied one once, under its first name.

    Normalization gains, biases, embedding tables and free parameters such as prompts are not among them.

    Args:
        model: Any module.
        where: Which modules; ``None``: all that have matrices or kernels.
        frozen: Take those that do not train as well.

    Returns:
        Slots by qualified name, and why weights of chosen modules were left out.

    Raises:
        UsageError: Nothing is left, or a module that ``where`` names has a weight that cannot be written.
        TypeError: It names one of an integer, packed or sharded kind.
    """
    holders = owners(model)
    chosen = select(model, where, default=lambda _, module: any(True for _ in layouts(module)))
    found: dict[str, Slot] = {}
    left_out: dict[str, str] = {}
    for owner, module in chosen.items():
        for layout in layouts(module):
            name = f"{owner}.{layout.attribute}".lstrip(".")
            if not is_plain(module, layout.attribute):
                if where is not None:
                    check_plain(name, module, layout.attribute)
                reason = why_computed(module, layout.attribute)
                left_out[name] = reason or why_unusual(module._parameters[layout.attribute]) or "has no values yet"  # type: ignore[arg-type]
                continue
            parameter = module._parameters[layout.attribute]
            assert parameter is not None
            slot = holders[id(parameter)][0]
            if not (parameter.requires_grad or frozen):
                left_out[slot.name] = "is frozen: give frozen=True to prune it"
            elif torch._debug_has_internal_overlap(parameter) == 1:
                left_out[slot.name] = "is expanded: its entries share memory"
            elif parameter.numel():
                found[slot.name] = slot
    if not found:
        reasons = "; ".join(f"{name} {reason}" for name, reason in list(left_out.items())[:3])
        raise UsageError(f"where={where!r} leaves no weight to prune: {reasons or 'the chosen modules have none'}")
    return found, left_out


def find_named(model: nn.Module, takes: Callable[[str], bool]) -> dict[str, Slot]:
    """Find parameters by their qualified names, whatever they are: the rule of the authors' code.

    Raises:
        UsageError: No name is taken.
    """
    slots = [held[0] for held in owners(model).values()]
    found = {slot.name: slot for slot in slots if takes(slot.name)}
    if not found:
        raise UsageError("names must take at least one parameter of the model")
    return found


def groups_of(names: Iterable[str], scope: str | list[str]) -> dict[str, list[str]]:
    """Divide names into groups that share a threshold.

    Args:
        names: Qualified names.
        scope: ``"global"``: all; ``"layerwise"``: each alone; globs: one group each, and one of the rest.

    Raises:
        UsageError: The scope is not known, or a glob matches nothing.
    """
    from fnmatch import fnmatchcase

    names = list(names)
    if scope == "global":
        return {"all": names}
    if scope == "layerwise":
        return {name: [name] for name in names}
    if isinstance(scope, str) or not scope:
        raise UsageError(f"scope must be 'global', 'layerwise' or a list of globs over names, got {scope!r}")
    found: dict[str, list[str]] = {glob: [] for glob in scope}
    rest: list[str] = []
    for name in names:
        glob = next((glob for glob in scope if fnmatchcase(name, glob)), None)
        (rest if glob is None else found[glob]).append(name)
    for glob, members in found.items():
        if not members:
            raise UsageError(f"scope {glob!r} matches none of the prunable weights, for example {names[0]!r}")
    return found | ({"the rest": rest} if rest else {})
