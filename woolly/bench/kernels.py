"""Each kernel alone, at a model's sizes: time, rate, and share of the limit that binds it.

Matrices hold random bits: no kernel's time depends on their values. A matrix is multiplied again and again, so it comes
from whatever cache can hold it, and the read bandwidth that it is compared with is that of a working set of its size.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import numpy as np

from woolly import _kernels as kernels
from woolly._kernels import limits as loops
from woolly.bench.harness import Bench, Row, median, sample, spread
from woolly.bench.limits import Limits, bound, matmul_limit
from woolly.bench.sizes import Size, size_named
from woolly.errors import WoollyError
from woolly.formats import FLOATS

COMPUTED_IN_F32 = (*FLOATS, "f64")
ATTENTION_TOKENS = (1, 64)
ROW_TOKENS = (1, 256)

COLUMNS = [
    ("size", "size", ""),
    ("isa", "isa", ""),
    ("kernel", "kernel", ""),
    ("format", "format", ""),
    ("shape", "shape", ""),
    ("n_columns", ">columns", "d"),
    ("context", ">context", "d"),
    ("seconds", ">µs", "us"),
    ("gops", ">Gop/s", ",.1f"),
    ("gb_per_s", ">GB/s", ",.1f"),
    ("limit", "limit", ""),
    ("share", ">share", ".0%"),
]


def run(bench: Bench, args: argparse.Namespace) -> Iterator[Row]:
    """Rows of every kernel at every size asked for."""
    sizes = {name: size_named(name) for name in args.sizes}
    formats = check_formats(args.formats)
    total = len(sizes) * (5 * len(formats) * len(args.columns) + len(args.contexts) * len(ATTENTION_TOKENS) + 10)
    bench.progress.start("kernels", total)
    limits = Limits(repeat=bench.repeat)
    kernels.check_compute(args.compute)
    common: Row = {"mode": "kernels", "isa": kernels.active_isa(), "compute": args.compute}
    for name, size in sizes.items():
        for row in size_rows(bench, limits, size, formats, args.columns, args.contexts, compute=args.compute):
            yield {**common, "size": name, "n_threads": bench.n_threads, **row}


def size_rows(
    bench: Bench,
    limits: Limits,
    size: Size,
    formats: list[str],
    columns: list[int],
    contexts: list[int],
    *,
    compute: str = "exact",
) -> Iterator[Row]:
    """Rows of one size on the instruction set in use."""
    for format in formats:
        for kernel, shape in size.matrices().items():
            yield from matmul_rows(bench, limits, kernel, shape, format, columns, compute)
    for context in contexts:
        yield from attention_rows(bench, limits, size, context)
    for n_tokens in ROW_TOKENS:
        yield from row_kernel_rows(bench, limits, size, n_tokens)
    yield dequantize_row(bench, limits, size, "q4_0")


def check_formats(names: list[str] | None) -> list[str]:
    """The formats asked for, by default all that have kernels of their own.

    Raises
    ------
    WoollyError
        One has no kernels.
    """
    known = kernels.kernel_formats()
    for name in names or ():
        if name not in known:
            raise WoollyError(f"format {name!r} has no kernels; those that have: {', '.join(known)}")
    return list(names or (name for name in known if name not in kernels.converted_formats()))


def random_matrix(n_rows: int, n_cols: int, format: str, *, n_threads: int) -> kernels.PackedMatrix:
    """A packed matrix of random bits: bytes of 0x20 to 0x3b make every float field normal, whatever its width."""
    _, block_size, block_bytes = kernels.kernel_formats()[format]
    rng = np.random.default_rng(0)
    rows = rng.integers(0x20, 0x3C, (min(n_rows, 256), n_cols // block_size * block_bytes), dtype=np.uint8)
    rows = np.resize(rows, (n_rows, rows.shape[1]))
    return kernels.PackedMatrix(n_rows, n_cols, format).pack(rows, n_threads=n_threads)


def matmul_rows(
    bench: Bench,
    limits: Limits,
    kernel: str,
    shape: tuple[int, int],
    format: str,
    columns: list[int],
    compute: str = "exact",
) -> Iterator[Row]:
    """Rows of one matrix by column count; none where its width is no whole number of the format's blocks."""
    n_rows, n_cols = shape
    if n_cols % kernels.kernel_formats()[format][1]:
        return
    w = random_matrix(n_rows, n_cols, format, n_threads=bench.n_threads)
    for n in columns:
        bench.progress.step(f"{kernel} {format} × {n}")
        x = np.random.default_rng(n).standard_normal((n, n_cols), dtype=np.float32)
        out = np.empty((n, n_rows), dtype=np.float32)

        def call(x: np.ndarray = x, out: np.ndarray = out) -> None:
            kernels.matmul(w, x, out=out, compute=compute, n_threads=bench.n_threads)

        row: Row = {"kernel": kernel, "format": format, "shape": f"{n_rows} × {n_cols}", "n_columns": n}
        kind, reachable = matmul_limit(is_float=format in COMPUTED_IN_F32, n_tokens=n, compute=compute)
        ops = 2 * n_rows * n_cols * n
        yield {**row, **measured(bench, limits, call, kind=kind, ops=ops, n_bytes=w.nbytes, reachable=reachable)}


def attention_rows(bench: Bench, limits: Limits, size: Size, context: int) -> Iterator[Row]:
    """The last tokens of a context over its cache of keys and values."""
    rng = np.random.default_rng(context)
    cache = kernels.KVCache(1, size.n_kv_heads, size.head_dim, context)
    k, v = rng.standard_normal((2, context, size.n_kv_heads, size.head_dim), dtype=np.float32)
    cache.store(0, 0, k, v)
    for n in ATTENTION_TOKENS:
        if n > context:
            continue
        bench.progress.step(f"attention, context {context} × {n}")
        q = rng.standard_normal((n, size.n_heads, size.head_dim), dtype=np.float32)
        out = np.empty_like(q)

        def call(q: np.ndarray = q, out: np.ndarray = out, pos: int = context - n) -> None:
            kernels.attention_f32(q, cache, layer=0, pos=pos, split=True, out=out, n_threads=bench.n_threads)

        n_keys = n * context - n * (n - 1) // 2  # seen by all the tokens together
        ops = 4 * size.n_heads * size.head_dim * n_keys
        n_bytes = 2 * size.n_kv_heads * context * size.head_dim * 2
        row: Row = {"kernel": "attention", "format": "f16", "n_columns": n, "context": context}
        yield {**row, **measured(bench, limits, call, kind="fma_f32", ops=ops, n_bytes=n_bytes)}


def row_kernel_rows(bench: Bench, limits: Limits, size: Size, n: int) -> Iterator[Row]:
    """Kernels that work along rows: bound by memory, so bytes are what is read and what is written."""
    rng = np.random.default_rng(n)
    n_threads = bench.n_threads if n > 1 else 1
    x = rng.standard_normal((n, size.hidden_size), dtype=np.float32)
    gate, up = rng.standard_normal((2, n, size.intermediate_size), dtype=np.float32)
    heads = rng.standard_normal((n, size.n_heads, size.head_dim), dtype=np.float32)
    weight, half = np.ones(size.hidden_size, dtype=np.float32), size.head_dim // 2
    cos, sin = np.ones((n, half), dtype=np.float32), np.zeros((n, half), dtype=np.float32)
    out, gated = np.empty_like(x), np.empty_like(gate)
    calls: dict[str, tuple[Callable[[], object], int]] = {
        "rmsnorm": (lambda: kernels.rmsnorm_f32(x, weight, eps=1e-6, out=out, n_threads=n_threads), 2 * x.nbytes),
        "rope": (lambda: kernels.rope_f32(heads, cos, sin, pairing="norm", n_threads=n_threads), 2 * heads.nbytes),
        "swiglu": (
            lambda: kernels.glu_f32(gate, up, activation="silu", out=gated, n_threads=n_threads),
            3 * gate.nbytes,
        ),
    }
    if size.hidden_size % 32 == 0:
        n_bytes = 2 * x.nbytes + x.size // 32 * 20  # read; two digits and a word a value, five words a block
        calls["quantise"] = (lambda: loops.quantize_rows(x, n_threads=n_threads), n_bytes)
    for kernel, (call, n_bytes) in calls.items():
        bench.progress.step(f"{kernel} × {n}")
        row: Row = {"kernel": kernel, "format": "f32", "n_columns": n}
        yield {**row, **measured(bench, limits, call, kind=None, ops=0, n_bytes=n_bytes, n_threads=n_threads)}


def dequantize_row(bench: Bench, limits: Limits, size: Size, format: str) -> Row:
    """Rows of the embedding back to floats, on one thread."""
    bench.progress.step("dequantise")
    _, block_size, block_bytes = kernels.kernel_formats()[format]
    n_blocks = max(1, size.hidden_size // block_size)
    rows = np.random.default_rng(0).integers(0x20, 0x3C, (256, n_blocks * block_bytes), dtype=np.uint8)
    n_bytes = rows.nbytes + 256 * n_blocks * block_size * 4
    row: Row = {"kernel": "dequantise", "format": format, "n_columns": 256}

    def call() -> None:
        kernels.dequantize(rows, format)

    return {**row, **measured(bench, limits, call, kind=None, ops=0, n_bytes=n_bytes, n_threads=1)}


def measured(
    bench: Bench,
    limits: Limits,
    call: Callable[[], object],
    *,
    kind: str | None,
    ops: float,
    n_bytes: float,
    n_threads: int | None = None,
    reachable: float = 1.0,
) -> Row:
    """Times of a call and what they mean."""
    samples = sample(call, repeat=bench.repeat)
    n_threads = n_threads or bench.n_threads
    seconds = median(samples)
    row: Row = {"n_threads": n_threads, "seconds": seconds, "stddev_s": spread(samples), "samples_s": samples}
    row["ops"], row["bytes"] = ops, n_bytes
    shares = bound(
        limits,
        kind=kind,
        ops=ops,
        n_bytes=n_bytes,
        working_set=n_bytes,
        seconds=seconds,
        n_threads=n_threads,
        reachable=reachable,
    )
    return {**row, **shares}
