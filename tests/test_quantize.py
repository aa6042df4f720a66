"""Quantised rows: against gguf where it quantises, against what a simple quantiser leaves, and at the edges."""

from __future__ import annotations

import threading

import gguf
import numpy as np
import pytest
import strategies as sts
from hypothesis import given
from hypothesis import strategies as st

from woolly._kernels import QUANTIZED_FORMATS, PackedMatrix, available_isas, generate, quantize_rows, use_isa
from woolly.errors import UnsupportedFormatError, WoollyError
from woolly.formats import FORMATS

EXACT = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "mxfp4")  # formats that gguf quantises too
SEARCHED = ("q6_k", "q5_k", "q4_k", "q3_k", "q2_k", "iq4_nl", "iq4_xs")
FALLBACKS = ("q5_1 searched", "q5_0 searched")  # in mixes of the K formats, where rows are no whole number of blocks
WAYS = (*QUANTIZED_FORMATS, *FALLBACKS)

# Relative root mean square error on normal weights, which are a little harder than a model's
ERRORS = {
    "q8_0": 0.0054,
    "q6_k": 0.0180,
    "q5_k": 0.0356,
    "q5_1": 0.0385,
    "q5_0": 0.0435,
    "q5_1 searched": 0.0350,
    "q5_0 searched": 0.0415,
    "q4_k": 0.0715,
    "iq4_nl": 0.0770,
    "iq4_xs": 0.0775,
    "q4_1": 0.0795,
    "q4_0": 0.0875,
    "mxfp4": 0.1155,
    "q3_k": 0.1550,
    "q2_k": 0.2850,
}


def quantized(x: np.ndarray, way: str, *, n_threads: int | None = None) -> np.ndarray:
    """Blocks of a format, "q5_0", or of one that is searched for where it need not be, "q5_0 searched"."""
    name, _, searched = way.partition(" ")
    return quantize_rows(x, name, searched=bool(searched), n_threads=n_threads)


def dequantized(blocks: np.ndarray, way: str) -> np.ndarray:
    return gguf.quants.dequantize(blocks, sts.ggml_type_of(way.split()[0])).reshape(len(blocks), -1)


def error_of(x: np.ndarray, name: str, blocks: np.ndarray | None = None) -> float:
    """Relative root mean square error."""
    blocks = quantized(x, name) if blocks is None else blocks
    return float(np.sqrt(np.mean((dequantized(blocks, name) - x) ** 2) / np.mean(x**2)))


def normal(n_rows: int, n_cols: int, *, seed: int = 0, scale: float = 0.02) -> np.ndarray:
    return (scale * np.random.default_rng(seed).standard_normal((n_rows, n_cols))).astype(np.float32)


@pytest.mark.parametrize("name", EXACT)
@given(data=st.data())
def test_equal_to_gguf_bit_for_bit(name, data):
    block_size = FORMATS[name].block_size
    n_rows, n_blocks = data.draw(sts.sizes(20, min_size=1)), data.draw(sts.sizes(35, min_size=1))
    x = data.draw(sts.float_arrays((n_rows, n_blocks * block_size), max_exponent=1))
    stored = gguf.quants.quantize(x, sts.ggml_type_of(name)).view(np.uint8).reshape(n_rows, -1)
    np.testing.assert_array_equal(quantize_rows(x, name), stored)


@pytest.mark.parametrize("name", ["q8_0", "q5_0", "q4_1", "q4_0"])
def test_equal_to_the_generators_quantisers(name):
    options = {"seed": 3, "tensor": 5, "bound": 0.05}
    x = generate(PackedMatrix(19, 320, "f32"), **options).unpack().view(np.float32)
    np.testing.assert_array_equal(quantize_rows(x, name), generate(PackedMatrix(19, 320, name), **options).unpack())


@pytest.mark.parametrize("way", SEARCHED + FALLBACKS)
@given(data=st.data())
def test_no_error_passes_a_step(way, data):
    """Each weight lies within a step of the coarsest sub-block: the range of its block over its levels."""
    x = data.draw(sts.float_arrays((data.draw(sts.sizes(5, min_size=1)), 512), max_exponent=1))
    levels = {"q6": 63, "q5": 31, "q4": 15, "q3": 7, "q2": 3, "iq": 15}[way[:2]]
    values = dequantized(quantized(x, way), way)
    most = np.abs(x).reshape(len(x), -1, 256).max(axis=2, keepdims=True)
    errors = np.abs(values - x).reshape(len(x), -1, 256)
    assert (errors <= 1e-30 + 2.5 * most * (1 / levels + 2**-7)).all()


@pytest.mark.parametrize("name", ERRORS)
def test_error_on_normal_weights(name):
    assert error_of(normal(64, 2048), name) < ERRORS[name]


def test_more_bits_leave_less_error():
    x = normal(64, 2048, seed=1) * np.exp(np.random.default_rng(2).standard_normal((64, 1))).astype(np.float32)
    errors = {name: error_of(x, name) for name in SEARCHED}
    assert errors["q2_k"] > errors["q3_k"] > errors["iq4_xs"] > errors["q4_k"] > errors["q5_k"] > errors["q6_k"]
    assert errors["iq4_xs"] > errors["iq4_nl"]


def test_fallbacks_of_a_mix_are_searched_for():
    """Less squared error than rounding leaves, also where a block's weights have one sign or an outlier."""
    x = normal(64, 2048, seed=9)
    outliers = np.where(np.arange(2048) % 32 == 5, 5 * x, x)
    for name, share in (("q5_0", 0.93), ("q5_1", 0.84)):
        assert error_of(x, f"{name} searched") ** 2 < share * error_of(x, name) ** 2
        for weights in (np.abs(x), outliers, x + 1, x - 1):
            assert error_of(weights, f"{name} searched") ** 2 < 0.97 * error_of(weights, name) ** 2
    for name in set(QUANTIZED_FORMATS) - {"q5_0", "q5_1"}:
        np.testing.assert_array_equal(quantize_rows(x, name, searched=True), quantize_rows(x, name))


@pytest.mark.parametrize("name", ["q6_k", "q4_k"])
def test_searched_is_better_than_plain(name):
    options = {"seed": 3, "tensor": 5, "bound": 0.05}
    x = generate(PackedMatrix(64, 1024, "f32"), **options).unpack().view(np.float32)
    plain = generate(PackedMatrix(64, 1024, name), **options).unpack()
    assert error_of(x, name) < error_of(x, name, plain)


@pytest.mark.parametrize("way", WAYS)
def test_same_bits_for_all_threads_and_isas(way):
    x = normal(33, 2048, seed=4)
    stored = set()
    for isa in available_isas():
        with use_isa(isa):
            stored |= {quantized(x, way, n_threads=n).tobytes() for n in (1, 2, 5)}
    assert len(stored) == 1


@pytest.mark.parametrize("way", WAYS)
def test_a_block_depends_on_its_weights_alone(way):
    x = normal(7, 768, seed=5)
    whole = quantized(x, way)
    for row in range(7):
        np.testing.assert_array_equal(quantized(x[row : row + 1], way), whole[row : row + 1])


@pytest.mark.parametrize("way", WAYS)
def test_zeros_are_zeros(way):
    assert not dequantized(quantized(np.zeros((3, 512), np.float32), way), way).any()


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize("value", [0.37, -0.37])
def test_constants_stay_close(name, value):
    values = dequantized(quantized(np.full((2, 512), value, np.float32), name), name)
    assert np.abs(values - value).max() <= abs(value) * (0.2 if name == "mxfp4" else 0.01)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e-20, 1e-7, 1e-4, 1.0, 6e4])
def test_any_magnitude_gives_finite_values(way, size):
    x = np.clip(normal(4, 512, seed=6, scale=1) / 5, -1, 1).astype(np.float32) * np.float32(size)
    x[0, :300] = 0
    values = dequantized(quantized(x, way), way)
    assert np.isfinite(values).all()
    assert np.abs(values).max() <= 1.5 * np.abs(x).max() + 1e-7


@pytest.mark.parametrize("way", WAYS)
def test_what_a_format_does_not_hold_is_refused(way):
    for value, text in ((np.nan, "nan"), (np.inf, "inf"), (-np.inf, "-inf")):
        x = normal(40, 1024)
        x[31, 5] = x[31, 700] = value
        with pytest.raises(
            ValueError, match=rf"^weight {text} in row 31, column 5: {way.split()[0]} holds numbers up to"
        ):
            quantized(x, way, n_threads=2)


def test_too_large_weights_are_refused():
    x = np.full((1, 256), 65536, np.float32)
    with pytest.raises(ValueError, match=r"^weight 65536 in row 0, column 0: q4_k holds numbers up to 65504$"):
        quantize_rows(x, "q4_k")
    np.testing.assert_array_equal(quantize_rows(x, "bf16"), np.full((1, 256), 0x4780, np.uint16).view(np.uint8))


def test_wrong_arguments_are_refused():
    with pytest.raises(UnsupportedFormatError, match=r"^quantize_rows: cannot make 'iq2_xs'; formats that can be: f32"):
        quantize_rows(np.zeros((1, 256), np.float32), "iq2_xs")
    with pytest.raises(ValueError, match=r"^quantize_rows: q4_k wants a multiple of 256 columns, got 288$"):
        quantize_rows(np.zeros((1, 288), np.float32), "q4_k")
    with pytest.raises(WoollyError, match="n_threads"):
        quantize_rows(np.zeros((1, 256), np.float32), "q4_k", n_threads=0)
    for wrong in (np.zeros((2, 64)), np.zeros(64, np.float32), np.zeros((2, 128), np.float32)[:, ::2]):
        with pytest.raises(ValueError, match=r"[Bb]uffer|contiguous"):
            quantize_rows(wrong, "q8_0")
    with pytest.raises(TypeError):
        quantize_rows(None, "q8_0")


@pytest.mark.parametrize("shape", [(0, 256), (3, 0), (0, 0)])
def test_nothing_gives_nothing(shape):
    assert quantize_rows(np.zeros(shape, np.float32), "q4_k").shape == (shape[0], shape[1] // 256 * 144)


@pytest.mark.parametrize("name", QUANTIZED_FORMATS)
def test_sizes_are_those_of_the_registry(name):
    expected = FORMATS[name]
    assert quantize_rows(np.zeros((2, 512), np.float32), name).shape == (2, expected.nbytes(512))


def test_two_python_threads_at_once():
    x, results = normal(64, 1024), {}
    expected = quantize_rows(x, "q4_k").tobytes()

    def work(i: int) -> None:
        results[i] = quantize_rows(x, "q4_k", n_threads=2).tobytes()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {0: expected, 1: expected}


def test_llama_cpp_reads_as_much_from_our_blocks():
    """Our blocks leave less error than those of ggml's own quantiser, where it can be called."""
    xllamacpp = pytest.importorskip("xllamacpp", reason="xllamacpp is not installed")
    import ctypes

    library = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
    x = normal(32, 2048, seed=8)
    for way in SEARCHED + FALLBACKS:
        name = way.split()[0]
        try:
            quantize = getattr(library, "quantize_" + name.replace("_k", "_K"))
        except AttributeError:
            pytest.skip("this build of xllamacpp does not export ggml's quantisers")
        quantize.restype = ctypes.c_size_t
        quantize.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p]
        theirs = np.empty((32, FORMATS[name].nbytes(2048)), np.uint8)
        assert quantize(x.ctypes.data, theirs.ctypes.data, 32, 2048, None) == theirs.nbytes
        assert error_of(x, way) < error_of(x, way, theirs), way
