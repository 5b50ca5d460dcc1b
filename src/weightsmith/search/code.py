"""What a search asks of the user's code: a resumed one must not mix the results of two versions of it."""

import inspect
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

from torch import Tensor

from weightsmith.core.notebook import digest_without_file
from weightsmith.core.own_code import code_digest, digest

_PLAIN = (bool, int, float, str, type(None))


def code_of(thing: Any) -> str:
    """Changes when a function or object becomes another one, or its source does, or settings that it holds.

    The source is that of its module and of the user's own modules that this one imports. Settings are what frozen
    dataclasses hold, and what is bound by ``partial``; anything else an object may change by itself.
    """
    bound: list[Any] = []
    while isinstance(thing, partial):
        bound += [*thing.args, *thing.keywords, *thing.keywords.values()]
        thing = thing.func
    plain = thing if inspect.isroutine(thing) or inspect.isclass(thing) else type(thing)
    plain = getattr(inspect.unwrap(plain), "__func__", inspect.unwrap(plain))
    name = getattr(plain, "__qualname__", type(plain).__qualname__)
    return digest(plain.__module__ or "", name, _source(plain), *map(_words, bound), *_settings(thing))


def _source(plain: Any) -> str:
    name = plain.__module__ or ""
    if name.partition(".")[0] == "weightsmith":
        return ""  # ours is tested to give the same results
    module = sys.modules.get(name)
    return (code_digest(module) if module is not None else "") or digest_without_file(plain)


def _settings(thing: Any) -> Iterator[str]:
    if _frozen(thing):
        yield _words(thing)
    else:
        held = getattr(thing, "__dict__", {}) if not inspect.isroutine(thing) and not inspect.isclass(thing) else {}
        for name, value in held.items():
            if _frozen(value):
                yield f"{name}={_words(value)}"


def _frozen(value: Any) -> bool:
    return is_dataclass(value) and not isinstance(value, type) and type(value).__dataclass_params__.frozen  # type: ignore[attr-defined]


def _words(value: Any) -> str:
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, Tensor):
        return digest(f"{value.dtype} {tuple(value.shape)}", value.detach().cpu().contiguous().numpy().tobytes())
    if isinstance(value, tuple | list):
        return f"({', '.join(map(_words, value))})"
    if is_dataclass(value) and not isinstance(value, type):
        return f"{type(value).__qualname__}({', '.join(_words(getattr(value, f.name)) for f in fields(value))})"
    if isinstance(getattr(value, "digest", None), str):
        return str(value.digest)
    return code_of(value) if callable(value) else type(value).__qualname__
