"""Where data come from: a file, a folder, or the Hugging Face hub, read into one table per split."""

import os
import re
from pathlib import Path
from typing import Any

from weightsmith.core.errors import UsageError, near, require, unknown
from weightsmith.lab.data.hub import check_hub, switched_off

HUB = {
    "mnist": "ylecun/mnist",
    "fashion_mnist": "zalando-datasets/fashion_mnist",
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
    "stl10": "tanganke/stl10",
    "imagenet": "ILSVRC/imagenet-1k",
    "gsm8k": "openai/gsm8k",
}
"""Short names and the hub data sets that they stand for."""

BUILDERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}
"""Endings of files that are read, and the readers of ``datasets``."""

_SUBSETS = {"openai/gsm8k": "main"}  # hub data sets that cannot be loaded without a configuration
_READING: dict[str, dict[str, Any]] = {
    # a class or a text may be the word "null"
    ".csv": {"keep_default_na": False},
    ".tsv": {"keep_default_na": False, "sep": "\t"},
    ".txt": {"sample_by": "document"},
}
_SAVED = {"dataset_dict.json", "state.json"}  # what Dataset.save_to_disk leaves
SPLITS = {
    "train": {"train", "training"},
    "test": {"test", "testing"},
    "validation": {"validation", "valid", "val", "dev"},
}
"""Names of files and folders that stand for a split."""
SPLIT_OF = {name: split for split, names in SPLITS.items() for name in names}
"""The split that each of these names stands for."""


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
    if found is None and Path(name).suffix in BUILDERS:
        raise UsageError(f"data: there is no file {name!r} in {str(Path.cwd())!r}")
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
        name: See `locate`. A file is one split, ``train``; files in a folder are splits by their names; so are
            sub-folders, whose own sub-folders may be classes of images.
        subset: Configuration of a hub data set; ``""``: its default.
        data_dir: See `locate`.

    Returns:
        ``datasets.Dataset`` by split.

    Raises:
        UsageError: Nothing is there, or it cannot be read; the message names the file.
    """
    source = locate(name, data_dir)
    import datasets
    import huggingface_hub.utils

    hub: Any = huggingface_hub.utils  # it does not list what it exports

    options: dict[str, Any] = {"path": str(source), "name": subset or _SUBSETS.get(str(source))}
    if isinstance(source, Path):
        options = _files(name, source) or options
    with (
        switched_off(
            not datasets.are_progress_bars_disabled(), datasets.disable_progress_bars, datasets.enable_progress_bars
        ),
        switched_off(not hub.are_progress_bars_disabled(), hub.disable_progress_bars, hub.enable_progress_bars),
    ):
        try:
            if (
                _SAVED & {path.name for path in source.iterdir()}
                if isinstance(source, Path) and source.is_dir()
                else ()
            ):
                found = datasets.load_from_disk(str(source))
                tables = dict(found) if isinstance(found, datasets.DatasetDict) else {"train": found}
            else:
                tables = dict(datasets.load_dataset(**{key: v for key, v in options.items() if v is not None}))
        except Exception as error:  # the library wraps what a damaged file raises in errors of several kinds
            cause = _cause(error)
            fix = "; convert it to UTF-8, for example with iconv" if isinstance(cause, UnicodeDecodeError) else ""
            raise UsageError(f"data {name!r} cannot be read from {str(source)!r}: {_first_line(cause)}{fix}") from error
    if not any(len(table) for table in tables.values()):
        raise UsageError(f"data {name!r} has no rows")
    tables = {name: table for name, table in _by_split(tables).items() if len(table) or name == "train"}
    if "train" not in tables:
        raise UsageError(f"data {name!r} has no split named 'train', only {', '.join(map(repr, tables))}")
    return tables


def _by_split(tables: dict[str, Any]) -> dict[str, Any]:
    """Tables by the usual names of their splits: ``validation`` for ``val``."""
    usual = {other: split for other, split in SPLIT_OF.items() if split not in tables}
    named = {name: usual.pop(name.lower(), name) for name in tables}
    return {named[name] if list(named.values()).count(named[name]) == 1 else name: tables[name] for name in tables}


def _split_of(file: str) -> str:
    """The split that a file holds: ``"test"`` for ``my-test-2.csv``."""
    return next((split for split, names in SPLITS.items() if names & _words(file)), "train")


def _words(file: str) -> set[str]:
    return set(re.split(r"[^a-z]+", file.lower()))


def _files(name: str, source: Path) -> dict[str, Any] | None:
    """How files of one kind are read; ``None``: they are left to ``datasets``."""
    if source.is_file() and source.suffix not in BUILDERS:
        raise UsageError(f"data {name!r} must end in {', '.join(sorted(BUILDERS))}, or be a folder")
    if source.is_dir() and not any(source.iterdir()):
        raise UsageError(f"data {name!r}: the folder is empty")
    files = [source] if source.is_file() else sorted(path for path in source.iterdir() if path.suffix in BUILDERS)
    endings = {path.suffix for path in files}
    if len(endings) != 1:
        splits = [path.name for path in files if _words(path.stem) & SPLIT_OF.keys()]
        if len({Path(file).suffix for file in splits}) > 1:  # datasets would read the most frequent kind alone
            raise UsageError(f"data {name!r}: files of its splits are of several kinds, {', '.join(splits)}: use one")
        return None
    by_split: dict[str, list[str]] = {}
    for path in files:
        by_split.setdefault("train" if path == source else _split_of(path.stem), []).append(str(path))
    (ending,) = endings
    return {"path": BUILDERS[ending], "data_files": by_split, **_READING.get(ending, {})}


def column(name: str, table: Any, asked: str | None, known: tuple[str, ...], what: str) -> str:
    """Find a column: the one that was asked for, else the first of some usual names.

    Raises:
        UsageError: There is none; the message lists the columns.
    """
    names: list[str] = list(table.column_names)
    if asked is not None:
        if asked not in names:
            raise UsageError(f"data {name!r} has no column {asked!r}; {near(asked, names)}")
        return asked
    lower = {column.lower(): column for column in names}
    found: str | None = next((lower[usual] for usual in known if usual in lower), None)
    if found is None:
        raise UsageError(
            f"data {name!r} has no column for {what} (one of {', '.join(known)}), only {', '.join(names)}: "
            "name it with --columns"
        )
    return found


def read_labels(name: str, tables: dict[str, Any], label: str) -> tuple[dict[str, list[Any]], list[str] | None]:
    """Read a column of labels from every split that has it, numbered as in ``train`` whatever order a split names.

    Returns:
        Labels by split; and the names of the classes where the labels of ``train`` are their numbers.

    Raises:
        UsageError: Another split has rows of a class that ``train`` does not name.
    """
    feature = tables["train"].features[label]
    names: list[str] | None = getattr(feature, "names", None)
    labels = {split: list(table[label]) for split, table in tables.items() if label in table.column_names}
    for split, values in labels.items():
        own = getattr(tables[split].features[label], "names", None)
        if own is None or own == names or (names is None and feature.dtype != "string"):
            continue
        used = {value: own[value] for value in {*values} if value is not None and value >= 0}
        if names is not None and (unknown_names := sorted({*used.values()} - {*names})):
            raise UsageError(
                f"data {name!r}: {split} rows have classes that training does not have: {', '.join(unknown_names[:5])}"
            )
        number = {value: shown if names is None else names.index(shown) for value, shown in used.items()}
        labels[split] = [number.get(value, value) for value in values]
    return labels, names


def _cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
