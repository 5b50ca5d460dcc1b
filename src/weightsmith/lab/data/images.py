"""Labeled images as experiments see them: three splits of normalized batches, decoded once or on the way.

A split keeps bytes (uint8) and normalizes whole batches, so that small data costs nearly nothing per step. Everything
random about a training batch follows from the split's ``seed`` and the batch's indices alone: it is the same for every
arm, whatever else draws random numbers, and for any number of loader workers.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from weightsmith.lab.data.pictures import Pictures, in_bytes
from weightsmith.lab.task import Batch

Reader = Callable[[Tensor, torch.Generator | None], Tensor]
"""``(rows (B,), generator) -> uint8 (B, C, H, W)``; with a generator augmented, with ``None`` as for evaluation."""


@dataclass(frozen=True, slots=True)
class InMemory:
    """Images that are all decoded.

    Args:
        pixels: ``(N, C, H, W)``, uint8.
    """

    pixels: Tensor

    def __call__(self, rows: Tensor, generator: torch.Generator | None) -> Tensor:
        """Take rows; augmented by a shift of up to 4 pixels and a flip (arXiv 1512.03385, section 4.2)."""
        x = self.pixels[rows]
        return x if generator is None else crop_and_flip(x, generator)


@dataclass(frozen=True, slots=True)
class OnDisk:
    """Images that are decoded when they are asked for.

    Args:
        pictures: The encoded images.
        channels: 1 (gray) or 3 (RGB); images are converted.
        size: Side of the square that is cut out, in pixels.
    """

    pictures: Pictures
    channels: int
    size: int

    def __call__(self, rows: Tensor, generator: torch.Generator | None) -> Tensor:
        """Decode rows; augmented by a random resized crop and a flip (arXiv 1409.4842, section 6)."""
        images = self.pictures.read(rows.tolist())
        if generator is None:
            return torch.stack([to_square(image, self.channels, self.size, keep=0.875) for image in images])
        draws = torch.rand(len(images), 5, generator=generator).tolist()
        crops = [_random_crop(image, self.channels, self.size, draw) for image, draw in zip(images, draws, strict=True)]
        return torch.stack(crops)


class Split(Dataset[Batch]):
    """One part of a data set, as `weightsmith.lab.task.Batches`: normalized images with their labels.

    Args:
        read: Where the bytes come from.
        labels: ``(N,)``, int64, for every row that ``read`` knows.
        rows: ``(n,)``, the rows of ``read`` that belong to this split, in order.
        mean: ``(C,)``, subtracted from pixels in [0, 1].
        std: ``(C,)``, then divided by.
        augment: Whether batches are augmented.

    Attributes:
        seed: What augmentation draws from; set it anew before each epoch.
    """

    def __init__(
        self, read: Reader, labels: Tensor, rows: Tensor, *, mean: Tensor, std: Tensor, augment: bool = False
    ) -> None:
        self.read, self.rows, self.augment, self.seed = read, rows, augment, 0
        self.labels = labels[rows]
        self._offset, self._scale = 255 * mean.view(-1, 1, 1), 255 * std.view(-1, 1, 1)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def slow(self) -> bool:
        """Whether reading decodes files."""
        return isinstance(self.read, OnDisk)

    def __getitems__(self, indices: Sequence[int] | Tensor) -> Batch:
        """Read a whole batch.

        Args:
            indices: ``(B,)``, positions within the split.

        Returns:
            Images ``(B, C, H, W)``, float32, normalized; labels ``(B,)``, int64.
        """
        at = torch.as_tensor(indices, dtype=torch.int64)
        generator = None
        if self.augment and len(at):
            generator = torch.Generator().manual_seed((self.seed + int(at[0])) % 2**63)
        x = self.read(self.rows[at], generator)
        return Batch(x.float().sub_(self._offset).div_(self._scale), self.labels[at], at)


@dataclass(frozen=True, slots=True)
class Images:
    """A data set of labeled images.

    Attributes:
        name: What it was asked for by.
        train: What is trained on, without the validation part.
        validation: The data's own validation split, else held out from the train rows; then empty when its fraction is
            0.
        test: Never trained on nor chosen by.
        channels: 1 or 3.
        size: Height and width in pixels.
        class_names: One name per label.
        mean: Per channel, of train pixels in [0, 1].
        std: Per channel, likewise.
        fingerprint: Changes when the rows or their form do.
        facts: What a reader wants to know about the splits, in words.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    channels: int
    size: int
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fingerprint: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)

    @property
    def classes(self) -> int:
        """Number of labels."""
        return len(self.class_names)


def crop_and_flip(x: Tensor, generator: torch.Generator, *, padding: int = 4) -> Tensor:
    """Shift every image by up to ``padding`` pixels (black moves in) and mirror half of them.

    Args:
        x: ``(B, C, H, W)``, any dtype.
        generator: Where the draws come from.
        padding: Largest shift in pixels.
    """
    batch, channels, height, width = x.shape
    top, left = torch.randint(2 * padding + 1, (2, batch, 1), generator=generator)
    mirrored = torch.rand(batch, 1, generator=generator) < 0.5
    down, right = top + torch.arange(height), left + torch.arange(width)
    right = torch.where(mirrored, right.flip(1), right)
    # one gather over flattened pixels: several times faster than indexing by image, row and column
    at = down[:, :, None] * (width + 2 * padding) + right[:, None, :]
    return F.pad(x, (padding,) * 4).flatten(2).gather(2, at.view(batch, 1, -1).expand(-1, channels, -1)).view_as(x)


def to_square(image: Any, channels: int, size: int, *, keep: float = 1.0) -> Tensor:
    """Cut the central square out of a PIL image and resize it.

    Args:
        image: A PIL image.
        channels: 1 or 3.
        size: Side of the result in pixels.
        keep: Side of the square, as a share of the shorter side; 0.875 is "resize to 256, crop 224".

    Returns:
        ``(channels, size, size)``, uint8.
    """
    side = keep * min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    return _resized(image, channels, size, (left, top, left + side, top + side))


def _random_crop(image: Any, channels: int, size: int, draw: Sequence[float]) -> Tensor:
    area = image.width * image.height * (0.08 + 0.92 * draw[0])
    ratio = math.exp((2 * draw[1] - 1) * math.log(4 / 3))
    width, height = min(math.sqrt(area * ratio), image.width), min(math.sqrt(area / ratio), image.height)
    left, top = draw[2] * (image.width - width), draw[3] * (image.height - height)
    x = _resized(image, channels, size, (left, top, left + width, top + height))
    return x.flip(-1) if draw[4] < 0.5 else x


def _resized(image: Any, channels: int, size: int, box: tuple[float, float, float, float]) -> Tensor:
    image = in_bytes(image, channels)
    if (*image.size, *box) != (size, size, 0, 0, size, size):
        image = image.resize((size, size), resample=2, box=box)  # 2: bilinear, antialiased
    return torch.from_numpy(np.array(image)).view(size, size, channels).permute(2, 0, 1)
