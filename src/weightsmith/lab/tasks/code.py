"""Fingerprint of what the user names beside the data: functions, and files of weights."""

from pathlib import Path

from weightsmith.core.load import load_module
from weightsmith.lab.fingerprint import code_digest, digest, files_digest


def code_of(*names: str) -> str:
    """Changes when the source behind a ``module:function``, a file, or a folder does; ``""`` where there is none."""
    found = []
    for name in filter(None, names):
        where = name.rpartition(":")[0]
        if where:
            found.append(code_digest(load_module(where, name)))
        elif Path(name).is_file():
            found.append(files_digest([Path(name)]))
        elif Path(name).is_dir():
            found.append(files_digest(path for path in Path(name).iterdir() if path.is_file()))
    return digest(*found) if found else ""
