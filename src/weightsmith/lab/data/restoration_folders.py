"""Folders of degraded images and their clean partners, in the layouts that restoration sets are published in.

    rainy/rain-001.png    gt/norain-001.png       Rain100L and other rain sets; also input/ and target/, or one folder
    hazy/0001_0.8_0.2.jpg gt/0001.png             SOTS, RESIDE; also synthetic/ and original/

A degraded image belongs to the clean one whose name begins it. What is in no such folder is a clean photograph, as in
BSD68, BSD400 and WED.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from weightsmith.core.errors import UsageError

_DEGRADED = {"rainy": "rain", "rain": "rain", "hazy": "haze", "haze": "haze", "synthetic": "haze", "input": ""}
_CLEAN = ("gt", "target", "norain", "clear", "original", "groundtruth", "clean")
_HAZY_NAME = re.compile(r"[^_]+_[\d.]+_[\d.]+$")
_STRENGTH = re.compile(r"(?<=\d)x\d$")  # of Rain100L's own archive: rain/X2/norain-001x2.png
_MARK = re.compile(r"^(no)?rain-?", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Scene:
    """A clean photograph, and its degraded versions by kind.

    Attributes:
        clean: Its file.
        degraded: ``(kind, file)``; empty for a photograph of which there are none.
    """

    clean: Path
    degraded: tuple[tuple[str, Path], ...] = ()


def find_scenes(root: Path, paths: Iterable[Path]) -> list[Scene]:
    """Pair degraded images with clean ones.

    Args:
        root: The folder that was given.
        paths: All images below it.

    Raises:
        UsageError: A degraded image lacks its clean one, or the other way round; the message names the file.
    """
    folders: dict[Path, list[Path]] = {}
    for path in sorted(paths):
        folders.setdefault(path.parent, []).append(path)
    found: list[Scene] = []
    taken: set[Path] = set()
    for clean_folder, clean in folders.items():
        if clean_folder == root or clean_folder.name.lower() not in _CLEAN:
            continue
        # of one set: every folder of degraded images beside it, and parts below those
        degraded = {
            folder: members
            for folder, members in folders.items()
            if any(
                place.parent == clean_folder.parent and place.name.lower() in _DEGRADED and place != root
                for place in (folder, *folder.parents)
            )
        }
        if degraded:
            found += _pair(root, clean_folder, clean, degraded)
            taken |= {clean_folder, *degraded}
    for folder, members in folders.items():
        if folder in taken:
            continue
        lonely = next((part for part in folder.relative_to(root).parts if part.lower() in ("hazy", "rainy")), None)
        if lonely is not None:
            beside = f"a folder named {', '.join(_CLEAN[:3])} beside {lonely}"
            raise UsageError(f"{members[0]} lacks its clean image: there must be {beside}")
        rainy = [path for path in members if path.stem.lower().startswith("rain-")]
        if rainy:  # both in one folder, told apart by their names
            clean = [path for path in members if path.stem.lower().startswith("norain-")]
            found += _pair(root, folder, clean, {folder: rainy}, kind="rain")
            members = [path for path in members if not path.stem.lower().startswith(("rain", "norain-"))]
        found += [Scene(path) for path in members]
    return found


def _pair(
    root: Path, folder: Path, clean: list[Path], degraded: Mapping[Path, list[Path]], kind: str = ""
) -> list[Scene]:
    by_name = {_key(path): path for path in clean}
    versions: dict[Path, list[tuple[str, Path]]] = {path: [] for path in clean}
    for place, members in degraded.items():
        for path in members:
            key = _key(path)
            partner = by_name.get(key) or by_name.get(key.partition("_")[0])
            if partner is None:
                raise UsageError(
                    f"{path} lacks its clean image in {folder}: add it, or move the file to another folder"
                )
            versions[partner].append((kind or _kind(root, place, path), path))
    for path, found in versions.items():
        if not found:
            raise UsageError(
                f"{path} lacks its degraded image in {next(iter(degraded))}: add it, or move the file to another folder"
            )
    return [Scene(path, tuple(found)) for path, found in versions.items()]


def _key(path: Path) -> str:
    """What an image shares with its partner: ``norain-001.png`` and ``rain-001.png`` are both 001."""
    return _STRENGTH.sub("", _MARK.sub("", path.stem))


def _kind(root: Path, folder: Path, path: Path) -> str:
    parts = [part.lower() for part in folder.relative_to(root.parent).parts]
    for part in reversed(parts):
        if _DEGRADED.get(part):
            return _DEGRADED[part]
        if "rain" in part.replace("train", ""):
            return "rain"
        if "haz" in part or "sots" in part or "reside" in part:
            return "haze"
        if "nois" in part:
            return "noise"
    return "haze" if _HAZY_NAME.match(path.stem) else "rain"
