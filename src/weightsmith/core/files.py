"""Writing files so that a reader sees the old content or the new, never half of either, also after a kill.

Whatever is being written lies in a hidden folder ``.<name>.<8 random characters>.tmp`` beside its target, locked for as
long as its process lives. A folder of that form that can be locked is the leftover of a killed process: the next write
of the same target removes it.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from weightsmith.core.errors import UsageError, WeightsmithWarning, brief

_LEFTOVER = re.compile(r"\.(?P<name>.+)\.[a-z0-9_]{8}\.tmp", re.DOTALL)
_REPLACED = "replaced"
"""Name, in the hidden folder, of what was at the target, where the system cannot exchange two folders in one step."""
_TRIES = 3
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100
_UNSUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EXDEV}


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file under a temporary name beside it, then rename it into place.

    Args:
        path: Where the content goes; missing parent folders are made. A link is replaced, not what it points to.
        content: Text (written as UTF-8) or bytes.

    Raises:
        OSError: The folder cannot be written or the disk is full; ``path`` is as it was.
    """
    data = content.encode() if isinstance(content, str) else content
    with file_atomically(path) as fresh, fresh.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def file_atomically(path: Path) -> Iterator[Path]:
    """Let somebody else write a file under a temporary name; it takes ``path``'s place when the block ends.

    After an error ``path`` is as it was.

    Args:
        path: The file to make or replace; missing parent folders are made. A link is replaced, not what it points to.

    Yields:
        The temporary path to write to. It has the name of the final one.
    """
    with temporary_folder(path) as folder:
        fresh = folder / path.name
        yield fresh
        fresh.replace(path)


@contextlib.contextmanager
def folder_atomically(path: Path) -> Iterator[Path]:
    """Fill a folder under a temporary name; it takes ``path``'s place when the block ends without an error.

    An existing folder at ``path`` is replaced as a whole and only then: in one step where the system can (Linux, on
    most file systems). Elsewhere a kill in between may leave nothing at ``path``; the old folder is then put back by
    the next write. After an error it is as it was. A link at ``path`` stays, and what it points to is replaced.

    Args:
        path: The folder to make or replace.

    Yields:
        The temporary folder to write into. It has the name of the final one.
    """
    target = Path(os.path.realpath(path)) if path.is_symlink() else path
    with temporary_folder(target) as folder:
        fresh = folder / target.name
        fresh.mkdir()
        yield fresh
        _put(fresh, target, folder / _REPLACED)


@contextlib.contextmanager
def temporary_folder(beside: Path) -> Iterator[Path]:
    """Make a hidden folder beside a path, for as long as the block runs.

    What a killed process left of such a folder for the same path is removed first.

    Args:
        beside: The path, which need not exist; missing parent folders are made.

    Yields:
        The folder; it is empty.
    """
    parent = beside.parent
    parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(parent, beside.name)
    for tries_left in reversed(range(_TRIES)):
        folder = Path(tempfile.mkdtemp(dir=parent, prefix=f".{beside.name}.", suffix=".tmp"))
        lock = _lock(folder)
        if lock is not None or not tries_left:
            break
        # another process took it for a leftover before it was locked, or the file system has no locks, in which case
        # nobody removes leftovers and the last try is used without one
        shutil.rmtree(folder, ignore_errors=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove what killed processes were writing in a folder; what a live process writes stays.

    A folder that was being replaced when its process was killed is put back first if nothing is in its place.

    Args:
        folder: Where to look, not below it.
        name: Only leftovers of this target's name; ``None``: of any.
    """
    for path in sorted(folder.iterdir()):
        match = _LEFTOVER.fullmatch(path.name)
        if match is None or name not in (None, match["name"]) or path.is_symlink() or not path.is_dir():
            continue
        lock = _lock(path)
        if lock is None:
            continue
        try:
            replaced, target = path / _REPLACED, folder / match["name"]
            if os.path.lexists(replaced) and not os.path.lexists(target):
                replaced.rename(target)
            shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(lock)


def check_target(out: Path, sources: Iterable[Path], *, argument: str = "out") -> None:
    """Make sure that what will be written replaces nothing that is read.

    Args:
        out: The folder to make or replace.
        sources: Files and folders that are read, also while ``out`` is written. A folder's links count as what they
            point to.
        argument: Name of ``out`` for the error.

    Raises:
        UsageError: ``out`` is equal to, inside or around one of them.
    """
    target = out.resolve()
    for source in sources:
        read = source.resolve()
        linked = [path.resolve() for path in source.iterdir() if path.is_symlink()] if source.is_dir() else []
        same = out.exists() and source.exists() and out.samefile(source)
        if same or target.is_relative_to(read) or any(path.is_relative_to(target) for path in (read, *linked)):
            raise UsageError(
                f"{argument} must be neither in, around nor equal to what is read, got {out} for {source}: "
                "name another folder"
            )


def check_plain_name(name: str, where: Path | str) -> str:
    """Make sure that a file's name out of another file is that of a file in the same folder.

    Args:
        name: What was found.
        where: The file that says so, for the error.

    Returns:
        ``name``.

    Raises:
        UsageError: It has folders in it, or characters that no such name has.
    """
    if name in ("", ".", "..") or not name.isprintable() or any(mark in name for mark in "/\\:") or len(name) > 255:
        raise UsageError(f"{where} names the file {brief(name)}; it must be a plain file name in the same folder")
    return name


def say_where_link_leads(path: Path) -> Path:
    """Warn when a file of a folder is a link to somewhere else; the cache of the Hugging Face hub is made of those.

    Args:
        path: A file that is about to be read or copied.

    Returns:
        ``path``.

    Warns:
        WeightsmithWarning: It leads out of its folder, and not into the ``blobs`` of the hub's cache it belongs to.
    """
    if path.is_symlink():
        real, folder = path.resolve(), path.parent.resolve()
        blobs = [above.parent / "blobs" for above in (folder, *folder.parents) if above.name == "snapshots"]
        if not real.is_relative_to(folder) and real.parent not in blobs:
            warnings.warn(f"{path} is a link out of its folder, to {real}", WeightsmithWarning, stacklevel=3)
    return path


def _put(fresh: Path, target: Path, replaced: Path) -> None:
    if not os.path.lexists(target):
        fresh.rename(target)
    elif not _exchange(fresh, target):
        try:
            target.rename(replaced)
            fresh.rename(target)
        except BaseException:
            if os.path.lexists(replaced) and not os.path.lexists(target):
                replaced.rename(target)
            raise


def _exchange(one: Path, other: Path) -> bool:
    """Let two paths change places in one step; false where the system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))


def _lock(folder: Path) -> int | None:
    """Lock a folder until the handle is closed or the process ends; ``None`` where it is locked or gone."""
    handle = None
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(handle), folder.stat()):
            return handle
    except OSError:
        pass
    if handle is not None:
        os.close(handle)
    return None
