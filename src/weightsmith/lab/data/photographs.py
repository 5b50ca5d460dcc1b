"""Photographs to degrade and restore: those that scikit-image and scikit-learn bring, or a folder."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from weightsmith.core.errors import UsageError, require
from weightsmith.lab.data.degradations import DEGRADATIONS, Image, degrade
from weightsmith.lab.data.pictures import Files
from weightsmith.lab.data.sources import locate
from weightsmith.lab.task import Batch

BUNDLED = "photographs"
_TRAIN, _VALIDATION, _TEST = ("astronaut", "rocket"), ("coffee",), ("chelsea",)
_ENDINGS = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"}
_SIGMAS = (15, 25, 50)


@dataclass(frozen=True, slots=True)
class Photographs:
    """Whole photographs by split: no patch of a test photograph is ever trained on.

    Attributes:
        train: ``(H, W, 3)`` each, uint8.
        validation: The same.
        test: The same.
        fingerprint: Changes when they do.
    """

    train: tuple[Image, ...]
    validation: tuple[Image, ...]
    test: tuple[Image, ...]
    fingerprint: str


def load_photographs(name: str) -> Photographs:
    """Load them.

    Args:
        name: ``"photographs"`` for the bundled ones, or a folder with images; a fifth of its files, chosen by their
            names, is for the test, and a fifth of the others for validation.

    Raises:
        UsageError: There are fewer than three images, or one cannot be read.
        MissingExtra: scikit-image is needed and not installed.
    """
    if name == BUNDLED:
        images: Any = require("skimage.data", extra="vision", purpose="the bundled photographs")
        datasets: Any = require("sklearn.datasets", extra="vision", purpose="the bundled photographs")
        more = [np.ascontiguousarray(image) for image in datasets.load_sample_images().images]
        splits = [[np.asarray(getattr(images, photo)()) for photo in photos] for photos in (_TRAIN, _VALIDATION, _TEST)]
        splits[0] += more
    else:
        place = locate(name)
        if isinstance(place, str) or not place.is_dir():
            raise UsageError(f"data {name!r} must be a folder of images, or {BUNDLED!r}")
        paths = sorted((path for path in place.rglob("*") if path.suffix.lower() in _ENDINGS), key=_order)
        if len(paths) < 3:
            raise UsageError(f"data {name!r} must hold at least three images: to train on, to choose by, to test")
        test = max(1, len(paths) // 5)
        validation = max(1, (len(paths) - test) // 5)
        parts = (paths[test + validation :], paths[test : test + validation], paths[:test])
        splits = [[_rgb(image) for image in Files(part).read(range(len(part)))] for part in parts]
    digest = hashlib.sha256()
    for image in (image for split in splits for image in split):
        digest.update(repr(image.shape).encode())
        digest.update(np.ascontiguousarray(image).data)
    train, validation_images, test_images = (tuple(split) for split in splits)
    return Photographs(train, validation_images, test_images, digest.hexdigest())


class Patches:
    """Degraded patches of photographs, as `weightsmith.lab.task.Batches`; the degradations take turns.

    Args:
        photographs: Whole images.
        count: How many patches there are.
        size: Their side in pixels.
        draw_anew: Every epoch has other patches; otherwise they are always the same.

    Attributes:
        seed: What patches are drawn from; set anew before each epoch.

    Raises:
        UsageError: A photograph is smaller than a patch.
    """

    slow = False

    def __init__(self, photographs: Sequence[Image], count: int, size: int, *, draw_anew: bool) -> None:
        smallest = min(min(image.shape[:2]) for image in photographs)
        if smallest < size:
            raise UsageError(
                f"size must be at most the shorter side of the smallest photograph, {smallest}, got {size}"
            )
        self.photographs, self.count, self.size, self.draw_anew, self.seed = photographs, count, size, draw_anew, 0

    def __len__(self) -> int:
        return self.count

    def __getitems__(self, indices: Sequence[int] | Tensor) -> Batch:
        """Read patches.

        Args:
            indices: ``(B,)``.

        Returns:
            Degraded patches ``(B, 3, S, S)`` in [0, 1] as inputs, clean ones as targets.
        """
        at = torch.as_tensor(indices, dtype=torch.int64)
        pairs = [self._pair(index) for index in at.tolist()]
        degraded, clean = (
            torch.from_numpy(np.stack(side)).permute(0, 3, 1, 2).float() / 255 for side in zip(*pairs, strict=True)
        )
        return Batch(degraded, clean, at)

    def kind(self, index: int) -> str:
        """Which degradation a patch has."""
        return DEGRADATIONS[index % len(DEGRADATIONS)]

    def _pair(self, index: int) -> tuple[Image, Image]:
        generator = np.random.default_rng([self.seed if self.draw_anew else 0, index])
        image = self.photographs[int(generator.integers(len(self.photographs)))]
        top, left = (generator.integers(side - self.size + 1) for side in image.shape[:2])
        clean = image[top : top + self.size, left : left + self.size]
        sigma = 25
        if self.draw_anew:
            turned: Image = np.rot90(clean, int(generator.integers(4)))
            clean = turned[:, ::-1] if generator.integers(2) else turned
            sigma = _SIGMAS[int(generator.integers(len(_SIGMAS)))]
        clean = np.ascontiguousarray(clean)
        return degrade(clean, self.kind(index), generator, sigma), clean


def _rgb(image: Any) -> Image:
    return np.asarray(image.convert("RGB"))


def _order(path: Path) -> str:
    return hashlib.sha256(path.name.encode()).hexdigest()
