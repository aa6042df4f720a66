"""`woolly run`: one answer, a chat, or the memory plan."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from woolly.sampling import SamplingParams
from woolly.terminal import format_bytes, note, one_line, print_table, write

if TYPE_CHECKING:
    from woolly.model import Model
    from woolly.session import Completion, Piece, Timing

MAX_TOKENS = 256
MAX_CHAT_TOKENS = 1024  # a chat's answer that is cut annoys more than one that is long

_SAMPLING_OPTIONS = ("temperature", "top_k", "top_p", "min_p", "repeat_penalty", "seed")
_SIZE_OPTIONS = ("hidden_size", "n_layers", "n_heads", "n_kv_heads", "intermediate_size", "vocab_size", "dtype")
_GENERATED_FIELDS = ("init_s", "materialise_s")
_TIMING_FIELDS = ("load_s", "ttft_s", "prefill_tokens_per_s", "decode_tokens_per_s", "threads", "isa", "compute")

_CHAT_HELP = """\
/reset   forget the conversation
/help    show this
/exit    leave (as does Ctrl-D)
Ctrl-C   stop the answer"""


def run(args: argparse.Namespace) -> int:
    """Load the model and do what the arguments ask."""
    sampling = _check_arguments(args)
    model = _load(args)
    with contextlib.closing(model):
        if getattr(model, "is_generated", False):
            note("The weights are generated, not trained: the text is noise.")
        if args.dry_run:
            _print_plan(model, as_json=args.json)
        elif args.interactive:
            chat(model, args, sampling)
        elif args.json:
            _print_json(model, args, sampling)
        else:
            _print_answer(model, args, sampling)
    return 0


def _load(args: argparse.Namespace) -> Model:
    """The model that is named, or one with generated weights."""
    import woolly

    sizes = {name: getattr(args, name) for name in _SIZE_OPTIONS if getattr(args, name) is not None}
    if args.fast_fp32 and args.model is not None:
        args.parser.error("--fast-fp32 does not go with a MODEL")
    how = {"n_ctx": args.ctx, "n_threads": args.threads, "compute": args.compute}
    if args.fast_fp32:
        return woolly.load_fast_fp32(**how, **sizes)
    if sizes:
        args.parser.error("the sizes of a model (--hidden-size, --layers …, --dtype) go with --fast-fp32")
    return woolly.load(args.model, **how, quantize=args.quantize)


def _check_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The sampling options that were given. Wrong usage ends here, before a model is fetched or loaded."""
    if args.json and args.interactive:
        args.parser.error("--json does not go with --interactive")
    if args.prompt is not None and not args.prompt.isascii():
        try:
            args.prompt.encode()
        except UnicodeEncodeError:
            args.parser.error("--prompt is not valid UTF-8")
    given = {name: getattr(args, name) for name in _SAMPLING_OPTIONS if getattr(args, name) is not None}
    try:
        SamplingParams(**given)
    except ValueError as error:
        args.parser.error(str(error))
    return given


# --- one answer ---


def _print_answer(model: Model, args: argparse.Namespace, sampling: dict[str, Any]) -> None:
    options = {"max_tokens": args.max_tokens or MAX_TOKENS, **sampling}
    if _takes_messages(model, args):
        pieces = model.stream_chat([{"role": "user", "content": args.prompt}], **options)
    else:
        pieces = model.stream(args.prompt, **options)
    completion = None
    with _ending_the_line():
        for piece in pieces:
            write(piece.text)
            completion = getattr(piece, "completion", None) or completion
    if args.timing and completion is not None:
        _print_timing(completion)


def _print_json(model: Model, args: argparse.Namespace, sampling: dict[str, Any]) -> None:
    options = {"max_tokens": args.max_tokens or MAX_TOKENS, **sampling}
    if _takes_messages(model, args):
        completion = model.chat([{"role": "user", "content": args.prompt}], **options)
    else:
        completion = model.generate(args.prompt, **options)
    record = {
        "model": model.name,
        "prompt": args.prompt,
        "text": completion.text,
        "prompt_tokens": completion.prompt_tokens,
        "completion_tokens": completion.completion_tokens,
        "finish_reason": completion.finish_reason,
        "timing": _timing_record(completion.timing),
    }
    print(json.dumps(record, allow_nan=False))


def _takes_messages(model: Model, args: argparse.Namespace) -> bool:
    return not args.raw and model.chat_template is not None


@contextlib.contextmanager
def _ending_the_line() -> Iterator[None]:
    """End the streamed line whatever happens, so that an error or the shell's prompt begins on a fresh one."""
    try:
        yield
    except BrokenPipeError:
        raise
    except BaseException:
        if sys.stdout.isatty():
            write("\n")
        raise
    write("\n")


# --- a chat ---


def chat(model: Model, args: argparse.Namespace, sampling: dict[str, Any]) -> None:
    """Read a line, answer it, until /exit or the end of the input. Errors are told and the chat goes on."""
    from woolly.errors import WoollyError

    conversation = _Conversation(model, is_raw=not _takes_messages(model, args))
    if not args.raw and model.chat_template is None:
        note("This model has no chat template: it continues your text as it is.")
    if sys.stdin.isatty():
        note(f"{model.name}, {model.n_threads} threads, {model.isa}. /help shows the commands.")
    options = {"max_tokens": args.max_tokens or MAX_CHAT_TOKENS, **sampling}
    for line in _input_lines():
        if line.startswith("/"):
            if not _do_command(line, conversation):
                return
            continue
        try:
            completion = _answer(conversation, line, options)
        except (WoollyError, ValueError) as error:
            conversation.take_back()
            note(f"error: {error}")
            continue
        if completion is not None and args.timing:
            _print_timing(completion)


class _Conversation:
    """What has been said, and the session whose KV cache holds it.

    Every turn passes the whole conversation; the session finds the prefix that its cache already has.
    """

    def __init__(self, model: Model, *, is_raw: bool) -> None:
        self._session = model.session()
        self._is_raw = is_raw
        self._turns: list[dict[str, str]] = []

    def ask(self, text: str, options: dict[str, Any]) -> Iterator[Piece]:
        """Add the user's words and stream what the model says to them."""
        self._turns.append({"role": "user", "content": text})
        if self._is_raw:
            return self._session.stream("".join(turn["content"] for turn in self._turns), **options)
        return self._session.stream_chat(self._turns, **options)

    def answered(self, text: str) -> None:
        """Keep the model's words, even if they were stopped half-way."""
        self._turns.append({"role": "assistant", "content": text})

    def take_back(self) -> None:
        """Forget a question that could not be answered."""
        if self._turns and self._turns[-1]["role"] == "user":
            self._turns.pop()

    def reset(self) -> None:
        self._turns.clear()
        self._session.rewind(0)


def _answer(conversation: _Conversation, line: str, options: dict[str, Any]) -> Completion | None:
    """Stream one answer; Ctrl-C ends it and keeps what was said. None where it was stopped."""
    parts: list[str] = []
    completion = None
    try:
        with contextlib.closing(conversation.ask(line, options)) as pieces, _ending_the_line():  # type: ignore[type-var]
            for piece in pieces:
                parts.append(piece.text)
                write(piece.text)
                completion = getattr(piece, "completion", None) or completion
    except KeyboardInterrupt:
        note("(stopped)")
    text = "".join(parts)
    if text:
        conversation.answered(text)
    else:
        conversation.take_back()
    if completion is not None and completion.finish_reason == "length":
        note(f"(cut at {completion.completion_tokens} tokens: -n allows more)")
    return completion


def _do_command(line: str, conversation: _Conversation) -> bool:
    """Carry out a line that begins with a slash; False to leave."""
    command = line.split()[0]
    if command in ("/exit", "/quit"):
        return False
    if command == "/reset":
        conversation.reset()
        note("The conversation starts anew.")
    elif command == "/help":
        print(_CHAT_HELP, file=sys.stderr)
    else:
        note(f"No command {command}; /help shows them.")
    return True


def _input_lines() -> Iterator[str]:
    """The user's lines that are not blank. Ctrl-C at the prompt clears the line; twice in a row it leaves."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - importing it gives input() editing and history
    was_interrupted = False
    while True:
        try:
            line = input("> " if is_terminal else "").strip()
        except EOFError:
            if is_terminal:
                write("\n")
            return
        except KeyboardInterrupt:
            if was_interrupted or not is_terminal:
                raise
            was_interrupted = True
            write("\n")
            note("(Ctrl-C again, Ctrl-D or /exit leaves)")
            continue
        was_interrupted = False
        if line:
            yield line


# --- figures ---


def _print_plan(model: Model, *, as_json: bool) -> None:
    plan = model.memory_plan()
    fields = ("runtime_bytes", "weights_bytes", "kv_cache_bytes", "scratch_bytes", "total_bytes")
    if as_json:
        memory = {field: getattr(plan, field) for field in fields}
        print(json.dumps({"model": model.name, "n_ctx": model.n_ctx, "memory": memory}))
        return
    names = ("Runtime, vocabulary", "Weights", f"KV cache ({model.n_ctx:,} tokens)", "Scratch", "Total")
    sizes = (getattr(plan, field) for field in fields)
    rows = [(name, format_bytes(size), f"{size:,}") for name, size in zip(names, sizes, strict=True)]
    print_table(("Memory", ">Size", ">Bytes"), rows, title=one_line(model.name))


def _timing_record(timing: Timing) -> dict[str, Any]:
    """The timing as JSON has it: a rate over no time or no tokens is null."""
    record = {field: getattr(timing, field) for field in _TIMING_FIELDS}
    if getattr(timing, "init_s", None) is not None:
        record |= {field: getattr(timing, field) for field in _GENERATED_FIELDS}
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in record.items()
    }


def _print_timing(completion: Completion) -> None:
    timing = _timing_record(completion.timing)

    def say(field: str, unit: str, digits: int) -> str:
        return "–" if timing[field] is None else f"{timing[field]:.{digits}f} {unit}"

    generated = ""
    if "init_s" in timing:
        generated = f" · init {say('init_s', 's', 3)} · weights {say('materialise_s', 's', 3)}"
    how = "" if timing["compute"] == "exact" else f", {timing['compute']}"
    note(
        f"load {say('load_s', 's', 3)}{generated} · first token {say('ttft_s', 's', 3)}"
        f" · prefill {say('prefill_tokens_per_s', 'tokens/s', 1)} ({completion.prompt_tokens} tokens)"
        f" · decode {say('decode_tokens_per_s', 'tokens/s', 1)} ({completion.completion_tokens} tokens)"
        f" · {timing['threads']} threads, {timing['isa']}{how}"
    )
