"""Which code is the user's own: neither installed, nor Python's, nor ours; and whether it has changed."""

import ast
import hashlib
import sys
import sysconfig
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType

from weightsmith.core.outdated import check_current

_OURS = Path(__file__).resolve().parents[1]


@cache
def _installed() -> tuple[Path, ...]:
    paths = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    return tuple(Path(path).resolve() for path in paths if path)


def is_own(path: Path) -> bool:
    """Whether a file or folder is the user's own."""
    path = path.resolve()
    if {"site-packages", "dist-packages"} & set(path.parts):
        return False
    return not any(path.is_relative_to(root) for root in (*_installed(), _OURS))


def own_path() -> list[Path]:
    """Folders that modules which are not installed are imported from, the current one among them."""
    entries = dict.fromkeys(Path(entry).resolve() for entry in [*sys.path, ""])
    return [entry for entry in entries if entry.is_dir() and is_own(entry)]


def digest(*parts: str | bytes) -> str:
    """Twelve hexadecimal digits of some parts, in order."""
    total = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        total.update(len(data).to_bytes(8, "little") + data)
    return total.hexdigest()[:12]


def code_digest(module: ModuleType) -> str:
    """Changes when a module's source does, or that of a module of the user's own that it imports, directly or not.

    Raises:
        UsageError: A file was edited after it was imported here: what runs is not what the digest would stand for.
    """
    files = code_files(module)
    check_current(files)
    return digest(*sorted(path.read_bytes() for path in files)) if files else ""


def code_files(module: ModuleType) -> set[Path]:
    """Source files of a module and of those of the user's own that it imports, directly or not; resolved paths."""
    file = getattr(module, "__file__", None)
    if file is None or not Path(file).is_file():
        return set()
    start, root = Path(file).resolve(), root_of(module)
    # of an installed package its own files count, not all that lies beside them
    package = root / module.__name__.partition(".")[0] if start.parent != root else start
    places, waiting, seen = [root, *own_path()], [start], set[Path]()
    while waiting:
        path = waiting.pop()
        if path not in seen:
            seen.add(path)
            found = (other.resolve() for other in _imports(path, places))
            waiting += [other for other in found if is_own(other) or other.is_relative_to(package)]
    return seen


def root_of(module: ModuleType) -> Path:
    """The folder that a module with a file, or the package that it is part of, is imported from."""
    start = Path(module.__file__ or "").resolve()
    depth = module.__name__.count(".") + (start.name == "__init__.py")
    return start.parents[min(depth, len(start.parents) - 1)]


def _imports(path: Path, places: Sequence[Path]) -> set[Path]:
    """Files that a source file imports, read from its text: what has been imported so far varies."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return set()
    found = {path.with_name("__init__.py"), path.parent.with_name("__init__.py")}
    for node in ast.walk(tree):
        bases, names = places, list[str]()
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                bases = path.parents[node.level - 1 : node.level]
            names = [f"{node.module or ''}.{alias.name}".removeprefix(".") for alias in node.names]
        for parts in (name.split(".") for name in names):
            if parts[0] == "weightsmith":  # counts as a whole, and another copy of it may be on the path
                continue
            for length in range(1, len(parts) + 1):
                for place in (base.joinpath(*parts[:length]) for base in bases):
                    found |= {place.with_name(f"{place.name}.py"), place / "__init__.py"}
    return {place for place in found if place.is_file()}
