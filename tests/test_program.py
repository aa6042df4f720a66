"""Programs of a few operations, checked against the same steps in float64, and everything that `Program` refuses."""

from __future__ import annotations

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import make_gguf
import numpy as np
import pytest
import reference

from woolly._kernels import KVCache, PackedMatrix, Program, available_isas, use_isa
from woolly.errors import WoollyError

WIDTH = 64
VOCAB = 50


def weights(name: str, n_rows: int, n_cols: int, seed: int) -> tuple[PackedMatrix, np.ndarray]:
    """A matrix packed and, in float64, as it is."""
    raw = make_gguf.random_rows(np.random.default_rng(seed), name, n_rows, n_cols, std=n_cols**-0.5)
    return PackedMatrix(n_rows, n_cols, name).pack(raw), reference.dequantize(raw, name).astype(np.float64)


class Block:
    """One attention layer between an embedding and a head, recorded and in float64."""

    def __init__(self, name: str = "q8_0", *, n_threads: int = 2, max_tokens: int = 32, n_ctx: int = 400) -> None:
        self.embedding, self.e = weights(name, VOCAB, WIDTH, 0)
        (q, self.q), (k, self.k), (v, self.v) = (weights(name, n, WIDTH, n) for n in (64, 32, 32))
        self.norm = np.linspace(0.5, 1.5, WIDTH).astype(np.float32)
        self.head_norm = np.linspace(1.5, 0.5, 16).astype(np.float32)
        angles = np.arange(n_ctx)[:, None] * 100.0 ** (-np.arange(8) / 8)
        cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        p = self.program = Program(max_tokens, n_threads)
        p.embed("x", self.embedding, factor=3.0)
        p.rmsnorm("h", "x", self.norm, eps=1e-6, name="norm")
        p.matmul(["q", "k", "v"], "h", [q, k, v], name="qkv")
        sizes = {"n_heads": 4, "n_kv_heads": 2, "head_dim": 16}
        rope = {"cos": cos, "sin": sin, "pairing": "neox", "q_norm": self.head_norm, "eps": 1e-6, "scale": 0.25}
        p.rope_store("q", "k", "v", layer=0, **sizes, **rope, name="rope")
        p.attention("heads", "q", layer=0, n_heads=4, window=20, softcap=30.0, name="heads")
        p.rmsnorm("x", "heads", self.norm, eps=1e-6, accumulate=True, name="post_norm")
        p.glu("gated", "x", "h", activation="gelu_tanh", name="glu")
        p.add("sum", "gated", "x", name="sum")
        p.scale("sum", "sum", 0.5, name="half")
        p.matmul(["logits"], p.select("last", "sum"), [self.embedding], name="logits")
        self.n_ctx = n_ctx

    def cache(self) -> KVCache:
        return KVCache(1, 2, 16, self.n_ctx, dtype="f32")

    def run(self, spans: list[tuple[KVCache, int, list[int]]], **options: object) -> np.ndarray:
        """Logits of every token of (cache, position, tokens)."""
        tokens = np.concatenate([np.array(ids, np.int32) for *_, ids in spans])
        logits = np.full((len(tokens), VOCAB), np.nan, np.float32)
        outputs = np.arange(len(tokens), dtype=np.int32)
        self.program.run(tokens, [(cache, pos, len(ids)) for cache, pos, ids in spans], outputs, logits, **options)
        return logits

    def expected(self, tokens: list[int]) -> np.ndarray:
        x, n, eps = 3 * self.e[tokens], len(tokens), 1e-6
        h = reference.rmsnorm(x, self.norm, eps=eps)
        q, k, v = ((h @ w.T).reshape(n, -1, 16) for w in (self.q, self.k, self.v))
        q = reference.rope(reference.rmsnorm(q, self.head_norm, eps=eps), range(n), theta=100.0, pairing="neox")
        k = reference.rope(k, range(n), theta=100.0, pairing="neox")
        heads = reference.attention(q, k, v, pos=0, scale=0.25, window=20, softcap=30.0).reshape(n, WIDTH)
        x = x + reference.rmsnorm(heads, self.norm, eps=eps)
        return 0.5 * (reference.geglu(x, h) + x) @ self.e.T


TOKENS = [int(t) for t in np.random.default_rng(0).integers(0, VOCAB, 30)]


@pytest.mark.parametrize("name", ["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0"])
def test_operations_follow_their_equations(isa: str, name: str) -> None:
    block = Block(name)
    logits, expected = block.run([(block.cache(), 0, TOKENS)]), block.expected(TOKENS)
    # a chain of matmuls and norms: single kernels are held to derived bounds in their own tests
    assert np.abs(logits - expected).max() < (1e-5 if name in ("f32", "f16", "bf16") else 5e-4) * expected.std()


def test_operations_without_gates_follow_their_equations(isa: str) -> None:
    (embedding, e), (up, u) = weights("q8_0", VOCAB, WIDTH, 0), weights("q8_0", 96, WIDTH, 1)
    norm, bias = np.linspace(0.5, 1.5, WIDTH).astype(np.float32), np.linspace(-1, 1, 96).astype(np.float32)
    p = Program(8, 2)
    p.layernorm("h", p.embed("x", embedding), norm, bias[:WIDTH], eps=1e-5, name="norm")
    p.bias(p.matmul(["up"], "h", [up], name="up"), bias, name="up_bias")
    p.activate("up", "up", activation="gelu_tanh", name="act")
    p.matmul(["logits"], p.select("last", "up"), [PackedMatrix(2, 96, "f32").pack(bias_rows(bias))], name="logits")
    p.softcap_logits(2.0)
    p.rope_store("x", "x", "x", layer=0, n_heads=4, n_kv_heads=4, head_dim=16, cos=None, sin=None, pairing="norm",
                 scale=1.0, name="rope")  # fmt: skip
    h = reference.layernorm(e[TOKENS[:8]], norm, bias[:WIDTH], eps=1e-5)
    raw = reference.gelu_tanh(h @ u.T + bias) @ np.stack([bias, -bias]).astype(np.float64).T
    logits, capture = np.empty((8, 2), np.float32), dict.fromkeys(["logits", "logits_softcap"])
    p.run(TOKENS[:8], [(KVCache(1, 4, 16, 8), 0, 8)], range(8), logits)
    assert np.abs(raw).max() > 2
    np.testing.assert_allclose(logits, reference.softcap(raw, 2.0), atol=1e-4)
    p.run(TOKENS[:8], [(KVCache(1, 4, 16, 8), 0, 8)], range(8), np.empty_like(logits), capture=capture)
    np.testing.assert_allclose(capture["logits"], raw, atol=1e-3)
    assert capture["logits_softcap"].tobytes() == logits.tobytes()


def bias_rows(bias: np.ndarray) -> np.ndarray:
    """A matrix of float32 rows, as bytes."""
    return np.stack([bias, -bias]).view(np.uint8)


def test_same_bits_over_isas_threads_and_batches() -> None:
    expected = Block(n_threads=1).run([(Block().cache(), 0, TOKENS)])
    for isa in available_isas():
        with use_isa(isa):
            for n_threads in (1, 2, 5):
                block = Block(n_threads=n_threads)
                assert block.run([(block.cache(), 0, TOKENS)]).tobytes() == expected.tobytes()
                cache, others = block.cache(), [block.cache() for _ in range(3)]
                for pos, token in enumerate(TOKENS):
                    batch = [(others[0], pos, [1]), (cache, pos, [token]), (others[1], pos, [2]), (others[2], pos, [3])]
                    assert block.run(batch)[1].tobytes() == expected[pos].tobytes()


def test_more_sequences_than_fit_on_the_stack() -> None:
    block = Block(max_tokens=100)
    caches = [block.cache() for _ in range(100)]
    logits = block.run([(cache, 0, [i % VOCAB]) for i, cache in enumerate(caches)])
    assert logits[70].tobytes() == block.run([(block.cache(), 0, [70 % VOCAB])]).tobytes()


def test_long_contexts_are_split_into_tiles() -> None:
    one, two = Block(n_threads=1), Block(n_threads=4)
    caches = one.cache(), two.cache()
    for pos in range(0, 384, 32):
        for block, cache in zip((one, two), caches, strict=True):
            block.run([(cache, pos, [(pos + i) % VOCAB for i in range(32)])])
    assert one.run([(caches[0], 384, [5])]).tobytes() == two.run([(caches[1], 384, [5])]).tobytes()


def test_outputs_choose_rows() -> None:
    block = Block()
    whole = block.run([(block.cache(), 0, TOKENS)])
    for rows in ([29], [3, 17], [17, 3], []):
        logits = np.full((len(rows), VOCAB), np.nan, np.float32)
        block.program.run(TOKENS, [(block.cache(), 0, 30)], rows, logits)
        assert logits.tobytes() == whole[rows].tobytes()


def test_no_tokens_do_nothing() -> None:
    block = Block()
    block.program.run([], [], [], np.empty((0, VOCAB), np.float32))


def test_capture_gives_outputs_and_changes_none() -> None:
    block = Block()
    capture = dict.fromkeys(["embd", "norm", "qkv", "heads", "post_norm", "select", "logits"])
    cache = block.cache()
    logits = block.run([(cache, 0, TOKENS)], capture=capture)
    assert logits.tobytes() == block.run([(block.cache(), 0, TOKENS)]).tobytes()
    assert capture["logits"].tobytes() == logits.tobytes()
    assert capture["embd"].tobytes() == (np.float32(3) * block.embedding.dequantize()[TOKENS]).tobytes()
    assert {name: array.shape for name, array in capture.items()} == {
        "embd": (30, 64), "norm": (30, 64), "qkv": (30, 64), "heads": (30, 64), "post_norm": (30, 64),
        "select": (30, 64), "logits": (30, VOCAB),
    }  # fmt: skip
    with pytest.raises(ValueError, match="capture: no operation named nonsense, other"):
        block.run([(block.cache(), 0, TOKENS)], capture={"other": None, "nonsense": None, "embd": None})


def test_facts() -> None:
    block = Block()
    p = block.program
    assert (p.max_tokens, p.n_threads, p.vocab_size, p.width("heads")) == (32, 2, VOCAB, 64)
    names = ["embd", "norm", "qkv", "rope", "heads", "post_norm", "glu", "sum", "half", "select", "logits"]
    assert p.names == names
    assert p.buffer_bytes > 0
    times = np.zeros(len(p.stage_names))
    block.run([(block.cache(), 0, TOKENS)], times=times)
    assert (times > 0).all()
    with pytest.raises(ValueError, match=rf"run: times must be \({len(times)},\), got \(1,\)"):
        block.run([(block.cache(), 0, TOKENS)], times=np.zeros(1))


@pytest.mark.parametrize("width", [8, 4096])  # the larger one takes more scratch than attention does
def test_what_a_norm_adds_leaves_its_input_as_it_is(width: int) -> None:
    matrix, _ = weights("f32", 8, width, 0)
    program = Program(4, 2)
    program.embed("x", matrix)
    program.scale("sum", "x", 2.0, name="twice")
    program.rmsnorm("sum", "x", np.ones(width), eps=1e-6, accumulate=True, name="norm")
    program.scale("x", "x", 1.0, name="input")
    program.rope_store("x", "x", "x", layer=0, n_heads=1, n_kv_heads=1, head_dim=width, cos=None, sin=None,
                       pairing="norm", scale=1.0, name="rope")  # fmt: skip
    rows: dict[str, np.ndarray | None] = dict.fromkeys(("embd", "norm", "input"))
    program.run([3, 5], [(KVCache(1, 1, width, 2), 0, 2)], [], np.empty((0, 0), np.float32), capture=rows)
    assert rows["input"].tobytes() == rows["embd"].tobytes()
    x = rows["embd"].astype(np.float64)
    np.testing.assert_allclose(rows["norm"], 2 * x + reference.rmsnorm(x, np.ones(width), eps=1e-6), rtol=1e-5)


# Refusals while recording


def small() -> tuple[Program, PackedMatrix]:
    program, (matrix, _) = Program(4, 1), weights("f32", 8, 8, 0)
    program.embed("x", matrix)
    return program, matrix


ROPE = {"layer": 0, "cos": None, "sin": None, "pairing": "norm", "scale": 1.0, "name": "rope"}


def test_program_needs_tokens() -> None:
    with pytest.raises(ValueError, match="Program: max_tokens must be positive, got 0"):
        Program(0)
    with pytest.raises(WoollyError, match="n_threads"):
        Program(1, 0)


def test_unpacked_matrices_are_refused() -> None:
    program, _ = small()
    with pytest.raises(ValueError, match="PackedMatrix: nothing was packed yet"):
        program.embed("y", PackedMatrix(8, 8, "f32"))
    with pytest.raises(ValueError, match="PackedMatrix: nothing was packed yet"):
        program.matmul(["y"], "x", [PackedMatrix(8, 8, "f32")], name="m")
    with pytest.raises(TypeError, match="got NoneType"):
        program.embed("y", None)


def test_widths_that_do_not_fit_are_refused() -> None:
    program, matrix = small()
    program.buffer("wide", 9)
    with pytest.raises(ValueError, match="buffer 'x' has width 8, not 7"):
        program.buffer("x", 7)
    with pytest.raises(ValueError, match="a: widths 8 and 9 differ"):
        program.add("y", "x", "wide", name="a")
    with pytest.raises(ValueError, match="g: widths 9 and 8 differ"):
        program.glu("y", "wide", "x", activation="silu", name="g")
    with pytest.raises(ValueError, match="m: the matrix has 8 columns, 'wide' has 9"):
        program.matmul(["y"], "wide", [matrix], name="m")
    with pytest.raises(ValueError, match=r"n: expected values of shape \(8,\), got \(9,\)"):
        program.rmsnorm("y", "x", np.ones(9, np.float32), eps=1e-6, name="n")
    for weight, bias in ((np.ones(9), np.ones(8)), (np.ones(8), np.ones(9))):
        with pytest.raises(ValueError, match=r"n: expected values of shape \(8,\), got \(9,\)"):
            program.layernorm("y", "x", weight, bias, eps=1e-6, name="n")
    with pytest.raises(ValueError, match=r"b: expected values of shape \(8,\), got \(9,\)"):
        program.bias("x", np.ones(9), name="b")


def test_matmul_takes_as_many_outputs_as_matrices() -> None:
    program, matrix = small()
    for n_outs, n_matrices in ((1, 2), (5, 5), (0, 0)):
        with pytest.raises(ValueError, match=f"m: {n_outs} outputs for {n_matrices} matrices, at most 4"):
            program.matmul([f"y{i}" for i in range(n_outs)], "x", [matrix] * n_matrices, name="m")


def test_logits_need_a_selection() -> None:
    program, matrix = small()
    with pytest.raises(ValueError, match="m: select the rows whose logits are wanted first"):
        program.matmul(["logits"], "x", [matrix], name="m")
    with pytest.raises(ValueError, match="logits_softcap: there are no logits yet"):
        program.softcap_logits(30.0)


def test_heads_that_do_not_fit_are_refused() -> None:
    program, _ = small()
    with pytest.raises(ValueError, match="rope: q, k, v are 8, 8, 8 wide, expected 2 and 1 heads of 4"):
        program.rope_store("x", "x", "x", n_heads=2, n_kv_heads=1, head_dim=4, **ROPE)
    table = np.zeros((9, 3), np.float32)
    for cos, sin in ((table, table), (table[:, :2], table[:8, :2]), (table[:, :1].astype(float), table[:, :1])):
        with pytest.raises(ValueError, match=r"rope: cos \(9, \d\) and sin \(\d, \d\) do not fit heads of 4"):
            program.rope_store("x", "x", "x", n_heads=2, n_kv_heads=2, head_dim=4, **{**ROPE, "cos": cos, "sin": sin})
    with pytest.raises(ValueError, match=r"rope: expected values of shape \(4,\), got \(8,\)"):
        program.rope_store("x", "x", "x", n_heads=2, n_kv_heads=2, head_dim=4, q_norm=np.ones(8), **ROPE)


def test_attention_without_its_cache_is_refused() -> None:
    program, _ = small()
    with pytest.raises(ValueError, match="a: q is 8 wide, expected 2 heads of 0"):
        program.attention("y", "x", layer=0, n_heads=2, name="a")
    program.rope_store("x", "x", "x", n_heads=2, n_kv_heads=2, head_dim=4, **ROPE)
    with pytest.raises(ValueError, match="a: q is 8 wide, expected 3 heads of 4"):
        program.attention("y", "x", layer=0, n_heads=3, name="a")
    with pytest.raises(ValueError, match="a: nothing stores keys and values for layer 1"):
        program.attention("y", "x", layer=1, n_heads=2, name="a")
    with pytest.raises(ValueError, match="rope: all layers must have 2 KV heads of 4"):
        program.rope_store("x", "x", "x", n_heads=4, n_kv_heads=4, head_dim=2, **{**ROPE, "layer": 1})


def test_rope_store_refuses_heads_that_no_attention_has() -> None:
    program, _ = small()
    program.buffer("q", 12)
    program.buffer("kv", 8)
    with pytest.raises(ValueError, match="rope: layer 0, 3 heads on 2 KV heads is no attention"):
        program.rope_store("q", "kv", "kv", n_heads=3, n_kv_heads=2, head_dim=4, **ROPE)
    with pytest.raises(ValueError, match="rope: layer -1, 2 heads on 2 KV heads is no attention"):
        program.rope_store("kv", "kv", "kv", n_heads=2, n_kv_heads=2, head_dim=4, **{**ROPE, "layer": -1})


def test_there_is_an_end_to_operations() -> None:
    program, _ = small()
    for _ in range(4095):
        program.add("x", "x", "x", name="twice")
    with pytest.raises(ValueError, match="Program: more than 4096 operations"):
        program.add("x", "x", "x", name="twice")


# Refusals while running


def test_run_refuses_what_does_not_fit() -> None:
    block = Block()
    cache, run, logits = block.cache(), block.program.run, np.empty((1, VOCAB), np.float32)

    def refused(message: str, *args: object) -> None:
        with pytest.raises(ValueError, match=message):
            run(*args)

    refused(r"run: at most 32 tokens in a vector, got shape \(33,\)", [1] * 33, [(cache, 0, 33)], [0], logits)
    refused(r"run: at most 32 tokens in a vector, got shape \(1, 1\)", [[1]], [(cache, 0, 1)], [0], logits)
    for bad in (-1, VOCAB):
        refused(rf"run: token ids must be in \[0, 50\), got .*{bad}", [3, bad], [(cache, 0, 2)], [0], logits)
    for bad in (-1, 1):
        refused(rf"run: outputs must be rows in \[0, 1\), got {bad} to {bad}", [3], [(cache, 0, 1)], [bad], logits)
    for pos, n in ((-1, 1), (0, 0), (400, 1), (399, 2)):
        refused(f"run: positions {pos} to {pos + n} are not in a cache of 400", [3] * 2, [(cache, pos, n)], [0], logits)
    refused("run: 2 tokens, but the spans hold 1, each with a cache of its own", [3, 3], [(cache, 0, 1)], [0], logits)
    refused("run: 2 tokens, but the spans hold 2", [3, 3], [(cache, 0, 1), (cache, 1, 1)], [0], logits)
    other = KVCache(2, 2, 16, 400)
    refused("run: the cache has 2 layers, 2 heads of 16; the program wants 1, 2, 16", [3], [(other, 0, 1)], [0], logits)


@pytest.mark.parametrize(
    "logits",
    [
        np.empty((2, VOCAB), np.float32),
        np.empty((1, VOCAB)),
        np.empty((1, 2 * VOCAB), np.float32)[:, ::2],
        np.broadcast_to(np.float32(0), (1, VOCAB)),
    ],
)
def test_run_refuses_logits_that_it_cannot_write(logits: np.ndarray) -> None:
    block = Block()
    with pytest.raises(ValueError, match=r"run: logits must be writable C-contiguous float32 \(1, 50\), got float"):
        block.program.run([1], [(block.cache(), 0, 1)], [0], logits)


def test_tables_limit_positions() -> None:
    block = Block(n_ctx=10)
    cache = KVCache(1, 2, 16, 50, dtype="f32")
    block.run([(cache, 0, TOKENS[:10])])
    with pytest.raises(ValueError, match="run: positions 10 to 11 are not in a cache of 50"):
        block.run([(cache, 10, [1])])


# Threads and signals


def test_two_python_threads_take_turns() -> None:
    block = Block()
    expected = block.run([(block.cache(), 0, TOKENS)]).tobytes()
    with ThreadPoolExecutor(2) as pool:
        outs = pool.map(lambda _: block.run([(block.cache(), 0, TOKENS)]).tobytes(), range(30))
        assert set(outs) == {expected}


def endless(n_threads: int) -> Program:
    """A program that computes for seconds: a few hundred large products."""
    matrix = PackedMatrix(2048, 2048, "f32").pack(np.zeros((2048, 8192), np.uint8))
    program = Program(256, n_threads)
    program.embed("x", matrix)
    for i in range(300):
        program.matmul(["y"], "x", [matrix], name=f"m{i}")
    return program


@pytest.mark.parametrize("n_threads", [1, 2, 4])
def test_ctrl_c_stops_a_run(n_threads: int) -> None:
    program = endless(n_threads)
    # the head is missing: no logits are wanted
    logits = np.empty((0, 0), np.float32)
    program.rope_store("x", "x", "x", layer=0, n_heads=32, n_kv_heads=32, head_dim=64, cos=None, sin=None,
                       pairing="norm", scale=1.0, name="rope")  # fmt: skip
    cache = KVCache(1, 32, 64, 256)
    started = time.perf_counter()
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        program.run([0] * 256, [(cache, 0, 256)], [], logits)
    assert time.perf_counter() - started < 3
