"""Fingerprint of what the user names beside the data: functions, files of weights, and models of the hub."""

from pathlib import Path

from weightsmith.core.load import load_module
from weightsmith.lab.fingerprint import code_digest, digest, files_digest
from weightsmith.lab.models.external import hub_revision


def code_of(*names: str, hub_model: str = "") -> str:
    """Changes when the source behind a ``module:function``, a file, or a folder does; ``""`` where there is none.

    Args:
        *names: Any of these, or names of ours, which count with the package.
        hub_model: A model, whose commit counts if it is the hub's: the same id may stand for other weights tomorrow.
    """
    found = []
    for name in filter(None, names):
        where = name.rpartition(":")[0]
        if where:
            found.append(code_digest(load_module(where, name)))
        elif Path(name).is_file():
            found.append(files_digest([Path(name)]))
        elif Path(name).is_dir():
            found.append(files_digest(_files(Path(name))))
    if "/" in hub_model and ":" not in hub_model and not Path(hub_model).exists():
        found += filter(None, [hub_revision(hub_model)])
    return digest(*found) if found else ""


def _files(folder: Path) -> list[Path]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return [path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
