"""Reading one list of a JSON file entry by entry, in the memory of an entry."""

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from weightsmith.core.errors import UsageError
from weightsmith.core.json_files import MOST_BYTES, check_shape, open_file, too_deep

_CHUNK = 2**18
_LONGEST_EXPONENT_MARK = 2
_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\n\r]*")


def stream_json(path: Path | str, key: str, shape: Any = dict) -> Iterator[Any]:
    """Read the list under one key of a JSON object entry by entry, in the memory of an entry.

    Args:
        path: The file, of any size.
        key: The list's name; only names at the top are looked at.
        shape: What each entry must be, see `weightsmith.core.json_files`.

    Yields:
        The entries.

    Raises:
        UsageError: The file is missing or damaged, has no list of that name or two, or an entry is of another shape.
    """
    path = Path(path)
    with open_file(path) as file:
        source = _Stream(file, path)
        source.expect("{")
        found = False
        more = source.peek() != "}"
        while more:
            name = source.value(str)
            source.expect(":")
            if name != key:
                source.value(object)
            elif found:
                raise UsageError(f"{path} is damaged: it has {key!r} twice")
            elif source.peek() != "[":
                raise UsageError(f"{path}: {key} must be a list")
            else:
                found = True
                yield from source.entries(shape)
            more = source.peek() != "}"
            if more:
                source.expect(",")
        source.expect("}")
        if source.peek():
            raise UsageError(f"{path} is damaged: something follows its end")
        if not found:
            raise UsageError(f"{path} must have {key}, a list")


class _Place(NamedTuple):
    """Worded only when there is an error, as there may be millions of entries."""

    path: Path
    number: int | None

    def __str__(self) -> str:
        return str(self.path) if self.number is None else f"{self.path}, entry {self.number},"


class _Stream:
    """The part of a JSON file that is being looked at."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file, self._path = file, path
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._text, self._at, self._ended = "", 0, False

    def peek(self) -> str:
        """Give the next character that is no space, empty at the end of the file."""
        while True:
            self._at = _SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def expect(self, mark: str) -> None:
        """Pass over a character."""
        if self.peek() != mark:
            got = ascii(self.peek()) if self.peek() else "its end"
            raise UsageError(f"{self._path} is damaged or not JSON: expected {mark!r}, got {got}")
        self._at += 1

    def value(self, shape: Any, number: int | None = None) -> Any:
        """Read one value, an entry of a list where there is a number."""
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
                fault = None
            except RecursionError:
                raise too_deep(self._path) from None
            except ValueError as error:
                end, fault = len(self._text), error
            # what almost reaches the end of what has been read may go on: of "1.5e-3" the part "1.5" is a number, too
            if (
                len(self._text) - end < _LONGEST_EXPONENT_MARK + 1
                and len(self._text) - self._at <= MOST_BYTES
                and self._more()
            ):
                continue
            if fault:
                raise UsageError(f"{self._path} is damaged or not JSON: {fault}") from None
            check_shape(value, self._text[self._at : end], _Place(self._path, number), shape)
            self._at = end
            return value

    def entries(self, shape: Any) -> Iterator[Any]:
        """Read a list."""
        self.expect("[")
        number, more = 0, self.peek() != "]"
        while more:
            yield self.value(shape, number)
            number += 1
            more = self.peek() != "]"
            if more:
                self.expect(",")
        self.expect("]")

    def _more(self) -> bool:
        """Read on; twice as much each time that a value is not whole yet, so that all takes linear time."""
        if self._ended:
            return False
        rest = self._text[self._at :]
        chunk = self._file.read(max(_CHUNK, len(rest)))
        self._ended = not chunk
        try:
            self._text, self._at = rest + self._decoder.decode(chunk, final=self._ended), 0
        except UnicodeDecodeError:
            raise UsageError(f"{self._path} is not UTF-8") from None
        return True
