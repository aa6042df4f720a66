"""A file mapped read-only: its pages come into memory as they are read, and leave it as they are released.

Owns that it is a regular file, that it is still as long as it was, and the mapping's life. It does not know what the
bytes mean; what is no such file is refused in the words of the format that expected one.
"""

from __future__ import annotations

import mmap
import os
import stat
from abc import ABC, abstractmethod
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from woolly.errors import WoollyError

_T = TypeVar("_T", bound="Closing")


def aligned(offset: int, alignment: int) -> int:
    """The first multiple of `alignment` from `offset` on."""
    return -(-offset // alignment) * alignment


class Closing(ABC):
    """What `with` closes at the end of its block."""

    @abstractmethod
    def close(self) -> None:
        """Let go of what is open."""

    def __enter__(self: _T) -> _T:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class MappedFile(Closing):
    """An open file.

    Parameters
    ----------
    path : str
    format : str
        What is expected, for messages, such as "GGUF".
    first_field : str
        What is missing from an empty file, such as "magic at byte 0".
    error : type of WoollyError
        What is raised.

    Attributes
    ----------
    path : str

    Raises
    ------
    WoollyError
        `error`: it is no regular file, or empty.
    OSError
        The system cannot open or map it: `FileNotFoundError`, `PermissionError` and so on.

    Notes
    -----
    Reading from several threads at once is safe. `view` refuses a file that has been shortened, but whoever shortens it
    between that and the reading of the view makes the reading end the process with SIGBUS, as any mapping would.
    """

    def __init__(self, path: str, *, format: str, first_field: str, error: type[WoollyError]) -> None:
        self.path = path
        self._error = error
        # Without O_NONBLOCK, opening a pipe would wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                kind = "a directory" if stat.S_ISDIR(status.st_mode) else "no regular file"
                raise error(f"{path!r}: expected a {format} file, this is {kind}")
            if status.st_size == 0:
                raise error(f"{path!r}: {first_field}: the file is empty")
            self._map: mmap.mmap | None = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
        finally:
            os.close(descriptor)

    @property
    def n_bytes(self) -> int:
        """Of the file, as it was when it was opened."""
        return len(self._open_map())

    def view(self, offset: int, n_bytes: int) -> NDArray[np.uint8]:
        """Bytes of the file as a read-only view: uint8, (n_bytes,).

        It stays valid after `close`; the file stays mapped for as long as a view of it lives.

        Raises
        ------
        ValueError
            The file is closed.
        WoollyError
            `error`: the file has been shortened since it was opened.
        """
        mapped = self._open_map()
        if mapped.size() < len(mapped):
            raise self._error(f"{self.path!r}: the file was shortened while it was open, to {mapped.size()} bytes")
        return np.frombuffer(mapped, np.uint8, count=n_bytes, offset=offset)

    def release(self, offset: int, n_bytes: int) -> None:
        """Tell the system that the pages of a range are not needed soon, so that they leave the process's memory.

        Reading it again brings them back. Pages shared with what is beside it stay.
        """
        first = aligned(offset, mmap.PAGESIZE)
        end = (offset + n_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if first < end:
            self._open_map().madvise(mmap.MADV_DONTNEED, first, end - first)

    def close(self) -> None:
        """Let go of the mapping; it is undone when the last view is gone."""
        self._map = None

    def _open_map(self) -> mmap.mmap:
        if self._map is None:
            raise ValueError(f"{self.path!r}: the file is closed")
        return self._map
