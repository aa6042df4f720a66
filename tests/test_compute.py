"""The ways to compute that round: int8, whose kernels test_matmul.py tests, and bf16.

In bf16 weights and activations are rounded by whichever dot unit the machine has. The bound follows from the roundings:
a bf16 has 8 bits, so each factor is off by at most 2^-8 of itself. What is left is float32: a weight's dequantisation,
whose offset of 256 scales and a minimum is rounded once, and a chain of k sums.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import oracle_models
import pytest
import reference
import strategies as sts

import woolly
from woolly import cli
from woolly._kernels import (
    BF16_LEAST_TOKENS,
    COMPUTES,
    PackedMatrix,
    active_isa,
    available_isas,
    bf16_unit,
    check_compute,
    matmul,
    use_isa,
)
from woolly.errors import UnsupportedISAError, WoollyError

ROUND_BF16, ROUND_F32 = 2.0**-8, 2.0**-24
SHAPES = [(1, 8, 1), (15, 9, 2), (40, 17, 3), (33, 33, 23), (100, 70, 5)]  # rows, tokens, multiples of 32 along k
PROMPT = [5 + i % 200 for i in range(70)]


def isas_with_unit() -> list[str]:
    """Instruction sets of the machine beside which there is a BF16 dot unit."""
    found = []
    for name in available_isas():
        with use_isa(name):
            found += [name] if bf16_unit() else []
    return found


@pytest.fixture(params=["avx512", "avx512_amx"])
def unit_isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of an active instruction set with a BF16 dot unit."""
    if request.param not in isas_with_unit():
        pytest.skip(f"no BF16 dot unit beside {request.param} on this machine")
    with use_isa(request.param):
        yield request.param


@pytest.fixture
def any_unit() -> Iterator[str]:
    """The best instruction set with a BF16 dot unit, active."""
    if not isas_with_unit():
        pytest.skip("this machine has no BF16 dot unit")
    with use_isa(isas_with_unit()[-1]):
        yield isas_with_unit()[-1]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return oracle_models.write_tiny("llama", tmp_path_factory.mktemp("bf16") / "tiny.gguf", dtype="q4_0")


def random_case(name: str, n_rows: int, n_tokens: int, n_32: int) -> tuple[PackedMatrix, np.ndarray, np.ndarray]:
    """A packed matrix, its weights, and activations, of n_32 blocks of 32 along k or as few more as the format can."""
    block_size = sts.block_shape(name)[0]
    n_blocks = -(-n_32 * 32 // block_size) if block_size > 1 else n_32 * 32 - 5
    raw = sts.random_raw(n_rows * 1000 + n_32, name, n_rows, n_blocks)
    w = PackedMatrix(n_rows, n_blocks * block_size, name).pack(raw)
    return w, reference.dequantize(raw, name).astype(np.float64), sts.random_floats(7, (n_tokens, w.n_cols))


@pytest.mark.parametrize("name", sts.FORMATS)
def test_matmul_is_within_the_bound_of_rounding_to_bf16(name: str, unit_isa: str) -> None:
    for n_rows, n_tokens, n_32 in SHAPES:
        packed, w, x = random_case(name, n_rows, n_tokens, n_32)
        size = reference.matmul(np.abs(w), np.abs(x))
        largest = np.abs(w).max(axis=1, initial=0)[None, :] * np.abs(x).sum(axis=1)[:, None]
        bound = (2.02 * ROUND_BF16 + 2 * packed.n_cols * ROUND_F32) * size + 2048 * ROUND_F32 * largest
        error = np.abs(matmul(packed, x, compute="bf16") - reference.matmul(w, x))
        assert (error <= bound + 2.0**-110).all(), f"{name} {n_rows} × {packed.n_cols} × {n_tokens}: {error.max():g}"


@pytest.mark.parametrize("name", ["f32", "bf16", "q4_0", "q6_k"])
def test_a_column_is_the_same_bits_whatever_threads_and_other_columns(name: str, unit_isa: str) -> None:
    packed, _, x = random_case(name, 90, 300, 23)
    expected = matmul(packed, x, compute="bf16", n_threads=1)
    assert np.array_equal(matmul(packed, x, compute="bf16", n_threads=3), expected)
    for n in (BF16_LEAST_TOKENS, 17, 40):
        part = matmul(packed, np.ascontiguousarray(x[100 : 100 + n]), compute="bf16")
        assert np.array_equal(part, expected[100 : 100 + n])


def test_small_integers_are_exact(unit_isa: str) -> None:
    """Numbers that bf16 holds, and sums below 2^24: nothing is rounded, so columns and rows are all in their places."""
    rng = np.random.default_rng(0)
    w = rng.integers(-100, 100, (70, 1355)).astype(np.float32)
    x = rng.integers(-9, 9, (45, 1355)).astype(np.float32)
    packed = PackedMatrix(70, 1355, "f32").pack(w.view(np.uint8))
    assert np.array_equal(matmul(packed, x, compute="bf16"), x @ w.T)


def test_few_tokens_are_exact(any_unit: str) -> None:
    packed, _, x = random_case("q4_0", 40, BF16_LEAST_TOKENS - 1, 4)
    assert np.array_equal(matmul(packed, x, compute="bf16"), matmul(packed, x))


@pytest.mark.parametrize("arch", ["llama", "gemma3", "gpt-oss", "qwen3moe"])
@pytest.mark.parametrize("dtype", ["q8_0", "f32"])
def test_logits_are_close_to_the_exact_ones(arch: str, dtype: str, any_unit: str, tmp_path: Path) -> None:
    path = oracle_models.write_tiny(arch, tmp_path / "tiny.gguf", dtype=dtype)
    exact = woolly.load_gguf(path, n_threads=1).forward(PROMPT)
    rounded = woolly.load_gguf(path, n_threads=2, compute="bf16").forward(PROMPT)
    assert not np.array_equal(exact, rounded)
    assert np.abs(exact - rounded).max() < 0.05 * np.abs(exact).max()


def test_logits_are_the_same_bits_whatever_threads_and_long_chunks(tiny: Path, any_unit: str) -> None:
    model = woolly.load_gguf(tiny, n_threads=1, compute="bf16")
    expected = model.forward(PROMPT)
    assert np.array_equal(woolly.load_gguf(tiny, n_threads=3, compute="bf16").forward(PROMPT), expected)
    for chunk in (8, 14, 35):  # 70 tokens leave no chunk with fewer than 6, or those are left out
        engine = model.engine
        (found,) = engine.step([(engine.new_sequence(), PROMPT)], logits="all", chunk=chunk)
        n = len(PROMPT) - (len(PROMPT) % chunk if len(PROMPT) % chunk < BF16_LEAST_TOKENS else 0)
        assert np.array_equal(found[:n], expected[:n])


def test_decoding_is_exact_after_the_same_cache(tiny: Path, any_unit: str) -> None:
    exact, rounded = (woolly.load_gguf(tiny, compute=compute) for compute in ("exact", "bf16"))
    first = BF16_LEAST_TOKENS - 1
    assert np.array_equal(rounded.forward(PROMPT[:first]), exact.forward(PROMPT[:first]))


def test_the_mode_is_told(tiny: Path, any_unit: str) -> None:
    with woolly.load_gguf(tiny, compute="bf16") as model:
        assert (model.compute, model.base_timing.compute) == ("bf16", "bf16")
        assert repr(model).endswith(", compute bf16>")
    with woolly.load_gguf(tiny) as model:
        assert model.compute == "exact"
        assert "compute" not in repr(model)


def test_command_takes_the_mode(tiny: Path, any_unit: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", str(tiny), "--compute", "bf16", "--prompt", "abc", "-n", "2", "--json"]) == 0
    assert '"compute": "bf16"' in capsys.readouterr().out


def test_generated_weights_take_the_mode(any_unit: str) -> None:
    sizes = {"vocab_size": 260, "hidden_size": 64, "n_layers": 1, "n_heads": 2, "intermediate_size": 96, "n_ctx": 64}
    exact, rounded = (woolly.load_fast_fp32(**sizes, compute=compute) for compute in ("exact", "bf16"))
    exact, rounded = (model.forward(PROMPT[:20]) for model in (exact, rounded))
    assert 0 < np.abs(exact - rounded).max() < 0.05 * np.abs(exact).max()


def test_a_machine_without_a_unit_is_refused(tiny: Path) -> None:
    message = r'compute="bf16" needs AMX-BF16 or AVX512_BF16.*the active ISA is scalar'
    packed, _, x = random_case("q4_0", 16, 9, 1)
    with use_isa("scalar"):
        assert bf16_unit() is None
        with pytest.raises(UnsupportedISAError, match=message):
            woolly.load_gguf(tiny, compute="bf16")
        with pytest.raises(UnsupportedISAError, match=message):
            matmul(packed, x, compute="bf16")


def test_a_model_whose_unit_went_away_is_refused(tiny: Path, any_unit: str) -> None:
    model = woolly.load_gguf(tiny, compute="bf16")
    with use_isa("scalar"), pytest.raises(UnsupportedISAError, match="the active ISA is scalar"):
        model.forward(PROMPT)


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_int8_is_told_and_close(arch: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = oracle_models.write_tiny(arch, tmp_path / "tiny.gguf", dtype="q8_0")
    exact, rounded = (woolly.load_gguf(path, compute=compute) for compute in ("exact", "int8"))
    assert (rounded.compute, rounded.base_timing.compute) == ("int8", "int8")
    assert repr(rounded).endswith(", compute int8>")
    exact, rounded = (model.forward(PROMPT) for model in (exact, rounded))
    assert 0 < np.abs(exact - rounded).max() < 0.05 * np.abs(exact).max()
    assert cli.main(["run", str(path), "--compute", "int8", "--prompt", "abc", "-n", "2", "--timing"]) == 0
    assert f"{active_isa()}, int8" in capsys.readouterr().err


def test_int8_changes_nothing_where_weights_are_floats(tmp_path: Path) -> None:
    path = oracle_models.write_tiny("llama", tmp_path / "tiny.gguf", dtype="f32")
    exact, rounded = (woolly.load_gguf(path, compute=compute).forward(PROMPT) for compute in ("exact", "int8"))
    assert np.array_equal(exact, rounded)


def test_commands_take_every_way() -> None:
    assert cli.COMPUTES == COMPUTES


def test_unknown_compute_is_refused(tiny: Path) -> None:
    with pytest.raises(WoollyError, match=r"^compute: expected one of exact, int8, bf16, got 'fp8'$"):
        woolly.load_gguf(tiny, compute="fp8")
    check_compute("exact")
