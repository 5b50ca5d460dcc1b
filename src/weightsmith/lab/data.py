"""Named image data: the bundled digits, a folder, or a data set of the Hugging Face hub.

A folder is read as the hub would: parquet files named after their split, or ``train/<class>/<image>``. So one call
serves a machine with a network and one without.
"""

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

from weightsmith.core.errors import UsageError, require, unknown
from weightsmith.lab.hub import check_hub, switched_off
from weightsmith.lab.images import Images, InMemory, OnDisk, Reader, Split, to_square

HUB = {
    "mnist": "ylecun/mnist",
    "fashion_mnist": "zalando-datasets/fashion_mnist",
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
    "imagenet": "ILSVRC/imagenet-1k",
}
"""Short names and the hub data sets that they stand for."""

IN_MEMORY_BYTES = 2**30
"""Data sets that are larger than this when decoded are decoded on the way."""

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
    data_dir: str | Path | None = None,
) -> Images:
    """Load a data set of labelled images.

    The validation part is cut from the (first ``train_examples``) train rows by a seed of its own: it is the same for
    every job. A data set without a labelled test split uses its validation split as such, or gives up a fifth of its
    train rows. Decoded small data is kept in ``$WEIGHTSMITH_CACHE`` (``~/.cache/weightsmith``).

    Args:
        name: ``"digits"`` (bundled), a short name of ``HUB``, a hub id ``"owner/name"``, or a folder.
        train_examples: Use the first so many train rows, validation included; ``None``: all.
        test_examples: Use the first so many test rows; ``None``: all.
        validation_fraction: Share of the train rows that is held out, in [0, 1).
        augment: Small data: random crop from 4 pixels of padding, and flip; large data: random resized crop, and flip.
        size: Side in pixels to resize to; ``None``: that of images which are alike and fit into memory, else 224.
        data_dir: Folder with one sub-folder per data set, looked into first; ``None``: ``$WEIGHTSMITH_DATA``.

    Raises:
        UsageError: The name is unknown, there is neither a folder nor a network, or the columns are not understood.
        MissingExtra: ``datasets`` or ``pillow`` is needed and not installed.
    """
    if not 0 <= validation_fraction < 1:
        raise UsageError(f"validation_fraction must be at least 0 and below 1, got {validation_fraction}")
    for argument, value in {"train_examples": train_examples, "test_examples": test_examples, "size": size}.items():
        if value is not None and value < 1:
            raise UsageError(f"{argument} must be at least 1, got {value}")
    if name == "digits":
        parts = _digits(train_examples, test_examples, size)
    else:
        parts = _parts(name, train_examples, test_examples, size, data_dir)
    (train, train_labels), (test, test_labels), names = parts
    order = torch.randperm(len(train_labels), generator=torch.Generator().manual_seed(0))
    cut = min(round(validation_fraction * len(order)), len(order) - 1)
    held_out, kept = order[:cut].sort().values, order[cut:].sort().values
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
    )


def check_data(name: str, data_dir: str | Path | None = None) -> None:
    """Say at once, before anything expensive starts, that a data set cannot be had.

    Args:
        name: As in :func:`load_images`.
        data_dir: As in :func:`load_images`.

    Raises:
        UsageError: The name is unknown, or there is neither a folder nor a network.
        MissingExtra: ``datasets`` or ``pillow`` is needed and not installed.
    """
    if name != "digits":
        _locate(name, data_dir)


def _digits(
    train_examples: int | None, test_examples: int | None, size: int | None
) -> tuple[_Part, _Part, tuple[str, ...]]:
    from sklearn.datasets import load_digits  # slow to import, and only this data set needs it

    bundled = load_digits()
    pixels = torch.from_numpy(bundled.images).mul(15)[:, None]  # grey levels 0 to 16
    if size is not None:
        pixels = F.interpolate(pixels, (size, size), mode="bilinear", antialias=True)
    pixels, labels = pixels.round().byte(), torch.from_numpy(bundled.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    test, train = order.tensor_split([len(order) // 5])
    train, test = train[:train_examples], test[:test_examples]
    names = tuple(str(name) for name in bundled.target_names)
    return (InMemory(pixels[train]), labels[train]), (InMemory(pixels[test]), labels[test]), names


def _parts(
    name: str, train_examples: int | None, test_examples: int | None, size: int | None, data_dir: str | Path | None
) -> tuple[_Part, _Part, tuple[str, ...]]:
    tables = _load(name, _locate(name, data_dir))
    if "train" not in tables:
        raise UsageError(f"data {name!r} has no split named 'train', only {', '.join(map(repr, tables))}")
    image, label = _columns(name, tables["train"])
    train, test = _train_and_test(tables, label)
    names = tuple(train.features[label].names)
    train, test = _first(train, train_examples), _first(test, test_examples)
    labels = [table.select_columns(label).with_format("torch")[:][label] for table in (train, test)]
    train, test = train.select_columns(image), test.select_columns(image)
    some = train[:16][image]
    channels = 1 if all(picture.mode in ("1", "L", "I;16") for picture in some) else 3
    alike = len({picture.size for picture in some}) == 1
    side = size or (min(some[0].size) if alike else _LARGE_SIZE)
    fits = (len(train) + len(test)) * channels * side**2 <= IN_MEMORY_BYTES
    if not fits and size is None:
        side = min(side, _LARGE_SIZE)
    readers: list[Reader] = [
        InMemory(_decoded(table, channels, side)) if fits else OnDisk(table, channels, side) for table in (train, test)
    ]
    return (readers[0], labels[0]), (readers[1], labels[1]), names


def _locate(name: str, data_dir: str | Path | None) -> Path | str:
    """Find the folder of a data set, or else its hub id, checked to be reachable."""
    root = data_dir or os.environ.get("WEIGHTSMITH_DATA")
    if root and not Path(root).is_dir():
        raise UsageError(f"{'data_dir' if data_dir else 'WEIGHTSMITH_DATA'} must be a folder, got {str(root)!r}")
    hub_id = HUB.get(name, name)
    folders = [Path(root, part) for part in (name, hub_id.split("/")[-1])] if root else []
    if name not in HUB:
        folders.append(Path(name))
    found = next((folder for folder in folders if folder.is_dir()), None)
    if found is None and "/" not in hub_id:
        raise unknown("data", name, ["digits", *HUB])
    datasets = require("datasets", extra="hf", purpose=f"the data set {name!r}")
    require("PIL", extra="hf", purpose=f"the images of {name!r}")
    if found is None:
        mend = (
            f"set --data-dir or WEIGHTSMITH_DATA to a folder with {name.split('/')[-1]}/train.parquet and test.parquet "
            "as on the hub, or use --data digits"
        )
        check_hub("dataset", hub_id, cached=lambda: datasets.load_dataset_builder(hub_id), mend=mend)
    return found or hub_id


def _load(name: str, source: Path | str) -> dict[str, Any]:
    import datasets
    from huggingface_hub import utils as hub

    with (
        switched_off(
            not datasets.are_progress_bars_disabled(), datasets.disable_progress_bars, datasets.enable_progress_bars
        ),
        switched_off(not hub.are_progress_bars_disabled(), hub.disable_progress_bars, hub.enable_progress_bars),
    ):
        try:
            return dict(datasets.load_dataset(str(source)))
        except FileNotFoundError as error:  # also what a hub data set without access to it raises
            raise UsageError(f"data {name!r} cannot be read from {str(source)!r}: {error}") from error


def _columns(name: str, table: Any) -> tuple[str, str]:
    import datasets

    images = [column for column, feature in table.features.items() if isinstance(feature, datasets.Image)]
    labels = [column for column, feature in table.features.items() if isinstance(feature, datasets.ClassLabel)]
    if not images or not labels:
        raise UsageError(
            f"data {name!r} needs a column of type Image and one of type ClassLabel, got {dict(table.features)}; "
            "`datasets.Dataset.to_parquet` writes both so that they are recognised"
        )
    return images[0], labels[0]  # the finer of two labels comes first, as in CIFAR-100


def _train_and_test(tables: dict[str, Any], label: str) -> tuple[Any, Any]:
    for split in ("test", "validation"):
        # ImageNet's test labels are withheld and read -1
        if split in tables and tables[split].select_columns(label)[0][label] >= 0:
            return tables["train"], tables[split]
    parts = tables["train"].train_test_split(test_size=0.2, seed=0)
    return parts["train"], parts["test"]


def _first(table: Any, examples: int | None) -> Any:
    return table if examples is None or examples >= len(table) else table.select(range(examples))


def _decoded(table: Any, channels: int, size: int) -> Tensor:
    def decode() -> Tensor:
        pixels = torch.empty(len(table), channels, size, size, dtype=torch.uint8)
        done = 0
        for batch in table.iter(batch_size=256):
            (images,) = batch.values()
            for row, image in enumerate(images, done):
                pixels[row] = to_square(image, channels, size)
            done += len(images)
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
