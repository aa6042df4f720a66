"""From a file to the first token: everything to FP32 with the package gguf, Woolly, and weights without a file.

Each step runs in a process of its own, so that its peak memory is its own; the file lies in the page cache. Times are
taken inside that process, without starting Python and importing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from woolly.bench import machine
from woolly.bench.harness import Bench, Row, median
from woolly.bench.sizes import size_of
from woolly.bench.steps import token_ids
from woolly.errors import WoollyError

PROMPT_TOKENS = 8

COLUMNS = [
    ("model", "model", ""),
    ("step", "step", ""),
    ("file_bytes", ">file GB", "GB"),
    ("open_s", ">open ms", "ms"),
    ("materialise_s", ">weights ms", "ms"),
    ("ttft_s", ">first token ms", "ms"),
    ("total_s", ">together ms", "ms"),
    ("memory_bytes", ">peak memory GB", "GB"),
    ("baseline_bytes", ">of it Python GB", "GB"),
]

WORDS = {
    "gguf": "gguf: every tensor to FP32",
    "woolly": "Woolly: open, first token",
    "fast": "load_fast_fp32 of the same sizes",
}


def run(bench: Bench, args: argparse.Namespace) -> Iterator[Row]:
    """Rows of each step; medians over the processes."""
    if args.step is not None:
        yield _run_step(args, bench.n_threads)
        return
    if args.model is None:
        raise WoollyError("loading: --model is missing: the file whose loading is measured")
    from woolly import hub

    path = Path(hub.resolve(args.model))
    path.read_bytes()  # into the page cache
    bench.progress.start("loading", len(WORDS) * bench.repeat + 1)
    for step, words in WORDS.items():
        rows = []
        for _ in range(bench.repeat):
            bench.progress.step(words)
            rows.append(_in_a_process(path, step, bench.n_threads))
        yield {**_medians(rows), "step": words, "model": path.stem, "file_bytes": path.stat().st_size}


def _medians(rows: list[Row]) -> Row:
    keys = [key for key, value in rows[0].items() if isinstance(value, float | int) and not isinstance(value, bool)]
    return {**rows[0], **{key: median([row[key] for row in rows]) for key in keys}, "samples": len(rows)}


def _in_a_process(path: Path, step: str, n_threads: int) -> Row:
    command = [sys.executable, "-m", "woolly.bench", "loading", "--json", "--model", str(path), "--step", step]
    done = subprocess.run([*command, "--threads", str(n_threads)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise WoollyError(f"loading, step {step}: {done.stderr.strip().splitlines()[-1]}")
    row: Row = json.loads(done.stdout.splitlines()[-1])
    return row


def _run_step(args: argparse.Namespace, n_threads: int) -> Row:
    steps: dict[str, Callable[[str, int], Row]] = {"gguf": _gguf_step, "woolly": _woolly_step, "fast": _fast_step}
    if args.step not in steps:
        raise WoollyError(f"loading: step {args.step!r} is unknown; those that are known: {', '.join(steps)}")
    row: Row = {"mode": "loading", "n_threads": n_threads}
    return {**row, **steps[args.step](args.model, n_threads), "memory_bytes": machine.peak_memory_bytes()}


def _gguf_step(path: str, n_threads: int) -> Row:
    """What a reader without kernels of its own does: all of it inflated, and kept."""
    import gguf

    baseline = machine.peak_memory_bytes()
    started = time.perf_counter()
    reader = gguf.GGUFReader(path)
    opened = time.perf_counter()
    tensors = {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    done = time.perf_counter()
    assert tensors
    row: Row = {"open_s": opened - started, "materialise_s": done - opened, "total_s": done - started}
    return {**row, "baseline_bytes": baseline}


def _woolly_step(path: str, n_threads: int) -> Row:
    from woolly.loading import load_gguf

    baseline = machine.peak_memory_bytes()
    started = time.perf_counter()
    model = load_gguf(path, n_threads=n_threads)
    opened = time.perf_counter()
    model.generate(token_ids(PROMPT_TOKENS, model.config.vocab_size).tolist(), max_tokens=1, temperature=0)
    done = time.perf_counter()
    return {
        "open_s": opened - started,
        "ttft_s": done - opened,
        "total_s": done - started,
        "baseline_bytes": baseline,
        "n_prompt": PROMPT_TOKENS,
    }


def _fast_step(path: str, n_threads: int) -> Row:
    """Generated weights of the file's dimensions, in FP32: made at first use."""
    from woolly.gguf_file import GGUFFile
    from woolly.loading import load_fast_fp32
    from woolly.models import architecture

    with GGUFFile.open(path) as file:
        config = architecture(file.metadata.get_str("general.architecture")).read_config(file.metadata)
    size = size_of(config)
    baseline = machine.peak_memory_bytes()
    started = time.perf_counter()
    model = load_fast_fp32(
        vocab_size=size.vocab_size,
        hidden_size=size.n_heads * size.head_dim,
        n_layers=size.n_layers,
        n_heads=size.n_heads,
        n_kv_heads=size.n_kv_heads,
        intermediate_size=size.intermediate_size,
        n_threads=n_threads,
    )
    opened = time.perf_counter()
    model.generate(token_ids(PROMPT_TOKENS, size.vocab_size).tolist(), max_tokens=1, temperature=0)
    done = time.perf_counter()
    row: Row = {"open_s": opened - started, "ttft_s": done - opened, "total_s": done - started}
    row["materialise_s"] = getattr(model, "materialise_s", None)
    return {**row, "baseline_bytes": baseline, "n_prompt": PROMPT_TOKENS}
