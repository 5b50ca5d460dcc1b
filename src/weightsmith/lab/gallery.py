"""Pictures that jobs keep for the report, for example what went in, what came out and what it should be."""

import base64
import json
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from weightsmith.core.display import printable
from weightsmith.core.errors import UsageError
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
    def of(cls, images: Tensor, group: str, caption: str, order: int = 0) -> "Picture":
        """Encode images ``(N, 1 or 3, H, W)``, uint8 or in [0, 1]; see `png`."""
        pixels = images if images.dtype == torch.uint8 else (images * 255).round().byte()
        return cls(group, caption, order, base64.b64encode(png(pixels)).decode())


def keep_gallery(folder: Path, pictures: Iterable[Picture]) -> None:
    """Add pictures to those in the folder that a job keeps; of the same group and caption the last counts."""
    folder.mkdir(parents=True, exist_ok=True)
    before = _read(folder / _FILE) if (folder / _FILE).is_file() else []
    kept = {(picture.group, picture.caption): picture for picture in (*before, *pictures)}
    write_atomically(folder / _FILE, json.dumps({"pictures": [asdict(picture) for picture in kept.values()]}))


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


def png(images: Tensor, columns: int = 8) -> bytes:
    """A PNG file of images side by side, written without an imaging library, which few users of the lab have.

    Args:
        images: uint8 ``(N, 1 or 3, H, W)``; an incomplete last row is left out.
        columns: Images per row.
    """
    columns = min(columns, len(images))
    rows = [torch.cat(list(row), dim=-1) for row in images[: len(images) // columns * columns].split(columns)]
    canvas = torch.cat(rows, dim=-2)
    channels, height, width = canvas.shape
    lines = canvas.permute(1, 2, 0).reshape(height, width * channels)
    raw = b"".join(b"\0" + bytes(line.tolist()) for line in lines)
    header = struct.pack(">IIBBBBB", width, height, 8, 0 if channels == 1 else 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(raw)), (b"IEND", b"")]
    body = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    ]
    return _SIGNATURE + b"".join(body)
