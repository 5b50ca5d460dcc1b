"""What tells one model, data set or call of ``fit`` from another, so that no result is shared by mistake."""

import dis
import hashlib
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = (bool, int, float, str, type(None))


def weights_digest(model: nn.Module) -> str:
    """Changes with any bit of a model's parameters and saved buffers."""
    return tensors_digest(model.state_dict())


def tensors_digest(tensors: Mapping[str, Any]) -> str:
    """Changes with any bit of some tensors, or with what else lies between them."""
    total = hashlib.sha256()
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            total.update(f"{name} {value!r}".encode())
            continue
        total.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        total.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()[:16]


def optimizer_words(optimizer: torch.optim.Optimizer) -> str:
    """Class and settings of an optimizer, learning rates included."""
    groups = [
        {name: repr(value) for name, value in group.items() if name != "params"} | {"parameters": len(group["params"])}
        for group in optimizer.param_groups
    ]
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__} {groups}"


def function_words(function: Callable[..., Any], depth: int = 3) -> str:
    """Qualified name of a function, with the plain values that are bound to it: another weight makes another loss.

    Args:
        function: May be a ``partial`` or a closure.
        depth: How many functions within functions are looked into.
    """
    if isinstance(function, partial):
        return f"partial{_words([function.func, *function.args, *function.keywords.items()], depth)}"
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{getattr(function, '__module__', '')}.{name}{bound_words(function, depth)}"


def bound_words(function: Callable[..., Any], depth: int = 3) -> str:
    """The plain values that are bound to a function."""
    return _words(bound(function), depth)


def bound(function: Callable[..., Any]) -> list[Any]:
    """All values that are bound to a function: arguments of a ``partial``, defaults, what a closure holds."""
    if isinstance(function, partial):
        return [*bound(function.func), *function.args, *function.keywords, *function.keywords.values()]
    return [*(getattr(function, "__defaults__", None) or ()), *_enclosed(function)]


def differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Names of the entries that are not equal."""
    return [name for name in {**before, **now} if before.get(name) != now.get(name)]


def _words(values: Iterable[Any], depth: int) -> str:
    found = []
    for value in values if depth else ():
        if isinstance(value, _PLAIN):
            found.append(repr(value))
        elif isinstance(value, tuple | list):
            found.append(_words(value, depth))
        elif callable(value) and not isinstance(value, nn.Module | type):
            found.append(function_words(value, depth - 1))
    return f"({', '.join(found)})" if found else ""


def _enclosed(function: Callable[..., Any]) -> Iterable[Any]:
    """What a closure holds, without what it changes itself: a counter would make another function of each call."""
    cells = getattr(function, "__closure__", None)
    if not cells or not hasattr(function, "__code__"):
        return
    changed = {step.argval for step in dis.get_instructions(function) if step.opname == "STORE_DEREF"}
    for name, cell in zip(function.__code__.co_freevars, cells, strict=True):
        if name in changed:
            continue
        try:
            value = cell.cell_contents
        except ValueError:  # not assigned yet
            continue
        yield value
