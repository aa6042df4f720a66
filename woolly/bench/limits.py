"""The limits of the machine, measured: arithmetic peaks, memory bandwidth, the cost of threads and of a call.

A limit is the best of several samples, as whatever disturbs a sample makes it slower; the median is given beside it.
Every other mode takes its limits from `Limits` here, in the same run.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import time
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from woolly._kernels import BF16_LEAST_TOKENS, active_isa, aligned_empty, rmsnorm_f32
from woolly._kernels import limits as loops
from woolly.bench import machine
from woolly.bench.harness import Bench, Row, median, spread

SAMPLE_S = 0.002  # short, so that on a busy machine some samples are left alone
SAMPLES = 6  # for each one that is asked for: short samples scatter
PART_BYTES = 16 << 20
BUSY = 0.7  # a median below this part of the best: something else ran on the cores
MIN_REPETITIONS = 50  # of a region or barrier: one alone may wait for a thread that lost its core
MAX_BUFFER_BYTES = 1 << 30
FIRST_WRITE_BYTES = 256 << 20
MODEL_BYTES = (1 << 20, 16 << 20, 100 << 20, 256 << 20)  # working sets: a layer, and small models

PEAKS = {
    "fma_f32": "FP32 FMA peak",
    "dot_int8": "INT8 dot peak",
    "dot_int16": "INT16 dot peak",
    "dot_bf16": "BF16 dot peak",
}
COLUMNS = [
    ("limit", "limit", ""),
    ("isa", "isa", ""),
    ("n_threads", ">threads", "d"),
    ("bytes", ">buffer MB", "MB"),
    ("value", ">best", ",.1f"),
    ("median", ">median", ",.1f"),
    ("unit", "unit", ""),
    ("note", "note", ""),
]


class Limits:
    """Peaks and bandwidths of the instruction set in use, measured when they are first asked for.

    Parameters
    ----------
    repeat : int
        Sets how many samples are taken of each.
    """

    def __init__(self, *, repeat: int = 5) -> None:
        self._repeat = SAMPLES * max(repeat, 5)
        self._samples: dict[tuple[object, ...], list[float]] = {}

    def peak(self, kind: str, n_threads: int) -> float:
        """Operations a second of a kind, one of PEAKS; 0 where the machine has no such unit."""
        samples = self.peak_samples(active_isa(), kind, n_threads)
        return max(samples, default=0.0)

    def peak_samples(self, isa: str, kind: str, n_threads: int) -> list[float]:
        """Operations a second, sample by sample."""
        ops = {entry[:2]: entry[3] for entry in loops.peaks()}.get((isa, kind))
        if ops is None:
            return []

        def run(n: int, n_threads: int = n_threads) -> None:
            loops.run_peak(isa, kind, n, n_threads=n_threads)

        return self._measured(("peak", isa, kind, n_threads), run, ops * n_threads)

    def read(self, n_bytes: int, n_threads: int) -> float:
        """Bytes a second that a working set of n_bytes is read at, again and again.

        One that no cache holds is read as fast as any larger one, so no larger one is made.
        """
        return max(self.memory_samples("read", min(n_bytes, beyond_cache_bytes()), n_threads))

    def memory_samples(self, kind: str, n_bytes: int, n_threads: int) -> list[float]:
        """Bytes a second of "read" or "write" over a buffer of about n_bytes, sample by sample."""
        isa, n_bytes = active_isa(), _rounded(n_bytes)
        key = (kind, isa, n_bytes, n_threads)
        if key in self._samples:
            return self._samples[key]
        buffer = aligned_empty(n_bytes)
        buffer[:] = 1
        parts = _parts(buffer)
        work = loops.read_memory if kind == "read" else loops.write_memory
        following = itertools.cycle(parts)

        def run(n: int, n_threads: int = n_threads) -> None:
            work(next(following), isa=isa, n_passes=n, n_threads=n_threads)

        # a part of a large buffer is read once: by the time it comes round again it is in no cache
        return self._measured(key, run, len(parts[0]), most=1 if len(parts) > 1 else None)

    def first_write_samples(self, n_threads: int) -> list[float]:
        """Bytes a second into memory that the system has yet to give: what loading a model pays."""
        key = ("first_write", n_threads)
        if key not in self._samples:
            samples = []
            for part in _parts(aligned_empty(min(FIRST_WRITE_BYTES, beyond_cache_bytes()))):
                started = time.perf_counter()
                loops.write_memory(part, isa=active_isa(), n_threads=n_threads)
                samples.append(len(part) / (time.perf_counter() - started))
            self._samples[key] = samples
        return self._samples[key]

    def seconds_samples(self, name: str, run: Callable[[int], None]) -> list[float]:
        """Seconds that one of n repetitions costs."""
        return [1 / rate for rate in self._measured((name,), run, 1, least=MIN_REPETITIONS)]

    def _measured(
        self,
        key: tuple[object, ...],
        run: Callable[..., None],
        work: float,
        *,
        least: int | None = None,
        most: int | None = None,
    ) -> list[float]:
        """Rate of `work` a repetition, of which a sample takes as many as SAMPLE_S holds, within least and most.

        How many that are is found on one thread, unless there is a `least`: then run takes no n_threads.
        """
        if key not in self._samples:
            n = 1
            if most is None:
                n = max(least or 1, _repetitions(run if least else functools.partial(run, n_threads=1)))
            self._samples[key] = [n * work / _seconds(run, n) for _ in range(self._repeat)]
        return self._samples[key]


def quantised_limit(isa: str, compute: str = "exact") -> tuple[str, float]:
    """The dot product that matmuls of quantised weights are made of, and how much of its peak can be reached.

    Activations have 16 bits, a word. In AMX's tiles of bf16, which hold such integers exactly, they are two digits, so
    that a multiply-add of the model is two of the machine's. With compute "int8" they have 8 bits.
    """
    if isa == "avx512_amx":
        return "dot_bf16", 1.0 if compute == "int8" else 0.5
    return "dot_int8" if compute == "int8" else "dot_int16", 1.0


def matmul_limit(*, is_float: bool, n_tokens: int, compute: str = "exact") -> tuple[str, float]:
    """The arithmetic that bounds a matmul, and how much of its peak can be reached."""
    if compute == "bf16" and n_tokens >= BF16_LEAST_TOKENS:
        return "dot_bf16", 1.0
    if is_float:
        return "fma_f32", 1.0
    return quantised_limit(active_isa(), compute)


def bound(
    limits: Limits,
    *,
    kind: str | None,
    ops: float,
    n_bytes: float,
    working_set: float,
    seconds: float,
    n_threads: int,
    reachable: float = 1.0,
) -> Row:
    """What a measured time means: rates, and shares of the compute ceiling and of the read bandwidth.

    Parameters
    ----------
    limits : Limits
    kind : {"fma_f32", "dot_int8", "dot_int16", "dot_bf16", None}
        The arithmetic that bounds the work.
    ops : float
        Multiplications and additions of the model, not of the machine.
    n_bytes, working_set : float
        Bytes that must be read, and those that lie in memory meanwhile: which cache they can come from.
    seconds : float
    n_threads : int
    reachable : float
        How much of the peak is the ceiling, see `matmul_limit`.
    """
    row: Row = {"gops": ops / seconds / 1e9, "gb_per_s": n_bytes / seconds / 1e9}
    row["read_share"] = n_bytes / seconds / limits.read(int(working_set), n_threads) if n_bytes else 0.0
    row["compute_share"] = 0.0
    if kind is not None and ops:
        row["compute_share"] = ops / seconds / (reachable * limits.peak(kind, n_threads))
    row["share"] = max(row["compute_share"], row["read_share"])
    row["limit"] = "read" if row["read_share"] >= row["compute_share"] else kind
    return row


def beyond_cache_bytes() -> int:
    """Bytes of a buffer that no cache holds: twice the largest, at most a gigabyte or an eighth of the memory."""
    most = min(MAX_BUFFER_BYTES, (machine.memory_bytes() or MAX_BUFFER_BYTES) // 8)
    return _rounded(min(max(2 * machine.last_level_bytes(), 256 << 20), most))


def run(bench: Bench, args: argparse.Namespace) -> Iterator[Row]:
    """Rows of all limits, for 1 to n_threads threads."""
    limits = Limits(repeat=bench.repeat)
    counts = _thread_counts(bench.n_threads)
    sizes = [*(size for size in MODEL_BYTES if size < beyond_cache_bytes()), beyond_cache_bytes()]
    bench.progress.start("limits", len(counts) * (len(loops.peaks()) + 2 * len(sizes) + 3) + 1)
    for cache in machine.caches():
        name = f"L{cache['level']} {cache['kind']} cache"
        note = f"of the core's group, shared by {cache['shared_by']} CPU(s) of this machine"
        yield {"mode": "limits", "limit": name, "value": cache["bytes"] / 1024, "unit": "KiB", "note": note}
    for n_threads in counts:
        yield from _arithmetic(bench, limits, n_threads)
        yield from _memory(bench, limits, n_threads, sizes)
        yield from _threads(bench, limits, n_threads)
    yield _call(bench, limits)


def _arithmetic(bench: Bench, limits: Limits, n_threads: int) -> Iterator[Row]:
    for isa, kind, instruction, _ in loops.peaks():
        bench.progress.step(f"{PEAKS[kind]}, {isa}, {n_threads} thread(s)")
        samples = [rate / 1e9 for rate in limits.peak_samples(isa, kind, n_threads)]
        unit = "Gop/s" if kind.startswith("dot_int") else "GFLOP/s"
        yield _row(PEAKS[kind], samples, unit, n_threads, kind=kind, isa=isa, note=instruction)


def _memory(bench: Bench, limits: Limits, n_threads: int, sizes: list[int]) -> Iterator[Row]:
    beyond = beyond_cache_bytes()
    for kind in ("read", "write"):
        for size in sizes:
            bench.progress.step(f"{kind}, {size >> 20} MB, {n_threads} thread(s)")
            samples = [rate / 1e9 for rate in limits.memory_samples(kind, size, n_threads)]
            note = "twice the largest cache" if size == beyond >= 2 * machine.last_level_bytes() else None
            name = f"{kind} bandwidth"
            yield _row(name, samples, "GB/s", n_threads, kind=kind, isa=active_isa(), bytes=size, note=note)
    bench.progress.step(f"first write, {n_threads} thread(s)")
    samples = [rate / 1e9 for rate in limits.first_write_samples(n_threads)]
    size = min(FIRST_WRITE_BYTES, beyond)
    yield _row("first-write bandwidth", samples, "GB/s", n_threads, kind="first_write", bytes=size, note="new pages")


def _threads(bench: Bench, limits: Limits, n_threads: int) -> Iterator[Row]:
    """An empty parallel region, and a barrier within one."""
    costs = {"parallel region": loops.run_regions, "barrier": loops.run_barriers}
    for name, work in costs.items():
        bench.progress.step(f"{name}, {n_threads} thread(s)")

        def repeat(n: int, work: Callable[..., None] = work) -> None:
            work(n, n_threads=n_threads)

        samples = limits.seconds_samples(f"{name} {n_threads}", repeat)
        yield _cost(name, samples, n_threads)


def _call(bench: Bench, limits: Limits) -> Row:
    """A kernel call from Python that has next to nothing to do."""
    bench.progress.step("kernel call")
    x, weight = np.ones((1, 16), dtype=np.float32), np.ones(16, dtype=np.float32)
    out = np.empty_like(x)

    def repeat(n: int) -> None:
        for _ in range(n):
            rmsnorm_f32(x, weight, eps=1e-6, out=out, n_threads=1)

    note = "rmsnorm_f32 of 16 values, from Python"
    return {**_cost("kernel call", limits.seconds_samples("kernel call", repeat), 1), "note": note}


def _cost(name: str, samples: list[float], n_threads: int) -> Row:
    microseconds = [1e6 * seconds for seconds in samples]
    row = _row(name, microseconds, "µs", n_threads)
    return {**row, "value": min(microseconds)}


def _row(name: str, samples: list[float], unit: str, n_threads: int, **rest: object) -> Row:
    row = {"mode": "limits", "limit": name, "n_threads": n_threads, **rest}
    row |= {"value": max(samples), "median": median(samples), "stddev": spread(samples), "samples": samples}
    row["is_busy"] = median(samples) < BUSY * max(samples)
    if row["is_busy"]:
        row["note"] = "; ".join(filter(None, (row.get("note"), "samples scatter: is the machine busy?")))
    return {**row, "unit": unit}


def _repetitions(run: Callable[[int], None]) -> int:
    """How many repetitions take about SAMPLE_S."""
    n = 1
    while True:
        seconds = min(_seconds(run, n) for _ in range(2))
        if seconds > SAMPLE_S / 4:
            return max(1, round(n * SAMPLE_S / seconds))
        n *= 4


def _seconds(run: Callable[[int], None], n: int) -> float:
    started = time.perf_counter()
    run(n)
    return time.perf_counter() - started


def _parts(buffer: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
    """A large buffer in parts that a sample can read in a millisecond or two; a small one as it is."""
    return [buffer[at : at + PART_BYTES] for at in range(0, len(buffer), PART_BYTES)]


def _rounded(n_bytes: int) -> int:
    """The nearest of sizes a factor of two apart, in whole steps of the memory loops and 32 KB at least."""
    return max(32 << 10, 1 << round(np.log2(max(n_bytes, 1))))


def _thread_counts(n_threads: int) -> list[int]:
    """1, 2, 4 … and n_threads."""
    return sorted({n_threads, *(1 << k for k in range(n_threads.bit_length()) if 1 << k <= n_threads)})
