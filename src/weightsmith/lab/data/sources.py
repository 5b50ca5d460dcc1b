"""Where data come from: a file, a folder, or the Hugging Face hub, read into one table per split."""

import logging
import os
from pathlib import Path
from typing import Any

from weightsmith.core.errors import UsageError, near, require, unknown
from weightsmith.lab.data.hub import check_hub, switched_off
from weightsmith.lab.fingerprint import digest, files_digest

HUB = {
    "mnist": "ylecun/mnist",
    "fashion_mnist": "zalando-datasets/fashion_mnist",
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
    "imagenet": "ILSVRC/imagenet-1k",
    "gsm8k": "openai/gsm8k",
}
"""Short names and the hub data sets that they stand for."""

_BUILDERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}
_SUBSETS = {"openai/gsm8k": "main"}  # hub data sets that cannot be loaded without a configuration
_log = logging.getLogger(__name__)


def locate(name: str, data_dir: str | Path | None = None) -> Path | str:
    """Find a file or folder, or else a hub id, checked to be reachable.

    Args:
        name: A path, a short name of ``HUB``, or a hub id ``"owner/name"``.
        data_dir: Folder with one sub-folder per data set, searched first; ``None``: ``$WEIGHTSMITH_DATA``.

    Raises:
        UsageError: There is neither a file, a folder nor a network.
        MissingExtra: ``datasets`` is not installed.
    """
    root = data_dir or os.environ.get("WEIGHTSMITH_DATA")
    if root and not Path(root).is_dir():
        raise UsageError(f"{'data_dir' if data_dir else 'WEIGHTSMITH_DATA'} must be a folder, got {str(root)!r}")
    hub_id = HUB.get(name, name)
    places = [Path(root, part) for part in (name, hub_id.split("/")[-1])] if root else []
    if name not in HUB:
        places.append(Path(name))
    found = next((place for place in places if place.exists()), None)
    if found is None and "/" not in hub_id:
        raise unknown("data", name, ["digits", *HUB])
    datasets = require("datasets", extra="hf", purpose=f"the data set {name!r}")
    if found is None:
        fix = (
            f"set --data-dir or WEIGHTSMITH_DATA to a folder with {name.split('/')[-1]}/train.parquet and test.parquet "
            "as on the hub, or use --data digits"
        )
        check_hub("dataset", hub_id, cached=lambda: datasets.load_dataset_builder(hub_id), fix=fix)
    return found or hub_id


def load_tables(name: str, *, subset: str = "", data_dir: str | Path | None = None) -> dict[str, Any]:
    """Read every split.

    Args:
        name: See :func:`locate`. A file is one split, ``train``; files in a folder are splits by their names; so are
            sub-folders, whose own sub-folders may be classes of images.
        subset: Configuration of a hub data set; ``""``: its default.
        data_dir: See :func:`locate`.

    Returns:
        ``datasets.Dataset`` by split.

    Raises:
        UsageError: Nothing is there, or it cannot be read; the message names the file.
    """
    source = locate(name, data_dir)
    import datasets
    from huggingface_hub import utils as hub

    options: dict[str, Any] = {"path": str(source), "name": subset or _SUBSETS.get(str(source))}
    if isinstance(source, Path) and source.is_file():
        if source.suffix not in _BUILDERS:
            raise UsageError(f"data {name!r} must end in {', '.join(sorted(_BUILDERS))}, or be a folder")
        options = {"path": _BUILDERS[source.suffix], "data_files": {"train": str(source)}}
        if source.suffix == ".tsv":
            options["sep"] = "\t"
    elif isinstance(source, Path) and not any(source.iterdir()):
        raise UsageError(f"data {name!r}: the folder is empty")
    with (
        switched_off(
            not datasets.are_progress_bars_disabled(), datasets.disable_progress_bars, datasets.enable_progress_bars
        ),
        switched_off(not hub.are_progress_bars_disabled(), hub.disable_progress_bars, hub.enable_progress_bars),
    ):
        try:
            tables = dict(datasets.load_dataset(**{key: value for key, value in options.items() if value is not None}))
        except UnicodeDecodeError as error:
            raise UsageError(f"data {name!r} is not UTF-8 text: {error}; convert it, for example with iconv") from error
        except Exception as error:  # the library wraps what a damaged file raises in errors of several kinds
            raise UsageError(f"data {name!r} cannot be read from {str(source)!r}: {_first_line(error)}") from error
    if not any(len(table) for table in tables.values()):
        raise UsageError(f"data {name!r} has no rows")
    if "train" not in tables:
        raise UsageError(f"data {name!r} has no split named 'train', only {', '.join(map(repr, tables))}")
    return tables


def source_digest(name: str, data_dir: str | Path | None = None) -> str:
    """Changes when the files do that :func:`load_tables` reads; of the hub, the name and the cached revision."""
    source = locate(name, data_dir)
    if isinstance(source, Path):
        return files_digest([source] if source.is_file() else (path for path in source.rglob("*") if path.is_file()))
    return digest(source)


def column(name: str, table: Any, asked: str | None, known: tuple[str, ...], what: str) -> str:
    """Find a column: the one that was asked for, else the first of some usual names.

    Raises:
        UsageError: There is none; the message lists the columns.
    """
    names = list(table.column_names)
    if asked is not None:
        if asked not in names:
            raise UsageError(f"data {name!r} has no column {asked!r}; {near(asked, names)}")
        return asked
    lower = {column.lower(): column for column in names}
    found = next((lower[usual] for usual in known if usual in lower), None)
    if found is None:
        raise UsageError(
            f"data {name!r} has no column for {what} (one of {', '.join(known)}), only {', '.join(names)}: "
            "name it with --columns"
        )
    return found


def _first_line(error: BaseException) -> str:
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    lines = str(cause).strip().splitlines()
    return f"{type(cause).__name__}: {lines[0] if lines else ''}"
