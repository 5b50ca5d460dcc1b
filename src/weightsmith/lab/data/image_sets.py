"""Labeled images by name: the bundled digits, a file, a folder, or a data set of the Hugging Face hub."""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from weightsmith.core.errors import UsageError, require
from weightsmith.core.files import file_atomically
from weightsmith.lab.data.class_folders import read_class_folders
from weightsmith.lab.data.images import Images, InMemory, OnDisk, Reader, Split, to_square
from weightsmith.lab.data.labels import (
    check_counts,
    hold_out,
    own_validation,
    parts_of,
    unused_validation,
    validation_facts,
)
from weightsmith.lab.data.pictures import Column, Files, Pictures, is_gray
from weightsmith.lab.data.sources import column, load_tables, locate, read_labels
from weightsmith.lab.identity import tensors_digest

IN_MEMORY_BYTES = 2**30
"""Data sets that are larger than this when decoded are decoded when they are read."""

IMAGE_COLUMNS = ("image", "img", "picture", "image_path", "path", "file", "filename", "file_name")
LABEL_COLUMNS = ("label", "labels", "class", "target", "category", "y", "fine_label")

_LARGE_SIZE = 224  # what images are cut to when they differ in size or do not fit into memory
_LOOKED_AT = 64  # images that tell size and color of all
_SAMPLE = 512  # images from which the mean and deviation of a data set on disk are estimated

_log = logging.getLogger(__name__)


def load_images(
    name: str,
    *,
    train_examples: int | None = None,
    test_examples: int | None = None,
    validation_fraction: float = 0.2,
    augment: bool = False,
    size: int | None = None,
    columns: tuple[str, ...] = (),
    subset_name: str = "",
    data_dir: str | Path | None = None,
) -> Images:
    """Load a data set of labeled images.

    Rows are left out by a seed of their own and in the same share of every class. The validation part is the data's own
    split of that name beside ``train`` and ``test``, else a share of the train rows, the same for every job. A data set
    without a labeled test split uses its validation split as such, or gives up a fifth of its train rows. Decoded small
    data are kept in ``$WEIGHTSMITH_CACHE`` (``~/.cache/weightsmith``).

    Args:
        name: ``"digits"`` (bundled), a short name of ``HUB``, a hub id ``"owner/name"``, a file or a folder.
        train_examples: Use this many train rows, validation included; ``None``: all.
        test_examples: Use this many test rows, and as many of a validation split; ``None``: all.
        validation_fraction: Share of the train rows that is held out where there is no validation split, in [0, 1).
        augment: Small data: random crop from 4 pixels of padding, and flip; large data: random resized crop, and flip.
        size: Side in pixels to resize to; ``None``: that of images of one size which fit into memory, else 224.
        columns: Names of the column of images, or of their paths, and of the column of labels; empty: usual names.
        subset_name: Configuration of a hub data set.
        data_dir: Folder with one sub-folder per data set, searched first; ``None``: ``$WEIGHTSMITH_DATA``.

    Raises:
        UsageError: The name is unknown, there is neither a folder nor a network, or the data are not labeled images.
        MissingExtra: ``datasets`` or ``pillow`` is needed and not installed.
    """
    check_counts(train_examples=train_examples, test_examples=test_examples, size=size)
    pixels: Mapping[str, Tensor] = {}
    pictures: Mapping[str, Pictures] = {}
    if name == "digits":
        pixels, values, class_names = _digits(size)
    else:
        require("PIL", extra="hf", purpose=f"the images of {name!r}")
        pictures, values, class_names = _find(name, columns, subset_name, data_dir)
    train_part, test_part, names = parts_of(
        name, values, class_names, train_examples=train_examples, test_examples=test_examples
    )
    own = own_validation(name, values, class_names, examples=test_examples)
    used = [part for part in (train_part, test_part, own) if part is not None]
    train, test, *others = (
        [InMemory(pixels[part.split][part.rows]) for part in used]
        if pixels
        else _readers([pictures[part.split].select(part.rows.tolist()) for part in used], size=size)
    )
    kept, held_out = hold_out(len(train_part.rows), 0.0 if own else validation_fraction, train_part.labels)
    mean, std = _mean_and_std(train, kept)
    channels, _, side = train(kept[:1], None).shape[1:]
    labels, test_labels = train_part.labels, test_part.labels
    content: dict[str, Any] = {
        "train": _content(train),
        "test": _content(test),
        "labels": labels,
        "test labels": test_labels,
        "": names,
    }
    validation = Split(train, labels, held_out, mean=mean, std=std)
    if own is not None:
        validation = Split(others[0], own.labels, torch.arange(len(own.labels)), mean=mean, std=std)
        content |= {"validation": _content(others[0]), "validation labels": own.labels}
    return Images(
        name=name,
        train=Split(train, labels, kept, mean=mean, std=std, augment=augment),
        validation=validation,
        test=Split(test, test_labels, torch.arange(len(test_labels)), mean=mean, std=std),
        channels=channels,
        size=side,
        class_names=names,
        mean=tuple(mean.tolist()),
        std=tuple(std.tolist()),
        fingerprint=tensors_digest(content),
        facts=validation_facts(len(own.labels) if own else None, unused_validation(values)),
    )


def _digits(size: int | None) -> tuple[dict[str, Tensor], dict[str, list[Any]], Sequence[str] | None]:
    from sklearn.datasets import load_digits  # slow to import, and only this data set needs it

    bundled = load_digits()
    pixels = torch.from_numpy(bundled.images).mul(15)[:, None]  # gray levels 0 to 16
    if size is not None:
        pixels = F.interpolate(pixels, (size, size), mode="bilinear", antialias=True)
    pixels, labels = pixels.round().byte(), torch.from_numpy(bundled.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    test, train = order.tensor_split([len(order) // 5])
    return (
        {"train": pixels[train], "test": pixels[test]},
        {"train": labels[train].tolist(), "test": labels[test].tolist()},
        tuple(str(name) for name in bundled.target_names),
    )


def _find(
    name: str, columns: tuple[str, ...], subset_name: str, data_dir: str | Path | None
) -> tuple[dict[str, Pictures], dict[str, list[Any]], Sequence[str] | None]:
    """Pictures and labels by split, and the names of classes where labels are their numbers."""
    source = locate(name, data_dir)
    if isinstance(source, Path) and source.is_dir() and not columns:
        folders = read_class_folders(name, source)
        if folders is not None:
            return (
                {split: files for split, (files, _) in folders.items()},
                {split: labels for split, (_, labels) in folders.items()},
                None,
            )
    tables = load_tables(name, subset=subset_name, data_dir=data_dir)
    image, label = _columns(name, tables["train"], columns)
    pictures = {split: _pictures(name, source, table, image) for split, table in tables.items()}
    return pictures, *read_labels(name, tables, label)


def _columns(name: str, table: Any, columns: tuple[str, ...]) -> tuple[str, str]:
    import datasets

    if columns and len(columns) != 2:
        raise UsageError(f"columns must name the images and the labels, got {columns}")
    if columns:
        image, label = (column(name, table, asked, (), "") for asked in columns)
        return image, label
    images = [key for key, feature in table.features.items() if isinstance(feature, datasets.Image)]
    labels = [key for key, feature in table.features.items() if isinstance(feature, datasets.ClassLabel)]
    return (
        images[0] if images else column(name, table, None, IMAGE_COLUMNS, "images"),
        labels[0] if labels else column(name, table, None, LABEL_COLUMNS, "labels"),
    )  # the finer of two labels comes first, as in CIFAR-100


def _pictures(name: str, source: Path | str, table: Any, image: str) -> Pictures:
    import datasets

    if isinstance(table.features[image], datasets.Image):
        return Column(table, image)
    folder = (source.parent if source.is_file() else source) if isinstance(source, Path) else Path()
    paths = []
    for value in table[image]:
        path = Path(str(value))
        found = next((place for place in (folder / path, path) if place.is_file()), None)
        if found is None:
            raise UsageError(f"data {name!r}: there is no image {str(value)!r}, here or in {str(folder)!r}")
        paths.append(found)
    return Files(paths)


def _readers(parts: Sequence[Pictures], *, size: int | None) -> list[InMemory] | list[OnDisk]:
    train = parts[0]
    some = train.read(torch.linspace(0, len(train) - 1, min(_LOOKED_AT, len(train))).long().tolist())
    channels = 1 if all(map(is_gray, some)) else 3
    one_size = len({picture.size for picture in some}) == 1
    side = size or (min(some[0].size) if one_size else _LARGE_SIZE)
    fits = sum(map(len, parts)) * channels * side**2 <= IN_MEMORY_BYTES
    if not fits and size is None:
        side = min(side, _LARGE_SIZE)
    if fits:
        return [InMemory(_decoded(pictures, channels, side)) for pictures in parts]
    return [OnDisk(pictures, channels, side) for pictures in parts]


def _content(read: InMemory | OnDisk) -> Tensor | str:
    """What identifies the images: all pixels, or the key of files that do not fit into memory."""
    return read.pixels if isinstance(read, InMemory) else read.pictures.key


def _decoded(pictures: Pictures, channels: int, size: int) -> Tensor:
    def decode() -> Tensor:
        pixels = torch.empty(len(pictures), channels, size, size, dtype=torch.uint8)
        for first in range(0, len(pictures), 256):
            rows = range(first, min(first + 256, len(pictures)))
            for row, picture in zip(rows, pictures.read(rows), strict=True):
                pixels[row] = to_square(picture, channels, size)
        return pixels

    return _cached(f"images-{pictures.key}-{channels}x{size}x{size}", decode)


def _cached(key: str, make: Callable[[], Tensor]) -> Tensor:
    folder = Path(os.environ.get("WEIGHTSMITH_CACHE") or "~/.cache/weightsmith").expanduser()
    file = folder / f"{key}.safetensors"
    try:
        return load_file(file)["pixels"]
    except (OSError, SafetensorError):
        pixels = make()
    try:
        with file_atomically(file) as fresh:
            save_file({"pixels": pixels}, fresh)
    except (OSError, SafetensorError) as error:
        _log.info("decoded images are not kept, %s cannot be written: %s", folder, error)
    return pixels


def _mean_and_std(read: Reader, rows: Tensor) -> tuple[Tensor, Tensor]:
    if isinstance(read, OnDisk):
        rows = rows[:: max(1, len(rows) // _SAMPLE)]
    pixels = read(rows, None)
    counts = torch.stack([channel.flatten().bincount(minlength=256) for channel in pixels.unbind(1)]).double()
    share, level = counts / counts.sum(1, keepdim=True), torch.arange(256) / 255.0
    mean = (share * level).sum(1)
    std = (share * (level - mean[:, None]) ** 2).sum(1).sqrt().clamp_min(1 / 255)
    return mean.float(), std.float()
