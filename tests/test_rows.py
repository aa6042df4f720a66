"""Row kernels against their float64 references, within bounds that follow from their roundings.

u is the largest relative error of one float32 rounding. A sum over 16 lanes and a tree of four has n / 16 + 4 roundings
on every path; exp is within three ulp, 6 u. A factor of 1.01 covers products of the small terms.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import reference
import strategies as sts
from hypothesis import given
from hypothesis import strategies as st

from woolly._kernels import (
    activation_f32,
    available_isas,
    exp_f32,
    glu_f32,
    layernorm_f32,
    quantize_q8,
    quantize_q16,
    rmsnorm_f32,
    rope_f32,
    softcap_f32,
    softmax_f32,
    use_isa,
)

U = 2.0**-24
EXP_ULPS = 3
SUBNORMAL = 2.0**-149

matrices = sts.float_matrices(max_rows=20, max_cols=150)


def assert_within(actual: np.ndarray, expected: np.ndarray, bound: np.ndarray | float) -> None:
    """|actual - expected| <= bound, element by element; says by how much it is not."""
    assert actual.dtype == np.float32
    excess = np.abs(actual.astype(np.float64) - expected) - 1.01 * bound
    assert (excess <= 0).all(), f"off by {excess.max():g} more than the bound, first in place {(excess > 0).argmax()}"


def assert_same_bits(compute: Callable[[int], np.ndarray]) -> None:
    """compute(n_threads) gives the same bytes on every instruction set, with one thread and with more."""
    expected = compute(1).tobytes()
    for isa in available_isas():
        with use_isa(isa):
            assert all(compute(n_threads).tobytes() == expected for n_threads in (1, 3)), isa


def matrix(n_rows: int = 5, n_cols: int = 33, seed: int = 0) -> np.ndarray:
    return sts.random_floats(seed, (n_rows, n_cols))


# What every row kernel refuses: each is here as a function of a matrix, and of its out where it takes one

KERNELS: dict[str, Callable[..., np.ndarray]] = {
    "rmsnorm_f32": lambda x, **options: rmsnorm_f32(x, np.ones(33, np.float32), eps=1e-6, **options),
    "layernorm_f32": lambda x, **options: layernorm_f32(
        x, np.ones(33, np.float32), np.ones(33, np.float32), eps=1e-6, **options
    ),
    "activation_f32": lambda x, **options: activation_f32(x, activation="gelu_tanh", **options),
    "softcap_f32": lambda x, **options: softcap_f32(x, cap=3.0, **options),
    "glu_f32": lambda x, **options: glu_f32(x, matrix(), activation="silu", **options),
    "softmax_f32": lambda x, **options: softmax_f32(x, **options),
}

BAD_MATRICES = {
    "None": (None, TypeError, "must not be None"),
    "list": ([[1.0]], TypeError, "bytes-like object is required"),
    "float64": (np.zeros((5, 33)), ValueError, "Buffer dtype mismatch, expected 'const float' but got 'double'"),
    "int32": (np.zeros((5, 33), np.int32), ValueError, "Buffer dtype mismatch"),
    "big-endian": (np.zeros((5, 33), ">f4"), ValueError, "Big-endian buffer not supported|Buffer dtype mismatch"),
    "Fortran order": (np.asfortranarray(matrix()), ValueError, "not C-contiguous"),
    "strided": (matrix(5, 66)[:, ::2], ValueError, "not C-contiguous"),
    "a vector": (np.zeros(33, np.float32), ValueError, "wrong number of dimensions"),
}

BAD_OUTS = {
    "shape": (np.zeros((5, 32), np.float32), r"out must be a float32 array of shape \(5, 33\), got float32 \(5, 32\)"),
    "dtype": (np.zeros((5, 33)), r"out must be a float32 array of shape \(5, 33\), got float64 \(5, 33\)"),
    "list": ([[0.0]], r"out must be a float32 array of shape \(5, 33\), got list"),
    "order": (np.zeros((33, 5), np.float32).T, "out must be C-contiguous and writable"),
    "read-only": (np.broadcast_to(np.float32(0), (5, 33)), "out must be C-contiguous and writable"),
}


@pytest.mark.parametrize("what", BAD_MATRICES)
@pytest.mark.parametrize("name", KERNELS)
def test_bad_input_is_refused(name: str, what: str) -> None:
    x, error, message = BAD_MATRICES[what]
    with pytest.raises(error, match=message):
        KERNELS[name](x)


@pytest.mark.parametrize("what", BAD_OUTS)
@pytest.mark.parametrize("name", KERNELS)
def test_bad_out_is_refused(name: str, what: str) -> None:
    out, message = BAD_OUTS[what]
    with pytest.raises(ValueError, match=f"{name}: {message}"):
        KERNELS[name](matrix(), out=out)


@pytest.mark.parametrize("name", KERNELS)
def test_out_is_used_and_may_be_the_input(isa: str, name: str) -> None:
    expected, out, x = KERNELS[name](matrix()), np.full((5, 33), np.nan, np.float32), matrix()
    assert KERNELS[name](x, out=out) is out
    assert KERNELS[name](x, out=x) is x
    assert out.tobytes() == x.tobytes() == expected.tobytes()


@pytest.mark.parametrize("name", KERNELS)
def test_unknown_options_and_thread_counts_are_refused(name: str) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'copy'"):
        KERNELS[name](matrix(), copy=True)
    with pytest.raises(Exception, match="n_threads: expected an integer of 1 to 256, got 0"):
        KERNELS[name](matrix(), n_threads=0)


@pytest.mark.parametrize("name", KERNELS)
def test_read_only_input_and_two_python_threads_at_once(name: str) -> None:
    x = matrix()
    x.flags.writeable = False
    expected = KERNELS[name](x).tobytes()
    with ThreadPoolExecutor(2) as pool:
        assert {out.tobytes() for out in pool.map(lambda _: KERNELS[name](x, n_threads=2), range(40))} == {expected}


# RMSNorm


@given(matrices, st.sampled_from([0.0, 1e-6, 1e-2]))
def test_rmsnorm(isa: str, x: np.ndarray, eps: float) -> None:
    x = x[(x != 0).any(axis=1)]
    weight = sts.random_floats(1, (x.shape[1],))
    expected = reference.rmsnorm(x, weight, eps=np.float32(eps))
    # half the sum's error, the division by n and eps; then a root, a quotient and two products
    bound = ((x.shape[1] / 16 + 6) / 2 + 4) * U * np.abs(expected) + SUBNORMAL
    assert_within(rmsnorm_f32(x, weight, eps=eps), expected, bound)


@given(matrices)
def test_rmsnorm_same_bits(x: np.ndarray) -> None:
    weight = sts.random_floats(1, (x.shape[1],))
    assert_same_bits(lambda n_threads: rmsnorm_f32(x, weight, eps=1e-5, n_threads=n_threads))


def test_rmsnorm_of_zeros_is_zero(isa: str) -> None:
    assert not rmsnorm_f32(np.zeros((2, 20), np.float32), np.ones(20, np.float32), eps=1e-6).any()


def test_rmsnorm_refuses_weights_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="rmsnorm_f32: x has 33 columns, weight has 32"):
        rmsnorm_f32(matrix(), np.ones(32, np.float32), eps=1e-6)
    with pytest.raises(TypeError, match="'weight' must not be None"):
        rmsnorm_f32(matrix(), None, eps=1e-6)
    with pytest.raises(TypeError, match="eps"):
        rmsnorm_f32(matrix(), np.ones(33, np.float32))


# LayerNorm


@given(matrices, st.sampled_from([1e-6, 1e-2]))
def test_layernorm(isa: str, x: np.ndarray, eps: float) -> None:
    n = x.shape[1]
    weight, bias = sts.random_floats(1, (n,)), sts.random_floats(2, (n,))
    expected = reference.layernorm(x, weight, bias, eps=np.float32(eps))
    wide = x.astype(np.float64)
    centred = wide - wide.mean(axis=1, keepdims=True)
    inverse = 1 / np.sqrt((centred**2).mean(axis=1, keepdims=True) + eps)
    # the mean's sum and division, and the difference; they move the variance by twice their share of its root
    shift = U * ((n / 16 + 6) * np.abs(wide).mean(axis=1, keepdims=True) + np.abs(centred).max(axis=1, keepdims=True))
    scaled = np.abs(weight * centred * inverse)
    relative = ((n / 16 + 8) / 2 + 4) * U + inverse * shift * (1 + inverse * shift)
    bound = np.abs(weight) * inverse * shift + scaled * relative + U * np.abs(expected) + SUBNORMAL
    assert_within(layernorm_f32(x, weight, bias, eps=eps), expected, bound)


@given(matrices)
def test_layernorm_same_bits(x: np.ndarray) -> None:
    weight, bias = sts.random_floats(1, (x.shape[1],)), sts.random_floats(2, (x.shape[1],))
    assert_same_bits(lambda n_threads: layernorm_f32(x, weight, bias, eps=1e-5, n_threads=n_threads))


def test_layernorm_of_a_constant_is_the_bias(isa: str) -> None:
    bias = sts.random_floats(0, (20,))
    x = np.full((2, 20), 4.0, np.float32)
    assert layernorm_f32(x, np.ones(20, np.float32), bias, eps=1e-6).tobytes() == np.stack([bias, bias]).tobytes()


def test_layernorm_refuses_weights_that_do_not_fit() -> None:
    good, bad = np.ones(33, np.float32), np.ones(32, np.float32)
    with pytest.raises(ValueError, match="layernorm_f32: x has 33 columns, weight has 32, bias has 33"):
        layernorm_f32(matrix(), bad, good, eps=1e-6)
    with pytest.raises(ValueError, match="layernorm_f32: x has 33 columns, weight has 33, bias has 32"):
        layernorm_f32(matrix(), good, bad, eps=1e-6)
    for args, name in (((None, good), "weight"), ((good, None), "bias")):
        with pytest.raises(TypeError, match=f"'{name}' must not be None"):
            layernorm_f32(matrix(), *args, eps=1e-6)


# Activations without a gate, and soft caps

PLAIN = {"silu": reference.silu, "gelu_tanh": reference.gelu_tanh}


@pytest.mark.parametrize("activation", PLAIN)
@given(matrices)
def test_activation(isa: str, activation: str, x: np.ndarray) -> None:
    expected = PLAIN[activation](x)
    # as for glu_f32, without the product
    size = np.abs(x.astype(np.float64))
    exponent = np.minimum(1.6 * (size + 0.0447 * size**3), 90) if activation == "gelu_tanh" else 0
    bound = (9 + 6 * exponent) * U * np.abs(expected) + 1e-38 * (1 + size) + SUBNORMAL
    assert_within(activation_f32(x, activation=activation), expected, bound)


@pytest.mark.parametrize("activation", PLAIN)
@given(matrices)
def test_activation_same_bits(activation: str, x: np.ndarray) -> None:
    assert_same_bits(lambda n_threads: activation_f32(x, activation=activation, n_threads=n_threads))


def test_unknown_activations_are_refused() -> None:
    with pytest.raises(ValueError, match="activation_f32: unknown activation 'relu', known: silu, gelu_tanh"):
        activation_f32(matrix(), activation="relu")


@given(matrices, st.sampled_from([0.5, 3.0, 30.0]))
def test_softcap(isa: str, x: np.ndarray, cap: float) -> None:
    # 2 cap s - cap, s = 1 / (1 + e): e has 6 u of exp, and 2 u of an exponent that the sigmoid's slope keeps below 0.3;
    # two roundings more in s, which is at most 1, and one in the difference
    assert_within(softcap_f32(x, cap=cap), reference.softcap(x, cap), 2 * cap * (6 / 4 + 2 * 0.3 + 2 + 0.5) * U)


@given(matrices)
def test_softcap_same_bits(x: np.ndarray) -> None:
    assert_same_bits(lambda n_threads: softcap_f32(x, cap=5.0, n_threads=n_threads))


@pytest.mark.parametrize("cap", [0.0, -1.0, float("nan")])
def test_caps_that_are_not_above_zero_are_refused(cap: float) -> None:
    with pytest.raises(ValueError, match=f"softcap_f32: cap must be above zero, got {cap}"):
        softcap_f32(matrix(), cap=cap)


# Gated activations

ACTIVATIONS = {"silu": reference.swiglu, "gelu_tanh": reference.geglu, "swiglu_clamped": reference.swiglu_clamped}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@given(matrices, sts.seeds)
def test_glu(isa: str, activation: str, gate: np.ndarray, seed: int) -> None:
    up = sts.random_floats(seed, gate.shape)
    expected = ACTIVATIONS[activation](gate, up)
    # exp, 1 + exp, quotient, product; GELU's exponent comes from six roundings more, which exp makes relative to 1
    x = np.abs(gate.astype(np.float64))
    exponent = {"silu": 0, "gelu_tanh": 1.6 * (x + 0.0447 * x**3), "swiglu_clamped": 1.702 * x}[activation]
    exponent = np.minimum(exponent, 90)
    bound = (10 + 6 * exponent) * U * np.abs(expected)
    # exp stays at 2.2e38 above 88.3: beyond, a gate that should vanish leaves 1e-38 of itself
    assert_within(
        glu_f32(gate, up, activation=activation), expected, bound + 1e-38 * (1 + x * (1 + np.abs(up))) + SUBNORMAL
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
@given(matrices, sts.seeds)
def test_glu_same_bits(activation: str, gate: np.ndarray, seed: int) -> None:
    up = sts.random_floats(seed, gate.shape)
    assert_same_bits(lambda n_threads: glu_f32(gate, up, activation=activation, n_threads=n_threads))


def test_glu_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="glu_f32: unknown activation 'relu', known: silu, gelu_tanh, swiglu_clamped"):
        glu_f32(matrix(), matrix(), activation="relu")
    with pytest.raises(ValueError, match=r"glu_f32: gate is \(5, 33\), up is \(5, 34\)"):
        glu_f32(matrix(), matrix(5, 34), activation="silu")
    with pytest.raises(TypeError, match="'up' must not be None"):
        glu_f32(matrix(), None, activation="silu")


# exp


def test_exp_is_within_three_ulp_over_its_range(isa: str) -> None:
    x = np.linspace(-87.3, 88.3, 400_003).astype(np.float32)
    x = x[(x >= np.float32(-87.3)) & (x <= np.float32(88.3))]
    expected = np.exp(x.astype(np.float64))
    assert_within(exp_f32(x), expected, EXP_ULPS * np.spacing(expected.astype(np.float32)).astype(np.float64))


def test_exp_outside_its_range(isa: str) -> None:
    x = np.array([-np.inf, -1e30, -88, -87.31, 0, 89, 1e30, np.inf, np.nan], np.float32)
    y = exp_f32(x)
    assert y[:4].tolist() == [0, 0, 0, 0]
    assert y[4] == 1
    assert y[5] == y[6] == y[7]
    assert 2.1e38 < y[5] < 2.3e38
    assert np.isnan(y[8])


@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, 33])
def test_exp_same_bits(n: int) -> None:
    x = sts.random_floats(n, (n,), magnitude=10)
    assert_same_bits(lambda _: exp_f32(x))


def test_exp_refuses_what_is_no_float32_vector() -> None:
    with pytest.raises(ValueError, match="wrong number of dimensions"):
        exp_f32(matrix())
    with pytest.raises(TypeError, match="'x' must not be None"):
        exp_f32(None)


# Softmax


@given(matrices)
def test_softmax(isa: str, x: np.ndarray) -> None:
    expected = reference.softmax(x)
    # the difference to the maximum is rounded, relative to 1 behind exp: in the element, and by its share in the sum
    below = x.max(axis=1, keepdims=True).astype(np.float64) - x
    in_sum = (expected * below).sum(axis=1, keepdims=True)
    bound = (below + in_sum + x.shape[1] / 16 + 5 + 6 + 6 + 2) * U * expected
    assert_within(softmax_f32(x), expected, bound + np.exp(-87.3))


@given(matrices)
def test_softmax_same_bits(x: np.ndarray) -> None:
    assert_same_bits(lambda n_threads: softmax_f32(x, n_threads=n_threads))


def test_softmax_leaves_out_minus_infinity(isa: str) -> None:
    x = np.full((1, 40), -np.inf, np.float32)
    x[0, [3, 39]] = 1e30
    expected = np.zeros((1, 40))
    expected[0, [3, 39]] = 0.5
    np.testing.assert_array_equal(softmax_f32(x), expected)


def test_no_rows_and_no_columns(isa: str) -> None:
    for name, kernel in KERNELS.items():
        if name != "glu_f32":
            assert kernel(np.zeros((0, 33), np.float32)).shape == (0, 33)
    assert softmax_f32(np.zeros((3, 0), np.float32)).shape == (3, 0)
    assert glu_f32(*np.zeros((2, 0, 7), np.float32), activation="silu").shape == (0, 7)


# RoPE


@st.composite
def rope_cases(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Heads, and the cosines and sines of their tokens; some dimensions at the end do not rotate."""
    heads, n = draw(sts.head_configs()), draw(sts.sizes(9))
    half = draw(st.integers(0, heads.head_dim // 2))
    rng = np.random.default_rng(draw(sts.seeds))
    angle = rng.uniform(-np.pi, np.pi, (n, half))
    x = sts.random_floats(draw(sts.seeds), (n, heads.n_heads, heads.head_dim))
    return x, np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def rotated(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, pairing: str) -> tuple[np.ndarray, np.ndarray]:
    """The rotation in float64, and the sum of the two products' sizes."""
    half = cos.shape[1]
    first = slice(0, half) if pairing == "neox" else slice(0, 2 * half, 2)
    second = slice(half, 2 * half) if pairing == "neox" else slice(1, 2 * half, 2)
    a, b = x[..., first].astype(np.float64), x[..., second].astype(np.float64)
    cos, sin = cos[:, None].astype(np.float64), sin[:, None].astype(np.float64)
    out, size = x.astype(np.float64), np.zeros(x.shape)
    out[..., first], out[..., second] = a * cos - b * sin, b * cos + a * sin
    size[..., first], size[..., second] = np.abs(a * cos) + np.abs(b * sin), np.abs(b * cos) + np.abs(a * sin)
    return out, size


@pytest.mark.parametrize("pairing", ["norm", "neox"])
@given(rope_cases())
def test_rope(isa: str, pairing: str, case: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    x = case[0].copy()
    expected, size = rotated(*case, pairing)
    assert_within(rope_f32(*case, pairing=pairing), expected, 2 * U * size)  # two products and a sum
    np.testing.assert_array_equal(case[0], x)


@pytest.mark.parametrize("pairing", ["norm", "neox"])
@given(rope_cases())
def test_rope_same_bits(pairing: str, case: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    assert_same_bits(lambda n_threads: rope_f32(*case, pairing=pairing, n_threads=n_threads))


def test_rope_equals_the_published_rotation(isa: str) -> None:
    x, angles = sts.random_floats(0, (4, 2, 8)), np.arange(5, 9)[:, None] * 100.0 ** (-2 * np.arange(3) / 6)
    tables = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    for pairing in ("norm", "neox"):
        expected = reference.rope(x, np.arange(5, 9), theta=100.0, pairing=pairing, n_dims=6)
        np.testing.assert_allclose(rope_f32(x, *tables, pairing=pairing), expected, atol=1e-5 * np.abs(x).max())


def test_rope_refuses_what_does_not_fit() -> None:
    x, table = np.zeros((3, 2, 8), np.float32), np.zeros((3, 4), np.float32)
    with pytest.raises(ValueError, match="rope_f32: unknown pairing 'gpt', known: norm, neox"):
        rope_f32(x, table, table, pairing="gpt")
    with pytest.raises(ValueError, match=r"rope_f32: x has 3 tokens, cos is \(2, 4\), sin is \(2, 4\)"):
        rope_f32(x, table[:2], table[:2], pairing="norm")
    with pytest.raises(ValueError, match=r"rope_f32: x has 3 tokens, cos is \(3, 4\), sin is \(3, 3\)"):
        rope_f32(x, table, np.zeros((3, 3), np.float32), pairing="norm")
    with pytest.raises(ValueError, match="rope_f32: 10 dimensions to rotate, heads have 8"):
        rope_f32(x, *np.zeros((2, 3, 5), np.float32), pairing="norm")
    for args, name in (((None, table, table), "x"), ((x, None, table), "cos"), ((x, table, None), "sin")):
        with pytest.raises(TypeError, match=f"'{name}' must not be None"):
            rope_f32(*args, pairing="norm")


# Activation quantisation

Quantize = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
each_quantize = pytest.mark.parametrize("quantize", [quantize_q16, quantize_q8])


@given(sts.seeds, sts.sizes(5), st.integers(0, 6), st.integers(-30, 24))
def test_quantised_activations(isa: str, seed: int, n: int, n_blocks: int, exponent: int) -> None:
    x = sts.random_floats(seed, (n, 32 * n_blocks), magnitude=10.0**exponent)
    q, d = quantize_q16(x)
    expected_q, expected_d = reference.quantize_activations(x)
    assert (q.dtype, d.dtype) == (np.int32, np.float32)
    np.testing.assert_array_equal(d, expected_d)
    assert (np.abs(q) <= 32639).all()
    np.testing.assert_array_equal(q, expected_q)  # as d is a power of two, nothing is rounded before q is
    assert ((q + 128) % 256 - 128 >= -127).all()


@given(sts.seeds, sts.sizes(5), st.integers(0, 6), st.integers(-30, 24))
def test_activations_of_8_bits(isa: str, seed: int, n: int, n_blocks: int, exponent: int) -> None:
    x = sts.random_floats(seed, (n, 32 * n_blocks), magnitude=10.0**exponent)
    q, d = quantize_q8(x)
    most = np.abs(x).reshape(n, n_blocks, 32).max(axis=2, initial=0)
    np.testing.assert_array_equal(d, most / np.float32(127))
    blocks = x.reshape(n, n_blocks, 32) * (np.float32(127) / np.where(most, most, 1))[..., None]
    np.testing.assert_array_equal(q, np.rint(blocks).reshape(x.shape))
    assert (np.abs(q) <= 127).all()


@given(sts.seeds, sts.sizes(4), st.integers(0, 5))
def test_quantised_activations_same_bits(seed: int, n: int, n_blocks: int) -> None:
    x = sts.random_floats(seed, (n, 32 * n_blocks))
    for quantize in (quantize_q8, quantize_q16):
        assert_same_bits(lambda _, f=quantize: np.concatenate([part.ravel().view(np.uint8) for part in f(x)]))


def test_lower_digit_is_never_minus_128(isa: str) -> None:
    x = np.zeros((1, 32), np.float32)
    x[0, :5] = 32639, 128, 384, -128, -32639  # the scale is 1
    q, d = quantize_q16(x)
    assert d.tolist() == [[1]]
    assert q[0, :5].tolist() == [32639, 129, 385, -127, -32639]


def test_scales_are_the_least_powers_of_two_that_hold_the_block(isa: str) -> None:
    x = np.zeros((4, 32), np.float32)
    x[:, 0] = 32639, np.nextafter(np.float32(32639), np.float32(np.inf)), 32640 / 2**40, 16384
    q, d = quantize_q16(x)
    assert d[:, 0].tolist() == [1, 2, 2**-39, 1]  # 16384 alone would allow no less: 32768 is above 32639
    assert q[:, 0].tolist() == [32639, 16320, 16320, 16384]


@each_quantize
def test_tiny_blocks_become_zero_and_not_more(isa: str, quantize: Quantize) -> None:
    x = np.full((3, 32), [[0.0], [9e-33], [2e-32]], np.float32)
    q, d = quantize(x)
    assert not q[:2].any()
    assert d[:2].tolist() == [[0], [0]]
    assert (q[2] > (16000 if quantize is quantize_q16 else 126)).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 2.0**100])
@each_quantize
def test_what_is_not_finite_shows_in_the_scale(isa: str, value: float, quantize: Quantize) -> None:
    x = np.ones((1, 64), np.float32)
    x[0, 40] = value
    _, d = quantize(x)
    assert np.isfinite(d[0, 0])
    assert not np.isfinite(d[0, 1])


@each_quantize
def test_quantize_refuses_what_is_no_whole_block(quantize: Quantize) -> None:
    with pytest.raises(ValueError, match=f"{quantize.__name__}: expected a multiple of 32 columns, got 33"):
        quantize(matrix())
    with pytest.raises(TypeError, match="'x' must not be None"):
        quantize(None)
