"""The identity of a question: a result is never reused for a question that has changed.

A run folder is named after the digest of configuration, experiment source, package, data and the user's own code.
"""

import inspect
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import weightsmith
from weightsmith.core.notebook import digest_without_file
from weightsmith.core.outdated import check_function
from weightsmith.core.own_code import code_digest, digest
from weightsmith.lab.experiment import Experiment
from weightsmith.lab.identity import bound, bound_words

_CONTENT_BYTES = 2**30  # beyond that, files are told apart by name, size and time of change
_NO_RESULT_DEPENDS_ON = ("cards", "cli", "lab/report", "lab/watching.py", "lab/track.py", "tools")


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


def function_digest(function: Any, depth: int = 3) -> str:
    """Changes when the source behind a function or callable object does; ``""`` for ours: the package counts whole.

    Where there is no file, as in a notebook, the compiled function counts, and what it uses.

    Args:
        function: May be a ``partial`` or a closure.
        depth: How many functions bound to functions are looked into.

    Raises:
        UsageError: A file was edited after what it holds was imported here.
    """
    inner = [value for value in bound(function) if isinstance(value, partial) or inspect.isroutine(value)]
    found = [function_digest(value, depth - 1) for value in inner if depth]
    while isinstance(function, partial):
        function = function.func
    plain = inspect.unwrap(function if inspect.isroutine(function) else type(function).__call__)
    module = sys.modules.get(getattr(plain, "__module__", None) or "")
    if module is not None and module.__name__.partition(".")[0] != "weightsmith":
        found.append(code_digest(module) or digest_without_file(plain))
        check_function(plain, Path(getattr(module, "__file__", None) or "").resolve())
    return " ".join(sorted({*found} - {""}))


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
    parts = [part for part in (experiment.job, experiment.start, experiment.task, experiment.arms) if part is not None]
    code = {function_digest(part) for part in parts} | {bound_words(part) for part in parts}
    return {
        "configuration": config_digest(config),
        "experiment": f"{experiment.revision} {digest(*sorted(code))}",
        "package": package_digest(),
        "data and model code": digest(data, experiment.code),
    }
