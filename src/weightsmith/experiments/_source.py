"""Where a data set of texts comes from."""

import os
from pathlib import Path

from weightsmith.core.errors import UsageError, require
from weightsmith.lab.hub import check_hub

PURPOSE = "the language task"


def find_source(name: str, fields: str) -> str:
    """Find a data set of JSON lines: a folder with ``train.jsonl`` or ``test.jsonl``, or a hub id.

    Args:
        name: The folder, its name in ``$WEIGHTSMITH_DATA``, or the id.
        fields: What each row has; ends the error.

    Raises:
        UsageError: There is neither a folder nor a network.
        MissingExtra: ``datasets`` is not installed.
    """
    datasets = require("datasets", extra="hf", purpose=PURPOSE)
    root = os.environ.get("WEIGHTSMITH_DATA")
    folders = [Path(root, part) for part in (name, name.split("/")[-1])] if root else []
    found = next((folder for folder in (*folders, Path(name)) if folder.is_dir()), None)
    if found is None:
        if "/" not in name:
            raise UsageError(f"data {name!r} is neither a folder nor a hub id owner/name")
        mend = f"give a folder with train.jsonl and test.jsonl, each row with {fields}"
        check_hub("dataset", name, cached=lambda: datasets.load_dataset_builder(name), mend=mend)
    return str(found or name)
