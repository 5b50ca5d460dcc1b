"""Whether modules are still what their files say: fingerprints read the files, jobs run what was imported."""

import ast
import inspect
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from functools import cache, cached_property
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, FunctionType, MemberDescriptorType, ModuleType
from typing import Any

import psutil

from weightsmith.core.errors import UsageError

_PLAIN = (bool, int, float, complex, str, bytes, type(None), tuple)
_Definition = ast.FunctionDef | ast.AsyncFunctionDef


def check_current(files: Iterable[Path]) -> None:
    """Refuse to go on with a module that was imported from one of the files before the file was edited.

    Compared are the compiled functions and methods, their plain defaults, and the plain constants of modules and
    classes that are assigned once, in files that have changed since this process began. What no text tells, such as a
    constant that is computed, is not seen.

    Args:
        files: Resolved paths of source files.

    Raises:
        UsageError: A file was edited after its import.
    """
    wanted = {path for path in files if _is_new(path)}
    names = tuple(path.name for path in wanted)
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        # other loaders may change the code as they load it
        if file is None or type(getattr(module, "__loader__", None)) is not SourceFileLoader:
            continue
        if not file.endswith(names):  # to resolve the paths of thousands of modules takes seconds
            continue
        if (path := Path(file).resolve()) in wanted and (part := _differing(module, path)):
            raise UsageError(
                f"{path} was edited after module {name!r} was imported: {part!r} is another one now; "
                "start Python again, or reload the module and make anew what was built with it"
            )


def check_function(function: Any, path: Path) -> None:
    """Refuse to go on with a function that is not the one in its file, as after a reload of its module.

    Args:
        function: A function; anything else passes.
        path: Resolved path of its module's file.

    Raises:
        UsageError: The file holds another function of this name.
    """
    loader = getattr(sys.modules.get(getattr(function, "__module__", None) or ""), "__loader__", None)
    if type(loader) is not SourceFileLoader or not path.is_file() or not _is_new(path):
        return
    if isinstance(function, FunctionType) and _is_from(function, path):
        codes = _codes(path.read_bytes(), path)
        if codes is not None and not _is_among(function, codes):
            raise UsageError(
                f"{function.__qualname__!r} is not the function of this name in {path}, which was edited; "
                "make it anew from the module as it is now"
            )


@cache
def _begun() -> float:
    return float(psutil.Process().create_time())


def _is_new(path: Path) -> bool:
    # what decorators and metaclasses make of a module can look like an edit: only edited files are compared
    return path.stat().st_mtime >= _begun() - 2  # seconds: clocks of file systems are coarse


def _differing(module: ModuleType, path: Path) -> str:
    """Name of something that is not as the text says; empty when there is nothing."""
    text = path.read_bytes()
    codes = _codes(text, path)
    if codes is None:
        return ""
    for function in _functions(vars(module), module.__name__, path, set()):
        if not _is_among(function, codes):
            return function.__qualname__
    tree = ast.parse(text)
    elsewhere = {name for node in ast.walk(tree) if isinstance(node, ast.Global) for name in node.names}
    return next(_other_values(tree.body, vars(module), "", elsewhere), "")


def _codes(text: bytes, path: Path) -> Mapping[str, list[CodeType]] | None:
    """The compiled functions and classes of a text by qualified name; ``None`` where it does not compile."""
    try:
        waiting = [compile(text, str(path), "exec", dont_inherit=True)]
    except (SyntaxError, ValueError):
        return None
    found = defaultdict[str, list[CodeType]](list)
    for code in waiting:
        found[code.co_qualname].append(code)
        waiting += [part for part in code.co_consts if isinstance(part, CodeType)]
    return found


def _functions(names: Mapping[str, Any], module: str, path: Path, seen: set[int]) -> Iterator[FunctionType]:
    for value in list(names.values()):
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, type):
            if value.__module__ == module:
                yield from _functions(vars(value), module, path, seen)
            continue
        parts = [value]
        if isinstance(value, property):
            parts = [value.fget, value.fset, value.fdel]
        elif isinstance(value, cached_property):
            parts = [value.func]
        elif isinstance(value, staticmethod | classmethod):
            parts = [value.__func__]
        for part in parts:
            plain = inspect.unwrap(part) if callable(part) else part
            if isinstance(plain, FunctionType) and _is_from(plain, path):
                yield plain


def _is_from(function: FunctionType, path: Path) -> bool:
    # methods that dataclasses write are from no file
    file = Path(function.__code__.co_filename)
    return file.name == path.name and file.resolve() == path


def _is_among(function: FunctionType, codes: Mapping[str, list[CodeType]]) -> bool:
    return any(_is_same(function.__code__, code) for code in codes.get(function.__code__.co_qualname, []))


def _is_same(one: CodeType, other: CodeType) -> bool:
    """Whether two pieces of code compute the same; line numbers do not count."""
    plain = ("co_code", "co_names", "co_varnames", "co_freevars", "co_cellvars", "co_flags")
    if any(getattr(one, name) != getattr(other, name) for name in plain):
        return False
    if len(one.co_consts) != len(other.co_consts):
        return False
    for mine, its in zip(one.co_consts, other.co_consts, strict=True):
        if isinstance(mine, CodeType) and isinstance(its, CodeType):
            if not _is_same(mine, its):
                return False
        elif not _is_equal(mine, its):
            return False
    return True


def _is_equal(mine: Any, its: Any) -> bool:
    return type(mine) is type(its) and (bool(mine == its) or repr(mine) == repr(its))  # a NaN is not equal to itself


def _other_values(body: list[ast.stmt], names: Mapping[str, Any], prefix: str, elsewhere: set[str]) -> Iterator[str]:
    """Names whose plain values are not those of the text, defaults of functions and fields among them."""
    stored = Counter(name for part in body for node in ast.walk(part) for name in _assigned(node))
    for part in body:
        if isinstance(part, ast.Assign | ast.AnnAssign):
            targets = part.targets if isinstance(part, ast.Assign) else [part.target]
            for target in targets:
                if not isinstance(target, ast.Name) or stored[target.id] > 1 or target.id in elsewhere:
                    continue
                if not _agrees(part.value, _held(names, target.id)):
                    yield prefix + target.id
        elif isinstance(part, _Definition) and stored[part.name] == 1:  # others are overloads or setters
            held = names.get(part.name)
            function = inspect.unwrap(held) if callable(held) else None
            if isinstance(function, FunctionType) and _has_other_defaults(part, function):
                yield prefix + part.name
        elif isinstance(part, ast.ClassDef):
            kind = names.get(part.name)
            if isinstance(kind, type) and kind.__qualname__ == prefix + part.name:
                yield from _other_values(part.body, vars(kind), f"{prefix}{part.name}.", set())


def _assigned(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store | ast.Del):
        return [node.id]
    return [node.name] if isinstance(node, _Definition | ast.ClassDef) else []


def _held(names: Mapping[str, Any], name: str) -> Any:
    value = names.get(name, ...)
    # dataclasses with slots keep the default of a field elsewhere
    fields = names.get("__dataclass_fields__", {})
    return fields[name].default if isinstance(value, MemberDescriptorType) and name in fields else value


def _agrees(text: ast.expr | None, value: Any) -> bool:
    """Whether a value is what a literal says; what is no plain literal agrees with anything."""
    if text is None or type(value) not in _PLAIN:  # members of an enumeration may be strings, too
        return True
    try:
        literal = ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError):
        return True
    return type(literal) not in _PLAIN or _is_equal(literal, value)


def _has_other_defaults(text: _Definition, function: FunctionType) -> bool:
    if function.__code__.co_qualname.rpartition(".")[2] != text.name:
        return False
    plain, held = text.args.defaults, function.__defaults__ or ()
    named = {part.arg: value for part, value in zip(text.args.kwonlyargs, text.args.kw_defaults, strict=True) if value}
    its = function.__kwdefaults__ or {}
    if len(plain) != len(held) or named.keys() != its.keys():
        return True
    pairs = [*zip(plain, held, strict=True), *((named[name], its[name]) for name in named)]
    return not all(_agrees(default, value) for default, value in pairs)
