"""python -m woolly.bench: each mode on tiny sizes, what its rows hold, and what is refused."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import oracle_models
import pytest
from make_gguf import write_tiny_gemma3, write_tiny_llama

import woolly
from woolly._kernels import active_isa, aligned_empty, available_isas, use_isa
from woolly._kernels import limits as loops
from woolly.bench import harness, limits, machine, plots, report, sizes, stack, steps, subjects
from woolly.bench.__main__ import main
from woolly.bench.limits import Limits, beyond_cache_bytes, bound, matmul_limit, quantised_limit
from woolly.errors import UnsupportedModelError, WoollyError

Row = dict[str, Any]
SIZES = ["--vocab-size", "320", "--hidden-size", "64", "--layers", "3", "--heads", "4", "--kv-heads", "2"]
SIZES += ["--intermediate-size", "128", "--ctx", "64"]


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of two layers in a GGUF file."""
    return write_tiny_llama(tmp_path_factory.mktemp("bench") / "tiny.gguf", dtype="q4_0", n_layers=2, hidden=64)


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits that are found in a moment: the sizes are not what is tested."""
    monkeypatch.setattr("woolly.bench.limits.MAX_BUFFER_BYTES", 8 << 20)
    monkeypatch.setattr("woolly.bench.limits.FIRST_WRITE_BYTES", 4 << 20)
    monkeypatch.setattr("woolly.bench.limits.SAMPLES", 1)
    monkeypatch.setattr("woolly.bench.harness.MIN_SAMPLE_S", 0.0005)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    """Run a mode with --json and return its rows, the machine's first."""

    def run_mode(*arguments: str) -> list[Row]:
        assert main([*arguments, "--json", "--repeat", "2"]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        return [json.loads(line) for line in out.splitlines()]

    return run_mode


# --- limits ---


def test_limits(run: Any) -> None:
    facts, *rows = run("limits", "--threads", "2")
    assert facts["mode"] == "machine"
    assert {"machine", "isa", "n_threads", "commit", "date", "numpy", "woolly"} <= facts.keys()
    names = {row["limit"] for row in rows}
    assert {"FP32 FMA peak", "INT8 dot peak", "read bandwidth", "write bandwidth", "first-write bandwidth"} <= names
    assert {"parallel region", "barrier", "kernel call"} <= names
    assert all(row["value"] >= 0 and math.isfinite(row["value"]) for row in rows)
    assert {row["n_threads"] for row in rows if "n_threads" in row} == {1, 2}
    assert {row["isa"] for row in rows if row.get("kind") == "fma_f32"} == set(available_isas())


@pytest.mark.parametrize("kind", ["fma_f32", "dot_int8", "dot_int16"])
def test_peaks_are_of_the_order_of_a_clock(kind: str, isa: str) -> None:
    """At least one operation a nanosecond: a loop that was left out would be far above the other bound."""
    assert 1e9 < Limits().peak(kind, 1) < 1e14


def test_peak_steps_take_time() -> None:
    """Ten times the steps take about ten times as long, so none is left out."""

    def best(n: int) -> float:
        call = lambda: loops.run_peak(active_isa(), "fma_f32", n, n_threads=1)  # noqa: E731
        return min(harness.sample(call, repeat=9, min_s=0))

    assert best(2_000_000) > 4 * best(200_000)


def test_peak_that_is_missing() -> None:
    assert Limits().peak("dot_int4", 1) == 0
    with pytest.raises(ValueError, match="run_peak: no dot_int4 loop for avx9 runs on this machine"):
        loops.run_peak("avx9", "dot_int4", 1)


def test_read_memory_reads_everything(isa: str) -> None:
    buffer = aligned_empty(64 * 512)
    buffer[:] = 0
    assert loops.read_memory(buffer, isa=isa, n_threads=3) == 0
    for at in (0, 511, 12345, len(buffer) - 1):
        buffer[at] = 1
        assert loops.read_memory(buffer, isa=isa, n_threads=3) != 0
        buffer[at] = 0


def test_write_memory_writes_everything(isa: str) -> None:
    buffer = aligned_empty(64 * 512)
    buffer[:] = 255
    loops.write_memory(buffer, isa=isa, n_threads=3)
    assert not buffer.any()


@pytest.mark.parametrize("work", [loops.read_memory, loops.write_memory])
def test_memory_loops_want_aligned_steps(work: Any) -> None:
    buffer = aligned_empty(2048)
    for wrong in (buffer[:500], buffer[:0], buffer[1:513]):
        with pytest.raises(ValueError, match="expected a multiple of 512 bytes at a multiple of 64, got"):
            work(wrong, isa="scalar")


def test_quantize_rows() -> None:
    loops.quantize_rows(np.ones((3, 64), dtype=np.float32))
    loops.quantize_rows(np.ones((0, 64), dtype=np.float32))
    with pytest.raises(ValueError, match="quantize_rows: expected a multiple of 32 columns, got 33"):
        loops.quantize_rows(np.ones((3, 33), dtype=np.float32))


def test_bound_takes_the_limit_that_binds() -> None:
    class Fixed(Limits):
        def peak(self, kind: str, n_threads: int) -> float:
            return 100e9

        def read(self, n_bytes: int, n_threads: int) -> float:
            return 10e9

    given: Row = {"working_set": 1e6, "seconds": 1.0, "n_threads": 1}
    row = bound(Fixed(), kind="fma_f32", ops=50e9, n_bytes=1e9, **given)
    assert (row["limit"], row["share"], row["read_share"]) == ("fma_f32", 0.5, 0.1)
    row = bound(Fixed(), kind="dot_int8", ops=25e9, n_bytes=1e9, reachable=0.5, **given)
    assert (row["limit"], row["share"]) == ("dot_int8", 0.5)
    row = bound(Fixed(), kind="fma_f32", ops=1e9, n_bytes=5e9, **given)
    assert (row["limit"], row["share"], row["compute_share"]) == ("read", 0.5, 0.01)


def test_the_limit_of_a_matmul_is_its_arithmetic() -> None:
    with use_isa("scalar"):
        assert matmul_limit(is_float=False, n_tokens=9) == ("dot_int16", 1.0)
        assert matmul_limit(is_float=False, n_tokens=9, compute="int8") == ("dot_int8", 1.0)
        assert matmul_limit(is_float=True, n_tokens=9, compute="int8") == ("fma_f32", 1.0)
        assert matmul_limit(is_float=True, n_tokens=9, compute="bf16") == ("dot_bf16", 1.0)
        assert matmul_limit(is_float=True, n_tokens=7, compute="bf16") == ("fma_f32", 1.0)
    assert quantised_limit("avx512_amx") == ("dot_bf16", 0.5)  # two digits an activation
    assert quantised_limit("avx512_amx", "int8") == ("dot_bf16", 1.0)


def test_buffer_is_beyond_the_cache_or_at_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("woolly.bench.limits.MAX_BUFFER_BYTES", 1 << 40)
    monkeypatch.setattr(machine, "memory_bytes", lambda field="": 1 << 42)
    assert beyond_cache_bytes() >= 2 * machine.last_level_bytes() / math.sqrt(2)
    monkeypatch.setattr(machine, "memory_bytes", lambda field="": 1 << 29)
    assert beyond_cache_bytes() == 1 << 26


# --- kernels and instruction sets ---


def test_kernels(run: Any) -> None:
    _, *rows = run("kernels", "--sizes", "tiny", "--columns", "1,16", "--contexts", "48", "--formats", "f32,q4_0")
    kernels = {row["kernel"] for row in rows}
    assert kernels == {
        *("qkv", "output", "gate_up", "down", "head", "attention"),
        *("rmsnorm", "rope", "swiglu", "quantise", "dequantise"),
    }
    for row in rows:
        assert row["seconds"] > 0
        assert 0 <= row["share"] == max(row["compute_share"], row["read_share"])
        assert row["limit"] in ("read", "fma_f32", "dot_int16", "dot_bf16")
    matmuls = [row for row in rows if row["kernel"] == "qkv"]
    assert {(row["format"], row["n_columns"]) for row in matmuls} == {(f, n) for f in ("f32", "q4_0") for n in (1, 16)}
    assert all(row["ops"] == 2 * 128 * 64 * row["n_columns"] for row in matmuls)


def test_kernels_skip_formats_that_a_width_has_no_blocks_for(run: Any) -> None:
    _, *rows = run("kernels", "--sizes", "tiny", "--columns", "1", "--contexts", "16", "--formats", "q4_k")
    assert not [row for row in rows if row["format"] == "q4_k"]


def test_isa(run: Any) -> None:
    _, *rows = run("isa", "--sizes", "tiny", "--columns", "4", "--contexts", "16", "--formats", "q8_0")
    assert {row["isa"] for row in rows} == set(available_isas())
    assert all(row["over_scalar"] == 1 for row in rows if row["isa"] == available_isas()[0])
    assert active_isa() == available_isas()[-1] or len(available_isas()) == 1


# --- models ---


def test_layer_sums_to_the_whole(run: Any, tiny_llama: Path) -> None:
    _, *rows = run("layer", "--model", str(tiny_llama), "-p", "8")
    for phase in ("prefill", "decode"):
        for table, whole in (("one layer", "layer"), ("one step", "step")):
            parts = [row for row in rows if (row["phase"], row["table"]) == (phase, table)]
            assert parts[-1]["part"] == whole
            assert sum(row["of_whole"] for row in parts[:-1]) == pytest.approx(1)
            assert sum(row["seconds"] for row in parts[:-1]) == pytest.approx(parts[-1]["seconds"])
    names = {row["part"] for row in rows if row["table"] == "one layer"}
    assert {"attn_norm", "attn_qkv", "attn_rope", "attn_heads", "ffn_gate_up", "ffn_glu"} <= names
    assert all(row["share"] > 0 for row in rows if row["part"] in ("attn_qkv", "attn_heads", "ffn_gate_up", "head"))


def test_layer_of_gemma(run: Any, tmp_path: Path) -> None:
    path = write_tiny_gemma3(tmp_path / "g.gguf", dtype="q8_0")
    _, *rows = run("layer", "--model", str(path), "-p", "4")
    matmuls = {row["part"] for row in rows if row.get("share") and row["table"] == "one layer"}
    assert matmuls == {"attn_qkv", "attn_heads", "attn_out", "ffn_gate_up", "ffn_out"}


@pytest.mark.parametrize(
    ("name", "matmuls"),
    [
        ("phi3", {"attn_qkv", "attn_residual", "ffn_gate_up", "ffn_residual"}),
        ("starcoder2", {"attn_qkv", "attn_residual", "ffn_up", "ffn_residual"}),
    ],
)
def test_layer_of_other_architectures(run: Any, tmp_path: Path, name: str, matmuls: set[str]) -> None:
    """Tensors that hold several matrices, MLPs without a gate, stages that begin with a bias."""
    path = oracle_models.write_gguf(oracle_models.MODELS[name], tmp_path / f"{name}.gguf")
    _, *rows = run("layer", "--model", str(path), "-p", "4")
    layer = [row for row in rows if row["table"] == "one layer"]
    assert {row["part"] for row in layer if row.get("share")} == matmuls | {"attn_heads"}
    assert all(row["does"] for row in layer)


def test_model_rows_have_llama_benchs_fields(run: Any, tiny_llama: Path) -> None:
    arguments = ["-p", "8,16", "-n", "4", "-d", "0,8", "--sequences", "1,3", "--prompts", "1,10", "--sustained", "24"]
    _, *rows = run("model", "--model", str(tiny_llama), *arguments)
    tests = [row["test"] for row in rows]
    rates = ["pp8", "pp16", "tg4", "tg4 × 3", "pp8 @ d8", "pp16 @ d8", "tg4 @ d8", "tg4 × 3 @ d8"]
    assert tests == [*rates, "prompt 1", "prompt 10", "sustained 24", "peak memory"]
    for row in rows[: len(rates)]:
        fields = {"model", "n_params", "n_threads", "test", "n_prompt", "n_gen", "n_depth", "avg_ts", "stddev_ts"}
        assert fields <= row.keys()
        assert row["samples"] == len(row["samples_ts"]) == 2
        assert row["avg_ts"] == pytest.approx(sum(row["samples_ts"]) / 2)
        assert row["share"] > 0
        assert row["projected"] is None
    assert all(row["ttft_s"] > 0 for row in rows if row["test"].startswith("prompt"))
    assert rows[-2]["first_ts"] > 0
    assert rows[-2]["last_ts"] > 0
    assert rows[-1]["memory_bytes"] > 1e6


def test_projection_is_marked_and_near(run: Any, tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "deep.gguf", n_layers=6, hidden=64, intermediate=256)
    common = ["model", "--model", str(path), "-p", "32", "-n", "4", "--prompts", "1", "--sustained", "0"]
    _, *rows = run(*common, "--measure-layers", "2")
    assert {row["test"] for row in rows} == {"pp32", "tg4", "peak memory"}
    assert all(row["projected"] == "projected from 2 of 6 layers" for row in rows)
    assert all(row["rule"] == steps.PROJECTION_RULE for row in rows)
    whole = run(*common)[1]
    assert rows[0]["n_params"] == whole["n_params"]


def test_projection_rule() -> None:
    times = steps.StepTimes(10.0, {"embd": 1.0, "blk.0.a": 2.0, "blk.1.a": 4.0, "logits": 1.0})
    assert times.layers_s == 6
    assert steps.projected_s(times, 2, 2) == 10
    assert steps.projected_s(times, 2, 5) == 10 + 3 * 3


def test_more_layers_than_there_are(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", "--model", str(tiny_llama), "--measure-layers", "3", "-p", "4", "-n", "2"]) == 1
    assert "--measure-layers: 3 of 2 layers are asked for" in capsys.readouterr().err


def test_too_long_for_the_model(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", "--model", str(tiny_llama), "-p", "300"]) == 1
    assert "301 tokens are asked for, the model was trained for 256" in capsys.readouterr().err


def test_sizes_do_not_go_with_a_file(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["layer", "--model", str(tiny_llama), "--layers", "2"]) == 1
    assert "--layers is of a model without a file, it does not go with --model" in capsys.readouterr().err


def test_model_without_a_file(run: Any) -> None:
    _, *rows = run("model", *SIZES, "--dtype", "q8_0", "-p", "8", "-n", "2", "--prompts", "1", "--sustained", "0")
    assert rows[0]["model"] == "generated-64x3-q8_0"
    _, *some = run("model", *SIZES, "-p", "8", "-n", "2", "--measure-layers", "1")
    assert some[0]["projected"] == "projected from 1 of 3 layers"
    assert some[0]["n_params"] == rows[0]["n_params"]


# --- stack and loading ---


def test_stack(run: Any, tiny_llama: Path) -> None:
    _, *rows = run("stack", "--model", str(tiny_llama), "-p", "6", "-n", "2")
    assert [row["variant"] for row in rows] == [
        "numpy FP32, no KV cache",
        "KV cache",
        "Woolly's FP32 matmul",
        "fused program, FP32",
        "BF16 weights",
        "Q8_0 weights",
        "Q4_0 weights",
    ]
    assert rows[0]["factor"] is None
    for before, row in itertools.pairwise(rows):
        assert row["factor"] == pytest.approx(row["avg_ts"] / before["avg_ts"])
    assert rows[-1]["weights_bytes"] < rows[-2]["weights_bytes"] < rows[0]["weights_bytes"]


def test_stack_without_a_file(run: Any) -> None:
    assert len(run("stack", *SIZES, "-p", "4", "-n", "1")) == 8


def test_numpy_llama_computes_what_the_engine_does(tiny_llama: Path) -> None:
    args = argparse.Namespace(model=str(tiny_llama))
    for option in (
        "vocab_size",
        "hidden_size",
        "layers",
        "heads",
        "kv_heads",
        "intermediate_size",
        "ctx",
        "seed",
        "dtype",
    ):
        setattr(args, option, None)
    _, config, tensors = stack.read_tensors(args, 1)
    plain = stack.NumpyLlama(config, tensors, 16)
    ids = steps.token_ids(9, config.vocab_size)
    plain.forward(ids[:5], 0)
    ours = subjects.open_gguf(str(tiny_llama)).model.forward(ids.tolist())
    np.testing.assert_allclose(plain.forward(ids[5:], 5), ours[-1], atol=0.02)


def test_stack_wants_a_llama(tmp_path: Path) -> None:
    path = write_tiny_gemma3(tmp_path / "g.gguf")
    with pytest.raises(UnsupportedModelError, match="stack has a numpy form of llama only, this is 'gemma3'"):
        stack._read_gguf(path)


def test_loading(run: Any, tiny_llama: Path) -> None:
    _, *rows = run("loading", "--model", str(tiny_llama), "--threads", "1")
    assert len(rows) == 3
    for row in rows:
        assert row["file_bytes"] == tiny_llama.stat().st_size
        assert row["memory_bytes"] >= row["baseline_bytes"] > 0
        assert row["total_s"] >= row["open_s"] > 0
        assert row["samples"] == 2


def test_loading_wants_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["loading"]) == 1
    assert "loading: --model is missing" in capsys.readouterr().err


def test_loading_step_that_is_unknown(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["loading", "--model", str(tiny_llama), "--step", "magic"]) == 1
    assert "loading: step 'magic' is unknown; those that are known: gguf, woolly, fast" in capsys.readouterr().err


def test_loading_tells_what_a_step_died_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF")
    assert main(["loading", "--model", str(path)]) == 1
    assert "loading, step gguf: " in capsys.readouterr().err


# --- the report ---


@pytest.mark.slow
def test_report(tmp_path: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert main(["all", "--report", str(tmp_path), "--quick", "--model", str(tiny_llama), "--threads", "2"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.md")
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {row["mode"] for row in rows} == {"machine", *report.TITLES}
    assert not [row for row in rows if row.get("table") == "failed"]
    text = (tmp_path / "report.md").read_text()
    for mode, name in report.PICTURES.items():
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"
        assert f"({name})" in text
        chosen = [row for row in rows if row["mode"] == mode]
        tables = dict.fromkeys(row.get("table") for row in chosen)
        columns = __import__(f"woolly.bench.{mode}", fromlist=["COLUMNS"]).COLUMNS
        for table in tables:  # the figures are the JSON's
            for line in report.markdown_table([row for row in chosen if row.get("table") == table], columns):
                assert line in text


def test_report_says_what_failed(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    facts = machine.describe(1)
    report.write_report(tmp_path, [facts, {"mode": "stack", "table": "failed", "error": "it broke"}])
    assert "Failed: it broke" in (tmp_path / "report.md").read_text()
    assert not list(tmp_path.glob("*.png"))


def test_mode_that_fails_is_a_row(tmp_path: Path) -> None:
    rows = report._run_mode(["layer", "--model", str(tmp_path / "none.gguf")], 1)
    assert rows[-1]["table"] == "failed"
    assert "none.gguf" in rows[-1]["error"]


def test_report_without_matplotlib(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["all", "--report", str(tmp_path / "r")]) == 1
    assert "the report's pictures need matplotlib: pip install 'woolly[bench]'" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_pictures_need_their_rows(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert not plots.draw("stack", [machine.describe(1)], tmp_path / "x.png")


# --- arguments, tables, Ctrl-C ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: MODE"),
        (["nothing"], "invalid choice: 'nothing'"),
        (["limits", "--threads", "0"], "argument --threads: must be at least 1, got 0"),
        (["limits", "--threads", "many"], "argument --threads: invalid integer value: 'many'"),
        (["kernels", "--columns", "4,0"], "argument --columns: must be at least 1, got 0"),
        (["kernels", "--columns", "4;5"], "argument --columns: invalid integers value: '4;5'"),
        (["model", "-d", "-1"], "argument -d/--depth: must be at least 0, got -1"),
        (["all"], "the following arguments are required: --report"),
    ],
)
def test_wrong_usage(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["kernels", "--sizes", "70t"], "size '70t' is unknown; those that are known: tiny, smollm2"),
        (["kernels", "--formats", "q9_9"], "format 'q9_9' has no kernels; those that have: f32"),
        (["limits", "--threads", "1000"], "n_threads: expected an integer of 1 to 256, got 1000"),
        (["model", "--model", "/nowhere/x.gguf"], "/nowhere/x.gguf"),
        (["model", "--heads", "7"], "7"),
    ],
)
def test_bad_values(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert len(err.splitlines()) == 1


def test_debug_shows_where() -> None:
    with pytest.raises(WoollyError, match="size '70t' is unknown"):
        main(["kernels", "--sizes", "70t", "--debug"])


def test_table_for_people(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["layer", "--model", str(tiny_llama), "-p", "4", "--repeat", "1"]) == 0
    out, err = capsys.readouterr()
    assert err == ""  # the progress bar is for terminals
    assert "one layer" in out
    assert "100.0%" in out


def test_ctrl_c_keeps_what_is_done(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(bench: object, args: object) -> Iterator[Row]:
        yield {"mode": "limits", "limit": "first", "value": 1.0, "unit": "GB/s"}
        raise KeyboardInterrupt

    monkeypatch.setattr("woolly.bench.limits.run", interrupted)
    assert main(["limits"]) == 130
    out, err = capsys.readouterr()
    assert "first" in out
    assert "interrupted: this is what was done until then" in err
    assert main(["limits", "--json"]) == 130
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["limit"] == "first"


def test_ctrl_c_of_the_report_keeps_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")

    def run_mode(command: list[str], n_threads: int) -> list[Row]:
        if command[0] != "limits":
            raise KeyboardInterrupt
        return [{"mode": "limits", "limit": "first", "value": 1.0, "unit": "GB/s"}]

    monkeypatch.setattr(report, "_run_mode", run_mode)
    monkeypatch.setattr(report, "_model", lambda args: None)
    assert main(["all", "--report", str(tmp_path)]) == 130
    assert "first" in (tmp_path / "report.md").read_text()


def test_interrupted_mode_interrupts_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.CompletedProcess([], 130, "", "")
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: done)
    with pytest.raises(KeyboardInterrupt):
        report._run_mode(["limits"], 1)


def test_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with harness.Progress(is_shown=True) as progress:
        progress.start("limits", 2)
        progress.step("first")
        progress.step("second")
    assert capsys.readouterr().out == ""


def test_cells() -> None:
    assert harness.format_cell(None, "") == ""
    assert harness.format_cell(1.5e-6, "us") == "1.5"
    assert harness.format_cell(0.25, "ms") == "250.00"
    assert harness.format_cell(1.5e9, "GB") == "1.500"
    assert harness.format_cell(3 << 20, "MB") == "3"
    assert harness.format_cell(0.5, ".0%") == "50%"


def test_sizes() -> None:
    assert sizes.size_named("7b").matrices()["gate_up"] == (22016, 4096)
    assert harness.spread([1.0]) == 0


def test_scattered_samples_are_called_so() -> None:
    assert limits._row("x", [1.0, 1.0, 2.0], "GB/s", 1, note="n")["note"] == "n; samples scatter: is the machine busy?"
    assert not limits._row("x", [1.9, 1.9, 2.0], "GB/s", 1)["is_busy"]


def test_compare_matmuls() -> None:
    script = Path(__file__).parents[1] / "bench" / "compare.py"
    command = [sys.executable, str(script), "--matmul", "4,16,32", "--repeat", "2", "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rates = json.loads(done.stdout.splitlines()[-1])["matmuls"]["4x16x32"]["matmul"]
    assert {"woolly", "numpy"} <= rates.keys()
    assert all(engine["median"] > 0 and len(engine["samples"]) == 2 for engine in rates.values())
    refused = subprocess.run(command[:2], capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "nothing to compare: give --model or --matmul" in refused.stderr


def test_kernels_of_two_trees_by_turns(tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "bench" / "before_after.py"
    tree, rows = str(Path(woolly.__file__).parents[1]), tmp_path / "rows.jsonl"
    options = ["--isa", "scalar", "--kernels", "cached,rows", "--formats", "q4_0", "--columns", "1"]
    options += ["--seconds", "0.01"]

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True, check=False)

    done = run(tree, tree, *options, "--out", str(rows))
    assert done.returncode == 0, done.stderr
    measured = [json.loads(line) for line in rows.read_text().splitlines()]
    assert len(measured) == 9
    assert all(row["old_s"] > 0 and row["new_s"] > 0 and row["speed"] > 0 for row in measured)
    shown = run("--table", str(rows)).stdout
    assert "Matmul, cached, 1 thread\n\n| | scalar × 1 |\n|---|---:|\n| q4_0 |" in shown
    assert "| rmsnorm, 64 columns |" in shown
    assert "expected OLD_TREE and NEW_TREE" in run(tree).stderr
    assert "is no tree of this repository" in run(str(tmp_path), tree).stderr
    assert "the process of a tree ended with status 1" in run(tree, tree, "--isa", "none", "--kernels", "rows").stderr


def test_recorded_results_are_shown(tmp_path: Path) -> None:
    facts = {"mode": "machine", "machine": "Linux", "isa": "avx2", "n_threads": 2, "commit": "abc1234", "date": "today"}
    model = {
        "mode": "model",
        "model": "m",
        "compute": "exact",
        "test": "pp8",
        "median_ts": 9.5,
        "share": 0.5,
        "limit": "read",
    }
    engines = {"woolly": {"median": 9.5, "woolly_ratio": 1.0}, "other": {"median": 1.0, "woolly_ratio": 9.5}}
    compared = {"mode": "compare", "model": "m", "test": "pp8", "engines": engines}
    loading = {"mode": "loading", "model": "m", "step": "open", "total_s": 0.25, "memory_bytes": 1e9}
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (facts, model, compared, loading)))
    script = Path(__file__).parents[1] / "bench" / "record.py"
    shown = subprocess.run(
        [sys.executable, str(script), "--show", str(path)], capture_output=True, text=True, check=True
    )
    for line in (
        "| m | exact | pp8 | 9.5 | 50% | read |",
        "| m | pp8 | other | 1.0 | 9.50 |",
        "| m | open | 0.25 | 1.00 |",
    ):
        assert line in shown.stdout
    refused = subprocess.run([sys.executable, str(script), "--only", "x"], capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "--only: x: unknown; known: limits, kernels" in refused.stderr


def test_read_limit_of_a_huge_model_takes_no_huge_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "beyond_cache_bytes", lambda: 1 << 20)
    assert Limits().read(1 << 60, 1) > 1e8


def test_caches_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, (level, kind, size, cpus) in enumerate([("1", "Data", "32K", "0"), ("3", "Unified", "16M", "0-3,8")]):
        folder = tmp_path / f"index{number}"
        folder.mkdir()
        for name, text in (("level", level), ("type", kind), ("size", size), ("shared_cpu_list", cpus)):
            (folder / name).write_text(text + "\n")
    monkeypatch.setattr(machine, "CACHES", tmp_path)
    first, last = machine.caches()
    assert (first["bytes"], last["bytes"], last["shared_by"], last["kind"]) == (32 << 10, 16 << 20, 5, "unified")
    assert machine.last_level_bytes() == 16 << 20
    monkeypatch.setattr(machine, "CACHES", tmp_path / "none")
    assert machine.last_level_bytes() == 32 << 20
