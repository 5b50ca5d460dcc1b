"""Which code is the user's own: neither installed, nor Python's, nor ours."""

import sys
import sysconfig
from functools import cache
from pathlib import Path

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
