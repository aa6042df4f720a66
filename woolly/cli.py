"""The `woolly` command: its arguments, and errors as one line.

Each command is a function in a `cli_*` module, imported when it is used, so that `woolly --help` is quick. To add one:
write the function (parsed arguments in, exit code out), and a `_add_…` here.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from woolly.errors import WoollyError
from woolly.terminal import one_line

EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE
COMPUTES = ("exact", "int8", "bf16")  # those of woolly._kernels, which a --help need not import

_MODEL_HELP = (
    "path of a GGUF file, a Hugging Face folder or a safetensors file, a known name (see `woolly list`) "
    "or hf:OWNER/REPO[:QUANT]; default: smollm2"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 1 for a failure, 2 for wrong usage, 130 for Ctrl-C."""
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):  # a terminal that cannot show a character shows ?
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    args = argparse.Namespace(debug=False)
    try:
        args = _parse(argv)
        code = _function_of(args.command)(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        _silence_stdout()
        return EXIT_BROKEN_PIPE
    except Exception as error:
        if args.debug:
            traceback.print_exc()
        else:
            print(f"woolly: error: {describe(error)}", file=sys.stderr)
        return EXIT_FAILURE
    return code


def describe(error: BaseException) -> str:
    """An error as one line for the user; an unexpected kind is named, as it is a bug of ours."""
    if isinstance(error, MemoryError):
        return one_line(f"out of memory: {error}" if str(error) else "out of memory")
    if isinstance(error, OSError) and error.strerror:
        return one_line(f"{error.filename}: {error.strerror}" if error.filename else error.strerror)
    if isinstance(error, (WoollyError, OSError, ValueError)):
        return one_line(str(error) or type(error).__name__)
    return one_line(f"internal error, {type(error).__name__}: {error} (--debug shows where)")


def make_parser() -> argparse.ArgumentParser:
    """The parser of the whole command."""
    parser = _Parser(prog="woolly", description="LLM inference on CPUs: run GGUF models.")
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    parser.add_argument("--debug", action="store_true", help="show a traceback where a command fails")
    commands = parser.add_subparsers(metavar="COMMAND", dest="command_name", required=True)
    for add in (
        _add_run,
        _add_inspect,
        _add_pull,
        _add_list,
        _add_convert,
        _add_quantize,
        _add_dequantize,
        _add_perplexity,
        _add_compare,
        _add_synth,
    ):
        command = add(commands)
        # SUPPRESS: a default here would undo a --debug that stands before the command.
        command.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        command.set_defaults(parser=command)
    return parser


# --- the commands ---


def _add_run(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "run", help="generate text", description="Generate text from a prompt, or chat.", allow_abbrev=False
    )
    parser.set_defaults(command="woolly.cli_run:run")
    parser.add_argument("model", metavar="MODEL", nargs="?", help=_MODEL_HELP)
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--prompt", metavar="TEXT", help="answer this")
    mode.add_argument("--interactive", action="store_true", help="chat; Ctrl-C stops an answer, /help shows commands")
    mode.add_argument("--dry-run", action="store_true", help="open the model, print the memory plan, generate nothing")

    text = parser.add_argument_group("text")
    text.add_argument(
        "-n", dest="max_tokens", metavar="N", type=_at_least_1, help="tokens at most; default: 256, 1024 in a chat"
    )
    text.add_argument("--raw", action="store_true", help="continue the prompt as it is, without the chat template")

    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--temperature", metavar="T", type=float, help="0 takes the likeliest token; default: 0.8")
    sampling.add_argument("--top-k", metavar="K", type=int, help="of the K likeliest tokens; default: 40, 0 is off")
    sampling.add_argument("--top-p", metavar="P", type=float, help="of the likeliest that sum to P; default: 0.95")
    sampling.add_argument("--min-p", metavar="P", type=float, help="of those P × as likely as the best; default: 0.05")
    sampling.add_argument("--repeat-penalty", metavar="R", type=float, help="above 1 avoids repeats; default: 1.0")
    sampling.add_argument("--seed", metavar="S", type=int, help="of the random numbers; default: a new one each time")

    engine = parser.add_argument_group("engine")
    _add_computing(engine)
    engine.add_argument("--ctx", metavar="N", type=_at_least_1, help="context in tokens; default: the model's choice")
    engine.add_argument("--quantize", metavar="TYPE", help="of a model in floats: quantise it while loading, to q8_0 …")

    generated = parser.add_argument_group("generated weights", "to measure with: the text is noise")
    generated.add_argument("--fast-fp32", action="store_true", help="generate a model of these sizes instead of MODEL")
    _add_sizes(generated)

    output = parser.add_argument_group("output")
    output.add_argument("--timing", action="store_true", help="print load time, time to first token and tokens/s")
    output.add_argument("--json", action="store_true", help="print one JSON object and nothing else on stdout")
    return parser


def _add_inspect(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "inspect", help="show what is in a model file", description="Show what is in a model file."
    )
    parser.set_defaults(command="woolly.cli_models:inspect")
    parser.add_argument("model", metavar="MODEL", nargs="?", help=_MODEL_HELP)
    parser.add_argument("--tensors", action="store_true", help="list the tensors")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _add_quantize(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "quantize",
        help="write a model file in other formats",
        description="Write a GGUF file again with its matrices quantised.",
        allow_abbrev=False,
    )
    parser.set_defaults(command="woolly.cli_quantize:quantize")
    parser.add_argument("model", metavar="IN", help="path of a GGUF file, or a known name; `convert` takes folders")
    parser.add_argument("out", metavar="OUT.gguf", help="the file to write")
    parser.add_argument("type", metavar="TYPE", help="q4_k_m, q5_k_m, q6_k, q8_0, iq4_xs, q2_k, bf16 … (any case)")
    parser.add_argument("--dry-run", action="store_true", help="list what each tensor would become, write nothing")
    parser.add_argument("--output-type", metavar="FORMAT", help="of the output matrix; default: what the type says")
    parser.add_argument("--token-embd-type", metavar="FORMAT", help="of the token embedding; default likewise")
    parser.add_argument("--pure", action="store_true", help="all matrices in one format")
    parser.add_argument(
        "--allow-requantize", action="store_true", help="take tensors that are quantised already: quality suffers"
    )
    _add_writing(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _add_pull(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "pull", help="fetch a model into the cache", description="Fetch a model into the cache and print its path."
    )
    parser.set_defaults(command="woolly.cli_models:pull")
    parser.add_argument("model", metavar="NAME", help="a known name (see `woolly list`) or hf:OWNER/REPO[:QUANT]")
    parser.add_argument("--force", action="store_true", help="fetch it even if it is in the cache")
    return parser


def _add_list(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "list", help="show the models in the cache", description="Show the models in the cache, and what can be pulled."
    )
    parser.set_defaults(command="woolly.cli_models:list_models")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _add_convert(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "convert",
        help="write a Hugging Face folder as a GGUF file",
        description="Write a Hugging Face folder, or another model file, as a GGUF file that other engines open too.",
        allow_abbrev=False,
    )
    parser.set_defaults(command="woolly.cli_convert:convert")
    parser.add_argument("model", metavar="FOLDER", help="the folder, or another model as `run` takes it")
    parser.add_argument("out", metavar="OUT.gguf", help="the file to write")
    parser.add_argument(
        "--dtype",
        metavar="TYPE",
        default="auto",
        help="of the matrices: f32, f16, bf16, q8_0 or another type of `woolly quantize`; default: auto, as they are",
    )
    _add_writing(parser)
    return parser


def _add_dequantize(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "dequantize",
        help="write a model's weights as floats",
        description="Write a model's weights as floats into a safetensors file, which opens as a model by itself.",
        allow_abbrev=False,
    )
    parser.set_defaults(command="woolly.cli_convert:dequantize")
    parser.add_argument("model", metavar="IN", help=_MODEL_HELP.partition("; default")[0])
    parser.add_argument("out", metavar="OUT.safetensors", help="the file to write")
    parser.add_argument("--dtype", choices=("f32", "f16", "bf16"), default="f32", help="of the matrices; default: f32")
    _add_writing(parser)
    return parser


def _add_perplexity(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "perplexity",
        help="measure how well a model predicts a text",
        description="Measure a model's perplexity on a text, and how far its distributions are from a base model's.",
        allow_abbrev=False,
    )
    parser.set_defaults(command="woolly.cli_measure:perplexity")
    parser.add_argument("model", metavar="MODEL", nargs="?", help=_MODEL_HELP)
    parser.add_argument(
        "--kl-base", metavar="MODEL_OR_FILE", help="measure KL divergence too: from a model, or a file of --save-base"
    )
    parser.add_argument("--save-base", metavar="FILE", help="keep the distributions, as llama.cpp's tool does too")
    parser.add_argument("--force", action="store_true", help="replace a file that is there")
    _add_measuring(parser)
    return parser


def _add_compare(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "compare",
        help="measure two models on a text, and how far apart they are",
        description="Measure two models of one vocabulary on a text: perplexities, and B's KL divergence from A.",
        allow_abbrev=False,
    )
    parser.set_defaults(command="woolly.cli_measure:compare")
    parser.add_argument("a", metavar="A", help="the base: " + _MODEL_HELP.partition(";")[0])
    parser.add_argument("b", metavar="B", help="the other model")
    _add_measuring(parser)
    return parser


def _add_measuring(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-f", "--file", dest="text", metavar="TEXT", required=True, help="a text in UTF-8")
    parser.add_argument("--ctx", metavar="N", type=_at_least_1, default=512, help="tokens of a window; default: 512")
    parser.add_argument("--chunks", metavar="N", type=_at_least_1, help="windows at most; default: the whole text")
    _add_computing(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _add_computing(parser: Any) -> None:
    """How a model is computed: options of a parser or of a group of it."""
    parser.add_argument("--threads", metavar="N", type=_at_least_1, help="default: the cores that may be used")
    parser.add_argument(
        "--compute", choices=COMPUTES, default="exact", help="int8, bf16: faster prefill that rounds activations"
    )


def _add_writing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--force", action="store_true", help="replace a file that is there")
    parser.add_argument("--threads", metavar="N", type=_at_least_1, help="default: the cores that may be used")


def _add_synth(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "synth",
        help="write a model with generated weights",
        description="Write the model of `run --fast-fp32` as a GGUF file, which other engines open too.",
        allow_abbrev=False,
    )
    parser.set_defaults(command="woolly.cli_synth:synth")
    parser.add_argument("out", metavar="OUT.gguf", help="the file to write")
    _add_sizes(parser)
    parser.add_argument("--ctx", dest="n_ctx", metavar="N", type=int, help="context in tokens; default: 2048")
    parser.add_argument("--seed", metavar="S", type=int, help="of the weights; default: 42")
    parser.add_argument("--vocab", metavar="FROM.gguf", help="take the vocabulary and chat template of this file")
    _add_writing(parser)
    return parser


def _add_sizes(parser: Any) -> None:
    """The sizes of a generated model. No defaults here: WOOLLY_FAST_… variables come first."""
    parser.add_argument("--hidden-size", metavar="N", type=int, help="default: 4096")
    parser.add_argument("--layers", dest="n_layers", metavar="N", type=int, help="default: 32")
    parser.add_argument("--heads", dest="n_heads", metavar="N", type=int, help="default: 32")
    parser.add_argument("--kv-heads", dest="n_kv_heads", metavar="N", type=int, help="default: as many as heads")
    parser.add_argument("--intermediate-size", metavar="N", type=int, help="of the MLP; default: 11008")
    parser.add_argument("--vocab-size", metavar="N", type=int, help="default: 32000")
    parser.add_argument("--dtype", metavar="FORMAT", help="f32, f16, bf16, q8_0, q4_0, q4_k …; default: f32")


# --- argparse, made to say one line ---


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"{self.prog}: error: {one_line(message)} (see {self.prog} --help)\n")


class _Version(argparse.Action):
    """Looks the version up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from importlib.metadata import PackageNotFoundError, version

        try:
            text = version("woolly")
        except PackageNotFoundError:
            text = "(not installed)"
        print(f"woolly {text}")
        parser.exit()


def _at_least_1(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


_at_least_1.__name__ = "integer"  # argparse: "invalid integer value: 'x'"


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    try:
        return make_parser().parse_args(argv)
    except SystemExit:  # what --help and --version print is to meet a closed pipe here, not at Python's end
        sys.stdout.flush()
        raise


def _open_closed_streams() -> None:
    """Where a shell has closed a stream (`>&-`), Python has None: nothing to read, and what is written goes nowhere."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - for as long as the process runs


def _function_of(command: str) -> Callable[[argparse.Namespace], int]:
    module, _, name = command.partition(":")
    function: Callable[[argparse.Namespace], int] = getattr(importlib.import_module(module), name)
    return function


def _silence_stdout() -> None:
    """The reader is gone: keep Python from complaining when it flushes stdout at exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
