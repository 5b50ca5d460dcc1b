"""The identity of a question: a result is never reused for a question that has changed.

A run folder is named after the digest of configuration, experiment source, package, data and the user's own code.
"""

import ast
import hashlib
import inspect
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import weightsmith
from weightsmith.lab.experiment import Experiment

_CONTENT_BYTES = 2**30  # beyond that, files are told apart by name, size and time of change
_NO_RESULT_DEPENDS_ON = ("cards", "cli", "lab/report", "lab/watching.py", "lab/track.py", "tools")


def digest(*parts: str | bytes) -> str:
    """Twelve hexadecimal digits of some parts, in order."""
    total = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        total.update(len(data).to_bytes(8, "little") + data)
    return total.hexdigest()[:12]


def config_digest(config: Any) -> str:
    """Changes when any field of a configuration does."""
    return digest(json.dumps(asdict(config), sort_keys=True, default=str))


def files_digest(files: Iterable[Path]) -> str:
    """Changes when the files do: by content, or by size and time of change where all are larger than 1 GiB."""
    paths = sorted(set(files))
    by_content = sum(path.stat().st_size for path in paths) <= _CONTENT_BYTES
    parts: list[str | bytes] = []
    for path in paths:
        stat = path.stat()
        parts += [path.name, path.read_bytes() if by_content else f"{stat.st_size} {stat.st_mtime_ns}"]
    return digest(*parts)


def code_digest(module: ModuleType) -> str:
    """Changes when a module's source does, or that of a module beside it which it imports, directly or not."""
    file = getattr(module, "__file__", None)
    if file is None or not Path(file).is_file():
        return ""
    root, waiting, seen = Path(file).resolve().parent, [Path(file).resolve()], set[Path]()
    while waiting:
        path = waiting.pop()
        if path not in seen:
            seen.add(path)
            waiting += _imports(path, root)
    return digest(*(path.read_bytes() for path in sorted(seen)))


def _imports(path: Path, root: Path) -> list[Path]:
    """Files below ``root`` that a source file imports, read from its text: what has been imported so far varies."""
    try:
        tree = ast.parse(path.read_text())
    except (SyntaxError, ValueError):
        return []
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [(root, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = path.parents[node.level - 1] if node.level else root
            names += [(base, node.module)] if node.module else []
            names += [(base, f"{node.module}.{alias.name}" if node.module else alias.name) for alias in node.names]
    files = [base.joinpath(*name.split(".")) for base, name in names]
    found = [place for file in files for place in (file.with_suffix(".py"), file / "__init__.py")]
    return [place for place in found if place.is_file() and place.resolve().is_relative_to(root)]


def package_digest() -> str:
    """Changes with the version of this package, and with its source for those who work on it."""
    root = Path(weightsmith.__file__).parent
    files = [path for path in root.rglob("*.py") if not str(path.relative_to(root)).startswith(_NO_RESULT_DEPENDS_ON)]
    return f"{weightsmith.__version__} {digest(*(path.read_bytes() for path in sorted(files)))}"


def identity(experiment: Experiment[Any], config: Any, data: str) -> Mapping[str, str]:
    """What a run is identified by, part by part.

    Args:
        experiment: The experiment.
        config: The configuration.
        data: Fingerprint of the task: its data and the user's own code.
    """
    module = inspect.getmodule(experiment.job)
    ours = module is not None and module.__name__.startswith("weightsmith.")
    return {
        "configuration": config_digest(config),
        "experiment": f"{experiment.revision} {'' if ours or module is None else code_digest(module)}",
        "package": package_digest(),
        "data and model code": digest(data, experiment.code),
    }
