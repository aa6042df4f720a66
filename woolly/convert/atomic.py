"""Files that appear whole or not at all.

A file is written under a temporary name beside its own and renamed when all of it is on the disk. The writer holds a
lock on it, so that what a killed process left behind can be told from what another process is writing, and is removed
by the next one that writes the same file.
"""

from __future__ import annotations

import contextlib
import glob
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from woolly.errors import WoollyError

try:
    import fcntl
except ImportError:  # not a POSIX system: nothing is locked, and what is left behind stays
    fcntl = None  # type: ignore[assignment]

SUFFIX = ".partial"


@contextlib.contextmanager
def replacing(path: Path, *, force: bool = False) -> Iterator[int]:
    """Open a temporary file, which takes the name `path` when the block ends well, and goes away when it does not.

    Parameters
    ----------
    path : Path
    force : bool
        Replace a file that is there.

    Yields
    ------
    int
        A descriptor to write to.

    Raises
    ------
    WoollyError
        There is a file of this name, and `force` is false.
    OSError
        The system says so, with the path.
    """
    _check_free(path, force)
    _remove_left_behind(path)
    descriptor, temporary = _open_locked(path)
    try:
        try:
            yield descriptor
        except OSError as error:  # disk full and the like: descriptors have no names
            if error.filename is None and error.errno is not None:
                raise OSError(error.errno, os.strerror(error.errno), os.fspath(path)) from error
            raise
        os.fsync(descriptor)
        _check_free(path, force)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
        os.close(descriptor)
    _sync_folder(path.parent)


def write_all(descriptor: int, data: memoryview | bytes, offset: int) -> None:
    """Write all of `data` at an offset; safe from several threads at once."""
    view = memoryview(data).cast("B")
    while view:
        n_bytes = os.pwrite(descriptor, view, offset)
        view, offset = view[n_bytes:], offset + n_bytes


def _check_free(path: Path, force: bool) -> None:
    if path.is_dir():
        raise WoollyError(f"{path}: is a folder, expected the name of a file to write")
    if path.exists() and not force:
        raise WoollyError(f"{path}: the file exists; --force replaces it")


def _open_locked(path: Path) -> tuple[int, Path]:
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{SUFFIX}")
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        descriptor = os.open(temporary, flags, 0o666)
        if _lock(descriptor) and temporary.exists():
            return descriptor, temporary
        os.close(descriptor)  # another process took it for left behind in the moment before it was locked


def _lock(descriptor: int) -> bool:
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # some network file systems have no locks
        return True
    return True


def _remove_left_behind(path: Path) -> None:
    """Remove temporary files that nobody holds."""
    if fcntl is None:
        return
    for left in path.parent.glob(f".{glob.escape(path.name)}.*{SUFFIX}"):
        with contextlib.suppress(OSError):  # gone, not ours, or the file system has no locks: it stays
            descriptor = os.open(left, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                left.unlink()
            finally:
                os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    """Make the rename durable. Not every system can open a folder; there it is durable soon enough."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
