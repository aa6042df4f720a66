"""Memory by the size of its pages: huge ones for weights, which are read from end to end, usual ones for KV caches.

With pages of 4 kB, memory bandwidth is lost to page walks and to prefetchers, which stop at a page's end; and most of
the time that fresh memory takes is the kernel's, page by page. But a huge page is taken whole when its first byte is
written: numpy asks for them for every large array, and then a cache is there in full at its first tokens.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from woolly._kernels.matmul import aligned_empty

HUGE_PAGE = 2 << 20
LINE = 64


class Pages:
    """Memory for arrays that live about as long as each other.

    Parameters
    ----------
    n_bytes : int
        Most that all of them take; what comes after has memory of its own.

    Notes
    -----
    Address space is reserved at once, memory is taken as it is written. It goes back when the last array is gone. Where
    the system has no huge pages, or does not want them, pages are of the usual size. For one thread at a time.
    """

    def __init__(self, n_bytes: int, /) -> None:
        self._free = _huge_empty(n_bytes)

    def take(self, n_bytes: int, /) -> NDArray[np.uint8]:
        """Uninitialised bytes at an address that is a multiple of 64: uint8, (n_bytes,)."""
        if n_bytes > len(self._free):
            return aligned_empty(n_bytes)
        taken = self._free[:n_bytes]
        self._free = self._free[-(-n_bytes // LINE) * LINE :]
        return taken


def sparse_zeros(shape: tuple[int, ...], dtype: DTypeLike, /) -> NDArray[Any]:
    """An array of zeros that takes memory where it is written, and little more."""
    n_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    if n_bytes < HUGE_PAGE or not hasattr(mmap, "MADV_NOHUGEPAGE"):
        return np.zeros(shape, dtype)
    return np.frombuffer(_map(n_bytes, mmap.MADV_NOHUGEPAGE), dtype).reshape(shape)


def _huge_empty(n_bytes: int) -> NDArray[np.uint8]:
    """Zeros at the beginning of a huge page."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return aligned_empty(n_bytes)
    whole = np.frombuffer(_map(n_bytes + HUGE_PAGE, mmap.MADV_HUGEPAGE), np.uint8)
    start = -whole.ctypes.data % HUGE_PAGE
    return whole[start : start + n_bytes]


def _map(n_bytes: int, advice: int) -> mmap.mmap:
    try:
        area = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError):
        raise MemoryError(f"{n_bytes} bytes cannot be had") from None
    with contextlib.suppress(OSError):  # a kernel without huge pages
        area.madvise(advice)
    return area
