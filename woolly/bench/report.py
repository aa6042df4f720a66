"""All modes in one go, and a report of them: report.md, its pictures, and the JSON lines that both are made from.

Each mode runs in a process of its own, as a user would run it, so that memory and threads of one do not weigh on the
next. The report is written from the rows that were kept, so its figures are the JSON's.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from woolly.bench import machine
from woolly.bench.harness import Progress, Row, format_cell
from woolly.cli import EXIT_INTERRUPTED
from woolly.errors import WoollyError

TITLES = {
    "limits": "What the machine can do",
    "kernels": "Kernels",
    "isa": "Instruction sets",
    "layer": "Where a layer's time goes",
    "model": "Models",
    "stack": "What each optimisation brings",
    "loading": "From a file to the first token",
}
PICTURES = {
    "kernels": "roofline.png",
    "layer": "layer.png",
    "model": "depth.png",
    "stack": "stack.png",
    "loading": "loading.png",
}

QUICK_SIZES = ["--vocab-size", "512", "--hidden-size", "128", "--layers", "2", "--heads", "4", "--kv-heads", "2"]
QUICK_SIZES += ["--intermediate-size", "256"]


def run_all(args: argparse.Namespace, n_threads: int) -> int:
    """Run every mode, write the report into `args.report`, and return the exit code."""
    require_matplotlib()
    folder = Path(args.report)
    folder.mkdir(parents=True, exist_ok=True)
    facts = machine.describe(n_threads)
    rows, is_interrupted = [facts], False
    commands = list(_commands(args, n_threads))
    with Progress() as progress:
        progress.start("all", len(commands))
        try:
            for command in commands:
                progress.step(" ".join(command[:3]))
                rows += _run_mode(command, n_threads)
        except KeyboardInterrupt:
            is_interrupted = True
    (folder / "results.jsonl").write_text("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
    write_report(folder, rows)
    if args.json:
        print("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows), end="", flush=True)
    else:
        print(folder / "report.md")
    return EXIT_INTERRUPTED if is_interrupted else 0


def require_matplotlib() -> None:
    """Refuse early where pictures cannot be made.

    Raises
    ------
    WoollyError
        matplotlib is missing.
    """
    try:
        importlib.import_module("matplotlib")
    except ImportError:
        raise WoollyError("the report's pictures need matplotlib: pip install 'woolly[bench]'") from None


def _commands(args: argparse.Namespace, n_threads: int) -> Iterator[list[str]]:
    """Arguments of each mode; `--quick` makes everything tiny."""
    repeat = ["--repeat", "2" if args.quick else str(args.repeat)]
    model = _model(args)
    small = QUICK_SIZES if args.quick else ["--dtype", "q4_0"]
    size = "tiny" if args.quick else "small"
    tokens = ["-p", "16", "-n", "4"] if args.quick else ["-p", "256", "-n", "32"]
    depths = ["-d", "0,32"] if args.quick else ["-d", "0,512,1024,1536"]
    yield ["limits", *repeat]
    formats = "f32,q8_0,q4_0" if args.quick else "f32,bf16,q8_0,q4_0,q4_1,q4_k,q6_k"
    columns = ["--columns", "1,16" if args.quick else "1,4,16,64,256"]
    contexts = ["--contexts", "128" if args.quick else "128,1024,4096"]
    yield ["kernels", "--sizes", size, "--formats", formats, *columns, *contexts, *repeat]
    yield ["isa", "--sizes", size, *contexts[:1], "64" if args.quick else "1024", *repeat]
    for subject in ([*small], *([["--model", model]] if model else [])):
        yield ["layer", *subject, "-p", tokens[1], *repeat]
        sustained = ["--sustained", "24" if args.quick else "64"]
        yield ["model", *subject, *tokens, *depths, *sustained, *repeat]
    stack = ["--model", model] if model else QUICK_SIZES if args.quick else []
    yield ["stack", *stack, "-p", "8" if args.quick else "64", "-n", "2" if args.quick else "8", *repeat]
    if model:
        yield ["loading", "--model", model, "--repeat", "1" if args.quick else "3"]


def _model(args: argparse.Namespace) -> str | None:
    """The file beside the small model: the one asked for, or the default model where it is at hand already."""
    from woolly import hub

    if args.model is not None:
        return str(hub.resolve(args.model))
    cached = {model.name: model.path for model in hub.list_models()}
    return str(cached["smollm2"]) if "smollm2" in cached else None


def _run_mode(command: list[str], n_threads: int) -> list[Row]:
    """The rows of one mode; one row that says what went wrong, where it failed."""
    whole = [sys.executable, "-m", "woolly.bench", *command, "--json", "--threads", str(n_threads)]
    done = subprocess.run(whole, capture_output=True, text=True, check=False)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    rows = [row for row in rows if row["mode"] != "machine"]
    if done.returncode == EXIT_INTERRUPTED:
        raise KeyboardInterrupt
    if done.returncode:
        rows.append({"mode": command[0], "table": "failed", "error": done.stderr.strip().splitlines()[-1]})
    return rows


# --- the text ---


def write_report(folder: Path, rows: list[Row]) -> None:
    """report.md and its pictures from rows."""
    from woolly.bench import plots

    pictures = {mode: name for mode, name in PICTURES.items() if plots.draw(mode, rows, folder / name)}
    facts = rows[0]
    unused = f" Not used: {', '.join(facts['unused_units'])}." if facts["unused_units"] else ""
    lines = [
        "# How fast is this machine?",
        "",
        f"{facts['machine']}; instruction set {facts['isa']}, {facts['n_threads']} thread(s); "
        f"woolly {facts['woolly']}, commit {facts['commit']}, numpy {facts['numpy']}; {facts['date']}.{unused}",
        "",
        "Every figure was measured in this run, or is marked as projected with its rule. Limits are the best of their "
        "samples, everything else the median. A share is of the limit that binds: the read bandwidth of a working set "
        "of that size, or the ceiling of the arithmetic. For quantised matrices that ceiling is the INT16 peak, as "
        "activations have 16 bits, and 50 % of the BF16 peak on AMX, in whose tiles of bf16 they are two digits, which "
        "are exact; Gop/s counts the model's multiplications and additions.",
    ]
    for mode, title in TITLES.items():
        chosen = [row for row in rows if row["mode"] == mode]
        if chosen:
            lines += ["", f"## {title}", ""]
            if mode in pictures:
                lines += [f"![{title}]({pictures[mode]})", ""]
            lines += _tables(mode, chosen)
    (folder / "report.md").write_text("\n".join(lines) + "\n")


def _tables(mode: str, rows: list[Row]) -> list[str]:
    """Markdown tables of a mode's rows, one for each value of "table"; what failed is said."""
    module = importlib.import_module(f"woolly.bench.{mode}")
    lines: list[str] = []
    for table in dict.fromkeys(row.get("table") for row in rows):
        chosen = [row for row in rows if row.get("table") == table]
        if table == "failed":
            lines += [f"Failed: {row['error']}" for row in chosen]
            continue
        lines += [f"**{table}**", ""] if table else []
        lines += [*markdown_table(chosen, module.COLUMNS), ""]
    lines += [str(rule) for rule in dict.fromkeys(row["rule"] for row in rows if row.get("rule"))]
    return lines


def markdown_table(rows: list[Row], columns: list[tuple[str, str, str]]) -> list[str]:
    """Rows as the terminal shows them, in Markdown."""
    keys = [column for column in columns if any(row.get(column[0]) is not None for row in rows)]
    head = [heading.removeprefix(">") or " " for _, heading, _ in keys]
    rule = ["---:" if heading.startswith(">") else "---" for _, heading, _ in keys]
    cells: list[list[Any]] = [[format_cell(row.get(key), spec) for key, _, spec in keys] for row in rows]
    return ["| " + " | ".join(line) + " |" for line in [head, rule, *cells]]
