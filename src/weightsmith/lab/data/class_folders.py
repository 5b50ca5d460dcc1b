"""Image files whose folder is their class: ``train/cat/*.png``, or ``cat/*.png`` without splits."""

from pathlib import Path

from weightsmith.core.errors import UsageError
from weightsmith.lab.data.pictures import ENDINGS, Files
from weightsmith.lab.data.sources import BUILDERS, SPLIT_OF

Labeled = tuple[Files, list[str]]
"""Files and the class of each."""


def read_class_folders(name: str, root: Path) -> dict[str, Labeled] | None:
    """Find the images of every split; the class is the first folder below the split, however deep the file lies.

    Args:
        name: Of the data, for the error.
        root: The folder.

    Returns:
        ``None``: this is no folder of class folders.

    Raises:
        UsageError: A class has no images, images lie beside the class folders, or there is no training split.
    """
    tables = {
        path
        for ending in BUILDERS
        if ending != ".txt"
        for path in [*root.glob(f"*{ending}"), *root.glob(f"*/*{ending}")]
    }
    if tables or not any(_is_image(path) for path in root.rglob("*")):
        return None
    folders = _folders(root)
    named = [(SPLIT_OF[f.name.lower()], f) for f in folders if f.name.lower() in SPLIT_OF]
    by_split = dict(named)
    if len(named) < len(folders) and not any(_folders(folder) for _, folder in named):
        by_split = {}  # a class of trains, beside others
    elif len(by_split) < len(named):
        raise UsageError(f"data {name!r}: two folders stand for one split, of {', '.join(f.name for _, f in named)}")
    if by_split and "train" not in by_split:
        raise UsageError(f"data {name!r} has no folder 'train', only {', '.join(f.name for f in by_split.values())}")
    return {split: _read(name, folder) for split, folder in (by_split or {"train": root}).items()}


def _read(name: str, folder: Path) -> Labeled:
    if not _folders(folder):
        raise UsageError(f"data {name!r}: {folder} needs a folder per class, and has one class only")
    paths: list[Path] = []
    labels: list[str] = []
    for place in _folders(folder):
        found = sorted(path for path in place.rglob("*") if _is_image(path))
        if not found:
            raise UsageError(f"data {name!r}: {place} holds no images")
        paths += found
        labels += [place.name] * len(found)
    return Files(paths), labels


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith((".", "__")))


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in ENDINGS and not path.name.startswith(".") and path.is_file()
