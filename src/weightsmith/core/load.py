"""Load what a user names: ``module:name``, or ``file.py:name`` from anywhere."""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from zlib import crc32

from weightsmith.core.errors import UsageError, near
from weightsmith.core.own_code import is_own

# what loading brought in of the user's own: by module name, its file and the text it was run from
_texts: dict[str, tuple[Path, bytes]] = {}


def load_module(name: str, argument: str) -> ModuleType:
    """Import a module by name, from the current folder too, or a Python file by path.

    Files that were edited since they were loaded here are run anew, and what was loaded with them too.

    Args:
        name: ``"package.module"`` or ``"path/to/file.py"``; what the file imports from its own folder is found.
        argument: What the name was given for; begins the error.

    Raises:
        UsageError: There is no such module or file.
    """
    _forget_edited()
    before = set(sys.modules)
    module = _load_file(Path(name), argument) if name.endswith(".py") else _import(name, argument)
    for loaded in set(sys.modules) - before:
        path = Path(getattr(sys.modules[loaded], "__file__", None) or "")
        if path.suffix == ".py" and path.is_file() and is_own(path):
            _texts[loaded] = (path, path.read_bytes())
    return module


def _forget_edited() -> None:
    # a fingerprint reads the text on disk: results of older code must not be stored under it
    if all(path.is_file() and path.read_bytes() == text for path, text in _texts.values()):
        return
    for name, (path, _) in _texts.items():
        sys.modules.pop(name, None)
        # bytecode is told apart by size and whole seconds: an edit at once would go unseen
        Path(importlib.util.cache_from_source(str(path))).unlink(missing_ok=True)
    _texts.clear()
    importlib.invalidate_caches()


def _import(name: str, argument: str) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except (ModuleNotFoundError, ValueError) as error:
        missing = getattr(error, "name", None)
        if missing and not f"{name}.".startswith(f"{missing}."):
            raise  # the module is there, but something that it needs is not
        raise UsageError(
            f"{argument}: there is no module {name!r}; give a module that Python can import from here, or file.py:name"
        ) from error


def load_object(name: str, argument: str) -> Any:
    """Load what ``module:name`` or ``file.py:name`` stands for.

    Args:
        name: Of the object.
        argument: What it was given for; begins the error.

    Raises:
        UsageError: The name has another form, or there is no such module, file or object.
    """
    where, colon, attribute = name.rpartition(":")
    if not (colon and where and attribute):
        raise UsageError(f"{argument} must be module:name or file.py:name, got {name!r}")
    module = load_module(where, argument)
    if not hasattr(module, attribute):
        public = [known for known in vars(module) if not known.startswith("_")]
        raise UsageError(f"{argument}: {where} has no {attribute!r}; {near(attribute, public)}")
    return getattr(module, attribute)


def _load_file(path: Path, argument: str) -> ModuleType:
    path = path.resolve()
    if not path.is_file():
        raise UsageError(f"{argument}: there is no file {str(path)!r}")
    folder = str(path.parent)
    # a file named like a module that is loaded already gets a name of its own
    names = [path.stem] if path.stem.isidentifier() else []
    for name in [*names, f"_{path.stem}_{crc32(folder.encode())}"]:
        loaded = sys.modules.get(name)
        if loaded is None:
            break
        if getattr(loaded, "__file__", None) == str(path):
            return loaded
    if folder not in sys.path:
        sys.path.insert(0, folder)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
