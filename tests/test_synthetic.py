"""The model without a file: sizes and their rules, weights, when they are generated, and what it says."""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
import time

import numpy as np
import pytest

import woolly
from woolly import cli, memory, synthetic
from woolly._kernels import GENERATED_FORMATS, PackedMatrix, Program, available_isas, use_isa
from woolly.byte_tokenizer import MIN_VOCAB_SIZE
from woolly.errors import NotEnoughMemoryError, WoollyError
from woolly.loading import load_fast_fp32
from woolly.materialise import Materialisation
from woolly.models import llama

SMALL = {
    "vocab_size": 300,
    "hidden_size": 64,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "intermediate_size": 96,
    "n_ctx": 64,
}
SMALL_OPTIONS = ["--vocab-size", "300", "--hidden-size", "64", "--layers", "2", "--heads", "4", "--kv-heads", "2"]
SMALL_OPTIONS += ["--intermediate-size", "96", "--ctx", "64"]

GOLDEN_SIZES = {"vocab_size": 1000, "hidden_size": 512, "n_layers": 2, "n_heads": 8, "intermediate_size": 768}
# SHA-256 of the float32 weights with seed 42, rows in order. They may never change.
GOLDEN = {
    "token_embd.weight": "74e0808957ce1d03247719a86b186050daba6a68804d38bbf8c3ac3c1668dc14",
    "blk.1.ffn_down.weight": "9c86450a5c2e1c80d36bed8571d121cdc97767a1f6664b1b43a7206c2e647388",
    "output_norm.weight": "c776ad623f5023fc450a4c46303be8252953399661363fd1b3e7d33764d9ff71",
}


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    """The machine's own variables must not choose the sizes here."""
    for variable in (synthetic.REQUEST_VARIABLE, synthetic.DTYPE_VARIABLE, *(s.variable for s in synthetic.SETTINGS)):
        monkeypatch.delenv(variable, raising=False)


def small(**changes):
    return load_fast_fp32(**{**SMALL, **changes})


# --- sizes ---


def test_defaults_are_those_of_the_documentation():
    spec = synthetic.resolve()
    c = spec.config
    assert (c.vocab_size, c.hidden_size, c.n_layers, c.n_heads, c.n_kv_heads) == (32000, 4096, 32, 32, 32)
    assert (c.intermediate_size, spec.n_ctx, spec.seed, spec.dtype) == (11008, 2048, 42, "f32")
    assert (c.rope_theta, c.head_dim, c.architecture) == (10000.0, 128, "llama")
    assert spec.name == "generated-4096x32-f32"


@pytest.mark.parametrize(
    ("variable", "text", "read"),
    [
        ("WOOLLY_FAST_VOCAB_SIZE", "512", lambda spec: spec.config.vocab_size == 512),
        ("WOOLLY_FAST_HIDDEN_SIZE", "128", lambda spec: spec.config.hidden_size == 128),
        ("WOOLLY_FAST_NUM_LAYERS", "3", lambda spec: spec.config.n_layers == 3),
        ("WOOLLY_FAST_NUM_HEADS", "8", lambda spec: spec.config.n_heads == spec.config.n_kv_heads == 8),
        ("WOOLLY_FAST_NUM_KV_HEADS", "4", lambda spec: spec.config.n_kv_heads == 4),
        ("WOOLLY_FAST_CONTEXT_LENGTH", "99", lambda spec: spec.n_ctx == spec.config.n_ctx_train == 99),
        ("WOOLLY_FAST_INTERMEDIATE_SIZE", "192", lambda spec: spec.config.intermediate_size == 192),
        ("WOOLLY_FAST_SEED", "18446744073709551615", lambda spec: spec.seed == 2**64 - 1),
        ("WOOLLY_FAST_DTYPE", "q4_0", lambda spec: spec.dtype == "q4_0"),
    ],
)
def test_variable_is_read(monkeypatch, variable, text, read):
    assert not read(synthetic.resolve())
    monkeypatch.setenv(variable, text)
    assert read(synthetic.resolve())


def test_arguments_win_over_variables(monkeypatch):
    monkeypatch.setenv("WOOLLY_FAST_NUM_LAYERS", "not read")
    monkeypatch.setenv("WOOLLY_FAST_DTYPE", "not read")
    spec = synthetic.resolve(n_layers=5, dtype="bf16")
    assert (spec.config.n_layers, spec.dtype) == (5, "bf16")


@pytest.mark.parametrize("setting", synthetic.SETTINGS, ids=lambda setting: setting.name)
@pytest.mark.parametrize("value", ["below", "above", "text", "float", "bool"])
def test_bad_argument_is_named_with_its_value_and_rule(setting, value):
    bad = {"below": setting.least - 1, "above": setting.most + 1, "text": "12", "float": 12.0, "bool": True}[value]
    with pytest.raises(WoollyError) as caught:
        synthetic.resolve(**{setting.name: bad})
    assert str(caught.value) == f"{setting.name}: expected an integer of {setting.least} to {setting.most}, got {bad!r}"


@pytest.mark.parametrize("setting", synthetic.SETTINGS, ids=lambda setting: setting.variable)
@pytest.mark.parametrize("value", ["below", "above", "text", "empty"])
def test_bad_variable_is_named_with_its_value_and_rule(monkeypatch, setting, value):
    bad = {"below": setting.least - 1, "above": setting.most + 1, "text": "'1.5'", "empty": "''"}[value]
    monkeypatch.setenv(setting.variable, str(bad).strip("'"))
    with pytest.raises(WoollyError) as caught:
        synthetic.resolve()
    rule = f"expected an integer of {setting.least} to {setting.most}"
    assert str(caught.value) == f"{setting.variable}: {rule}, got {bad}"


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"hidden_size": 64, "n_heads": 7}, "n_heads: expected a divisor of hidden_size 64, got 7"),
        ({"n_heads": 8, "n_kv_heads": 3}, "n_kv_heads: expected a divisor of n_heads 8, got 3"),
        (
            {"hidden_size": 12, "n_heads": 4},
            "n_heads: expected heads of an even size of at most 1024, got 4 heads of 3",
        ),
        (
            {"hidden_size": 4096, "n_heads": 2},
            "n_heads: expected heads of an even size of at most 1024, got 2 heads of 2048",
        ),
        ({"hidden_size": 64, "n_heads": 4, "dtype": "q4_k"}, "hidden_size: q4_k wants a multiple of 256, got 64"),
        ({"intermediate_size": 100, "dtype": "q8_0"}, "intermediate_size: q8_0 wants a multiple of 32, got 100"),
        ({"rope_theta": 0.0}, "rope_theta: expected a number above 0 and at most 1e12, got 0.0"),
        ({"rope_theta": math.nan}, "rope_theta: expected a number above 0 and at most 1e12, got nan"),
        ({"rope_theta": "1e4"}, "rope_theta: expected a number above 0 and at most 1e12, got '1e4'"),
    ],
)
def test_sizes_that_do_not_go_together(sizes, message):
    with pytest.raises(WoollyError) as caught:
        synthetic.resolve(**sizes)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"NUM_HEADS": "7"}, "WOOLLY_FAST_NUM_HEADS: expected a divisor of hidden_size 4096, got 7"),
        ({"NUM_KV_HEADS": "5"}, "WOOLLY_FAST_NUM_KV_HEADS: expected a divisor of n_heads 32, got 5"),
        (
            {"DTYPE": "q4_k", "INTERMEDIATE_SIZE": "100"},
            "WOOLLY_FAST_INTERMEDIATE_SIZE: q4_k wants a multiple of 256, got 100",
        ),
        (
            {"DTYPE": "fp32"},
            f"WOOLLY_FAST_DTYPE: expected one of {', '.join(GENERATED_FORMATS)}, got 'fp32'",
        ),
    ],
)
def test_variables_that_do_not_go_together(monkeypatch, variables, message):
    for name, value in variables.items():
        monkeypatch.setenv(f"WOOLLY_FAST_{name}", value)
    with pytest.raises(WoollyError) as caught:
        synthetic.resolve()
    assert str(caught.value) == message


def test_unknown_arguments_are_refused():
    with pytest.raises(TypeError, match=r"^unknown argument 'n_layer', known: vocab_size, "):
        synthetic.resolve(n_layer=3)
    with pytest.raises(WoollyError, match=r"^dtype: expected one of f32, .*, got 'int8'$"):
        synthetic.resolve(dtype="int8")


@pytest.mark.parametrize(("text", "expected"), [("1", True), ("true", True), (" ON ", True), ("0", False), ("", False)])
def test_request_variable(monkeypatch, text, expected):
    monkeypatch.setenv("WOOLLY_FAST_FP32", text)
    assert synthetic.is_requested() is expected


def test_bad_request_variable(monkeypatch):
    monkeypatch.setenv("WOOLLY_FAST_FP32", "maybe")
    with pytest.raises(WoollyError, match=r"^WOOLLY_FAST_FP32: expected 1 or 0, got 'maybe'$"):
        woolly.load()


# --- weights ---


def golden_digest(name: str, n_threads: int) -> str:
    shape = synthetic.resolve(**GOLDEN_SIZES).shapes[name]
    if len(shape) == 1:
        return hashlib.sha256(synthetic.generate_vector(name, *shape, seed=42)).hexdigest()
    matrix = synthetic.generate_matrix(name, PackedMatrix(*shape, "f32"), seed=42, n_threads=n_threads)
    return hashlib.sha256(matrix.unpack()).hexdigest()


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_weights(isa, name):
    for n_threads in (1, 2):
        assert golden_digest(name, n_threads) == GOLDEN[name]


@pytest.mark.parametrize("name", ["blk.0.attn_q.weight", "blk.1.ffn_down.weight", "output.weight"])
def test_matrices_are_glorot_uniform(name):
    spec = synthetic.resolve(**GOLDEN_SIZES)
    n_rows, n_cols = spec.shapes[name]
    values = synthetic.generate_matrix(name, PackedMatrix(n_rows, n_cols, "f32"), seed=1).dequantize().astype(float)
    bound = math.sqrt(6 / (n_rows + n_cols))
    assert np.abs(values).max() <= bound
    assert np.abs(values).max() > 0.9999 * bound
    assert abs(values.mean()) < 5 * values.std() / math.sqrt(values.size)
    assert values.var() == pytest.approx(2 / (n_rows + n_cols), rel=0.01)


def test_norms_are_one_and_some_noise():
    values = synthetic.generate_vector("blk.0.attn_norm.weight", 4096, seed=42).astype(float)
    assert np.abs(values - 1).max() <= 0.1
    assert values.mean() == pytest.approx(1, abs=0.005)
    assert values.std() == pytest.approx(0.1 / math.sqrt(3), rel=0.05)


def test_embeddings_have_unit_variance():
    values = synthetic.generate_matrix("token_embd.weight", PackedMatrix(500, 256, "f32"), seed=42).dequantize()
    assert values.var() == pytest.approx(1, rel=0.01)


def test_activations_stay_finite_through_100_layers():
    with small(n_layers=100) as model:
        capture = {f"blk.{layer}.ffn_residual": None for layer in (0, 49, 99)}
        logits = model.forward([256, 72, 105], capture=capture)
    assert np.isfinite(logits).all()
    assert all(0.5 < np.std(values) < 50 for values in capture.values())


def test_tensors_are_those_that_the_model_asks_for():
    spec = synthetic.resolve(**SMALL)
    asked = {}

    class Asking(synthetic.SyntheticWeights):
        def _check(self, name, shape):
            asked[name] = shape
            super()._check(name, shape)

    weights = Asking(spec, n_threads=1)
    llama.record(Program(4, 1), spec.config, weights, spec.n_ctx)
    assert asked == spec.shapes
    assert weights.nbytes == spec.weights_bytes
    with pytest.raises(
        WoollyError, match=r"^generated weights: 'output.weight' of shape \(1, 2\) was asked for, have \(300, 64\)$"
    ):
        weights.matrix("output.weight", (1, 2))


@pytest.mark.parametrize("dtype", ["f32", "bf16", "q8_0", "q4_0"])
def test_same_logits_for_all_threads_and_isas(dtype):
    logits = set()
    for isa in available_isas():
        for n_threads in (1, 2):
            with use_isa(isa), small(dtype=dtype, n_threads=n_threads) as model:
                logits.add(model.forward([256, 1, 2, 3]).tobytes())
    assert len(logits) == 1


def test_quantised_weights_are_the_same_numbers():
    with small() as exact, small(dtype="q8_0") as rounded:
        a, b = (model.forward([256, 1, 2, 3]).ravel() for model in (exact, rounded))
    assert np.corrcoef(a, b)[0, 1] > 0.99
    assert not np.array_equal(a, b)


# --- the model ---


def test_everything_works_on_it(capsys):
    with small() as model:
        assert model.is_generated
        completion = model.generate("Hello", max_tokens=5, temperature=0)
        assert completion.completion_tokens == 5
        assert completion.prompt_tokens == 6
        assert completion.finish_reason == "length"
        assert model.chat([{"role": "user", "content": "Hi"}], max_tokens=3).completion_tokens == 3
        assert "".join(piece.text for piece in model.stream("Hello", max_tokens=5, temperature=0)) == completion.text
        session = model.session()
        logits = session.feed([256, 1])
        assert logits.shape == (300,)
        assert completion.timing.init_s == model.init_s
        assert completion.timing.materialise_s == model.materialise_s > 0
        assert model.operations[0] == "embd"
    assert capsys.readouterr().err == ""  # the library does not print


def test_constructor_returns_in_100_ms_whatever_the_size(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda: None)
    small().close()  # imports are not a part of it
    sizes = {"hidden_size": 8192, "n_layers": 120, "n_heads": 64, "intermediate_size": 28672, "n_ctx": 1 << 18}
    model = load_fast_fp32(**sizes, dtype="q4_0")
    try:
        assert model.init_s < (0.1 if "ASAN_OPTIONS" not in os.environ else 1)
        assert model.materialise_s is None
    finally:
        model.close()


def test_plan_needs_no_weights(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda: None)
    model = load_fast_fp32(n_ctx=128)
    try:
        plan = model.memory_plan()
        assert plan.weights_bytes == 26_953_662_464
        assert model.materialise_s is None
    finally:
        model.close()


def test_plan_before_is_the_plan_after():
    for dtype in ("f32", "q8_0"):
        spec = synthetic.resolve(**SMALL, dtype=dtype)
        with small(dtype=dtype) as model:
            plan, parts = model.memory_plan(), synthetic.plan_parts(spec, model.engine.program.max_tokens)
        assert (parts["weights"], parts["KV cache"]) == (plan.weights_bytes, plan.kv_cache_bytes)
        assert plan.scratch_bytes <= 1.15 * parts["scratch"]
        assert parts["scratch"] <= 1.15 * plan.scratch_bytes


def test_model_that_does_not_fit_is_refused_before_anything_is_allocated(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda: 24 * 10**9)
    started = time.perf_counter()
    with pytest.raises(NotEnoughMemoryError) as caught:
        load_fast_fp32()
    assert time.perf_counter() - started < 1
    message = str(caught.value)
    assert message.startswith(
        "generated-4096x32-f32 needs 28.1 GB of memory (weights 27.0 GB, KV cache 1.07 GB, scratch "
    )
    assert "24.0 GB are available" in message
    assert message.endswith(
        f"what would fit: 27 layers in f32; all 32 layers with dtype {', '.join(GENERATED_FORMATS[1:])}"
    )


def test_what_fits_is_true(monkeypatch):
    spec = synthetic.resolve()
    for n_layers, fits in ((27, True), (28, False)):
        n_bytes = sum(synthetic.plan_parts(synthetic.resolve(n_layers=n_layers), 256).values())
        assert (n_bytes <= 24 * 10**9) is fits
    monkeypatch.setattr(memory, "available_bytes", lambda: 1000)
    with pytest.raises(NotEnoughMemoryError, match=r"what would fit: smaller sizes$"):
        synthetic.check_memory(spec, 256)


def test_closed_model_stops_generating(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda: None)
    model = load_fast_fp32(hidden_size=1024, n_heads=8, n_layers=200, intermediate_size=4096, n_ctx=16)
    model.close()
    assert model.materialise_s is None
    with pytest.raises(WoollyError, match=r"^the model was closed before its weights were generated$"):
        model.wait_ready()


def test_failure_in_the_background_is_told():
    def fail():
        raise MemoryError("no room")

    for waits in ("wait", "wait_recorded"):
        materialisation = Materialisation(fail, lambda: False)
        with pytest.raises(WoollyError, match=r"^generating the weights failed, MemoryError: no room$"):
            getattr(materialisation, waits)()
        assert materialisation.seconds is None


def test_first_step_waits_for_the_weights():
    release, order = threading.Event(), []

    def fill_next():
        release.wait()
        order.append("filled")
        return False

    materialisation = Materialisation(lambda: None, fill_next)
    materialisation.wait_recorded()
    assert materialisation.seconds is None
    release.set()
    materialisation.wait()
    assert order == ["filled"]
    assert materialisation.seconds > 0


def test_load_without_a_model(monkeypatch):
    for setting in synthetic.SETTINGS:
        if setting.name in SMALL:
            monkeypatch.setenv(setting.variable, str(SMALL[setting.name]))
    monkeypatch.setenv("WOOLLY_FAST_FP32", "1")
    with woolly.load(n_ctx=32) as model:
        assert (model.is_generated, model.n_ctx, model.config.n_layers) == (True, 32, 2)


# --- the command ---


def test_run_says_that_it_is_noise(capsys):
    assert cli.main(["run", "--fast-fp32", *SMALL_OPTIONS, "--prompt", "Hello world", "-n", "4", "--timing"]) == 0
    said = capsys.readouterr()
    assert said.out.strip()
    assert said.err.count("noise") == 1
    assert " · init 0." in said.err
    assert " · weights 0." in said.err


def test_run_as_json(capsys):
    assert (
        cli.main(["run", "--fast-fp32", *SMALL_OPTIONS, "--dtype", "q8_0", "--prompt", "test", "-n", "4", "--json"])
        == 0
    )
    record = json.loads(capsys.readouterr().out)
    assert record["model"] == "generated-64x2-q8_0"
    assert record["completion_tokens"] == 4
    assert 0 < record["timing"]["init_s"] < 1
    assert record["timing"]["materialise_s"] > 0


def test_dry_run(capsys):
    assert cli.main(["run", "--fast-fp32", *SMALL_OPTIONS, "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["memory"]["weights_bytes"] == synthetic.resolve(**SMALL).weights_bytes


def test_run_by_variable(monkeypatch, capsys):
    monkeypatch.setenv("WOOLLY_FAST_FP32", "1")
    for setting in synthetic.SETTINGS:
        if setting.name in SMALL:
            monkeypatch.setenv(setting.variable, str(SMALL[setting.name]))
    assert cli.main(["run", "--prompt", "x", "-n", "2"]) == 0
    assert "noise" in capsys.readouterr().err


def test_refusals_of_the_command(capsys, monkeypatch):
    for options, message in (
        (["smollm2", "--fast-fp32"], "--fast-fp32 does not go with a MODEL"),
        (["smollm2", "--layers", "2"], "go with --fast-fp32"),
    ):
        with pytest.raises(SystemExit) as caught:
            cli.main(["run", *options, "--prompt", "x"])
        assert caught.value.code == 2
        assert message in capsys.readouterr().err
    assert cli.main(["run", "--fast-fp32", "--heads", "7", "--prompt", "x"]) == 1
    assert "n_heads: expected a divisor of hidden_size 4096, got 7" in capsys.readouterr().err
    monkeypatch.setattr(memory, "available_bytes", lambda: 10**9)
    assert cli.main(["run", "--fast-fp32", "--prompt", "x"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "needs 28.1 GB" in error


def test_smallest_vocabulary():
    with small(vocab_size=MIN_VOCAB_SIZE) as model:
        assert model.forward([0]).shape == (1, MIN_VOCAB_SIZE)
