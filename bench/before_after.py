"""Each kernel in two trees of this repository, taking turns: python bench/before_after.py OLD_TREE NEW_TREE [--isa …]

Both trees are built in place. Each has a process of its own, which gets the same work by turns, A B B A, as a machine's
speed may change by half within a minute: what counts is the ratio of the times of one turn. A matrix is about 0.75 MB
("cached": it stays in L2) or 64 MB ("streamed"; 2048 rows for many columns, which take long enough over each weight).
A line says how fast the new tree is, as a multiple of the old one: the median of the turns' ratios, and the ratio of
the 10th percentiles of their times. Where a process finds its memory moves short kernels by some percent for as long
as it lives: `--rounds N` begins anew N times. `--out` appends JSON lines, of which `--table FILE` makes tables of
Markdown, of medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Case = dict[str, Any]
Call = Callable[[], object]

FORMATS = "f32,f16,bf16,q8_0,q4_0,q4_1,q5_0,q5_1,q4_k,q5_k,q6_k,q2_k,q3_k,iq4_nl,iq4_xs,mxfp4"
PLACES = {"cached": (3 << 18, 768), "streamed": (64 << 20, 5632)}  # bytes of a matrix, its columns
MANY_COLUMNS, MANY_COLUMNS_ROWS = 16, 2048
HEADS, KV_HEADS, HEAD_DIM = 32, 4, 64
WIDTH = 2048  # of the kernels along rows
SAMPLE_S = 0.003
LEAST_TURNS = 5
PAGE = 4096
ALL_CORES = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()


def main() -> int:
    """Measure what the arguments name and print a table."""
    args = arguments()
    if args.child:
        serve()
        return 0
    if args.table:
        print(tables([json.loads(line) for line in args.table.read_text().splitlines()]))
        return 0
    print(f"{'kernel':>10} {'format':>7} {'place':>9} {'isa':>11} {'columns':>7} {'context':>7} {'threads':>7}", end="")
    print(f" {'old µs':>10} {'new µs':>10} {'speed':>6} {'of p10':>6}")
    try:
        for _ in range(args.rounds):
            measure(args)
    except KeyboardInterrupt:
        return 130
    return 0


def measure(args: argparse.Namespace) -> None:
    """All cases once, by two processes."""
    children = [Child(args.old), Child(args.new)]
    try:
        for case in cases(args):
            row = compare(children, case, args.seconds)
            print(format_row(row), flush=True)
            if args.out:
                with args.out.open("a") as out:
                    out.write(json.dumps(row) + "\n")
    finally:
        for child in children:
            child.close()


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("old", nargs="?", type=Path, metavar="OLD_TREE")
    parser.add_argument("new", nargs="?", type=Path, metavar="NEW_TREE")
    parser.add_argument("--isa", default="scalar,avx2,avx512,avx512_amx", help="instruction sets, by commas")
    parser.add_argument("--formats", default=FORMATS)
    parser.add_argument("--columns", default="1,4,16,256")
    parser.add_argument("--kernels", default="cached,streamed,attention,rows", help="groups of kernels, by commas")
    parser.add_argument("--contexts", default="128,4096")
    parser.add_argument("--threads", default="1", help="numbers of threads, by commas")
    parser.add_argument("--seconds", type=float, default=0.6, help="for each line of the table")
    parser.add_argument("--rounds", type=int, default=1, help="times that all is measured by new processes")
    parser.add_argument("--out", type=Path, help="a file that JSON lines are appended to")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print tables of what --out has written, and end")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not args.child and not args.table and args.new is None:
        parser.error("expected OLD_TREE and NEW_TREE")
    for name in ("isa", "formats", "columns", "kernels", "contexts", "threads"):
        values = getattr(args, name).split(",")
        setattr(args, name, [int(value) for value in values] if name in ("columns", "contexts", "threads") else values)
    return args


def cases(args: argparse.Namespace) -> Iterator[Case]:
    """Every line of the table: cases of one matrix follow each other, so that it is made once."""
    for group in args.kernels:
        if group in PLACES:
            for format in args.formats:
                for columns in args.columns:
                    yield from ways(args, {"kernel": "matmul", "place": group, "format": format, "columns": columns})
        elif group == "attention":
            for context in args.contexts:
                for columns in (1, 64):
                    yield from ways(args, {"kernel": "attention", "context": context, "columns": columns})
        else:
            for kernel in ("rmsnorm", "rope", "swiglu", "quantise"):
                for columns in (1, 64):
                    yield from ways(args, {"kernel": kernel, "columns": columns})


def ways(args: argparse.Namespace, case: Case) -> Iterator[Case]:
    """The case on each instruction set by each number of threads."""
    for isa in args.isa:
        for threads in args.threads:
            yield {**case, "isa": isa, "threads": threads}


class Child:
    """A process that computes with one tree's kernels."""

    def __init__(self, tree: Path) -> None:
        if not (tree / "woolly").is_dir():
            raise SystemExit(f"before_after: error: {tree} is no tree of this repository")
        environment = {**os.environ, "PYTHONPATH": str(tree.resolve())}
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def ask(self, request: Case) -> float:
        """Seconds of one call: of a new case, or of so many more of the one before."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"before_after: error: the process of a tree ended with status {self._process.wait()}")
        return float(answer)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()


def compare(children: list[Child], case: Case, seconds: float) -> Case:
    """Times of a case in both trees, by turns, for about so many seconds."""
    once_s = max(child.ask(case) for child in children)
    request = {"calls": max(1, round(SAMPLE_S / once_s))}
    n_turns = max(LEAST_TURNS, round(seconds / (2 * request["calls"] * once_s)))
    old: list[float] = []
    new: list[float] = []
    for turn in range(n_turns):
        pair = [(children[0], old), (children[1], new)]
        for child, times in pair if turn % 2 else pair[::-1]:
            times.append(child.ask(request))
    low, high = np.quantile(old, 0.1), np.quantile(new, 0.1)
    return {
        **case,
        "turns": n_turns,
        "old_s": statistics.median(old),
        "new_s": statistics.median(new),
        "speed": statistics.median(a / b for a, b in zip(old, new, strict=True)),
        "speed_p10": float(low / high),
    }


def format_row(row: Case) -> str:
    """A line of the table."""
    return (
        f"{row['kernel']:>10} {row.get('format', ''):>7} {row.get('place', ''):>9} {row['isa']:>11} "
        f"{row['columns']:>7} {row.get('context', ''):>7} {row['threads']:>7} {row['old_s'] * 1e6:>10,.1f} "
        f"{row['new_s'] * 1e6:>10,.1f} {row['speed']:>6.2f} {row['speed_p10']:>6.2f}"
    )


def tables(rows: list[Case]) -> str:
    """Tables of Markdown: how fast the new tree is, as a multiple of the old one."""
    parts: dict[str, dict[str, dict[str, list[float]]]] = {}  # title -> line -> column -> speeds
    for row in rows:
        n_columns = f"{row['columns']} column" + "s" * (row["columns"] > 1)
        if row["kernel"] == "matmul":
            title = f"Matmul, {row['place']}, {row['threads']} thread" + "s" * (row["threads"] > 1)
            line, column = row["format"], f"{row['isa']} × {row['columns']}"
        else:
            title = "Other kernels"
            context = f", context {row['context']}" if "context" in row else ""
            line, column = f"{row['kernel']}, {n_columns}{context}", row["isa"]
        parts.setdefault(title, {}).setdefault(line, {}).setdefault(column, []).append(row["speed"])
    return "\n\n".join(f"{title}\n\n{table(lines)}" for title, lines in parts.items())


def table(lines: dict[str, dict[str, list[float]]]) -> str:
    """One table: medians by line and column."""
    columns = list(dict.fromkeys(column for line in lines.values() for column in line))
    text = [f"| | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for name, line in lines.items():
        cells = [f"{statistics.median(line[column]):.2f}" if column in line else "" for column in columns]
        text.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(text)


def serve() -> None:
    """Answer requests until stdin ends: a case is made ready, and calls are timed."""
    from woolly import _kernels as kernels

    call: Call | None = None
    for line in sys.stdin:
        request = json.loads(line)
        if "calls" not in request:
            kernels.set_isa(request["isa"])
            pin(request["threads"])
            call = prepare(request)
            call()
        assert call is not None
        call()  # brings back into the caches what the other process's turn may have driven out
        n_calls = request.get("calls", 1)
        started = time.perf_counter()
        for _ in range(n_calls):
            call()
        print((time.perf_counter() - started) / n_calls, flush=True)


def pin(n_threads: int) -> None:
    """One thread stays on one core, the same for both trees: what else runs there slows down both."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(ALL_CORES)} if n_threads == 1 else ALL_CORES)


def prepare(case: Case) -> Call:
    """What one call of a case does."""
    if case["kernel"] == "matmul":
        return prepare_matmul(case)
    return prepare_attention(case) if case["kernel"] == "attention" else prepare_rows(case)


matrices: dict[tuple[str, int, int], Any] = {}  # the last one


def prepare_matmul(case: Case) -> Call:
    """A matrix of random bits by random columns: bytes of 0x20 to 0x3b make every float field normal."""
    from woolly import _kernels as kernels

    n_bytes, n_cols = PLACES[case["place"]]
    _, block_size, block_bytes = kernels.kernel_formats()[case["format"]]
    row_bytes = n_cols // block_size * block_bytes
    n_rows = n_bytes // row_bytes // 64 * 64
    if case["place"] == "streamed" and case["columns"] >= MANY_COLUMNS:
        n_rows = MANY_COLUMNS_ROWS
    key = case["format"], n_rows, n_cols
    rng = np.random.default_rng(0)
    if key not in matrices:
        matrices.clear()
        rows = np.resize(rng.integers(0x20, 0x3C, (64, row_bytes), dtype=np.uint8), (n_rows, row_bytes))
        matrices[key] = kernels.PackedMatrix(n_rows, n_cols, case["format"]).pack(rows, n_threads=1)
    w = matrices[key]
    x = rng.standard_normal((case["columns"], n_cols), dtype=np.float32)
    out = np.empty((case["columns"], n_rows), dtype=np.float32)
    return lambda: kernels.matmul(w, x, out=out, n_threads=case["threads"])


def prepare_attention(case: Case) -> Call:
    """The last tokens of a context over its cache."""
    from woolly import _kernels as kernels

    context, n = case["context"], case["columns"]
    rng = np.random.default_rng(0)
    cache = kernels.KVCache(1, KV_HEADS, HEAD_DIM, context)
    cache.store(0, 0, *rng.standard_normal((2, context, KV_HEADS, HEAD_DIM), dtype=np.float32))
    q = rng.standard_normal((n, HEADS, HEAD_DIM), dtype=np.float32)
    out = np.empty_like(q)
    options = {"layer": 0, "pos": context - n, "split": True, "out": out, "n_threads": case["threads"]}
    return lambda: kernels.attention_f32(q, cache, **options)


def prepare_rows(case: Case) -> Call:
    """Kernels along rows."""
    from woolly import _kernels as kernels
    from woolly._kernels import limits

    n, n_threads = case["columns"], case["threads"]
    rng = np.random.default_rng(0)
    x, y, out = (floats_at(offset, (n, WIDTH)) for offset in (0, 1024, 2048))
    x[:], y[:] = rng.standard_normal((2, n, WIDTH), dtype=np.float32)
    weight = np.ones(WIDTH, dtype=np.float32)
    heads = x.reshape(n, -1, HEAD_DIM)
    cos, sin = np.ones((n, HEAD_DIM // 2), dtype=np.float32), np.zeros((n, HEAD_DIM // 2), dtype=np.float32)
    calls: dict[str, Call] = {
        "rmsnorm": lambda: kernels.rmsnorm_f32(x, weight, eps=1e-6, out=out, n_threads=n_threads),
        "rope": lambda: kernels.rope_f32(heads, cos, sin, pairing="norm", n_threads=n_threads),
        "swiglu": lambda: kernels.glu_f32(x, y, activation="silu", out=out, n_threads=n_threads),
        "quantise": lambda: limits.quantize_rows(x, n_threads=n_threads),
    }
    return calls[case["kernel"]]


def floats_at(offset: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """An array that begins so many bytes into a page: loads wait for stores at the same place of another page."""
    from woolly._kernels import aligned_empty

    return aligned_empty(offset + math.prod(shape) * 4, align=PAGE)[offset:].view(np.float32).reshape(shape)


if __name__ == "__main__":
    sys.exit(main())
