"""The references themselves, held against answers that do not come from them: naive loops, invariants, known values."""

import math

import gguf
import make_gguf
import numpy as np
import pytest
import reference
import strategies as sts
from hypothesis import given
from hypothesis import strategies as st
from reference import ReferenceModel
from strategies import AttentionCase, HeadConfig

SMALL = {"rtol": 1e-12, "atol": 1e-12}  # float64 on both sides


# Formats


@pytest.mark.parametrize("name", sts.FORMATS)
@pytest.mark.parametrize(("n_rows", "n_blocks"), [(0, 1), (1, 0), (1, 1), (17, 3)])
def test_random_blocks_hold_finite_values(name: str, n_rows: int, n_blocks: int) -> None:
    raw = sts.random_raw(1, name, n_rows, n_blocks)
    block_size, block_bytes = sts.block_shape(name)
    assert (raw.shape, raw.dtype) == ((n_rows, n_blocks * block_bytes), np.uint8)
    if raw.size:
        values = reference.dequantize(raw, name)
        assert (values.shape, values.dtype) == ((n_rows, n_blocks * block_size), np.float32)
        assert np.isfinite(values).all()
        assert np.abs(values).max() > 1e-3


@pytest.mark.parametrize("name", sts.FORMATS)
def test_random_rows_have_the_deviation_asked_for(name: str) -> None:
    raw = make_gguf.random_rows(np.random.default_rng(0), name, 64, 512, std=0.05)
    values = reference.dequantize(raw, name)
    assert values.std() == pytest.approx(0.05, rel=0.05)
    assert abs(values.mean()) < 0.004


def test_row_that_is_no_whole_block_is_refused() -> None:
    with pytest.raises(ValueError, match="q4_k: a row of 320 values is not a multiple of 256"):
        make_gguf.row_bytes("q4_k", 320)


def test_quantize_activations_of_known_values() -> None:
    x = np.zeros(64)
    x[:6] = 32639, -32639, 2.5, 3.5, 128, 384  # d = 1: halves round to even, and a lower digit of -128 is one more
    q, d = reference.quantize_activations(x)
    assert q[:6].tolist() == [32639, -32639, 2, 4, 129, 385]
    assert not q[6:].any()
    assert d.dtype == np.float32
    assert d.tolist() == [1, 0]


@given(sts.seeds, sts.sizes(5), st.integers(0, 6))
def test_quantised_activations_are_within_half_a_step(seed: int, n: int, n_blocks: int) -> None:
    x = sts.random_floats(seed, (n, 32 * n_blocks))
    q, d = reference.quantize_activations(x)
    assert (q.shape, d.shape) == (x.shape, (n, n_blocks))
    assert (np.abs(q) <= 32639).all()
    moved = (q + 128) % 256 == 1  # the lower digit may have been -128
    error = np.abs(reference.dequantize_activations(q, d) - x)
    assert (error <= np.repeat(d, 32, axis=1) * np.where(moved, 1.5, 0.5)).all()


# Kernels


def test_matmul_is_a_loop_of_dot_products() -> None:
    w, x = sts.random_floats(1, (5, 7)), sts.random_floats(2, (3, 7))
    expected = [[math.fsum(float(a) * float(b) for a, b in zip(row, column, strict=True)) for row in w] for column in x]
    np.testing.assert_allclose(reference.matmul(w, x), expected, **SMALL)
    np.testing.assert_array_equal(reference.matmul(w, x[0]).shape, (5,))


@given(sts.float_matrices(max_exponent=1))
def test_rmsnorm_gives_unit_mean_square(x: np.ndarray) -> None:
    x = x[(x != 0).any(axis=1)]
    y = reference.rmsnorm(x, np.ones(x.shape[1]), eps=0.0)
    np.testing.assert_allclose(np.mean(y * y, axis=1), 1, **SMALL)
    np.testing.assert_allclose(reference.rmsnorm(x, np.full(x.shape[1], 3.0), eps=0.0), 3 * y, **SMALL)


pairings = st.sampled_from(["neox", "norm"])


@given(sts.seeds, pairings, sts.head_configs(), st.integers(0, 10_000))
def test_rope_keeps_norms_and_depends_on_distance_alone(
    seed: int, pairing: reference.Pairing, config: HeadConfig, pos: int
) -> None:
    q, k = sts.random_floats(seed, (2, 1, config.n_heads, config.head_dim))

    def rotate(x: np.ndarray, at: int) -> np.ndarray:
        return reference.rope(x, [at], theta=10_000.0, pairing=pairing)

    norm = np.linalg.norm(q, axis=-1)
    np.testing.assert_allclose(np.linalg.norm(rotate(q, pos), axis=-1), norm, rtol=1e-6)
    here, there = (np.sum(rotate(q, at + 5) * rotate(k, at), axis=-1) for at in (0, pos))
    np.testing.assert_allclose(here, there, rtol=1e-6, atol=1e-6 * np.abs(norm * np.linalg.norm(k, axis=-1)).max())


def test_rope_rotates_the_pairs_by_the_published_angles() -> None:
    x = np.arange(1.0, 9.0).reshape(1, 1, 8)
    angles = [3 / f * 100.0 ** (-2 * j / 6) for j, f in enumerate((1, 2, 4))]
    for pairing, pairs in (("neox", [(0, 3), (1, 4), (2, 5)]), ("norm", [(0, 1), (2, 3), (4, 5)])):
        y = reference.rope(x, [3], theta=100.0, pairing=pairing, n_dims=6, freq_factors=[1, 2, 4])[0, 0]
        for (a, b), angle in zip(pairs, angles, strict=True):
            turned = complex(x[0, 0, a], x[0, 0, b]) * complex(math.cos(angle), math.sin(angle))
            assert complex(y[a], y[b]) == pytest.approx(turned)
        assert y[6:].tolist() == [7, 8]


def naive_attention(case: AttentionCase) -> np.ndarray:
    """One query, head and key at a time."""
    out = np.zeros(case.q.shape)
    n_q, n_heads, head_dim = case.q.shape
    q, k, v = (array.astype(np.float64) for array in (case.q, case.k, case.v))
    for t in range(n_q):
        i = case.pos + t
        keys = range(0 if case.window is None else max(0, i - case.window + 1), i + 1)
        for h in range(n_heads):
            g = h * k.shape[1] // n_heads
            scores = [q[t, h] @ k[j, g] / math.sqrt(head_dim) for j in keys]
            weights = [math.exp(s - max(scores)) for s in scores]
            out[t, h] = sum(w * v[j, g] for w, j in zip(weights, keys, strict=True)) / sum(weights)
    return out


@given(sts.attention_cases(max_q=5, max_pos=20))
def test_attention_equals_a_naive_loop(case: AttentionCase) -> None:
    got = reference.attention(case.q, case.k, case.v, pos=case.pos, window=case.window)
    np.testing.assert_allclose(got, naive_attention(case), rtol=1e-9, atol=1e-9 * np.abs(case.v).max())


def test_attention_softcap_bounds_the_scores() -> None:
    q, k = np.full((1, 1, 4), 100.0), np.zeros((2, 1, 4))
    k[0] = 100.0
    v = np.array([1.0, 0.0]).reshape(2, 1, 1)
    got = reference.attention(q, k, v, pos=1, softcap=2.0)
    assert got[0, 0, 0] == pytest.approx(math.exp(2) / (math.exp(2) + 1))


def test_attention_refuses_a_cache_that_is_too_short() -> None:
    q = np.zeros((2, 1, 4))
    with pytest.raises(ValueError, match="attention: the cache holds 4 positions, the queries end at 5"):
        reference.attention(q, np.zeros((4, 1, 4)), np.zeros((4, 1, 4)), pos=3)


@pytest.mark.parametrize("x", [-1e3, -40.0, -1.0, 0.0, 1e-9, 2.5, 1e3])
def test_activations_equal_their_definitions(x: float) -> None:
    logistic = math.exp(x) / (1 + math.exp(x)) if x < 0 else 1 / (1 + math.exp(-x))
    assert reference.silu(x) == pytest.approx(x * logistic, rel=1e-14)
    y = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    assert reference.gelu_tanh(x) == pytest.approx(0.5 * x * (1 + math.tanh(y)), rel=1e-14, abs=1e-15)
    assert reference.swiglu(x, 3) == 3 * reference.silu(x)
    assert reference.geglu(x, 3) == 3 * reference.gelu_tanh(x)


def test_softmax_of_known_values() -> None:
    np.testing.assert_allclose(reference.softmax([[0, math.log(3)], [1e4, -np.inf]]), [[0.25, 0.75], [1, 0]], **SMALL)


# Whole models

TINY = {"llama": make_gguf.write_tiny_llama, "gemma3": make_gguf.write_tiny_gemma3}
VARIANTS = {
    "llama": {"tied": False, "freq_factors": True, "rope_dims": 8, "embedding_dtype": "bf16"},
    "gemma3": {"sliding_window": 3, "dtype": "q4_0", "embedding_dtype": "q8_0"},
}
tokens_and_chunks = sts.token_lists(320, max_size=20).flatmap(
    lambda tokens: st.tuples(st.just(tokens), sts.chunkings(len(tokens)))
)


@pytest.fixture(scope="module", params=sorted(TINY))
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ReferenceModel:
    path = tmp_path_factory.mktemp("reference") / "tiny.gguf"
    return ReferenceModel.from_gguf(TINY[request.param](path, **VARIANTS[request.param]))


@given(tokens_and_chunks)
def test_cached_chunks_equal_the_whole(tiny: ReferenceModel, case: tuple[list[int], list[int]]) -> None:
    tokens, lengths = case
    cache, logits, remaining = tiny.new_cache(), [], tokens
    for length in lengths:
        logits.append(tiny.forward(remaining[:length], cache=cache))
        remaining = remaining[length:]
    assert cache.n_past == len(tokens)
    np.testing.assert_allclose(np.concatenate(logits), tiny.forward(tokens), rtol=1e-9, atol=1e-9)


def test_greedy_follows_the_whole_forward(tiny: ReferenceModel) -> None:
    prompt = [1, 50, 100]
    chosen = tiny.greedy(prompt, 6)
    logits = tiny.forward([*prompt, *chosen])[len(prompt) - 1 : -1]
    assert chosen == logits.argmax(axis=-1).tolist()
    assert reference.greedy_disagreements(logits, chosen) == []
    chosen[4] = int(logits[4].argmin())
    assert reference.greedy_disagreements(logits, chosen) == [4]
    assert tiny.greedy(prompt, 0) == []


def test_capture_holds_the_residual_stream(tmp_path) -> None:
    model = ReferenceModel.from_gguf(make_gguf.write_tiny_llama(tmp_path / "tiny.gguf"))
    capture: dict[str, np.ndarray] = {}
    logits = model.forward([3, 4, 5], capture=capture)
    h = capture["embd"]
    for layer in range(2):
        h = h + capture[f"blk.{layer}.attn_out"] + capture[f"blk.{layer}.ffn_out"]
        np.testing.assert_array_equal(h.shape, (3, 64))
        np.testing.assert_allclose(h, capture[f"blk.{layer}.out"], **SMALL)
    np.testing.assert_array_equal(capture["result_norm"] @ model.weights["token_embd.weight"].T, logits)


def test_sliding_layers_forget_and_global_layers_do_not(tmp_path) -> None:
    tokens, changed = [7] * 12, [8, *[7] * 11]

    def last_differs(n_layers: int) -> bool:
        path = make_gguf.write_tiny_gemma3(tmp_path / f"{n_layers}.gguf", n_layers=n_layers, sliding_window=3)
        model = ReferenceModel.from_gguf(path)
        return not np.array_equal(model.forward(tokens)[-1], model.forward(changed)[-1])

    assert not last_differs(5)  # five sliding layers reach back 5 · 2 positions, the first token is 11 back
    assert last_differs(6)


def test_simulated_quantisation_touches_quantised_matmuls_only(tmp_path) -> None:
    for dtype, differs in (("f32", False), ("bf16", False), ("q8_0", True), ("q4_1", True)):
        path = make_gguf.write_tiny_llama(tmp_path / f"{dtype}.gguf", dtype=dtype)
        plain = ReferenceModel.from_gguf(path).forward([1, 2, 3])
        simulated = ReferenceModel.from_gguf(path, simulate_activation_quantisation=True).forward([1, 2, 3])
        assert np.array_equal(plain, simulated) != differs
        np.testing.assert_allclose(plain, simulated, atol=1)


@pytest.mark.parametrize("arch", sorted(TINY))
@pytest.mark.parametrize("name", sts.FORMATS)
def test_tiny_models_exist_in_every_format(tmp_path, arch: str, name: str) -> None:
    shape = {"hidden": 256, "head_dim": 64, "intermediate": 256} if sts.block_shape(name)[0] == 256 else {}
    path = TINY[arch](tmp_path / "tiny.gguf", dtype=name, **shape)
    matrices = {t.tensor_type.name.lower() for t in gguf.GGUFReader(path).tensors if len(t.shape) == 2}
    assert matrices == {name}
    logits = ReferenceModel.from_gguf(path).forward([0, 1, 319])
    assert logits.shape == (3, 320)
    assert 1 < logits.std() < 10


def test_the_same_seed_writes_the_same_bytes(tmp_path) -> None:
    def write(name: str, seed: int) -> bytes:
        return make_gguf.write_tiny_llama(tmp_path / name, dtype="q5_0", seed=seed).read_bytes()

    assert write("a", 1) == write("b", 1) != write("c", 2)


def test_unknown_architecture_is_refused(tmp_path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ValueError, match="the reference knows the architectures llama and gemma3, not 'mamba'"):
        ReferenceModel.from_gguf(tmp_path / "x.gguf")


# Perplexity


def test_perplexity_scores_the_second_half_of_each_window() -> None:
    """A model that gives the true next token of a counting text the probability e / (e + 9)."""
    seen = []

    def forward(window: list[int]) -> np.ndarray:
        seen.append(window)
        logits = np.zeros((len(window), 10))
        logits[np.arange(len(window)), [(t + 1) % 10 for t in window]] = 1
        logits[: len(window) // 2] = np.nan  # never read
        logits[-1] = np.nan
        return logits

    text = [i % 10 for i in range(27)]
    running = reference.perplexity(forward, text, n_ctx=8, bos=99)
    assert running == pytest.approx([(math.e + 9) / math.e] * 3)
    assert seen[1] == [99, *text[9:16]]
    assert len(reference.perplexity(forward, text, n_ctx=8, n_chunks=2)) == 2
    assert seen[-1] == text[8:16]
