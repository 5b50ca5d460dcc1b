"""What identifies code that no file holds, as in a notebook: what has been compiled, and what it uses."""

import inspect
import sys
from functools import partial
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from weightsmith.core.own_code import code_digest, digest, is_own


def digest_without_file(function: Any) -> str:
    """Changes when a function or class does that no file holds, or what it uses; the same in every process."""
    words, modules = code_without_file(function)
    return digest(*sorted(words), *sorted(map(code_digest, modules)))


def code_without_file(function: Any) -> tuple[set[str], set[ModuleType]]:
    """Follow a function or class through the functions, classes and plain values that it uses.

    Returns:
        Words that change with any of them, the same in every process; and the user's own modules, with files, on the
        way.
    """
    waiting: list[Any] = [function]
    seen, words, modules = dict[int, Any](), set[str](), set[ModuleType]()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen[id(value)] = value  # kept: the next object may get the number of one that has gone
        if isinstance(value, ModuleType):
            if _has_file(value) and is_own(Path(value.__file__ or "")):
                modules.add(value)
        elif isinstance(value, partial):
            words.add(f"partial {_plain([value.args, value.keywords])}")
            waiting += [value.func, *value.args, *value.keywords.values()]
        elif isinstance(value, staticmethod | classmethod | MethodType):
            waiting.append(value.__func__)
        elif isinstance(value, property):
            waiting += [value.fget, value.fset]
        elif not isinstance(value, type | FunctionType):
            waiting.append(type(value))
        elif value.__module__ in sys.builtin_module_names:
            continue
        elif _has_file(home := sys.modules.get(value.__module__)):
            waiting.append(home)
        else:
            used = _of_class(value) if isinstance(value, type) else _of_function(value)
            words |= {f"{value.__qualname__}: {name} = {_plain(other)}" for name, other in used}
            waiting += [other for _, other in used if not isinstance(other, CodeType)]
    return words, modules


def _has_file(module: ModuleType | None) -> bool:
    return Path(getattr(module, "__file__", None) or "").is_file()


def _of_class(value: type) -> list[tuple[str, Any]]:
    # what Python itself adds to a class varies: the number of its first line, for example
    members = [(name, part) for name, part in vars(value).items() if callable(part) or not name.startswith("__")]
    return [*members, *(("base", base) for base in value.__bases__)]


def _of_function(value: FunctionType) -> list[tuple[str, Any]]:
    used: list[tuple[str, Any]] = [("default", part) for part in value.__defaults__ or ()]
    used += list((value.__kwdefaults__ or {}).items()) + list(inspect.getclosurevars(value).nonlocals.items())
    codes = [value.__code__]
    for code in codes:
        codes += [part for part in code.co_consts if isinstance(part, CodeType)]
        used.append((code.co_name, code))
        names = [(name, value.__globals__[name]) for name in code.co_names if name in value.__globals__]
        modules = [part for _, part in names if isinstance(part, ModuleType)]
        for module in modules:  # package.module.function: the text names all of them
            inside = [vars(module).get(name) for name in code.co_names]
            modules += [part for part in inside if isinstance(part, ModuleType) and part not in modules]
        names += [(module.__name__, module) for module in modules]
        used += names
    return used


def _plain(value: Any) -> str:
    if isinstance(value, CodeType):
        return f"{value.co_code.hex()} {value.co_names} {_plain(value.co_consts)}"
    if isinstance(value, set | frozenset):
        return f"{{{', '.join(sorted(map(_plain, value)))}}}"
    if isinstance(value, tuple | list):
        return f"({', '.join(map(_plain, value))})"
    if isinstance(value, dict):
        return _plain([*value.items()])
    if isinstance(value, int | float | complex | str | bytes | None):
        return repr(value)
    return type(value).__name__
