"""Pictures that jobs keep for the report, for example what went in, what came out and what it should be."""

import base64
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from weightsmith.core.display import printable
from weightsmith.core.errors import UsageError, require
from weightsmith.core.files import write_atomically
from weightsmith.core.json_files import read_json

_FILE = "gallery.json"
_SHAPE = {"pictures": [{"group": str, "caption": str, "order": int, "png": str}]}
_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture of a group that is shown side by side.

    Attributes:
        group: What all pictures of the group show.
        caption: What this one is.
        order: Place in the group, over all jobs.
        png: The file in base64.
    """

    group: str
    caption: str
    order: int
    png: str

    @classmethod
    def of(cls, image: Tensor, group: str, caption: str, order: int) -> "Picture":
        """Encode an image ``(3, H, W)`` in [0, 1]."""
        pillow: Any = require("PIL.Image", extra="vision", purpose="pictures in the report")
        pixels = (image.permute(1, 2, 0) * 255).round().byte().numpy()
        file = io.BytesIO()
        pillow.fromarray(np.ascontiguousarray(pixels)).save(file, "PNG", optimize=True)
        return cls(group, caption, order, base64.b64encode(file.getvalue()).decode())


def keep_gallery(folder: Path, pictures: Iterable[Picture]) -> None:
    """Write pictures into the folder that a job keeps."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / _FILE, json.dumps({"pictures": [asdict(picture) for picture in pictures]}))


def read_gallery(folders: Sequence[Path]) -> tuple[Mapping[str, Sequence[Picture]], list[str]]:
    """Read what jobs kept, of the first seed that has any.

    Args:
        folders: Of finished jobs.

    Returns:
        Pictures by group, in their order; and what could not be read, a line each.
    """
    found: dict[str, list[Picture]] = {}
    unread = []
    with_pictures = [folder for folder in folders if (folder / _FILE).is_file()]
    first = min((folder.name for folder in with_pictures), key=lambda name: (len(name), name), default="")
    for folder in with_pictures:
        if folder.name != first:
            continue
        try:
            for picture in _read(folder / _FILE):
                found.setdefault(picture.group, []).append(picture)
        except UsageError as error:
            unread.append(str(error))
    return {group: sorted(pictures, key=lambda picture: picture.order) for group, pictures in found.items()}, unread


def _read(path: Path) -> list[Picture]:
    pictures = []
    for row in read_json(path, _SHAPE)["pictures"]:
        try:
            content = base64.b64decode(row["png"], validate=True)
        except ValueError:
            content = b""
        if not content.startswith(_SIGNATURE):  # what is written into a page must be what it says it is
            raise UsageError(f"{path} holds a picture that is no PNG: it is left out of the report")
        texts = (printable(row["group"]), printable(row["caption"]))
        pictures.append(Picture(*texts, row["order"], base64.b64encode(content).decode()))
    return pictures
