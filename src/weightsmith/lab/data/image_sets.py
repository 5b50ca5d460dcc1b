"""Labeled images by name: the bundled digits, a file, a folder, or a data set of the Hugging Face hub."""

import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from weightsmith.core.errors import UsageError, require
from weightsmith.lab.data.images import Images, InMemory, OnDisk, Reader, Split, to_square
from weightsmith.lab.data.labels import check_counts, classes_of, hold_out, subset
from weightsmith.lab.data.sources import column, load_tables, source_digest
from weightsmith.lab.fingerprint import digest

IN_MEMORY_BYTES = 2**30
"""Data sets that are larger than this when decoded are decoded when they are read."""

IMAGE_COLUMNS = ("image", "img", "picture", "image_path", "path", "file", "filename", "file_name")
LABEL_COLUMNS = ("label", "labels", "class", "target", "category", "y", "fine_label")

_LARGE_SIZE = 224  # what images are cut to when they differ in size or do not fit into memory
_SAMPLE = 512  # images from which the mean and deviation of a data set on disk are estimated

_Part = tuple[Reader, Tensor]
"""All pixels of a train or test part and all their labels."""

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

    Rows are left out by a seed of their own and in the same share of every class, and so is the validation part: it is
    the same for every job. A data set without a labeled test split uses its validation split as such, or gives up a
    fifth of its train rows. Decoded small data are kept in ``$WEIGHTSMITH_CACHE`` (``~/.cache/weightsmith``).

    Args:
        name: ``"digits"`` (bundled), a short name of ``HUB``, a hub id ``"owner/name"``, a file or a folder.
        train_examples: Use this many train rows, validation included; ``None``: all.
        test_examples: Use this many test rows; ``None``: all.
        validation_fraction: Share of the train rows that is held out, in [0, 1).
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
    if name == "digits":
        parts, source = _digits(train_examples, test_examples, size), "digits"
    else:
        require("PIL", extra="hf", purpose=f"the images of {name!r}")
        parts = _parts(name, train_examples, test_examples, size, columns, subset_name, data_dir)
        source = source_digest(name, data_dir)
    (train, train_labels), (test, test_labels), names = parts
    kept, held_out = hold_out(len(train_labels), validation_fraction, train_labels)
    mean, std = _mean_and_std(train, kept)
    channels, _, side = train(kept[:1], None).shape[1:]
    return Images(
        name=name,
        train=Split(train, train_labels, kept, mean=mean, std=std, augment=augment),
        validation=Split(train, train_labels, held_out, mean=mean, std=std),
        test=Split(test, test_labels, torch.arange(len(test_labels)), mean=mean, std=std),
        channels=channels,
        size=side,
        class_names=names,
        mean=tuple(mean.tolist()),
        std=tuple(std.tolist()),
        fingerprint=digest(source, str((len(train_labels), len(test_labels), side, channels))),
    )


def _digits(
    train_examples: int | None, test_examples: int | None, size: int | None
) -> tuple[_Part, _Part, tuple[str, ...]]:
    from sklearn.datasets import load_digits  # slow to import, and only this data set needs it

    bundled = load_digits()
    pixels = torch.from_numpy(bundled.images).mul(15)[:, None]  # gray levels 0 to 16
    if size is not None:
        pixels = F.interpolate(pixels, (size, size), mode="bilinear", antialias=True)
    pixels, labels = pixels.round().byte(), torch.from_numpy(bundled.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    test, train = order.tensor_split([len(order) // 5])
    train = train[subset(len(train), train_examples, labels[train])]
    test = test[subset(len(test), test_examples, labels[test])]
    names = tuple(str(name) for name in bundled.target_names)
    return (InMemory(pixels[train]), labels[train]), (InMemory(pixels[test]), labels[test]), names


def _parts(
    name: str,
    train_examples: int | None,
    test_examples: int | None,
    size: int | None,
    columns: tuple[str, ...],
    subset_name: str,
    data_dir: str | Path | None,
) -> tuple[_Part, _Part, tuple[str, ...]]:
    tables = load_tables(name, subset=subset_name, data_dir=data_dir)
    image, label = _columns(name, tables["train"], columns)
    train, test = _train_and_test(tables, label)
    train_labels, test_labels, names = _labels(name, train, test, label)
    rows = subset(len(train), train_examples, train_labels), subset(len(test), test_examples, test_labels)
    train, test = (
        _as_images(name, table, image).select(chosen.tolist()).select_columns(image)
        for table, chosen in zip((train, test), rows, strict=True)
    )
    some = _decode(name, train, image, range(min(16, len(train))))
    channels = 1 if all(picture.mode in ("1", "L", "I;16") for picture in some) else 3
    one_size = len({picture.size for picture in some}) == 1
    side = size or (min(some[0].size) if one_size else _LARGE_SIZE)
    fits = (len(train) + len(test)) * channels * side**2 <= IN_MEMORY_BYTES
    if not fits and size is None:
        side = min(side, _LARGE_SIZE)
    readers: list[Reader] = [
        InMemory(_decoded(name, table, channels, side)) if fits else OnDisk(table, channels, side)
        for table in (train, test)
    ]
    return (readers[0], train_labels[rows[0]]), (readers[1], test_labels[rows[1]]), names


def _columns(name: str, table: Any, columns: tuple[str, ...]) -> tuple[str, str]:
    import datasets

    if columns and len(columns) != 2:
        raise UsageError(f"columns must name the images and the labels, got {columns}")
    if columns:
        image, label = (column(name, table, asked, (), "") for asked in columns)
        return image, label
    images = [key for key, feature in table.features.items() if isinstance(feature, datasets.Image)]
    labels = [key for key, feature in table.features.items() if isinstance(feature, datasets.ClassLabel)]
    if images and not labels and len(table.column_names) == 1:
        raise UsageError(f"data {name!r} has no labels or one class only: a folder of images needs a folder per class")
    return (
        images[0] if images else column(name, table, None, IMAGE_COLUMNS, "images"),
        labels[0] if labels else column(name, table, None, LABEL_COLUMNS, "labels"),
    )  # the finer of two labels comes first, as in CIFAR-100


def _labels(name: str, train: Any, test: Any, label: str) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    values = [table.select_columns(label)[:][label] for table in (train, test)]
    names = getattr(train.features[label], "names", None)
    first, second, classes = classes_of(name, *values)
    if names is None:
        return first, second, classes
    # numbered already: a class that no row has keeps its number
    return torch.tensor(values[0]), torch.tensor(values[1], dtype=torch.int64), tuple(names)


def _train_and_test(tables: dict[str, Any], label: str) -> tuple[Any, Any]:
    for split in ("test", "validation"):
        # ImageNet's test labels are withheld and read -1
        if split in tables and label in tables[split].column_names:
            first = tables[split].select_columns(label)[0][label]
            if not (isinstance(first, int) and first < 0):
                return tables["train"], tables[split]
    parts = tables["train"].train_test_split(test_size=0.2, seed=0)
    return parts["train"], parts["test"]


def _as_images(name: str, table: Any, image: str) -> Any:
    import datasets

    if isinstance(table.features[image], datasets.Image):
        return table
    source = Path(name)
    folder = source.parent if source.is_file() else source

    def full_path(row: dict[str, Any]) -> dict[str, str]:
        path = Path(str(row[image]))
        found = path if path.is_file() else folder / path
        if not found.is_file():
            raise UsageError(f"data {name!r}: there is no image {str(path)!r}, here or in {str(folder)!r}")
        return {image: str(found)}

    try:
        return table.map(full_path).cast_column(image, datasets.Image())
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(f"data {name!r}: column {image!r} holds neither images nor paths of images") from error


def _decode(name: str, table: Any, image: str, rows: Any) -> list[Any]:
    """Decode some images, or name the first that is broken."""
    try:
        return table[list(rows)][image]
    except Exception as error:
        import datasets

        raw = table.cast_column(image, datasets.Image(decode=False))
        for row in rows:
            try:
                table[row]
            except Exception:
                where = raw[row][image].get("path") or f"row {row}"
                raise UsageError(f"data {name!r}: {where} is not an image that can be read ({error})") from error
        raise


def _decoded(name: str, table: Any, channels: int, size: int) -> Tensor:
    def decode() -> Tensor:
        (image,) = table.column_names
        pixels = torch.empty(len(table), channels, size, size, dtype=torch.uint8)
        for first in range(0, len(table), 256):
            rows = range(first, min(first + 256, len(table)))
            for row, picture in zip(rows, _decode(name, table, image, rows), strict=True):
                pixels[row] = to_square(picture, channels, size)
        return pixels

    return _cached(f"images-{table._fingerprint}-{channels}x{size}x{size}", decode)


def _cached(key: str, make: Callable[[], Tensor]) -> Tensor:
    folder = Path(os.environ.get("WEIGHTSMITH_CACHE") or "~/.cache/weightsmith").expanduser()
    file = folder / f"{key}.safetensors"
    try:
        return load_file(file)["pixels"]
    except (OSError, SafetensorError):
        pixels = make()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            save_file({"pixels": pixels}, Path(scratch, file.name))
            Path(scratch, file.name).replace(file)
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
