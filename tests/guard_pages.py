"""Kernels with every buffer ending at a page that cannot be read: one byte too far is a crash.

Run in a process of its own, as `python guard_pages.py ISA`: test_guard_pages.py does. What the kernels' Python sides
allocate ends there too: numpy and `aligned_empty` are replaced in their modules.
"""

from __future__ import annotations

import ctypes
import faulthandler
import mmap
import sys
import tempfile
from pathlib import Path
from typing import Any

import make_gguf
import numpy as np
from numpy.typing import NDArray

from woolly import load_gguf
from woolly._kernels import attention as attention_module
from woolly._kernels import converted_formats, kernel_formats, use_isa
from woolly._kernels import matmul as _
from woolly._kernels import pages as pages_module
from woolly._kernels import program as program_module
from woolly._kernels import rows as rows_module

del _
matmul_module = sys.modules["woolly._kernels.matmul"]
PAGE = mmap.PAGESIZE
LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mmap.restype = ctypes.c_void_p
LIBC.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
LIBC.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
LIBC.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
PROT_NONE, PROT_READ_WRITE, MAP_PRIVATE_ANONYMOUS = 0, 3, 0x22

n_calls = 0


class _Mapping:
    """Pages of which the last cannot be touched; unmapped with the last array on them."""

    def __init__(self, n_bytes: int) -> None:
        self.size = (n_bytes + PAGE - 1) // PAGE * PAGE + PAGE
        self.address = LIBC.mmap(None, self.size, PROT_READ_WRITE, MAP_PRIVATE_ANONYMOUS, -1, 0)
        self.end = self.address + self.size - PAGE
        if LIBC.mprotect(self.end, PAGE, PROT_NONE):
            raise OSError(ctypes.get_errno(), "mprotect")

    def __del__(self) -> None:
        LIBC.munmap(self.address, self.size)


def guarded(shape: Any, dtype: Any = np.float64, *, align: int = 1, fill: int | None = 0xAB) -> NDArray[Any]:
    """An array that ends at an unreadable page, or less than `align` bytes before it."""
    dtype = np.dtype(dtype)
    shape = (int(shape),) if np.isscalar(shape) else tuple(int(n) for n in shape)
    n_bytes = int(np.prod(shape)) * dtype.itemsize
    mapping = _Mapping(n_bytes + align)
    start = (mapping.end - n_bytes) // align * align
    memory = (ctypes.c_uint8 * n_bytes).from_address(start)
    memory.owner = mapping
    array = np.frombuffer(memory, np.uint8)
    if fill is not None:
        array[:] = fill
    return array.view(dtype).reshape(shape)


def copied(values: Any, dtype: Any = np.float32) -> NDArray[Any]:
    """These values, at the end of a page."""
    values = np.asarray(values, dtype)
    array = guarded(values.shape, dtype)
    array[...] = values
    return array


class GuardedNumpy:
    """numpy, but what it allocates ends at an unreadable page."""

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    def empty(self, shape: Any, dtype: Any = np.float64) -> NDArray[Any]:
        return guarded(shape, dtype)

    def zeros(self, shape: Any, dtype: Any = np.float64) -> NDArray[Any]:
        return guarded(shape, dtype, fill=None)

    def ascontiguousarray(self, values: Any, dtype: Any = None) -> NDArray[Any]:
        return copied(values, dtype or np.asarray(values).dtype)


def aligned_empty(n_bytes: int, /, *, align: int = 64) -> NDArray[np.uint8]:
    return guarded(n_bytes, np.uint8, align=align)


def install() -> None:
    """Replace what the kernels' modules allocate with."""
    for module in (attention_module, matmul_module, pages_module, program_module, rows_module):
        module.np = GuardedNumpy()
        if hasattr(module, "aligned_empty"):
            module.aligned_empty = aligned_empty
    pages_module.Pages.take = lambda self, n_bytes: aligned_empty(n_bytes)


def count() -> None:
    global n_calls
    n_calls += 1


def check_rows(rng: np.random.Generator) -> None:
    """Row kernels at every width around whole vectors."""
    for n in (*range(1, 50), 63, 64, 65, 96, 127, 128, 129):
        x, y = (copied(rng.standard_normal((2, n))) for _ in range(2))
        rows_module.rmsnorm_f32(
            x, copied(rng.standard_normal(n)), eps=1e-5, out=guarded((2, n), np.float32), n_threads=1
        )
        for activation in ("silu", "gelu_tanh"):
            rows_module.glu_f32(x, y, activation=activation, out=guarded((2, n), np.float32), n_threads=1)
        rows_module.softmax_f32(x, out=guarded((2, n), np.float32), n_threads=1)
        rows_module.exp_f32(copied(rng.standard_normal(n)))
        if n % 32 == 0:
            rows_module.quantize_q16(x)
            rows_module.quantize_q8(x)
        if n % 2 == 0:
            heads = copied(rng.standard_normal((2, 1, n)))
            angles = copied(rng.standard_normal((2, n // 2)))
            for pairing in ("norm", "neox"):
                rows_module.rope_f32(heads, angles, angles, pairing=pairing, n_threads=1)
        count()


def check_matmul(rng: np.random.Generator, name: str) -> None:
    """Packing, products and dequantising of one format, with tails of rows, blocks and columns."""
    block_size = 1 if name in make_gguf.FLOATS else make_gguf.gguf.GGML_QUANT_SIZES[make_gguf.ggml_type_of(name)][0]
    blocks = {1: (1, 2, 3, 15, 16, 17, 40), 256: (1, 2)}.get(block_size, (1, 2, 3, 5))
    for n_rows in (1, 15, 16, 17, 33, 49):
        for n_blocks in blocks:
            n_cols = n_blocks * block_size
            raw = copied(make_gguf.random_rows(rng, name, n_rows, n_cols, std=0.1), np.uint8)
            w = matmul_module.PackedMatrix(n_rows, n_cols, name).pack(raw, n_threads=1)
            if name not in converted_formats():
                assert w.unpack().tobytes() == raw.tobytes()
            matmul_module.dequantize(raw, name)
            w.rows(np.array([n_rows - 1, 0]))
            for n in (1, 2, 3, 4, 5, 6, 7, 12, 13, 17, 31, 49, 60, 75):
                x = copied(rng.standard_normal((n, n_cols)))
                for compute in ("exact", "int8"):
                    out = guarded((n, n_rows), np.float32)
                    matmul_module.matmul(w, x, out=out, compute=compute, n_threads=1)
                    assert np.isfinite(out).all(), (name, n_rows, n_cols, n, compute)
                    count()


def check_attention(rng: np.random.Generator) -> None:
    """The cache and attention, with tails of heads, keys and queries."""
    for head_dim, (n_heads, n_kv_heads), dtype in (
        (head_dim, heads, dtype)
        for head_dim in (2, 15, 16, 17, 30, 64, 80, 128)
        for heads in ((1, 1), (6, 2), (25, 1))
        for dtype in ("f16", "f32")
    ):
        for n_ctx in (1, 15, 17, 127, 129, 150):
            cache = attention_module.KVCache(1, n_kv_heads, head_dim, n_ctx, dtype=dtype)
            k, v = (copied(rng.standard_normal((n_ctx, n_kv_heads, head_dim))) for _ in range(2))
            cache.store(0, 0, k, v)
            for n, window, split in ((1, 0, False), (1, 0, True), (min(7, n_ctx), 5, False), (n_ctx, 0, False)):
                q = copied(rng.standard_normal((n, n_heads, head_dim)))
                out = guarded((n, n_heads, head_dim), np.float32)
                attention_module.attention_f32(
                    q, cache, layer=0, pos=n_ctx - n, window=window, split=split, out=out, n_threads=1
                )
                assert np.isfinite(out).all()
                count()


def check_models(folder: Path) -> None:
    """Whole models: the program's buffers, tables, scratch and logits."""
    for dtype in ("f32", "q8_0"):
        path = make_gguf.write_tiny_llama(folder / f"{dtype}.gguf", dtype=dtype, n_layers=1, tied=False)
        with load_gguf(path, n_threads=1, n_ctx=140) as model:
            expected = model.forward(list(range(3, 140)))
            for chunk in (1, 5, 16, 17, 33, 140):
                logits = model.session().feed(list(range(3, 140)), logits="all", chunk=chunk)
                assert logits.tobytes() == expected.tobytes()
                count()


def main() -> None:
    faulthandler.enable()
    install()
    rng = np.random.default_rng(0)
    with use_isa(sys.argv[1]), tempfile.TemporaryDirectory() as folder:
        check_rows(rng)
        for name in kernel_formats():
            if name in make_gguf.RANDOM_BLOCKS or name in make_gguf.FLOATS:
                check_matmul(rng, name)
        check_attention(rng)
        check_models(Path(folder))
    print(n_calls)


if __name__ == "__main__":
    main()
