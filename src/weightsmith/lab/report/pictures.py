"""Pictures that jobs have kept beside their results, such as grids of samples, embedded in the page."""

import base64
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from weightsmith.lab.experiment import Arm
from weightsmith.lab.record import JobResult, job_folder

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_MOST, _MOST_BYTES = 4, 2**18  # per arm, and of one file: the page holds them all


@dataclass(frozen=True, slots=True)
class Picture:
    """One of them: its heading, and where the page has it from."""

    title: str
    source: str


def pictures(run_folder: Path, arms: Sequence[Arm], jobs: Sequence[JobResult]) -> tuple[Picture, ...]:
    """The PNG files of every arm's first finished seed, at most four."""
    found = []
    for arm in arms:
        seeds = [job.seed for job in jobs if job.arm == arm.name]
        files = sorted(job_folder(run_folder, arm.name, min(seeds)).glob("*.png"))[:_MOST] if seeds else []
        for file in files:
            content = file.read_bytes() if file.stat().st_size <= _MOST_BYTES else b""
            if content.startswith(_SIGNATURE):
                title = f"{arm.label}, seed {min(seeds)}" + (f": {file.stem}" if len(files) > 1 else "")
                found.append(Picture(title, f"data:image/png;base64,{base64.b64encode(content).decode()}"))
    return tuple(found)


def png(images: Tensor, columns: int = 8) -> bytes:
    """A PNG file of images side by side; written by hand, since nothing else here needs an imaging library.

    Args:
        images: uint8 ``(N, 1 or 3, H, W)``; an incomplete last row is left out.
        columns: Images per row.
    """
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
