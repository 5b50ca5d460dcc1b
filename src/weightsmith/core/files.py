"""Writing files so that a reader sees the old content or the new, never half of either."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file under a temporary name beside it, then rename it into place.

    Args:
        path: Where the content goes; missing parent folders are made.
        content: Text (written as UTF-8) or bytes.

    Raises:
        OSError: The folder cannot be written or the disk is full; ``path`` is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o666 & ~_umask())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def folder_atomically(path: Path) -> Iterator[Path]:
    """Fill a folder under a temporary name; it takes ``path``'s place when the block ends without an error.

    An existing folder at ``path`` is replaced as a whole and only then; after an error it is as it was.

    Args:
        path: The folder to make or replace.

    Yields:
        The temporary folder to write into.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
    try:
        yield fresh
        fresh.chmod(0o777 & ~_umask())
        if path.exists():
            old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.old.", suffix=".tmp"))
            path.replace(old / "old")
            fresh.replace(path)
            shutil.rmtree(old, ignore_errors=True)
        else:
            fresh.replace(path)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise


def _umask() -> int:
    # the umask can only be read by setting it
    mask = os.umask(0)
    os.umask(mask)
    return mask
