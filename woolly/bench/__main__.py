"""python -m woolly.bench MODE: the arguments, and errors as one line.

A mode is a module of its name with `run(bench, args)`, which yields rows, and COLUMNS, which lays them out as a table.
numpy is imported after the arguments are read, as its own threads are set by the environment.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from woolly.cli import COMPUTES, EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_USAGE, describe
from woolly.terminal import one_line

FAST_SIZES = {  # option -> argument of load_fast_fp32, value of the default small model
    "vocab-size": ("vocab_size", 32000),
    "hidden-size": ("hidden_size", 1024),
    "layers": ("n_layers", 24),
    "heads": ("n_heads", 16),
    "kv-heads": ("n_kv_heads", 4),
    "intermediate-size": ("intermediate_size", 2816),
    "ctx": ("n_ctx", 2048),
    "seed": ("seed", 42),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one mode and return its exit code: 0, 1 for a failure, 2 for wrong usage, 130 for Ctrl-C."""
    args = make_parser().parse_args(argv)
    if args.threads is not None:  # numpy's BLAS is compared with: it gets as many
        for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            os.environ[name] = str(args.threads)
    try:
        return _run(args)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except Exception as error:
        if args.debug:
            raise
        print(f"woolly.bench: error: {describe(error)}", file=sys.stderr)
        return EXIT_FAILURE


def _run(args: argparse.Namespace) -> int:
    from woolly._kernels import check_threads
    from woolly.bench import harness, machine

    n_threads = check_threads(args.threads)
    if args.mode == "all":
        from woolly.bench import report

        return report.run_all(args, n_threads)
    mode = importlib.import_module(f"woolly.bench.{args.mode}")
    facts = machine.describe(n_threads)
    if args.json:
        print(json.dumps(facts), flush=True)
    with harness.Progress() as progress:
        bench = harness.Bench(n_threads, args.repeat, progress)
        rows, is_interrupted = harness.collect(mode.run(bench, args), as_json=args.json)
    if not args.json:
        print(f"{facts['machine']}, {facts['isa']}, {n_threads} thread(s), commit {facts['commit']}\n")
        show(mode, rows)
    if is_interrupted:
        print("woolly.bench: interrupted: this is what was done until then", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


def show(mode: object, rows: list[dict[str, object]]) -> None:
    """A mode's rows as tables: one for each value of "table", where rows have it."""
    from woolly.bench.harness import print_rows

    for note in getattr(mode, "NOTES", ()):
        print(f"{note}\n")
    for table in dict.fromkeys(row.get("table") for row in rows):
        print_rows([row for row in rows if row.get("table") == table], mode.COLUMNS, title=table)  # type: ignore[attr-defined, arg-type]
        print()
    for rule in dict.fromkeys(row["rule"] for row in rows if row.get("rule")):
        print(rule)


def make_parser() -> argparse.ArgumentParser:
    """The parser of the whole command."""
    parser = _Parser(prog="python -m woolly.bench", description="Measure the machine, the kernels and the models.")
    modes = parser.add_subparsers(metavar="MODE", dest="mode", required=True)

    def add(name: str, text: str) -> argparse.ArgumentParser:
        mode: argparse.ArgumentParser = modes.add_parser(name, help=text, description=text, allow_abbrev=False)
        mode.add_argument("--json", action="store_true", help="print JSON lines and nothing else on stdout")
        mode.add_argument("--threads", metavar="N", type=_positive, help="default: the cores that may be used")
        mode.add_argument("--repeat", metavar="N", type=_positive, default=5, help="samples of each; default: 5")
        mode.add_argument("--debug", action="store_true", help="show a traceback where a mode fails")
        return mode

    add("limits", "the machine's peaks, bandwidths, and costs of threads and calls")
    for name, text in (("kernels", "each kernel at a model's sizes"), ("isa", "kernels on every instruction set")):
        _add_kernel_options(add(name, text), is_short=name == "isa")
    layer = add("layer", "where one layer's time goes, at prefill and at decode")
    _add_model_options(layer)
    layer.add_argument("-p", "--prompt-tokens", metavar="N", type=_positive, default=256, help="default: 256")
    layer.add_argument("-d", "--depth", metavar="N", type=_natural, default=0, help="tokens before; default: 0")
    _add_model_mode(add("model", "prefill and decode rates, time to first token, sustained generation, memory"))
    stack = add("stack", "what each optimisation brings, switched on one after the other")
    _add_model_options(stack)
    stack.add_argument("-p", "--prompt-tokens", metavar="N", type=_positive, default=64, help="default: 64")
    stack.add_argument("-n", "--gen-tokens", metavar="N", type=_positive, default=8, help="default: 8")
    loading = add("loading", "opening a GGUF file: gguf to FP32, Woolly, and generated weights")
    loading.add_argument("--model", metavar="MODEL", help="a GGUF file or a name")
    loading.add_argument("--step", help=argparse.SUPPRESS)  # one step, in the process that is measured
    everything = add("all", "all modes, and a report with pictures")
    everything.add_argument(
        "--report", metavar="DIR", required=True, help="folder for report.md, its pictures and JSON"
    )
    everything.add_argument(
        "--model", metavar="MODEL", help="a GGUF file or a name; default: smollm2 where it is cached"
    )
    everything.add_argument("--quick", action="store_true", help="small sizes and few samples: a look, not a result")
    return parser


def _add_kernel_options(mode: argparse.ArgumentParser, *, is_short: bool) -> None:
    formats = ["f32", "q8_0", "q4_0", "q4_k"] if is_short else None
    columns, contexts = ([1, 64], [1024]) if is_short else ([1, 4, 16, 64, 256], [128, 1024, 4096])
    mode.add_argument("--sizes", metavar="NAMES", type=_names, default=["small"], help="of models; default: small")
    mode.add_argument(
        "--formats", metavar="NAMES", type=_names, default=formats, help="default: all that have kernels of their own"
    )
    mode.add_argument("--columns", metavar="N,N", type=_numbers, default=columns, help="tokens at a time")
    if not is_short:
        mode.add_argument("--compute", choices=COMPUTES, default="exact", help="of matmuls; default: exact")
    mode.add_argument("--contexts", metavar="N,N", type=_numbers, default=contexts, help="of attention, in tokens")


def _add_model_options(mode: argparse.ArgumentParser) -> None:
    mode.add_argument("--model", metavar="MODEL", help="a GGUF file or a name; default: a small model without a file")
    for option, (_, default) in FAST_SIZES.items():
        text = f"of a model without a file; default: {default}"
        mode.add_argument(f"--{option}", metavar="N", type=_natural if option == "seed" else _positive, help=text)
    mode.add_argument("--dtype", metavar="FORMAT", help="of a model without a file; default: f32")


def _add_model_mode(mode: argparse.ArgumentParser) -> None:
    _add_model_options(mode)
    mode.add_argument("-p", "--prompt-tokens", metavar="N,N", type=_naturals, default=[256], help="default: 256")
    mode.add_argument("-n", "--gen-tokens", metavar="N,N", type=_naturals, default=[32], help="default: 32")
    mode.add_argument("-d", "--depth", metavar="N,N", type=_naturals, default=[0], help="tokens before; default: 0")
    text = "that decode together, a token of each in a step; default: 1"
    mode.add_argument("--sequences", metavar="N,N", type=_numbers, default=[1], help=text)
    mode.add_argument(
        "--prompts", metavar="N,N", type=_numbers, default=[1, 10, 50, 100], help="for time to first token"
    )
    mode.add_argument(
        "--sustained", metavar="N", type=_natural, default=64, help="tokens in a row; default: 64, 0: none"
    )
    mode.add_argument("--compute", choices=COMPUTES, default="exact", help="of matmuls; default: exact")
    text = "run K layers and project the rest: for a model that memory does not hold"
    mode.add_argument("--measure-layers", metavar="K", type=_positive, help=text)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"{self.prog}: error: {one_line(message)} (see {self.prog} --help)\n")


def _at_least(least: int, text: str) -> int:
    value = int(text)
    if value < least:
        raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
    return value


def _positive(text: str) -> int:
    return _at_least(1, text)


def _natural(text: str) -> int:
    return _at_least(0, text)


def _numbers(text: str) -> list[int]:
    return [_positive(part) for part in text.split(",")]


def _naturals(text: str) -> list[int]:
    return [_natural(part) for part in text.split(",")]


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


for _type, _name in ((_positive, "integer"), (_natural, "integer"), (_numbers, "integers"), (_naturals, "integers")):
    _type.__name__ = _name  # argparse: "invalid integer value: 'x'"

if __name__ == "__main__":
    sys.exit(main())
