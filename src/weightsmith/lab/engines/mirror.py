"""How the user's own modules reach processes and machines that would not find them."""

import importlib.machinery
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

from weightsmith.core.own_code import code_files, is_own, own_path, root_of


def mirror(folder: Path) -> list[Path]:
    """Copy the source of the user's own modules that are imported here, and of what these import.

    Python finds the copies under the names of the originals when ``folder`` is on its path. Data files beside the
    modules are not copied, and neither is the script that runs: its functions travel by themselves.

    Args:
        folder: An existing, empty folder.

    Returns:
        What now lies in the folder: files and packages.
    """
    files, roots = set[Path](), dict.fromkeys(own_path())
    for _, module in _own_modules():
        roots[root_of(module)] = None
        files |= {path for path in code_files(module) if is_own(path)}
    for path in sorted(files):
        for root in roots:  # the first on the path wins, as it does for Python
            copy = folder / path.relative_to(root) if path.is_relative_to(root) else path
            if not copy.exists():
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)
    return sorted(folder.iterdir())


def send_by_value(register: Callable[[ModuleType], None]) -> None:
    """Have those of the user's own modules sent as they are that another process would not find under their name.

    Args:
        register: Of the pickler that sends.
    """
    for name, module in _own_modules():
        if "." not in name:
            found = importlib.machinery.PathFinder.find_spec(name)
            file = Path(module.__file__ or "").resolve()
            if found is None or found.origin is None or Path(found.origin).resolve() != file:
                register(module)


def _own_modules() -> Iterator[tuple[str, ModuleType]]:
    for name, module in list(sys.modules.items()):
        file = Path(getattr(module, "__file__", None) or "")
        if name not in ("__main__", "__mp_main__") and file.suffix == ".py" and file.is_file() and is_own(file):
            yield name, module
