"""The `woolly` command on a fake model: options, streams, exit codes, the chat."""

import argparse
import ast
import dataclasses
import io
import json
import math
import os
import select
import signal
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

import woolly
from woolly import cli, cli_run, hub, terminal
from woolly.errors import ContextFullError, DownloadError, GGUFError
from woolly.sampling import SamplingParams

# --- the fakes ---


@dataclasses.dataclass
class FakeTiming:
    load_s: float = 0.5
    ttft_s: float = 0.25
    prefill_tokens_per_s: float = 800.0
    decode_tokens_per_s: float = math.inf
    threads: int = 2
    isa: str = "avx2"
    compute: str = "exact"


@dataclasses.dataclass
class FakeCompletion:
    text: str
    tokens: list
    finish_reason: str = "stop"
    prompt_tokens: int = 4
    completion_tokens: int = 3
    timing: FakeTiming = dataclasses.field(default_factory=FakeTiming)


@dataclasses.dataclass
class FakePiece:
    text: str
    token: int | None = None
    finish_reason: str | None = None
    completion: FakeCompletion | None = None


class FakeModel:
    """Answers with `script`: strings are pieces, exceptions are raised. Notes every call in `calls`."""

    name = "fake"
    n_threads = 2
    isa = "avx2"
    compute = "exact"
    load_s = 0.5
    n_ctx = 4096

    def __init__(self, script=("Par", "is", "."), chat_template=True, finish_reason="stop"):
        self.script = script
        self.chat_template = object() if chat_template else None
        self.finish_reason = finish_reason
        self.calls = []
        self.is_closed = False

    def _completion(self):
        text = "".join(part for part in self.script if isinstance(part, str))
        return FakeCompletion(text, [1, 2, 3], self.finish_reason)

    def stream(self, prompt, **options):
        self.calls.append(("stream", prompt, options))
        for part in self.script:
            if isinstance(part, BaseException):
                raise part
            yield FakePiece(part, 1)
        yield FakePiece("", None, self.finish_reason, self._completion())

    def stream_chat(self, messages, **options):
        name, copied = "stream_chat", [dict(message) for message in messages]
        yield from self.stream(copied, **options)
        self.calls[-1] = (name, copied, options)

    def generate(self, prompt, **options):
        self.calls.append(("generate", prompt, options))
        return self._completion()

    def chat(self, messages, **options):
        self.calls.append(("chat", messages, options))
        return self._completion()

    def memory_plan(self):
        return types.SimpleNamespace(
            runtime_bytes=60_000_000,
            weights_bytes=98_000_000,
            kv_cache_bytes=94_371_840,
            scratch_bytes=900,
            total_bytes=252_372_740,
        )

    def session(self):
        return self

    def rewind(self, n):
        self.calls.append(("rewind", n))

    def close(self):
        self.is_closed = True


@pytest.fixture
def use_model(monkeypatch):
    """A function that makes `woolly.load` return a model and note its arguments."""

    def use(model):
        def load(path_or_name=None, *, n_ctx=None, n_threads=None, compute="exact", quantize=None):
            model.loaded_with = (path_or_name, n_ctx, n_threads)
            model.compute = compute
            model.quantized_to = quantize
            return model

        monkeypatch.setattr(woolly, "load", load, raising=False)
        return model

    return use


def usage_error(capsys, *argv):
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    assert caught.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    return said.err


# --- run ---


def test_prompt_goes_through_the_template(use_model, capsys):
    model = use_model(FakeModel())
    assert cli.main(["run", "--prompt", "Capital?"]) == 0
    assert capsys.readouterr() == ("Paris.\n", "")
    assert model.calls == [("stream_chat", [{"role": "user", "content": "Capital?"}], {"max_tokens": 256})]
    assert model.loaded_with == (None, None, None)
    assert model.is_closed


@pytest.mark.parametrize(("argv", "has_template"), [(["--raw"], True), ([], False)])
def test_raw_prompt(use_model, capsys, argv, has_template):
    model = use_model(FakeModel(chat_template=has_template))
    assert cli.main(["run", "m.gguf", "--prompt", "Capital is", *argv]) == 0
    assert model.calls == [("stream", "Capital is", {"max_tokens": 256})]
    assert model.loaded_with == ("m.gguf", None, None)


def test_all_options_arrive(use_model):
    model = use_model(FakeModel())
    options = (
        "-n 32 --temperature 0 --top-k 5 --top-p 0.5 --min-p 0.1 --repeat-penalty 1.1 --seed 7 --threads 3 --ctx 99"
        " --quantize q8_0 --compute bf16"
    )
    assert cli.main(["run", "smollm2", "--prompt", "x", *options.split()]) == 0
    assert model.loaded_with == ("smollm2", 99, 3)
    assert model.compute == "bf16"
    assert model.quantized_to == "q8_0"
    sampling = {"temperature": 0, "top_k": 5, "top_p": 0.5, "min_p": 0.1, "repeat_penalty": 1.1, "seed": 7}
    assert model.calls[0][2] == {"max_tokens": 32, **sampling}


def test_timing(use_model, capsys):
    use_model(FakeModel())
    assert cli.main(["run", "--prompt", "x", "--timing"]) == 0
    said = capsys.readouterr()
    assert said.out == "Paris.\n"
    assert said.err == (
        "load 0.500 s · first token 0.250 s · prefill 800.0 tokens/s (4 tokens) · decode – (3 tokens)"
        " · 2 threads, avx2\n"
    )


@pytest.mark.parametrize(("argv", "call"), [([], "chat"), (["--raw"], "generate")])
def test_json(use_model, capsys, argv, call):
    model = use_model(FakeModel(script=("Pa\x1b", "ris\u2028é")))
    assert cli.main(["run", "--prompt", "x", "--json", "--timing", *argv]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert said.out.count("\n") == 1
    assert json.loads(said.out) == {
        "model": "fake",
        "prompt": "x",
        "text": "Pa\x1bris\u2028é",
        "prompt_tokens": 4,
        "completion_tokens": 3,
        "finish_reason": "stop",
        "timing": {
            "load_s": 0.5,
            "ttft_s": 0.25,
            "prefill_tokens_per_s": 800.0,
            "decode_tokens_per_s": None,
            "threads": 2,
            "isa": "avx2",
            "compute": "exact",
        },
    }
    assert [name for name, *_ in model.calls] == [call]


def test_dry_run(use_model, capsys):
    model = use_model(FakeModel())
    assert cli.main(["run", "--dry-run", "--ctx", "4096"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows == [
        ["fake"],
        ["Memory", "Size", "Bytes"],
        ["Runtime,", "vocabulary", "60.0", "MB", "60,000,000"],
        ["Weights", "98.0", "MB", "98,000,000"],
        ["KV", "cache", "(4,096", "tokens)", "94.4", "MB", "94,371,840"],
        ["Scratch", "900", "B", "900"],
        ["Total", "252.4", "MB", "252,372,740"],
    ]
    assert model.calls == []
    assert cli.main(["run", "--dry-run", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["n_ctx"] == 4096
    assert record["memory"]["runtime_bytes"] == 60_000_000
    assert record["memory"]["total_bytes"] == 252_372_740


# --- usage ---


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "woolly: error: the following arguments are required: COMMAND (see woolly --help)"),
        (["fly"], "woolly: error: argument COMMAND: invalid choice: 'fly'"),
        (["run"], "woolly run: error: one of the arguments --prompt --interactive --dry-run is required"),
        (["run", "--prompt", "x", "--interactive"], "not allowed with argument --prompt"),
        (["run", "--interactive", "--json"], "woolly run: error: --json does not go with --interactive"),
        (["run", "--prompt", "x", "-n", "0"], "argument -n: must be at least 1, got 0"),
        (["run", "--prompt", "x", "--ctx", "many"], "argument --ctx: invalid integer value: 'many'"),
        (["run", "--prompt", "x", "--top-k", "-1"], "top_k must be at least 0 (0 is off), got -1"),
        (["run", "--prompt", "x", "--temperature", "nan"], "temperature must be finite and at least 0, got nan"),
        (["run", "--prompt", "x", "--seed", "-1"], "seed must be between 0 and 2**64 - 1, got -1"),
        (["run", "--prompt", "x\udcff"], "--prompt is not valid UTF-8"),
        (["run", "--prom", "x"], "required"),
        (["pull"], "woolly pull: error: the following arguments are required: NAME"),
    ],
)
def test_wrong_usage(capsys, argv, message):
    assert message in usage_error(capsys, *argv)


def test_usage_is_checked_before_the_model_is_loaded(monkeypatch, capsys):
    monkeypatch.setattr(woolly, "load", None, raising=False)
    usage_error(capsys, "run", "--prompt", "x", "--top-p", "2")


def test_help_tells_the_defaults(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["run", "--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, value in dataclasses.asdict(SamplingParams()).items():
        option = "--" + name.replace("_", "-")
        if option in text and value is not None:
            described = text.rpartition(f"{option} ")[2].partition(" --")[0]
            assert f"default: {value}" in described
    assert f"default: {cli_run.MAX_TOKENS}, {cli_run.MAX_CHAT_TOKENS} in a chat" in text
    assert hub.DEFAULT_MODEL in text


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("woolly ")


# --- failures ---


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (GGUFError("m.gguf: magic at byte 0: \x1b[2J"), "m.gguf: magic at byte 0: \\x1b[2J"),
        (DownloadError("two\nlines"), "two lines"),
        (FileNotFoundError(2, "No such file or directory", "m.gguf"), "m.gguf: No such file or directory"),
        (FileNotFoundError("no file or known model 'm'"), "no file or known model 'm'"),
        (MemoryError(), "out of memory"),
        (MemoryError("4 GB"), "out of memory: 4 GB"),
        (ValueError("n_ctx must be at least 1"), "n_ctx must be at least 1"),
        (KeyError("k"), "internal error, KeyError: 'k' (--debug shows where)"),
    ],
)
def test_errors_are_one_line(monkeypatch, capsys, error, message):
    def load(*args, **options):
        raise error

    monkeypatch.setattr(woolly, "load", load, raising=False)
    assert cli.main(["run", "m.gguf", "--prompt", "x"]) == 1
    assert capsys.readouterr() == ("", f"woolly: error: {message}\n")


@pytest.mark.parametrize("argv", [["--debug", "run", "--prompt", "x"], ["run", "--prompt", "x", "--debug"]])
def test_debug_shows_the_traceback(monkeypatch, capsys, argv):
    def load(*args, **options):
        raise GGUFError("bad")

    monkeypatch.setattr(woolly, "load", load, raising=False)
    assert cli.main(argv) == 1
    said = capsys.readouterr().err
    assert said.startswith("Traceback")
    assert said.endswith("woolly.errors.GGUFError: bad\n")


def test_interrupt_is_quiet(use_model, capsys):
    model = use_model(FakeModel(script=("Pa", KeyboardInterrupt())))
    assert cli.main(["run", "--prompt", "x"]) == 130
    assert capsys.readouterr() == ("Pa", "")
    assert model.is_closed


DRIVER = """\
import sys, time, types
import woolly, woolly.cli
def stream(prompt, **options):
    while True:
        yield types.SimpleNamespace(text="words " * 100 + "\\n")
        time.sleep(0.01)
model = types.SimpleNamespace(stream=stream, chat_template=None, close=lambda: None)
woolly.load = lambda *args, **options: model
sys.exit(woolly.cli.main(["run", "--prompt", "x"]))
"""


def start_driver():
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER],
        env=os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[1])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout.readline().startswith(b"words ")
    return process


def test_reader_goes_away():
    process = start_driver()
    process.stdout.close()
    assert process.wait(timeout=30) == 141
    assert process.stderr.read() == b""
    process.stderr.close()


def test_sigint_exits_130():
    process = start_driver()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err == b""


@pytest.mark.parametrize("argv", [["--help"], ["--version"], ["run", "--help"], ["list"], ["list", "--json"]])
def test_reader_that_was_never_there(argv, tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    environment = os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[1]), "WOOLLY_CACHE": str(tmp_path)}
    environment.pop("PYTHONUNBUFFERED", None)  # argparse takes no notice of what it could not write
    with open(writer, "wb") as out:
        done = subprocess.run(
            [sys.executable, "-m", "woolly", *argv], stdout=out, stderr=subprocess.PIPE, env=environment, timeout=60
        )
    assert done.returncode == cli.EXIT_BROKEN_PIPE
    assert done.stderr == b""


def test_closed_streams_are_empty(tmp_path):
    command = f"{sys.executable} -m woolly list <&- >&- 2>&- && {sys.executable} -m woolly list --nonsense >&-"
    environment = os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[1]), "WOOLLY_CACHE": str(tmp_path)}
    done = subprocess.run(["sh", "-c", command], capture_output=True, env=environment, timeout=60)
    assert done.returncode == cli.EXIT_USAGE
    assert done.stdout == b""
    assert done.stderr.count(b"\n") == 1


# --- the chat ---


@pytest.fixture
def type_lines(monkeypatch):
    def type_in(*lines):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))

    return type_in


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def test_chat_passes_the_whole_conversation(use_model, type_lines, capsys):
    model = use_model(FakeModel())
    type_lines("Hi", "", "  And?  ", "/reset", "New", "/exit", "not read")
    assert cli.main(["run", "--interactive", "--temperature", "0"]) == 0
    options = {"max_tokens": 1024, "temperature": 0}
    assert model.calls == [
        ("stream_chat", [user("Hi")], options),
        ("stream_chat", [user("Hi"), assistant("Paris."), user("And?")], options),
        ("rewind", 0),
        ("stream_chat", [user("New")], options),
    ]
    assert capsys.readouterr() == ("Paris.\nParis.\nParis.\n", "The conversation starts anew.\n")
    assert model.is_closed


def test_raw_chat_continues_the_text(use_model, type_lines, capsys):
    model = use_model(FakeModel(chat_template=False))
    type_lines("One", "two")
    assert cli.main(["run", "--interactive"]) == 0
    assert [prompt for _, prompt, _ in model.calls] == ["One", "OneParis.two"]
    assert capsys.readouterr().err == "This model has no chat template: it continues your text as it is.\n"


def test_interrupt_stops_the_answer_and_keeps_the_session(use_model, type_lines, capsys):
    model = use_model(FakeModel(script=("Once", " upon", KeyboardInterrupt())))
    type_lines("Tell", "/help", "/nope")
    assert cli.main(["run", "--interactive"]) == 0
    said = capsys.readouterr()
    assert said.out == "Once upon"
    assert said.err == f"(stopped)\n{cli_run._CHAT_HELP}\nNo command /nope; /help shows them.\n"
    assert len(model.calls) == 1


def test_partial_answers_stay_in_the_conversation(use_model, type_lines):
    model = use_model(FakeModel(script=("Once", KeyboardInterrupt())))
    type_lines("a", "b")
    assert cli.main(["run", "--interactive"]) == 0
    assert model.calls[1][1] == [user("a"), assistant("Once"), user("b")]
    model.calls.clear()
    model.script = (KeyboardInterrupt(),)
    type_lines("a", "b")
    assert cli.main(["run", "--interactive"]) == 0
    assert model.calls[1][1] == [user("b")]


def test_errors_do_not_end_the_chat(use_model, type_lines, capsys):
    model = use_model(FakeModel(script=(ContextFullError("4097 tokens do not fit\ninto 4096"),)))
    type_lines("a", "b")
    assert cli.main(["run", "--interactive"]) == 0
    assert capsys.readouterr().err == "error: 4097 tokens do not fit into 4096\n" * 2
    assert model.calls[1][1] == [user("b")]


def test_a_cut_answer_is_told(use_model, type_lines, capsys):
    use_model(FakeModel(finish_reason="length"))
    type_lines("a")
    assert cli.main(["run", "--interactive", "--timing"]) == 0
    notes = capsys.readouterr().err.splitlines()
    assert notes[0] == "(cut at 3 tokens: -n allows more)"
    assert notes[1].startswith("load 0.500 s")


def test_interrupt_at_the_prompt(use_model, monkeypatch, capsys):
    answers = iter([KeyboardInterrupt, "Hi", KeyboardInterrupt, KeyboardInterrupt])

    def fake_input(prompt):
        assert prompt == "> "
        answer = next(answers)
        if answer is KeyboardInterrupt:
            raise answer
        return answer

    model = use_model(FakeModel())
    monkeypatch.setattr("builtins.input", fake_input)
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(isatty=lambda: True))
    assert cli.main(["run", "--interactive"]) == 130
    assert len(model.calls) == 1
    assert capsys.readouterr().err.splitlines() == [
        "fake, 2 threads, avx2. /help shows the commands.",
        "(Ctrl-C again, Ctrl-D or /exit leaves)",
        "(Ctrl-C again, Ctrl-D or /exit leaves)",
    ]


CHAT_DRIVER = """\
import sys, time, types
import woolly, woolly.cli
def stream_chat(messages, **options):
    for i in range(1000):
        yield types.SimpleNamespace(text=f"\\x1b word{i}")
        time.sleep(0.02)
session = types.SimpleNamespace(stream_chat=stream_chat)
woolly.load = lambda *args, **options: types.SimpleNamespace(
    name="fake", n_threads=1, isa="scalar", chat_template=1, session=lambda: session, close=lambda: None)
sys.exit(woolly.cli.main(["run", "--interactive"]))
"""


def test_chat_on_a_terminal():
    """A real terminal and a real SIGINT: the answer stops, the chat goes on, controls come out escaped."""
    pty = pytest.importorskip("pty", reason="needs pseudo-terminals")
    ours, theirs = pty.openpty()
    environment = os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[1]), "TERM": "dumb"}
    process = subprocess.Popen(
        [sys.executable, "-c", CHAT_DRIVER], env=environment, stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    shown = ""

    def wait_for(text):
        nonlocal shown
        while text not in shown:
            assert select.select([ours], [], [], 30)[0], f"{text!r} did not come after {shown!r}"
            shown += os.read(ours, 4096).decode()
        shown = shown.partition(text)[2]

    try:
        wait_for("> ")
        os.write(ours, b"Hi\n")
        wait_for("\\x1b word3")
        process.send_signal(signal.SIGINT)
        wait_for("(stopped)")
        wait_for("> ")
        os.write(ours, b"again\n")
        wait_for("\\x1b word1")
        process.send_signal(signal.SIGINT)
        wait_for("> ")
        os.write(ours, b"/exit\n")
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)


# --- inspect, pull, list ---


def fake_tensor(name, shape, format_name, n_bytes):
    return types.SimpleNamespace(
        name=name, shape=shape, format=types.SimpleNamespace(name=format_name), offset=64, n_bytes=n_bytes
    )


class FakeGGUFFile:
    version = 3
    n_bytes = 1234
    metadata = {  # noqa: RUF012
        "general.architecture": "llama",
        "general.name": "evil\x1b[2J [bold]name",
        "llama.block_count": 30,
        "llama.embedding_length": 576,
        "llama.context_length": 8192,
        "llama.eps": math.nan,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": ["a", "b", "c"],
        "tokenizer.chat_template": "{{ x }}",
    }
    tensors = {  # noqa: RUF012
        "a": fake_tensor("a\x9b", (10, 32), "Q8_0", 340),
        "b": fake_tensor("b", (32,), "F32", 128),
        "c": fake_tensor("c", (32,), "F32", 128),
    }

    @classmethod
    def open(cls, path):
        return cls()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass


@pytest.fixture
def fake_file(monkeypatch, tmp_path):
    fake = types.SimpleNamespace(open_checkpoint=FakeGGUFFile.open)
    monkeypatch.setitem(sys.modules, "woolly.convert.opening", fake)
    path = tmp_path / "m.gguf"
    path.write_bytes(b"x" * 1234)
    return path


def test_inspect(fake_file, capsys):
    assert cli.main(["inspect", str(fake_file), "--tensors"]) == 0
    text = capsys.readouterr().out
    facts = dict(line.split(maxsplit=1) for line in text.partition("\n\n")[0].splitlines())
    assert facts["Name"].strip() == "evil\\x1b[2J [bold]name"
    assert facts["Architecture"].strip() == "llama"
    assert facts["Parameters"].strip() == "384"
    assert facts["Tensors"].strip() == "3 (F32 2, Q8_0 1), 596 B"
    assert facts["Tokenizer"].strip() == "gpt2 smollm, 3 tokens"
    assert facts["Chat"].split() == ["template", "yes"]
    rows = [line.split() for line in text.partition("\n\n")[2].splitlines()]
    assert rows[1] == ["a\\x9b", "10", "×", "32", "Q8_0", "340", "B"]


def test_inspect_json(fake_file, capsys):
    assert cli.main(["inspect", str(fake_file), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert "tensors" not in record
    assert record["file_bytes"] == 1234
    assert record["formats"] == {"F32": {"tensors": 2, "bytes": 256}, "Q8_0": {"tensors": 1, "bytes": 340}}
    assert record["tokenizer"] == {"model": "gpt2", "pre": "smollm", "vocab_size": 3}
    assert record["context_length"] == 8192
    assert record["chat_template"] is True
    assert record["metadata"]["llama.eps"] == "nan"
    assert record["metadata"]["tokenizer.ggml.tokens"] == {"length": 3}
    assert cli.main(["inspect", str(fake_file), "--json", "--tensors"]) == 0
    tensors = json.loads(capsys.readouterr().out)["tensors"]
    assert tensors[1] == {"name": "b", "shape": [32], "format": "F32", "offset": 64, "bytes": 128}


def test_inspect_shows_arrays_in_odd_places_by_their_length(fake_file, monkeypatch, capsys):
    keys = ("general.architecture", "general.name", "tokenizer.ggml.model", "tokenizer.ggml.pre")
    monkeypatch.setattr(FakeGGUFFile, "metadata", dict.fromkeys(keys, np.arange(9)))
    assert cli.main(["inspect", str(fake_file), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["name"] == record["architecture"] == record["tokenizer"]["pre"] == {"length": 9}
    assert cli.main(["inspect", str(fake_file)]) == 0


def test_inspect_what_says_nothing(fake_file, monkeypatch, capsys):
    monkeypatch.setattr(FakeGGUFFile, "metadata", {})
    monkeypatch.setattr(FakeGGUFFile, "tensors", {})
    assert cli.main(["inspect", str(fake_file)]) == 0
    text = capsys.readouterr().out
    assert "not said" in text
    assert "none" in text


def test_pull_prints_the_path(monkeypatch, capsys):
    monkeypatch.setattr(hub, "pull", lambda name, *, force: Path(f"/cache/{name}-{force}.gguf"))
    assert cli.main(["pull", "smollm2", "--force"]) == 0
    assert capsys.readouterr() == ("/cache/smollm2-True.gguf\n", "")


def test_list(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("WOOLLY_CACHE", str(tmp_path))
    cached = [hub.CachedModel("smollm2", tmp_path / "smollm2.gguf", 98_362_432)]
    monkeypatch.setattr(hub, "list_models", lambda: cached)
    assert cli.main(["list"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[1] == ["smollm2", "98.4", "MB", str(tmp_path / "smollm2.gguf")]
    assert rows[2][:3] == ["gemma3-270m", "253.1", "MB"]
    assert cli.main(["list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "cache": str(tmp_path),
        "models": [{"name": "smollm2", "path": str(tmp_path / "smollm2.gguf"), "bytes": 98_362_432}],
        "known": list(hub.CATALOGUE),
    }


# --- the terminal ---


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\tb\nc é \U0001f600 \u200d", "a\tb\nc é \U0001f600 \u200d"),
        ("\x1b[31mred\x07\r\x00\x7f", "\\x1b[31mred\\x07\\x0d\\x00\\x7f"),
        ("\x9b2J\x85", "\\x9b2J\\x85"),
        ("\u202egnp.exe\u2066", "\\u202egnp.exe\\u2066"),
        ("\ud800", "\\ud800"),
    ],
)
def test_escape_controls(text, expected):
    assert terminal.escape_controls(text) == expected


def test_generated_text_is_escaped_on_a_terminal_only(monkeypatch, capsys):
    terminal.write("a\x1b[2J\n")
    assert capsys.readouterr().out == "a\x1b[2J\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    terminal.write("a\x1b[2J\n")
    assert capsys.readouterr().out == "a\\x1b[2J\n"


@pytest.mark.parametrize(
    ("n_bytes", "expected"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (98_362_432, "98.4 MB"),
        (999_960_000, "1.00 GB"),
        (2 * 10**15, "2000.0 TB"),
    ],
)
def test_format_bytes(n_bytes, expected):
    assert terminal.format_bytes(n_bytes) == expected


# --- shape ---


def test_the_command_line_starts_quickly():
    """Until a command runs, only the standard library and small modules of our own are imported."""
    for module in (cli, terminal):
        tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
        imported = {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
        imported |= {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
        roots = {name for name in imported if name.partition(".")[0] not in sys.stdlib_module_names}
        assert roots <= {"woolly.errors", "woolly.terminal"}


def test_every_command_has_a_function():
    parser = cli.make_parser()
    commands = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    assert set(commands.choices) >= {"run", "inspect", "pull", "list"}
    for command in commands.choices.values():
        assert callable(cli._function_of(command.get_default("command")))
