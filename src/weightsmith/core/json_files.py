"""Reading JSON, JSON lines and text that others wrote: what does not have the expected shape is one clear error.

A shape says what a value must be, with as little as the reader relies on; what it does not mention is not looked at.

| shape | value |
|---|---|
| ``object`` | anything |
| ``str``, ``bool`` | that type; ``None`` is null |
| ``int`` | a whole number of at most 64 bits |
| ``float`` | any number that a float can hold, also NaN and infinity |
| ``dict``, ``list`` | an object or a list, whatever is in it |
| ``[shape]`` | a list of such values |
| ``{str: shape}`` | an object of such values, under any names |
| ``{"a": s, "b?": t}`` | an object that has ``a``, and may have ``b``; other names are allowed |
| ``(s, t)`` | either |
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from weightsmith.core.errors import UsageError

MOST_BYTES = 64 * 2**20
"""Largest JSON file that is read at once, and largest line or list entry of one that is read in a stream."""

_MOST_NESTED = 64
_MOST_SHOWN = 60
_CONTAINERS = (dict, list)
_MUST = " must be"
_KINDS: dict[Any, str] = {
    dict: "an object",
    list: "a list",
    str: "a string",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    None: "null",
}


def read_json(path: Path | str, shape: Any = dict, *, what_to_do: str = "") -> Any:
    """Read a JSON file.

    Args:
        path: The file.
        shape: What its content must be, see the module docstring.
        what_to_do: Ends an error's message, for example ``"train again with log_history"``.

    Raises:
        UsageError: The file is missing, larger than :data:`MOST_BYTES`, not UTF-8, not JSON, nested too deeply, or
            of another shape; the message names the file and the place in it.

    Example:
        >>> read_json("model.safetensors.index.json", {"weight_map": {str: str}})  # doctest: +SKIP
        {'metadata': {'total_size': 400}, 'weight_map': {'a': 'model-00001-of-00002.safetensors', ...}}
    """
    path = Path(path)
    with open_file(path) as file:
        return _advised(lambda: parse_json(_all(file, path), path, shape), what_to_do)


def parse_json(text: str | bytes, where: Path | str, shape: Any = dict) -> Any:
    """Parse JSON that is already in memory, with `read_json`'s checks.

    Args:
        text: The JSON.
        where: What it was read from, for errors.
        shape: What it must be.

    Raises:
        UsageError: It is not, or not JSON.
    """
    decoded = _decode(text, where) if isinstance(text, bytes) else text
    try:
        content = json.loads(decoded)
    except RecursionError:
        raise too_deep(where) from None
    except ValueError as error:  # of json, or of a number with thousands of digits
        raise UsageError(f"{where} is damaged or not JSON: {error}") from None
    check_shape(content, decoded, where, shape)
    return content


def read_jsonl(path: Path | str, shape: Any = dict) -> Iterator[tuple[int, Any]]:
    r"""Read a file of JSON lines in a stream: lines end with ``\n`` and nothing else, empty ones are skipped.

    Args:
        path: The file.
        shape: What each line must be, see the module docstring.

    Yields:
        The line's number, from 1, and its content.

    Raises:
        UsageError: The file is missing, or a line is longer than :data:`MOST_BYTES`, not UTF-8, not JSON, or of another
            shape; the message names the file and the line.
    """
    path = Path(path)
    with open_file(path) as file:
        number = 0
        while line := file.readline(MOST_BYTES + 1):
            number += 1
            where = f"{path}, line {number},"
            if len(line) > MOST_BYTES:
                raise UsageError(f"{where} is longer than {MOST_BYTES} bytes")
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield number, parse_json(line, where, shape)


def read_text(path: Path | str) -> str:
    """Read a text file as UTF-8, with any line ends.

    Raises:
        UsageError: It is missing, or not UTF-8.
    """
    path = Path(path)
    with open_file(path) as file:
        return _decode(file.read(), path).replace("\r\n", "\n").replace("\r", "\n")


def open_file(path: Path) -> BinaryIO:
    """Open a plain file to read; what keeps it from that is one clear error."""
    try:
        if path.exists() and not path.is_file():
            raise UsageError(f"{path} must be a file")  # a pipe or a device could block forever
        return path.open("rb")
    except (OSError, ValueError) as error:  # of a name with a null character
        if isinstance(error, UsageError):
            raise
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"{path} cannot be read: {reason}") from error


def _all(file: BinaryIO, path: Path) -> bytes:
    content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise UsageError(f"{path} has more than {MOST_BYTES} bytes, which is more than such a file needs")
    return content


def _decode(content: bytes, where: Path | str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{where} is not UTF-8 (byte {content[error.start]:#04x} at {error.start}): save it as UTF-8, for example "
            "with iconv -f latin1 -t utf-8"
        ) from None


def _advised(read: Callable[[], Any], what_to_do: str) -> Any:
    try:
        return read()
    except UsageError as error:
        if not what_to_do:
            raise
        raise UsageError(f"{error}; {what_to_do}") from error


def check_shape(content: Any, text: str, where: object, shape: Any) -> None:
    """Refuse what is nested too deep or of another shape; ``where`` begins the message."""
    depth, level = 0, [content] if isinstance(content, _CONTAINERS) else []
    while level:
        depth += 1
        if depth > _MOST_NESTED:
            raise too_deep(where)
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, _CONTAINERS)
        ]
    if "\\ud" in text or "\\uD" in text:
        try:
            json.dumps(content, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise UsageError(f"{where} is damaged: it holds half of a character (a lone surrogate)") from None
    if fault := _fault(content, shape):
        raise UsageError(f"{where}{fault}")


def _fault(value: Any, shape: Any) -> str | None:
    """Say where a value is wrong and how, or ``None``; looks as deep as the shape, not as the value."""
    if shape is object:
        return None
    if isinstance(shape, tuple):
        faults = [_fault(value, one) for one in shape]
        if None in faults:
            return None
        return next((fault for fault in faults if fault and not fault.startswith(_MUST)), None) or _wrong(value, shape)
    if isinstance(shape, list):
        if not isinstance(value, list):
            return _wrong(value, list)
        return next((f"[{i}]{fault}" for i, one in enumerate(value) if (fault := _fault(one, shape[0]))), None)
    if isinstance(shape, dict):
        return _fault_in_object(value, shape) if isinstance(value, dict) else _wrong(value, dict)
    if shape is None:
        fits = value is None
    elif shape is int:
        fits = type(value) is int and -(2**63) <= value < 2**63
    elif shape is float:
        fits = type(value) is float or (type(value) is int and abs(value) < 2**1023)
    else:
        fits = isinstance(value, shape)
    return None if fits else _wrong(value, shape)


def _fault_in_object(value: dict[str, Any], shape: dict[Any, Any]) -> str | None:
    if str in shape:
        inner = shape[str]
        return next((f" {_short(name)}{fault}" for name, one in value.items() if (fault := _fault(one, inner))), None)
    for key, inner in shape.items():
        name = key.removesuffix("?")
        if name not in value:
            if name == key:
                return f" must have {name}"
        elif fault := _fault(value[name], inner):
            return f" {name}{fault}"
    return None


def _wrong(value: Any, shape: Any) -> str:
    shapes = shape if isinstance(shape, tuple) else (shape,)
    return f"{_MUST} {' or '.join(map(_kind, shapes))}, got {_short(value)}"


def _kind(shape: Any) -> str:
    return _KINDS[type(shape) if isinstance(shape, dict | list) else shape]


def _short(value: Any) -> str:
    if isinstance(value, dict | list):
        return _KINDS[type(value)]
    if type(value) is int and abs(value) >= 2**64:
        return "a number of more than 64 bits"  # it may have more digits than Python turns into a string
    text = ascii(value) if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _MOST_SHOWN else text[: _MOST_SHOWN - 3] + "..."


def too_deep(where: object) -> UsageError:
    """The error of what is nested too deep."""
    return UsageError(f"{where} is nested more than {_MOST_NESTED} levels deep")
