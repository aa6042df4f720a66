"""The whole table of speeds, recorded: python bench/record.py --files DIR [--only PART,PART] [--repeat N]

Runs the modes of `woolly.bench` and `bench/compare.py` over two real models and files of a 1B model with generated
weights, which are made in DIR where they are missing, and writes what they measured as JSON lines to
bench/results/COMMIT.jsonl: the machine first, then a row for each measurement, with its limit from the same process.
Under WOOLLY_ISA that is COMMIT-ISA.jsonl. With --only, what the file has of other parts is kept.
`--show FILE` prints such a file as a table. Not part of the package.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

RESULTS = Path(__file__).parent / "results"
SIZES_OF_1B = (
    "--hidden-size 2048 --layers 22 --heads 32 --kv-heads 4 --intermediate-size 5632 --vocab-size 49152 --ctx 8192"
)
KERNEL_FORMATS = "f32,f16,bf16,q8_0,q4_0,q4_1,q5_0,q5_1,q4_k,q5_k,q6_k,q2_k,q3_k,iq4_nl,iq4_xs,mxfp4"
USUAL_FORMATS = ("q4_0", "q8_0", "f16")  # of the 1B model
OTHER_FORMATS = tuple(name for name in KERNEL_FORMATS.split(",") if name not in ("f32", "q4_k", *USUAL_FORMATS))
SYNTHETIC = {f"1b-{dtype}": dtype for dtype in (*USUAL_FORMATS, *OTHER_FORMATS)}  # of `woolly synth`
QUANTISED = {"1b-q4_k_m": ("1b-f16", "q4_k_m"), "smollm2-f32": ("smollm2", "f32")}  # file -> source, type
REAL = ("smollm2", "gemma3-270m")  # names that `woolly pull` knows
COMPARED = ("smollm2", "gemma3-270m", "1b-q4_0", "1b-q8_0", "1b-q4_k_m", "1b-f16")

Row = dict[str, Any]


def commands(repeat: int) -> dict[str, list[tuple[str, str]]]:
    """Of each part, (mode and options, model) of its runs."""
    often, rarely = f"--repeat {repeat} --prompts 1 --sustained 0", "--repeat 5 --prompts 1 --sustained 0"
    return {
        "limits": [("limits", "")],
        "kernels": [(f"kernels --sizes 1b --columns 1,16,256 --contexts 128,4096 --formats {KERNEL_FORMATS}", "")],
        "isa": [("isa --sizes small --columns 1,4,64", "")],
        "models": [
            *((f"model -p 256 -n 32 {often}", name) for name in (*REAL, "smollm2-f32")),
            *((f"model -p 256 -n 32 {rarely}", name) for name in ("1b-q4_0", "1b-q8_0", "1b-q4_k_m", "1b-f16")),
            (f"model -p 0 -n 32 -d 1536 {often}", "smollm2"),
            (f"model -p 256 -n 16 -d 4096 {rarely}", "1b-q4_0"),
            (f"model -p 0 -n 16 --sequences 16 {rarely}", "1b-q4_0"),
        ],
        "formats": [(f"model -p 256 -n 32 {rarely}", f"1b-{dtype}") for dtype in OTHER_FORMATS],
        "int8": [(f"model --compute int8 -p 256 -n 32 {often}", name) for name in (*REAL, "1b-q4_0")],
        "bf16": [(f"model --compute bf16 -p 256 -n 0 {often}", name) for name in (*REAL, "1b-q4_0", "1b-f16")],
        "loading": [("loading --repeat 5", name) for name in (*REAL, "1b-q4_0")],
        "opening": [("loading --repeat 3", name) for name in ("1b-q4_k_m", *SYNTHETIC)],
        "compare": [("compare", name) for name in COMPARED],
    }


def main() -> int:
    """Make the files, run the parts and write their rows; or show a file of them."""
    args = _arguments()
    if args.show is not None:
        show([json.loads(line) for line in args.show.read_text().splitlines()])
        return 0
    from woolly._kernels import check_threads
    from woolly.bench import machine

    parts = commands(args.repeat)
    runs = [(part, *run) for part in args.only or parts for run in parts[part]]
    facts = machine.describe(check_threads(args.threads))
    RESULTS.mkdir(exist_ok=True)
    isa = os.environ.get("WOOLLY_ISA")
    path = RESULTS / f"{facts['commit']}{'-' + isa if isa else ''}.jsonl"
    rows = [facts, *kept(path, {part for part, *_ in runs})]
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns) as progress:
        task = progress.add_task("files", total=len(runs))
        for run in runs:
            part, command, model = run
            progress.update(task, description=f"{command} {model}"[:60])
            rows += ({"part": part, **row} for row in measured(command, model, args))
            path.write_text("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
            progress.advance(task)
    show(rows)
    print(path)
    return 0


def kept(path: Path, parts: set[str]) -> list[Row]:
    """Rows of an earlier run at the same commit, but for the parts that are measured again."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [row for row in rows if row["mode"] != "machine" and row["part"] not in parts]


def measured(command: str, model: str, args: argparse.Namespace) -> Iterator[Row]:
    """The rows of one run, in a process of its own."""
    path = str(model_file(model, args.files)) if model else ""
    threads = [] if args.threads is None else ["--threads", str(args.threads)]
    if command == "compare":
        whole = [sys.executable, str(Path(__file__).with_name("compare.py")), "--model", path, *threads]
        (tests,) = json.loads(_output(whole)[-1])["models"].values()
        for test, found in tests.items():
            yield {"mode": "compare", "model": model, "test": test, "engines": found}
        return
    subject = ["--model", path] if path else []
    for line in _output([sys.executable, "-m", "woolly.bench", *command.split(), *subject, "--json", *threads]):
        row = json.loads(line)
        if row["mode"] != "machine":
            yield row


def model_file(name: str, folder: Path) -> Path:
    """The file of a model of the table; made in the folder if it is not there."""
    from woolly import hub

    path = folder / f"{name}.gguf"
    if name in REAL:
        return path if path.exists() else Path(hub.resolve(name))
    if path.exists():
        return path
    if name in SYNTHETIC:
        vocabulary = str(model_file("smollm2", folder))
        command = ["synth", str(path), *SIZES_OF_1B.split(), "--dtype", SYNTHETIC[name], "--vocab", vocabulary]
    else:
        source, type = QUANTISED[name]
        command = ["quantize", str(model_file(source, folder)), str(path), type, "--allow-requantize"]
    _output([sys.executable, "-m", "woolly", *command])
    return path


def show(rows: list[Row]) -> None:
    """Medians of the models' rows, each beside its share of the limit, and ratios to other engines."""
    facts = rows[0]
    print(
        f"{facts['machine']}, {facts['isa']}, {facts['n_threads']} thread(s), commit {facts['commit']}, {facts['date']}"
    )
    print("\n| model | compute | test | tokens/s | share | of |\n|---|---|---|---:|---:|---|")
    for row in rows:
        if row["mode"] == "model" and "median_ts" in row:
            rate = f"{row['median_ts']:,.1f} | {row['share']:.0%} | {row['limit']}"
            print(f"| {row['model']} | {row['compute']} | {row['test']} | {rate} |")
    print("\n| model | test | engine | tokens/s | woolly is × |\n|---|---|---|---:|---:|")
    for row in rows:
        for engine, found in row["engines"].items() if row["mode"] == "compare" else ():
            print(
                f"| {row['model']} | {row['test']} | {engine} | {found['median']:,.1f} | {found['woolly_ratio']:.2f} |"
            )
    print("\n| model | step | together s | peak memory GB |\n|---|---|---:|---:|")
    for row in rows:
        if row["mode"] == "loading":
            print(f"| {row['model']} | {row['step']} | {row['total_s']:.2f} | {row['memory_bytes'] / 1e9:.2f} |")


def _output(command: list[str]) -> list[str]:
    """Lines of a command's output."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"record: {' '.join(command)}\n{done.stderr.strip()}")
    return done.stdout.splitlines()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--files", metavar="DIR", type=Path, default=Path("models"), help="where the model files are kept"
    )
    parser.add_argument("--only", metavar="PART,PART", type=lambda text: text.split(","), help=", ".join(commands(5)))
    parser.add_argument("--threads", metavar="N", type=int)
    parser.add_argument(
        "--repeat", metavar="N", type=int, default=7, help="samples of each small model's test; default: 7"
    )
    parser.add_argument("--show", metavar="FILE", type=Path, help="print a file of results and measure nothing")
    args = parser.parse_args()
    unknown = set(args.only or ()) - set(commands(5))
    if unknown:
        parser.error(f"--only: {', '.join(sorted(unknown))}: unknown; known: {', '.join(commands(5))}")
    return args


if __name__ == "__main__":
    sys.exit(main())
