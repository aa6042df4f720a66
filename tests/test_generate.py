"""Generated weights: the generator against its definition, the quantisers against gguf, the same bits everywhere."""

from __future__ import annotations

import sys

import gguf
import numpy as np
import pytest
import strategies as sts
from hypothesis import given

from woolly._kernels import GENERATED_FORMATS, PackedMatrix, available_isas, generate, kernel_formats, use_isa
from woolly.errors import UnsupportedFormatError, WoollyError

EXACT = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "mxfp4")  # formats that gguf quantises too


def philox(counter: tuple[int, int, int, int], key: tuple[int, int], n_rounds: int = 7) -> list[int]:
    """Philox4x32, word by word."""
    a, b, c, d = counter
    k0, k1 = key
    for _ in range(n_rounds):
        p, q = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = q >> 32 ^ b ^ k0, q & 0xFFFFFFFF, p >> 32 ^ d ^ k1, p & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return [a, b, c, d]


def expected_weights(n_rows: int, n_cols: int, *, seed: int, tensor: int, bound: float) -> np.ndarray:
    """The definition, in Python integers and one float32 product each."""
    scale, out = np.float32(bound / 2**24), np.empty((n_rows, n_cols), np.float32)
    for row in range(n_rows):
        for col in range(n_cols):
            counter = (col // 4, row, tensor & 0xFFFFFFFF, tensor >> 32)
            word = philox(counter, (seed & 0xFFFFFFFF, seed >> 32))[col % 4]
            signed = word - (word >> 31 << 32)
            out[row, col] = np.float32(signed >> 7 | 1) * scale
    return out


def weights(n_rows, n_cols, dtype="f32", *, seed=42, tensor=7, bound=0.5, n_threads=None) -> np.ndarray:
    """Generated rows as GGUF has them; float32 for f32."""
    matrix = generate(PackedMatrix(n_rows, n_cols, dtype), seed=seed, tensor=tensor, bound=bound, n_threads=n_threads)
    return matrix.unpack().view(np.float32) if dtype == "f32" else matrix.unpack()


def test_known_answers_of_the_reference():
    """From the known-answer file of Random123, for 7 and 10 rounds."""
    assert philox((0, 0, 0, 0), (0, 0), 10) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox((0, 0, 0, 0), (0, 0), 7) == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]


@pytest.mark.parametrize(("n_rows", "n_cols"), [(1, 1), (5, 3), (16, 4), (17, 9), (33, 6)])
def test_weights_equal_their_definition(isa, n_rows, n_cols):
    options = {"seed": 2**63 + 5, "tensor": 2**40 + 3, "bound": 0.37}
    np.testing.assert_array_equal(weights(n_rows, n_cols, **options), expected_weights(n_rows, n_cols, **options))


@given(sts.sizes(70, min_size=1), sts.sizes(70, min_size=1), sts.seeds, sts.n_threads)
def test_weight_depends_on_its_place_alone(n_rows, n_cols, seed, n_threads):
    whole = weights(80, 80, seed=seed, n_threads=1)
    part = weights(n_rows, n_cols, seed=seed, n_threads=n_threads)
    np.testing.assert_array_equal(part, whole[:n_rows, :n_cols])


@pytest.mark.parametrize("dtype", GENERATED_FORMATS)
def test_same_bits_for_all_threads_and_isas(dtype):
    packed = set()
    for isa in available_isas():
        with use_isa(isa):
            for n_threads in (1, 2, 5):
                matrix = generate(PackedMatrix(70, 512, dtype), seed=1, tensor=2, bound=0.02, n_threads=n_threads)
                packed.add(matrix.data.tobytes())
    assert len(packed) == 1


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("bound", [1.0, 0.013, 1e-4])
def test_quantised_weights_are_ggufs_bit_for_bit(isa, dtype, bound):
    stored = gguf.quants.quantize(weights(35, 320, bound=bound), gguf.GGMLQuantizationType[dtype.upper()])
    got = weights(35, 320, dtype, bound=bound)
    np.testing.assert_array_equal(got.view(np.uint8).reshape(35, -1), stored.view(np.uint8).reshape(35, -1))


@pytest.mark.parametrize(("dtype", "steps"), [("q6_k", 62), ("q4_k", 15)])
@pytest.mark.parametrize("bound", [1.0, 0.013])
def test_k_quants_are_within_half_a_step(isa, dtype, steps, bound):
    """And as much again for the scales, which have few bits themselves."""
    exact = weights(35, 512, bound=bound)
    stored = weights(35, 512, dtype, bound=bound)
    values = gguf.quants.dequantize(stored, gguf.GGMLQuantizationType[dtype.upper()])
    assert np.abs(values - exact).max() <= 2 * bound / steps
    assert values.std() == pytest.approx(exact.std(), rel=0.02)


def test_rows_of_padding_are_zero():
    matrix = generate(PackedMatrix(3, 8, "f32"), seed=1, tensor=1, bound=1.0)
    lanes = matrix.data.view(np.float32).reshape(8, 16)
    assert not lanes[:, 3:].any()
    assert lanes[:, :3].all()


def test_uniform_and_symmetric():
    n, bound = 1000, 0.25
    values = weights(n, n, bound=bound).astype(np.float64)
    assert np.abs(values).max() <= bound
    assert np.abs(values).max() > 0.99999 * bound
    # standard errors of the mean, variance and lag-one covariance of n^2 uniform numbers, times five
    variance = bound**2 / 3
    assert abs(values.mean()) < 5 * np.sqrt(variance) / n
    assert abs(values.var() - variance) < 5 * bound**2 * np.sqrt(4 / 45) / n
    for a, b in ((values[:, 1:], values[:, :-1]), (values[1:], values[:-1])):
        assert abs((a * b).mean()) < 5 * variance / n
    counts, _ = np.histogram(values, bins=100, range=(-bound, bound))
    assert ((counts - n * n / 100) ** 2 / (n * n / 100)).sum() < 170  # chi-squared, 99 degrees: 1 in 10,000


@pytest.mark.parametrize("change", [{"seed": 43}, {"tensor": 8}, {"seed": 42 + 2**32}, {"tensor": 7 + 2**32}])
def test_seeds_and_tensors_are_independent(change):
    a, b = weights(200, 200), weights(200, 200, **change)
    assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 5 / 200


@pytest.mark.parametrize("dtype", GENERATED_FORMATS)
def test_every_generated_format_has_kernels(dtype):
    assert dtype in kernel_formats()


def test_wrong_arguments_are_refused():
    matrix = PackedMatrix(4, 4, "f32")
    with pytest.raises(ValueError, match=r"^generate: seed must be in \[0, 2\^64\), got -1$"):
        generate(matrix, seed=-1, tensor=0, bound=1.0)
    with pytest.raises(ValueError, match=r"^generate: tensor must be in \[0, 2\^64\), got 18446744073709551616$"):
        generate(matrix, seed=0, tensor=2**64, bound=1.0)
    for bound in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"^generate: bound must be a positive number, got {bound}$"):
            generate(matrix, seed=0, tensor=0, bound=bound)
    with pytest.raises(WoollyError, match="n_threads"):
        generate(matrix, seed=0, tensor=0, bound=1.0, n_threads=0)
    with pytest.raises(TypeError):
        generate(None, seed=0, tensor=0, bound=1.0)


def test_format_that_cannot_be_made_is_refused(monkeypatch):
    module = sys.modules["woolly._kernels.generate"]  # the package's attribute of this name is the function
    monkeypatch.setattr(module, "GENERATED_FORMATS", ("f32",))
    with pytest.raises(UnsupportedFormatError, match=r"^generate: cannot make q8_0; formats that can be: f32$"):
        generate(PackedMatrix(4, 32, "q8_0"), seed=0, tensor=0, bound=1.0)


def test_reserved_matrix_keeps_its_address():
    matrix = PackedMatrix(4, 4, "f32").reserve()
    address = matrix.data.ctypes.data
    generate(matrix, seed=0, tensor=0, bound=1.0)
    assert matrix.data.ctypes.data == address
