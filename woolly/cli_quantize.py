"""`woolly quantize`: a GGUF file written again in other formats."""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

from woolly import hub
from woolly.atomic import check_target
from woolly.formats import FLOATS
from woolly.gguf_file import GGUFFile
from woolly.gguf_split import open_gguf
from woolly.quantizing import QuantizePlan, TensorPlan, plan_quantization, quantize_file
from woolly.terminal import format_bytes, note, print_facts, print_table


def quantize(args: argparse.Namespace) -> int:
    """Write the file, or say what would be written."""
    source, target = hub.resolve(args.model), Path(args.out)
    if not args.dry_run:
        check_target(target, force=args.force)
    with open_gguf(source) as file:
        plan = plan_quantization(
            file,
            args.type,
            allow_requantize=args.allow_requantize,
            output_type=_lower(args.output_type),
            token_embd_type=_lower(args.token_embd_type),
            pure=args.pure,
        )
        if args.dry_run:
            _show_plan(plan, as_json=args.json)
            return 0
        began = time.perf_counter()
        _write(file, target, plan, args.threads)
    _show_result(plan, target, time.perf_counter() - began, as_json=args.json)
    return 0


def _lower(name: str | None) -> str | None:
    return None if name is None else name.lower()


def _write(file: GGUFFile, target: Path, plan: QuantizePlan, n_threads: int | None) -> None:
    """Write the file with a progress bar on stderr, where that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.text import Text

    console = Console(stderr=True)
    columns = (TextColumn("Quantizing"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    name = TextColumn("{task.fields[tensor]}")
    with Progress(*columns, name, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=plan.bytes_before, tensor="")

        def advance(tensor: TensorPlan, n_bytes: int) -> None:
            progress.update(task, advance=n_bytes, tensor=Text(tensor.source.name))

        quantize_file(file, target, plan, n_threads=n_threads, on_progress=advance)


def _summary(plan: QuantizePlan) -> dict[str, Any]:
    counts = Counter(tensor.format.name for tensor in plan.tensors)
    return {
        "type": plan.mix.name,
        "tensors": dict(counts.most_common()),
        "weights": plan.n_weights,
        "bytes_before": plan.bytes_before,
        "bytes_after": plan.bytes_after,
        "bits_per_weight": round(plan.bits_per_weight, 4),
    }


def _show_plan(plan: QuantizePlan, *, as_json: bool) -> None:
    """The format of each tensor, and the sums."""
    if as_json:
        formats = {
            tensor.source.name: {
                "shape": tensor.source.shape,
                "before": tensor.source.format.name,
                "after": tensor.format.name,
                "bytes": tensor.n_bytes,
            }
            for tensor in plan.tensors
        }
        print(json.dumps(_summary(plan) | {"plan": formats}))
        return
    rows = [
        (
            tensor.source.name,
            " × ".join(map(str, tensor.source.shape)),
            tensor.source.format.name,
            tensor.format.name,
            format_bytes(tensor.n_bytes),
        )
        for tensor in plan.tensors
    ]
    print_table(("Tensor", ">Shape", "Format", "Becomes", ">Size"), rows)
    print()
    print_facts(_facts(plan))


def _show_result(plan: QuantizePlan, target: Path, seconds: float, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(_summary(plan) | {"path": str(target), "seconds": round(seconds, 3)}))
        return
    print_facts([*_facts(plan), ("File", target), ("Time", f"{seconds:.1f} s")])
    if any(tensor.source.format.name not in FLOATS for tensor in plan.tensors):
        note("Some tensors were quantised before: what was lost then is not in this file either.")


def _facts(plan: QuantizePlan) -> list[tuple[str, object]]:
    counts = Counter(tensor.format.name for tensor in plan.tensors)
    return [
        ("Type", plan.mix.name),
        ("Tensors", ", ".join(f"{name} {count}" for name, count in counts.most_common())),
        ("Size", f"{format_bytes(plan.bytes_before)} before, {format_bytes(plan.bytes_after)} after"),
        ("Bits a weight", f"{plan.bits_per_weight:.2f}"),
    ]
