"""Encoded images in order: files, or a column of a table."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from weightsmith.core.errors import UsageError
from weightsmith.core.own_code import digest

ENDINGS = {".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}


class Files:
    """Image files.

    Args:
        paths: In order.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def key(self) -> str:
        """Changes when a file does."""
        stats = ((path, path.stat()) for path in self.paths)
        return digest(*(f"{path} {stat.st_size} {stat.st_mtime_ns}" for path, stat in stats))

    def select(self, rows: Iterable[int]) -> "Files":
        """Some of them."""
        return Files([self.paths[row] for row in rows])

    def read(self, rows: Iterable[int]) -> list[Any]:
        """Decode some as PIL images, upright.

        Raises:
            UsageError: One cannot be decoded; the message names its file.
        """
        from PIL import Image, ImageOps

        found = []
        for path in (self.paths[row] for row in rows):
            try:
                with Image.open(path) as image:
                    found.append(ImageOps.exif_transpose(image))
            except Exception as error:  # damaged files raise errors of many kinds
                raise UsageError(f"{path} is not an image that can be read: {_first_line(error)}") from error
        return found


class Column:
    """The images of a table.

    Args:
        table: A ``datasets.Dataset``.
        name: Its column of type ``Image``.
    """

    def __init__(self, table: Any, name: str) -> None:
        self.table, self.name = table.select_columns(name), name

    def __len__(self) -> int:
        return len(self.table)

    @property
    def key(self) -> str:
        """Changes when the table does."""
        return str(self.table._fingerprint)

    def select(self, rows: Iterable[int]) -> "Column":
        """Some of them."""
        return Column(self.table.select(list(rows)), self.name)

    def read(self, rows: Iterable[int]) -> list[Any]:
        """Decode some as PIL images.

        Raises:
            UsageError: One cannot be decoded; the message names its file or row.
        """
        wanted = list(rows)
        try:
            return list(self.table[wanted][self.name])
        except Exception as error:
            raise UsageError(
                f"{self._first_broken(wanted)} is not an image that can be read: {_first_line(error)}"
            ) from error

    def _first_broken(self, rows: Sequence[int]) -> str:
        import datasets

        raw = self.table.cast_column(self.name, datasets.Image(decode=False))
        for row in rows:
            try:
                self.table[row]
            except Exception:
                return str(raw[row][self.name].get("path") or f"row {row}")
        return f"an image in rows {rows[0]} to {rows[-1]}"


Pictures = Files | Column


def is_gray(image: Any) -> bool:
    """Whether a PIL image has one channel of gray levels."""
    return image.mode in ("1", "L") or image.mode.startswith("I") or image.mode == "F"


def in_bytes(image: Any, channels: int) -> Any:
    """Convert a PIL image to 8 bits per channel, gray or RGB; 16-bit gray levels keep their upper 8 bits."""
    if image.mode.startswith("I"):
        from PIL import Image

        levels = np.asarray(image, dtype=np.int64)
        image = Image.fromarray((levels >> 8 if levels.max(initial=0) > 255 else levels).clip(0, 255).astype(np.uint8))
    return image.convert("L" if channels == 1 else "RGB")


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
