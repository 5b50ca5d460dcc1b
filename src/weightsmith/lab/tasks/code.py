"""Fingerprint of what the user names beside the data: functions, files of weights, and models of the hub."""

from pathlib import Path

from weightsmith.core.load import load_module
from weightsmith.core.own_code import code_digest, digest
from weightsmith.lab.fingerprint import files_digest
from weightsmith.lab.models.external import hub_revision


def code_of(model: str, *names: str) -> str:
    """Changes when the source behind a ``module:function``, a file, or a folder does; ``""`` where there is none.

    Args:
        model: Any of these; a name of ours, which counts with the package; or an id of the hub, whose commit counts,
            since the same id may stand for other weights tomorrow.
        *names: Any of these but the last.
    """
    found = []
    for name in filter(None, (model, *names)):
        where = name.rpartition(":")[0]
        if where:
            found.append(code_digest(load_module(where, name)))
        elif Path(name).is_file():
            found.append(files_digest([Path(name)]))
        elif Path(name).is_dir():
            found.append(files_digest(_files(Path(name))))
    if "/" in model and ":" not in model and not Path(model).exists():
        found += filter(None, [hub_revision(model)])
    return digest(*found) if found else ""


def _files(folder: Path) -> list[Path]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return [path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
