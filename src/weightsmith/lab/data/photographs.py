"""Photographs to degrade and restore: those that scikit-image and scikit-learn bring, or a folder."""

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from weightsmith.core.errors import UsageError, require
from weightsmith.lab.data.degradations import DEGRADATIONS, Image, degrade
from weightsmith.lab.data.pictures import Files
from weightsmith.lab.data.restoration_folders import Scene, find_scenes
from weightsmith.lab.data.sources import SPLIT_OF, locate
from weightsmith.lab.task import Batch

BUNDLED = "photographs"
_TRAIN, _VALIDATION, _TEST = ("astronaut", "rocket"), ("coffee",), ("chelsea",)
_ENDINGS = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"}
_SIGMAS = (15, 25, 50)
SPLITS = ("train", "validation", "test")
Pair = tuple[Image, Image]


@dataclass(frozen=True, slots=True)
class Photographs:
    """Whole photographs by split: no patch of a test photograph is ever trained on.

    Attributes:
        train: ``(H, W, 3)`` each, uint8.
        validation: The same.
        test: The same.
        fingerprint: Changes when they do.
        pairs: By split and kind, ``(degraded, clean)`` of sets that are published in pairs; other kinds are made.
    """

    train: tuple[Image, ...]
    validation: tuple[Image, ...]
    test: tuple[Image, ...]
    fingerprint: str
    pairs: Mapping[str, Mapping[str, Sequence[Pair]]] = field(default_factory=dict)


def load_photographs(name: str) -> Photographs:
    """Load them.

    Args:
        name: ``"photographs"`` for the bundled ones, or a folder with images, clean ones or pairs in the layouts of
            `weightsmith.lab.data.restoration_folders`. Folders named train, val and test divide them; else a fifth of
            the clean images, chosen by their names, is for the test, and a fifth of the others for validation, with
            all their degraded versions.

    Raises:
        UsageError: There are fewer than three images, one cannot be read, or one lacks its partner.
        MissingExtra: scikit-image is needed and not installed.
    """
    pairs: dict[str, dict[str, list[Pair]]] = {}
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
        parts = _divided(name, find_scenes(place, (p for p in place.rglob("*") if p.suffix.lower() in _ENDINGS)), place)
        splits = [[_read(scene.clean) for scene in part] for part in parts]
        for split, part, images in zip(SPLITS, parts, splits, strict=True):
            for scene, clean in zip(part, images, strict=True):
                for kind, path in scene.degraded:
                    pairs.setdefault(split, {}).setdefault(kind, []).append((_partner(path, scene.clean, clean), clean))
        _check_kinds(name, pairs)
    digest = hashlib.sha256()
    degraded = (pair[0] for kinds in pairs.values() for kind in sorted(kinds) for pair in kinds[kind])
    for image in itertools.chain(*splits, degraded):
        digest.update(repr(image.shape).encode())
        digest.update(np.ascontiguousarray(image).data)
    train, validation_images, test_images = (tuple(split) for split in splits)
    return Photographs(train, validation_images, test_images, digest.hexdigest(), pairs)


def _divided(name: str, scenes: Sequence[Scene], root: Path) -> list[list[Scene]]:
    """Scenes for training, validation and test; a clean image and all that was made of it are in one of them."""
    if len(scenes) < 3:
        raise UsageError(f"data {name!r} must hold at least three images: to train on, to choose by, to test")
    named: dict[str, list[Scene]] = {split: [] for split in SPLITS}
    rest: list[Scene] = []
    for scene in sorted(scenes, key=lambda scene: _order(scene.clean)):
        parts = [part.lower() for part in scene.clean.relative_to(root).parts[:-1]]
        split = next((SPLIT_OF[part] for part in parts if part in SPLIT_OF), None)
        (rest if split is None else named[split]).append(scene)
    # by kind, so that a small set of pairs is in all splits
    for kinds, members in _by_kind(rest).items():
        test = 0 if kinds in _by_kind(named["test"]) else max(1, len(members) // 5)
        named["test"] += members[:test]
        named["train"] += members[test:]
    validated = _by_kind(named["validation"])
    for kinds, members in _by_kind(named["train"]).items():
        if kinds not in validated:  # published sets have none
            chosen = members[: max(1, len(members) // 5)]
            named["validation"] += chosen
            named["train"] = [scene for scene in named["train"] if scene not in chosen]
    for split, members in named.items():
        if not members:
            raise UsageError(f"data {name!r} leaves no image for {split}: add some, or name the folders otherwise")
    return [named[split] for split in SPLITS]


def _by_kind(scenes: Sequence[Scene]) -> dict[frozenset[str], list[Scene]]:
    found: dict[frozenset[str], list[Scene]] = {}
    for scene in scenes:
        found.setdefault(frozenset(kind for kind, _ in scene.degraded), []).append(scene)
    return found


def _check_kinds(name: str, pairs: Mapping[str, Mapping[str, Sequence[Pair]]]) -> None:
    kinds = {kind for found in pairs.values() for kind in found}
    for split in SPLITS:
        missing = sorted(kinds - set(pairs.get(split, {})))
        if missing:
            raise UsageError(f"data {name!r} has no pair with {missing[0]} for {split}: it takes at least three scenes")


def _partner(path: Path, clean_path: Path, clean: Image) -> Image:
    image = _read(path)
    if image.shape != clean.shape:
        sizes = " and ".join(f"{pixels.shape[1]} x {pixels.shape[0]}" for pixels in (image, clean))
        raise UsageError(f"{path} must have the size of {clean_path}, got {sizes}")
    return image


def _read(path: Path) -> Image:
    return _rgb(Files([path]).read([0])[0])


class Patches:
    """Degraded patches of photographs, as `weightsmith.lab.task.Batches`; the degradations take turns.

    Args:
        photographs: Whole images.
        count: How many patches there are.
        size: Their side in pixels.
        draw_anew: Every epoch has other patches; otherwise they are always the same.
        pairs: ``(degraded, clean)`` by kind, instead of degrading photographs.

    Attributes:
        seed: What patches are drawn from; set anew before each epoch.

    Raises:
        UsageError: A photograph is smaller than a patch.
    """

    slow = False

    def __init__(
        self,
        photographs: Sequence[Image],
        count: int,
        size: int,
        *,
        draw_anew: bool,
        pairs: Mapping[str, Sequence[Pair]] | None = None,
    ) -> None:
        self.pairs = pairs or {}
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
        pairs = self.pairs.get(self.kind(index))
        of = self.photographs if pairs is None else pairs
        chosen = int(generator.integers(len(of)))
        both: tuple[Image, ...] = (self.photographs[chosen],) if pairs is None else pairs[chosen]
        top, left = (generator.integers(side - self.size + 1) for side in both[0].shape[:2])
        both = tuple(image[top : top + self.size, left : left + self.size] for image in both)
        sigma = 25
        if self.draw_anew:
            turns, flipped = int(generator.integers(4)), bool(generator.integers(2))
            both = tuple(np.rot90(image, turns)[:, :: -1 if flipped else 1] for image in both)
            sigma = _SIGMAS[int(generator.integers(len(_SIGMAS)))]
        *degraded, clean = map(np.ascontiguousarray, both)
        return (degraded[0] if degraded else degrade(clean, self.kind(index), generator, sigma)), clean


def _rgb(image: Any) -> Image:
    return np.asarray(image.convert("RGB"))


def _order(path: Path) -> str:
    return hashlib.sha256(path.name.encode()).hexdigest()
