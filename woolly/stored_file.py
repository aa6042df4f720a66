"""A file that is read piece by piece when its bytes are asked for, and what else gives bytes in pieces.

Owns that it is a regular file, that it is still as long as it was, and the descriptor's life. It does not know what the
bytes mean; what is no such file is refused in the words of the format that expected one. Files are read and not mapped:
a page of a mapping that is no longer in the file ends the process, a read of it is an error.
"""

from __future__ import annotations

import contextlib
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from woolly.errors import WoollyError

_T = TypeVar("_T", bound="Closing")
_LFS = b"version https://git-lfs"


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


class ByteSource(Protocol):
    """Bytes that are there when they are asked for: those of a tensor, for example."""

    @property
    def n_bytes(self) -> int: ...

    def read(self, begin: int = 0, end: int | None = None, /) -> NDArray[np.uint8]:
        """The bytes from `begin` to `end`, or to the last: uint8, (end - begin,)."""


@dataclass(frozen=True)
class HeldBytes:
    """A `ByteSource` whose bytes are in memory: uint8, (n_bytes,)."""

    array: NDArray[np.uint8]

    @property
    def n_bytes(self) -> int:
        """How many."""
        return self.array.size

    def read(self, begin: int = 0, end: int | None = None, /) -> NDArray[np.uint8]:
        """A view of some of them."""
        return self.array[begin:end]


@dataclass(frozen=True)
class FileRange:
    """A `ByteSource` whose bytes are in a file: `n_bytes` from `offset` on."""

    file: StoredFile
    offset: int
    n_bytes: int

    def read(self, begin: int = 0, end: int | None = None, /) -> NDArray[np.uint8]:
        """Read some of them. Raises as `StoredFile.read`."""
        end = self.n_bytes if end is None else end
        return self.file.read(self.offset + begin, end - begin)


class _Descriptor:
    """An open file of the system's; closed when nothing refers to it any more, so never under a thread that reads."""

    def __init__(self, path: str) -> None:
        # Without O_NONBLOCK, opening a pipe would wait for a writer.
        self._number = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)

    def fileno(self) -> int:
        return self._number

    def __del__(self) -> None:
        if hasattr(self, "_number"):
            os.close(self._number)


class StoredFile(Closing):
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
    n_bytes : int
        Of the file, as it was when it was opened.

    Raises
    ------
    WoollyError
        `error`: it is no regular file, or empty.
    OSError
        The system cannot open it: `FileNotFoundError`, `PermissionError` and so on.

    Notes
    -----
    Reading from several threads at once is safe, also where another closes the file meanwhile.
    """

    def __init__(self, path: str, *, format: str, first_field: str, error: type[WoollyError]) -> None:
        self.path = path
        self._error = error
        self._descriptor: _Descriptor | None = _Descriptor(path)
        status = os.fstat(self._descriptor.fileno())
        if not stat.S_ISREG(status.st_mode):
            kind = "a directory" if stat.S_ISDIR(status.st_mode) else "no regular file"
            raise error(f"{path!r}: expected a {format} file, this is {kind}")
        if status.st_size == 0:
            raise error(f"{path!r}: {first_field}: the file is empty")
        self.n_bytes = status.st_size
        if self.n_bytes < 1024 and self.read(0, min(self.n_bytes, len(_LFS))).tobytes() == _LFS:
            raise error(f"{path!r}: a pointer of Git LFS, not the {format} file that it stands for: see git lfs pull")

    def read(self, offset: int, n_bytes: int) -> NDArray[np.uint8]:
        """Bytes of the file, read now: uint8, (n_bytes,).

        Raises
        ------
        ValueError
            The file is closed.
        WoollyError
            `error`: the file has been shortened since it was opened.
        OSError
            The system cannot read it.
        """
        out = np.empty(n_bytes, np.uint8)
        self.read_into(out, offset)
        return out

    def read_into(self, out: NDArray[np.uint8], offset: int) -> None:
        """Fill `out`, uint8 and C-contiguous, with the bytes from `offset` on. Raises as `read`."""
        left = memoryview(out)
        with self.reading() as descriptor:
            while left:
                n_bytes = os.preadv(descriptor.fileno(), [left], offset)
                if n_bytes == 0:
                    raise EOFError
                left, offset = left[n_bytes:], offset + n_bytes

    @contextlib.contextmanager
    def reading(self) -> Iterator[_Descriptor]:
        """The open file, whose `fileno` is valid for as long as one refers to it.

        What is raised as EOFError in the block becomes the error of a file that was shortened; an OSError gets the
        file's name.
        """
        descriptor = self._descriptor
        if descriptor is None:
            raise ValueError(f"{self.path!r}: the file is closed")
        try:
            yield descriptor
        except EOFError:
            left = os.fstat(descriptor.fileno()).st_size
            raise self._error(f"{self.path!r}: the file was shortened while it was open, to {left} bytes") from None
        except OSError as error:
            raise OSError(error.errno, os.strerror(error.errno), self.path) from None

    def close(self) -> None:
        """Let go of the file; reads that are under way still end well."""
        self._descriptor = None
