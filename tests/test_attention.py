"""The KV cache and attention over it, against float64 within a derived bound."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import reference
import strategies as sts
from hypothesis import given
from hypothesis import strategies as st
from strategies import AttentionCase, HeadConfig

from woolly._kernels import KVCache, attention_f32, available_isas, use_isa
from woolly.errors import WoollyError

U = 2.0**-24
TILE = 128

dtypes = st.sampled_from(["f16", "f32"])
# A KV head's queries are taken 24 at a time: more of them than that, and a number that is no multiple
many_heads = st.sampled_from([(30, 1, 32), (64, 2, 16), (25, 1, 30), (48, 1, 2)]).map(lambda sizes: HeadConfig(*sizes))
heads = sts.head_configs() | many_heads


def filled(case: AttentionCase, dtype: str = "f32", *, layer: int = 0, n_ctx: int | None = None) -> KVCache:
    """A cache of three layers whose one layer holds the case's keys and values."""
    n_kv, n_kv_heads, head_dim = case.k.shape
    cache = KVCache(3, n_kv_heads, head_dim, n_ctx or n_kv, dtype=dtype)
    cache.store(layer, 0, case.k, case.v)
    return cache


def attend(case: AttentionCase, cache: KVCache, *, layer: int = 0, **options: object) -> np.ndarray:
    """Attention with the case's queries, scaled as models scale them."""
    q = case.q * np.float32(case.q.shape[2] ** -0.5)
    return attention_f32(q, cache, layer=layer, pos=case.pos, window=case.window or 0, **options)


def expected_and_bound(case: AttentionCase, cache: KVCache, softcap: float) -> tuple[np.ndarray, np.ndarray]:
    """Attention in float64 over what the cache holds, and how far float32 may be from it.

    A score is off by head_dim u Σ|q||k|, and bent by a cap by a few u of the cap. exp makes these errors and those of
    the differences to the maximum relative; the weighted sum of n values adds n u, each merge of a tile a few u.
    """
    n_kv = len(case.k)
    q = (case.q * np.float32(case.q.shape[2] ** -0.5)).astype(np.float64)
    k, v = cache.keys(0, n_kv).astype(np.float64), cache.values(0, n_kv).astype(np.float64)
    options = {"pos": case.pos, "window": case.window, "scale": 1.0, "softcap": softcap or None}
    expected = reference.attention(q, k, v, **options)

    n_rep = case.q.shape[1] // case.k.shape[1]
    size = np.einsum("qhd,khd->qhk", np.abs(q), np.abs(np.repeat(k, n_rep, axis=1)))
    most = size.max(axis=2)  # of |q||k|: no score and no difference to the maximum is larger than twice that
    in_score = case.q.shape[2] * U * most + (16 * U * softcap if softcap else 0)
    spread = np.minimum(2 * most, 2 * softcap) if softcap else 2 * most
    n_tiles = n_kv // TILE + 1
    relative = 2 * in_score + 3 * spread * U + (min(n_kv, TILE) + 10 * n_tiles + 20) * U
    weighted = reference.attention(q, k, np.abs(v), **options)
    return expected, 2 * np.expm1(relative)[..., None] * weighted


def assert_equals_reference(case: AttentionCase, dtype: str, *, softcap: float = 0.0, split: bool = False) -> None:
    cache = filled(case, dtype)
    expected, bound = expected_and_bound(case, cache, softcap)
    actual = attend(case, cache, softcap=softcap, split=split)
    assert (actual.dtype, actual.shape) == (np.float32, case.q.shape)
    # exp is zero below -87.3: a value may be missing from the sum by that much of itself
    excess = np.abs(actual - expected) - 1.01 * bound - 2.0**-120 * np.abs(case.v).max()
    assert (excess <= 0).all(), f"off by {excess.max():g} more than the bound"


def assert_same_bits(compute: Callable[[int], np.ndarray]) -> None:
    """compute(n_threads) gives the same bytes on every instruction set, with one thread and with more."""
    expected = compute(1).tobytes()
    for isa in available_isas():
        with use_isa(isa):
            assert all(compute(n_threads).tobytes() == expected for n_threads in (1, 3)), isa


def small_case(n_q: int = 3, pos: int = 5, seed: int = 0, config: HeadConfig | None = None) -> AttentionCase:
    config = config or HeadConfig(4, 2, 8)
    rng = np.random.default_rng(seed)
    shapes = ((n_q, config.n_heads), (pos + n_q, config.n_kv_heads), (pos + n_q, config.n_kv_heads))
    q, k, v = (rng.standard_normal((*shape, config.head_dim)).astype(np.float32) for shape in shapes)
    return AttentionCase(q, k, v, pos, None)


# The cache


@given(st.data(), dtypes)
def test_cache_holds_what_was_stored(isa: str, data: st.DataObject, dtype: str) -> None:
    case = data.draw(sts.attention_cases(max_pos=80))
    cache = filled(case, dtype, layer=1)
    n, numpy_dtype = len(case.k), {"f16": np.float16, "f32": np.float32}[dtype]
    for stored, array in ((cache.keys(1, n), case.k), (cache.values(1, n), case.v)):
        assert stored.dtype == numpy_dtype
        assert stored.tobytes() == array.astype(numpy_dtype).tobytes()
    assert not cache.keys(0, n).any()
    assert not cache.values(2, n).any()


def test_halves_round_as_numpy_does(isa: str) -> None:
    """Every kind of float32: subnormal halves, ties, overflow, infinities, NaN."""
    bits = np.random.default_rng(0).integers(0, 2**32, 40_000, np.uint64).astype(np.uint32)
    edges = [2.0**-24, 2.0**-25, 2.0**-25 * 1.0001, 65504, 65519, 65520, 6.1e-5, 1 + 2.0**-11, 1 + 3 * 2.0**-11, np.inf]
    with np.errstate(over="ignore", invalid="ignore"):
        x = np.concatenate([bits.view(np.float32), np.float32(edges), -np.float32(edges)])
        x = x[: len(x) // 4 * 4].reshape(-1, 1, 4)
        cache = KVCache(1, 1, 4, len(x))
        cache.store(0, 0, x, x)
        expected = x.astype(np.float16)
    for stored in (cache.keys(0, len(x)), cache.values(0, len(x))):
        np.testing.assert_array_equal(stored, expected)


def test_cache_facts() -> None:
    for dtype, itemsize in (("f16", 2), ("f32", 4)):
        cache = KVCache(2, 3, 40, 50, dtype=dtype)
        assert (cache.n_layers, cache.n_kv_heads, cache.head_dim, cache.n_ctx, cache.dtype) == (2, 3, 40, 50, dtype)
        # padded to whole vectors: 48 of a head, 64 positions
        assert cache.nbytes == KVCache.bytes_for(2, 3, 40, 50, dtype=dtype) == 2 * 2 * 3 * 48 * 64 * itemsize


def test_cache_refuses_sizes_that_are_none() -> None:
    for sizes in ((0, 1, 8, 9), (1, 0, 8, 9), (1, 1, -8, 9), (1, 1, 8, 0)):
        with pytest.raises(ValueError, match="KVCache: sizes must be positive, got "):
            KVCache(*sizes)
    with pytest.raises(ValueError, match="KVCache: unknown dtype 'q8_0', known: f16, f32"):
        KVCache(1, 1, 8, 9, dtype="q8_0")
    with pytest.raises(TypeError, match="positional argument"):
        KVCache(1, 1, 8, 9, "f32")


def test_cache_refuses_what_does_not_fit() -> None:
    cache, rows = KVCache(2, 3, 8, 10), np.zeros((2, 3, 8), np.float32)
    for n in (-1, 11):
        with pytest.raises(ValueError, match=f"KVCache: {n} positions asked for, it holds 10"):
            cache.keys(0, n)
    with pytest.raises(ValueError, match=r"store: k must be \(n, 3, 8\), got \(2, 2, 8\)"):
        cache.store(0, 0, rows[:, :2].copy(), rows)
    with pytest.raises(ValueError, match=r"store: v must be \(n, 3, 8\), got \(1, 3, 8\)"):
        cache.store(0, 0, rows, rows[:1])
    for layer, pos in ((-1, 0), (2, 0), (0, -1), (0, 9)):
        message = f"store: layer {layer}, positions {pos} to {pos + 2} are not in a cache of 2 layers and 10 positions"
        with pytest.raises(ValueError, match=message):
            cache.store(layer, pos, rows, rows)
    with pytest.raises(TypeError, match="'v' must not be None"):
        cache.store(0, 0, rows, None)
    with pytest.raises(ValueError, match="not C-contiguous"):
        cache.store(0, 0, rows, np.asfortranarray(rows))
    cache.store(0, 10, rows[:0], rows[:0])


# Attention


@given(sts.attention_cases(heads=heads), dtypes, st.sampled_from([0.0, 0.0, 5.0, 50.0]))
def test_attention(isa: str, case: AttentionCase, dtype: str, softcap: float) -> None:
    assert_equals_reference(case, dtype, softcap=softcap)


@given(sts.attention_cases(max_q=1, heads=heads), dtypes, st.sampled_from([0.0, 20.0]))
def test_split_attention(isa: str, case: AttentionCase, dtype: str, softcap: float) -> None:
    assert_equals_reference(case, dtype, softcap=softcap, split=True)


@given(sts.attention_cases(heads=heads, max_q=30), dtypes, st.sampled_from([0.0, 20.0]), st.booleans())
def test_attention_same_bits(case: AttentionCase, dtype: str, softcap: float, split: bool) -> None:
    cache = filled(case, dtype)
    assert_same_bits(lambda n_threads: attend(case, cache, softcap=softcap, split=split, n_threads=n_threads))


@given(sts.attention_cases(heads=heads, max_q=18), dtypes)
def test_a_token_is_the_same_alone_split_or_among_others(isa: str, case: AttentionCase, dtype: str) -> None:
    cache = filled(case, dtype, n_ctx=len(case.k) + 40)
    whole = attend(case, cache)
    for t in range(len(case.q)):
        alone = AttentionCase(case.q[t : t + 1], case.k, case.v, case.pos + t, case.window)
        for split in (False, True):
            assert attend(alone, cache, split=split).tobytes() == whole[t].tobytes()


@given(sts.attention_cases(heads=heads), st.sampled_from([-40.0, -1.0, 3.0, 60.0]), st.booleans())
def test_sinks_join_the_denominator(isa: str, case: AttentionCase, size: float, split: bool) -> None:
    cache, n_kv = filled(case), len(case.k)
    sinks = (size * np.linspace(0.5, 1, case.q.shape[1])).astype(np.float32)
    actual = attend(case, cache, sinks=sinks, split=split)
    # a key of its own, with values of zero: in float64 attention over one key more
    plain, bound = expected_and_bound(case, cache, 0.0)
    q = (case.q * np.float32(case.q.shape[2] ** -0.5)).astype(np.float64)
    k, v = cache.keys(0, n_kv).astype(np.float64), cache.values(0, n_kv).astype(np.float64)
    options = {"pos": case.pos, "window": case.window, "scale": 1.0}
    expected = reference.attention(q, k, v, sinks=sinks, **options)
    share = np.abs(reference.attention(q, k, np.ones_like(v), sinks=sinks, **options))
    most = np.abs(q).sum(axis=2).max() * np.abs(k).max() + np.abs(sinks).max()
    relative = bound * share + 2 * np.abs(expected) * np.expm1((4 * most + 30) * U) * q.shape[2]
    assert (np.abs(actual - expected) <= 2 * relative + 2.0**-120 * np.abs(case.v).max()).all()
    assert plain.shape == expected.shape


@given(sts.attention_cases(max_q=4))
def test_sinks_same_bits(case: AttentionCase) -> None:
    cache = filled(case, n_ctx=len(case.k) + 40)
    sinks = np.linspace(-3, 3, case.q.shape[1], dtype=np.float32)
    assert_same_bits(lambda n_threads: attend(case, cache, sinks=sinks, n_threads=n_threads))
    whole = attend(case, cache, sinks=sinks)
    for t in range(len(case.q)):
        alone = AttentionCase(case.q[t : t + 1], case.k, case.v, case.pos + t, case.window)
        for split in (False, True):
            assert attend(alone, cache, sinks=sinks, split=split).tobytes() == whole[t].tobytes()


def test_a_sink_of_minus_infinity_is_none(isa: str) -> None:
    case = small_case(pos=300)
    cache, sinks = filled(case), np.full(4, -np.inf, np.float32)
    assert attend(case, cache, sinks=sinks).tobytes() == attend(case, cache).tobytes()


@pytest.mark.parametrize("window", [None, 1, 16, 100, 128, 129, 400])
@pytest.mark.parametrize("pos", [0, 15, 126, 127, 128, 129, 383, 384, 600])
def test_windows_at_the_edges_of_tiles(isa: str, pos: int, window: int | None) -> None:
    case = small_case(n_q=9, pos=pos)
    case = AttentionCase(case.q, case.k, case.v, pos, window)
    assert_equals_reference(case, "f32")
    last = AttentionCase(case.q[:1], case.k, case.v, pos, window)
    assert_equals_reference(last, "f16", split=True)


def test_window_of_everything_is_no_window(isa: str) -> None:
    case = small_case(n_q=4, pos=200)
    cache = filled(case)
    q = case.q
    for window in (204, 10**6, 2**40):
        windowed = attention_f32(q, cache, layer=0, pos=200, window=window)
        assert windowed.tobytes() == attention_f32(q, cache, layer=0, pos=200).tobytes()


def test_what_lies_beyond_a_token_does_not_matter(isa: str) -> None:
    """Keys and values of later positions may be anything that is stored: another sequence's, say, after a rewind."""
    case = small_case(n_q=1, pos=130)
    cache = filled(case, n_ctx=300)
    expected = attend(case, cache)
    for value in (1e30, np.inf, np.nan):
        garbage = np.full((150, 2, 8), value, np.float32)
        cache.store(0, 131, garbage, garbage)
        assert attend(case, cache).tobytes() == expected.tobytes(), value
        assert attend(case, cache, split=True).tobytes() == expected.tobytes(), value


def test_large_later_keys_do_not_matter_within_a_chunk(isa: str) -> None:
    case = small_case(n_q=8, pos=20)
    expected = attend(case, filled(case))[:7]
    case.k[27], case.v[27] = 1e18, -1e18
    assert attend(case, filled(case))[:7].tobytes() == expected.tobytes()


def test_other_layers_and_heads_do_not_matter(isa: str) -> None:
    case = small_case()
    cache = filled(case, layer=2)
    other = small_case(seed=1)
    cache.store(0, 0, other.k, other.v)
    assert attend(case, cache, layer=2).tobytes() == attend(case, filled(case)).tobytes()
    one = AttentionCase(case.q[:, 2:].copy(), case.k[:, 1:].copy(), case.v[:, 1:].copy(), case.pos, None)
    assert attend(one, filled(one)).tobytes() == attend(case, filled(case))[:, 2:].tobytes()


def test_scores_far_apart_do_not_overflow(isa: str) -> None:
    case = small_case(n_q=2, pos=300)
    case.k[5] *= 1e4
    case.k[200] *= -1e4
    assert_equals_reference(case, "f32")


def test_out_is_used_and_may_be_the_queries(isa: str) -> None:
    case = small_case()
    cache, q = filled(case), case.q.copy()
    expected = attention_f32(q, cache, layer=0, pos=case.pos)
    out = np.full(q.shape, np.nan, np.float32)
    assert attention_f32(q, cache, layer=0, pos=case.pos, out=out) is out
    assert attention_f32(q, cache, layer=0, pos=case.pos, out=q) is q
    assert out.tobytes() == q.tobytes() == expected.tobytes()


def test_no_queries(isa: str) -> None:
    case = small_case()
    assert attention_f32(case.q[:0], filled(case), layer=0, pos=8).shape == (0, 4, 8)


def test_attention_refuses_what_does_not_fit() -> None:
    case = small_case()
    cache, q = filled(case), case.q
    for bad in (q[:, :3], q[:, :0], q[:, :, :7]):
        message = rf"attention_f32: q is \(3, {bad.shape[1]}, {bad.shape[2]}\), the cache has 2 heads of 8"
        with pytest.raises(ValueError, match=message):
            attention_f32(bad.copy(), cache, layer=0, pos=0)
    for layer, pos, window in ((3, 0, 0), (-1, 0, 0), (0, -1, 0), (0, 6, 0), (0, 2**60, 0), (0, 0, -1)):
        message = f"attention_f32: layer {layer}, positions {pos} to {pos + 3}, window {window} are not in a cache of 3"
        with pytest.raises(ValueError, match=message):
            attention_f32(q, cache, layer=layer, pos=pos, window=window)
    with pytest.raises(ValueError, match="attention_f32: 3 sinks for 4 heads"):
        attention_f32(q, cache, layer=0, pos=5, sinks=np.zeros(3, np.float32))
    with pytest.raises(ValueError, match=r"attention_f32: out must be a float32 array of shape \(3, 4, 8\)"):
        attention_f32(q, cache, layer=0, pos=5, out=np.zeros((3, 4, 7), np.float32))
    with pytest.raises(ValueError, match="attention_f32: out must be C-contiguous and writable"):
        attention_f32(q, cache, layer=0, pos=5, out=np.zeros((8, 4, 3), np.float32).T)
    with pytest.raises(WoollyError, match="n_threads"):
        attention_f32(q, cache, layer=0, pos=5, n_threads=-1)


def test_attention_refuses_what_is_no_float32_array() -> None:
    case = small_case()
    cache = filled(case)
    with pytest.raises(TypeError, match="'q' must not be None"):
        attention_f32(None, cache, layer=0, pos=5)
    with pytest.raises(TypeError, match="got NoneType"):
        attention_f32(case.q, None, layer=0, pos=5)
    with pytest.raises(ValueError, match="expected 'const float' but got 'double'"):
        attention_f32(case.q.astype(np.float64), cache, layer=0, pos=5)
    with pytest.raises(ValueError, match="not C-contiguous"):
        attention_f32(case.q[:, ::2], cache, layer=0, pos=5)
    with pytest.raises(ValueError, match="wrong number of dimensions"):
        attention_f32(case.q[0], cache, layer=0, pos=5)


def test_two_python_threads_at_once() -> None:
    case = small_case(n_q=40, pos=300, config=HeadConfig(9, 3, 64))
    cache = filled(case, "f16")
    expected = attend(case, cache).tobytes()
    with ThreadPoolExecutor(2) as pool:
        outs = pool.map(lambda _: attend(case, cache, n_threads=2).tobytes(), range(20))
        assert set(outs) == {expected}


# Values that are not finite


def attend_one(q: np.ndarray, cache: KVCache, pos: int, window: int) -> np.ndarray:
    return attention_f32(q, cache, layer=0, pos=pos, window=window, n_threads=1)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan, 1e6])
@pytest.mark.parametrize("window", [0, 9])
def test_values_that_a_query_does_not_see_do_not_count(isa: str, bad: float, window: int) -> None:
    """A masked key has the weight 0, but 0 times inf is NaN: what a token gets must not depend on its neighbours."""
    rng = np.random.default_rng(0)
    n, at = 150, (3, 40, 130)
    q, k, v = (rng.standard_normal((n, heads, 32), dtype=np.float32) for heads in (4, 2, 2))
    v[list(at), :, 5] = bad  # 1e6 is infinite in a cache of f16
    cache = KVCache(1, 2, 32, n)
    cache.store(0, 0, k, v)
    alone = np.concatenate([attend_one(q[t : t + 1], cache, t, window) for t in range(n)])
    finite = np.isfinite(alone)
    for chunk in (7, 64, n):
        parts = [attend_one(q[t : t + chunk], cache, t, window) for t in range(0, n, chunk)]
        together = np.concatenate(parts)
        np.testing.assert_array_equal(np.isfinite(together), finite)
        assert together[finite].tobytes() == alone[finite].tobytes()
    sees_bad = [any(b <= t and (not window or t - b < window) for b in at) for t in range(n)]
    np.testing.assert_array_equal(~finite[:, :, 5].all(axis=1), sees_bad)
    assert np.delete(finite, 5, axis=2).all()


@pytest.mark.parametrize("pos", [0, 1, 127, 128, 130, 256])
def test_a_score_that_is_nan_is_not_passed_over(isa: str, pos: int) -> None:
    """Also where it is the only one of its tile."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((pos + 1, 1, 16), dtype=np.float32) for _ in range(3))
    k[pos, 0, :2] = np.inf, -np.inf
    q[pos, 0, :2] = 1
    cache = KVCache(1, 1, 16, pos + 1)
    cache.store(0, 0, k, v)
    for split in (False, True):
        assert np.isnan(attention_f32(q[pos:], cache, layer=0, pos=pos, split=split)).all()
    if pos:
        assert np.isfinite(attention_f32(q[:pos], cache, layer=0, pos=0)).all()
