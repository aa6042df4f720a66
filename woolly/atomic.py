"""Writing a file so that its name stands for the whole of it, or for what was there before.

A temporary file in the same folder takes the name when all is written. Who writes it holds a lock on it, so what a
killed process has left is known by having none, and the next one who writes the same name removes it. What is there is
replaced only where that was asked for.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from woolly.errors import WoollyError

_CREATE_MODE = 0o666  # before the umask, as open() has it


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file in the same folder, which takes the name when the block ends well, its bytes on the disk.

    Parameters
    ----------
    path : Path
        Whatever is there stays until then.

    Raises
    ------
    OSError
        The folder is not there or cannot be written to, or the disk is full; what the system says of a descriptor gets
        the name `path`.
    """
    _remove_leftovers(path)
    handle, temporary = _locked_temporary(path)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(_CREATE_MODE & ~umask)
        os.fsync(handle)
        temporary.replace(path)
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), os.fspath(path)) from error
    finally:
        temporary.unlink(missing_ok=True)
        os.close(handle)


def check_target(path: Path, *, force: bool) -> None:
    """Refuse to write where a folder is, or without `force` where a file is.

    Raises
    ------
    WoollyError
    """
    if path.is_dir():
        raise WoollyError(f"{path}: is a folder, expected the name of a file to write")
    if path.exists() and not force:
        raise WoollyError(f"{path}: the file exists; --force replaces it")


def reserve(descriptor: int, path: Path, n_bytes: int) -> None:
    """Give a file its size, and refuse what does not fit on the disk before anything is computed.

    Raises
    ------
    WoollyError
        Names `path` and both sizes.
    """
    room = os.fstatvfs(descriptor)
    free = room.f_bavail * room.f_frsize
    if n_bytes > free:
        raise WoollyError(f"{path}: {n_bytes:,} bytes do not fit on the disk, which has {free:,} free")
    os.ftruncate(descriptor, n_bytes)


def _locked_temporary(path: Path) -> tuple[int, Path]:
    """A new file beside `path`, locked: its descriptor and its place."""
    while True:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        fcntl.flock(handle, fcntl.LOCK_EX)
        if os.fstat(handle).st_nlink:  # not taken for a leftover before it was locked
            return handle, Path(name)
        os.close(handle)


def _remove_leftovers(path: Path) -> None:
    """Remove temporary files of this name that nobody is writing."""
    for name in os.listdir(path.parent):
        if not (name.startswith(f".{path.name}.") and name.endswith(".tmp")):
            continue
        with contextlib.suppress(OSError):  # gone already, or in use, or not ours
            handle = os.open(path.parent / name, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(path.parent / name)
            finally:
                os.close(handle)
