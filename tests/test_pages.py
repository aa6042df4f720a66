"""Memory for weights and for KV caches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from woolly._kernels import KVCache
from woolly._kernels.pages import HUGE_PAGE, Pages, sparse_zeros
from woolly.memory import resident_bytes


def test_pieces_lie_beside_each_other_at_lines() -> None:
    pages = Pages(1000)
    pieces = [pages.take(n) for n in (1, 64, 65, 700)]
    first = pieces[0].ctypes.data
    assert first % HUGE_PAGE in (0, first % 64)  # where there are no huge pages, at a line
    assert [piece.ctypes.data - first for piece in pieces] == [0, 64, 128, 256]
    assert [len(piece) for piece in pieces] == [1, 64, 65, 700]
    for i, piece in enumerate(pieces):
        piece[:] = i
    assert [set(piece.tolist()) for piece in pieces] == [{0}, {1}, {2}, {3}]


def test_what_is_too_much_has_memory_of_its_own() -> None:
    pages = Pages(100)
    piece = pages.take(5000)
    piece[:] = 1
    assert piece.ctypes.data % 64 == 0
    assert pages.take(100).sum() == 0


@pytest.mark.parametrize("shape", [(3, 5), (4, HUGE_PAGE), (0, 7)])
@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_sparse_arrays_are_zeros(shape: tuple[int, ...], dtype: type) -> None:
    array = sparse_zeros(shape, dtype)
    assert (array.shape, array.dtype, array.flags.c_contiguous, array.flags.writeable) == (shape, dtype, True, True)
    assert not array[..., :3].any()
    array[...] = 1
    assert array.all()


def test_too_much_is_a_memory_error() -> None:
    with pytest.raises(MemoryError, match="1152921504606846976 bytes cannot be had"):
        sparse_zeros((1 << 60,), np.uint8)
    with pytest.raises(MemoryError, match=" bytes cannot be had"):
        Pages(1 << 64)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell")
def test_a_cache_takes_memory_where_it_is_written() -> None:
    cache = KVCache(8, 8, 64, 1 << 14)
    before = resident_bytes()
    for layer in range(8):
        cache.store(layer, 0, *np.ones((2, 20, 8, 64), np.float32))
    assert resident_bytes() - before < cache.nbytes // 16
