"""`woolly convert` and `woolly dequantize`: model files written from other model files."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from woolly import hub
from woolly.convert import writing
from woolly.convert.opening import SUFFIX, open_checkpoint
from woolly.errors import WoollyError
from woolly.terminal import format_bytes, note, progress_bar


def convert(args: argparse.Namespace) -> int:
    """Write a folder, or another model file, as GGUF."""
    started, out = time.perf_counter(), Path(args.out)
    if out.suffix != ".gguf":
        raise WoollyError(f"{args.out}: expected the name of a GGUF file, OUT.gguf")
    kind = None if args.dtype == "auto" else args.dtype
    with open_checkpoint(hub.resolve(args.model)) as source:
        total = writing.bytes_of_gguf(source, kind)
        with progress_bar(out.name, total) as show:
            writing.write_gguf(source, out, type=kind, force=args.force, n_threads=args.threads, show_bytes=show)
    _say(out, total, started)
    return 0


def dequantize(args: argparse.Namespace) -> int:
    """Write a model's tensors as floats, into a safetensors file."""
    started, out = time.perf_counter(), Path(args.out)
    if out.suffix != SUFFIX:
        raise WoollyError(f"{args.out}: expected the name of a safetensors file, OUT{SUFFIX}")
    with open_checkpoint(hub.resolve(args.model)) as source:
        total = writing.bytes_of_safetensors(source, args.dtype)
        with progress_bar(out.name, total) as show:
            writing.write_safetensors(
                source, out, format=args.dtype, force=args.force, n_threads=args.threads, show_bytes=show
            )
    _say(out, total, started)
    return 0


def _say(out: Path, n_bytes: int, started: float) -> None:
    seconds = time.perf_counter() - started
    note(f"{out}: {format_bytes(n_bytes)} in {seconds:.1f} s, {format_bytes(int(n_bytes / seconds))}/s")
