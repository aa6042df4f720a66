"""Routing, the packed tensors of experts, and programs that mix them, against the same steps in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import make_gguf
import numpy as np
import pytest
import reference
import strategies as sts
from hypothesis import given
from hypothesis import strategies as st

from woolly._kernels import KVCache, PackedExperts, PackedMatrix, Program, available_isas, route_experts, use_isa

VOCAB = 40
TOKENS = [int(t) for t in np.random.default_rng(1).integers(0, VOCAB, 30)]


# Routing


@given(
    seed=sts.seeds,
    n=st.integers(0, 5),
    n_experts=st.integers(1, 40),
    gating=st.sampled_from(("softmax", "softmax_chosen")),
    normalise=st.booleans(),
    data=st.data(),
)
def test_route_follows_its_equations(
    isa: str, seed: int, n: int, n_experts: int, gating: str, normalise: bool, data: st.DataObject
) -> None:
    scores = sts.random_floats(seed, (n, n_experts), magnitude=3)
    n_used = data.draw(st.integers(1, n_experts))
    weights, experts = route_experts(scores, n_used=n_used, gating=gating, normalise=normalise, scale=1.5)
    expected, chosen = reference.best_experts(scores, n_used, gating=gating, normalise=normalise, scale=1.5)
    np.testing.assert_array_equal(experts, chosen)
    # exp within 3 ulp, a sum of at most 40 terms, twice
    np.testing.assert_allclose(weights, expected, rtol=100 * 2.0**-24, atol=1e-37)


def test_equal_scores_and_nan_have_an_order() -> None:
    scores = np.array([[1, 2, 2, 1], [np.nan, -np.inf, 0, np.nan]], np.float32)
    weights, experts = route_experts(scores, n_used=4)
    assert experts.tolist() == [[1, 2, 0, 3], [2, 0, 1, 3]]
    assert np.isnan(weights[1]).all()  # it cannot go unnoticed
    assert weights[0, 0] == weights[0, 1] > weights[0, 2] == weights[0, 3]


def test_route_refuses() -> None:
    scores = np.zeros((1, 4), np.float32)
    for n_used in (0, 5):
        with pytest.raises(ValueError, match=f"route_experts: expected 1 to 4 experts a token, got {n_used}"):
            route_experts(scores, n_used=n_used)
    with pytest.raises(ValueError, match="route_experts: unknown gating 'sigmoid', known: softmax, softmax_chosen"):
        route_experts(scores, n_used=1, gating="sigmoid")
    with pytest.raises(TypeError, match="must not be None"):
        route_experts(None, n_used=1)


# Packing


@pytest.mark.parametrize("name", ["f32", "q8_0", "q4_k"])
@pytest.mark.parametrize("n_rows", [1, 16, 37])
def test_packed_experts_unpack_to_their_source(isa: str, name: str, n_rows: int) -> None:
    raw = make_gguf.random_rows(np.random.default_rng(0), name, 3 * n_rows, 256, std=1).reshape(3, n_rows, -1)
    for n_threads in (1, 2):
        experts = PackedExperts(3, n_rows, 256, name).pack(raw, n_threads=n_threads)
        assert (experts.shape, experts.format) == ((3, n_rows, 256), name)
        assert experts.nbytes == sum(matrix.nbytes for matrix in experts.matrices)
        for matrix, rows in zip(experts.matrices, raw, strict=True):
            assert matrix.unpack().tobytes() == rows.tobytes()


def test_packed_experts_refuse() -> None:
    with pytest.raises(ValueError, match="PackedExperts: expected at least one expert, got 0"):
        PackedExperts(0, 16, 32, "f32")
    experts = PackedExperts(2, 3, 4, "f32")
    message = r"pack: expected f32 rows of shape \(2, 3, 16\) bytes, got \(2, 3, 12\)"
    with pytest.raises(ValueError, match=message):
        experts.pack(np.zeros((2, 3, 12), np.uint8))
    with pytest.raises(TypeError, match="must not be None"):
        experts.pack(None)


# Programs


class Mixture:
    """An embedding, one mixture of experts and a head, recorded and in float64."""

    def __init__(
        self,
        formats: tuple[str, str] = ("q8_0", "q4_0"),
        *,
        n_experts: int = 6,
        n_used: int = 2,
        hidden: int = 64,
        inner: int = 96,
        n_threads: int = 2,
        gating: str = "softmax",
        compute: str = "exact",
        change: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> None:
        rng = np.random.default_rng(3)
        self.n_used, self.gating = n_used, gating
        shapes = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
        stored = {"gate": formats[0], "up": formats[0], "down": formats[1]}
        packed, self.w = {}, {}
        for name, (n_rows, n_cols) in shapes.items():
            raw = make_gguf.random_rows(rng, stored[name], n_experts * n_rows, n_cols, std=2 * n_cols**-0.5)
            values = reference.dequantize(raw, stored[name]).astype(np.float64)
            self.w[name] = values.reshape(n_experts, n_rows, n_cols)
            raw = raw.reshape(n_experts, n_rows, -1)
            raw = raw if change is None else change(raw)
            packed[name] = PackedExperts(n_experts, n_rows, n_cols, stored[name]).pack(raw)
        self.b = {name: rng.standard_normal((n_experts, n)).astype(np.float32) for name, (n, _) in shapes.items()}
        self.e, self.r = (rng.standard_normal((n, hidden)).astype(np.float32) for n in (VOCAB, n_experts))
        embedding, router = (PackedMatrix(*w.shape, "f32").pack(w.view(np.uint8)) for w in (self.e, self.r))
        self.norm = np.linspace(0.5, 1.5, hidden).astype(np.float32)
        self.position = {"layer": 0, "n_heads": 1, "n_kv_heads": 1, "head_dim": 2, "cos": None, "sin": None}
        self.program = p = Program(40, n_threads, compute=compute)
        p.embed("x", embedding)
        p.rmsnorm("h", "x", self.norm, eps=1e-6, name="norm")
        # a cache that nothing reads, so that the program has one
        few = PackedMatrix(2, hidden, "f32").pack(np.zeros((2, 4 * hidden), np.uint8))
        p.matmul(["q", "k", "v"], "h", [few] * 3, name="qkv")
        p.rope_store("q", "k", "v", **self.position, pairing="norm", scale=1.0, name="rope")
        p.matmul(["scores"], "h", [router], name="router")
        p.route("route", "scores", n_used=n_used, gating=gating, name="route")
        b = self.b
        pair = {"route": "route", "name": "gate_up", "biases": [b["gate"], b["up"]]}
        p.expert_matmul(["gate", "up"], "h", [packed["gate"], packed["up"]], **pair)
        p.glu("gate", "gate", "up", activation="swiglu_clamped", name="glu")
        p.expert_matmul(["out"], "gate", [packed["down"]], route="route", biases=[b["down"]], name="down")
        p.combine("x", "out", route="route", name="combine")
        p.matmul(["logits"], p.select("last", "x"), [embedding], name="logits")

    def run(self, tokens: list[int], **options: Any) -> np.ndarray:
        """Logits of tokens of one sequence; what is before them does not matter."""
        logits = np.full((len(tokens), VOCAB), np.nan, np.float32)
        self.program.run(tokens, [(KVCache(1, 1, 2, 40), 0, len(tokens))], range(len(tokens)), logits, **options)
        return logits

    def expected(self, tokens: list[int], *, simulate: bool) -> tuple[np.ndarray, np.ndarray]:
        """Logits, and which experts each token goes to."""

        def rounded(x: np.ndarray) -> np.ndarray:
            return reference.dequantize_activations(*reference.quantize_activations(x)) if simulate else x

        x = self.e[tokens].astype(np.float64)
        h = reference.rmsnorm(x, self.norm, eps=1e-6)
        weights, chosen = reference.best_experts(h @ self.r.T, self.n_used, gating=self.gating)
        for t, row in enumerate(rounded(h)):
            for weight, e in zip(weights[t], chosen[t], strict=True):
                gate, up = (self.w[name][e] @ row + self.b[name][e] for name in ("gate", "up"))
                inner = rounded(reference.swiglu_clamped(gate, up))
                x[t] += weight * (self.w["down"][e] @ inner + self.b["down"][e])
        return x @ self.e.T.astype(np.float64), chosen


@pytest.mark.parametrize("formats", [("f32", "f32"), ("q8_0", "q4_0"), ("f16", "q8_0"), ("q5_0", "bf16")])
@pytest.mark.parametrize("gating", ["softmax", "softmax_chosen"])
def test_mixtures_follow_their_equations(isa: str, formats: tuple[str, str], gating: str) -> None:
    mixture = Mixture(formats, gating=gating)
    expected, chosen = mixture.expected(TOKENS, simulate=False)
    assert len(np.unique(chosen)) == 6
    # a chain of matmuls, and two roundings of activations to 16 bits where formats are quantised
    assert np.abs(mixture.run(TOKENS) - expected).max() < (1e-5 if formats == ("f32", "f32") else 5e-4) * expected.std()
    for t in (0, 7):
        assert np.abs(mixture.run(TOKENS[t : t + 1]) - expected[t]).max() < 5e-4 * expected.std()


@pytest.mark.parametrize(("n_experts", "n_used", "inner"), [(1, 1, 32), (4, 4, 32), (130, 8, 64), (3, 1, 416)])
def test_any_number_of_experts(n_experts: int, n_used: int, inner: int) -> None:
    mixture = Mixture(("f32", "f32"), n_experts=n_experts, n_used=n_used, inner=inner, hidden=37)
    expected, _ = mixture.expected(TOKENS, simulate=False)
    assert np.abs(mixture.run(TOKENS) - expected).max() < 1e-5 * expected.std()


@pytest.mark.parametrize("formats", [("f32", "q4_0"), ("q8_0", "f16")])
def test_same_bits_over_isas_threads_and_batches(formats: tuple[str, str]) -> None:
    expected = Mixture(formats, n_threads=1).run(TOKENS)
    for isa in available_isas():
        with use_isa(isa):
            for n_threads in (1, 2, 5):
                mixture = Mixture(formats, n_threads=n_threads)
                assert mixture.run(TOKENS).tobytes() == expected.tobytes()
                for size in (1, 3):
                    for t in range(0, 30, size):
                        logits = mixture.run(TOKENS[t : t + size])
                        assert logits.tobytes() == expected[t : t + size].tobytes()


@pytest.mark.parametrize("formats", [("q4_0", "q4_1"), ("q8_0", "q4_k"), ("q5_k", "f16"), ("q6_k", "q2_k")])
@pytest.mark.parametrize(("n_experts", "n_used"), [(1, 1), (3, 2), (5, 2)])
@pytest.mark.parametrize("compute", ["exact", "int8"])
def test_same_bits_with_many_tokens_an_expert(
    formats: tuple[str, str], n_experts: int, n_used: int, compute: str
) -> None:
    """As many as tiles have columns, and more or fewer, beside experts that have none."""
    sizes = {"n_experts": n_experts, "n_used": n_used, "hidden": 256, "inner": 512, "compute": compute}
    tokens = TOKENS + TOKENS[:10]
    with use_isa("scalar"):
        expected = Mixture(formats, n_threads=1, **sizes).run(tokens)
    for isa in available_isas()[1:]:
        with use_isa(isa):
            mixture = Mixture(formats, **sizes)
            assert mixture.run(tokens).tobytes() == expected.tobytes(), isa
            for n in (1, 8, 9, 12, 17, 33):
                assert mixture.run(tokens[:n]).tobytes() == expected[:n].tobytes(), (isa, n)


def test_only_the_chosen_experts_are_computed() -> None:
    mixture = Mixture(("f32", "f32"), n_experts=20)
    _, chosen = mixture.expected(TOKENS[:4], simulate=False)
    expected = mixture.run(TOKENS[:4])

    def poison(raw: np.ndarray) -> np.ndarray:
        raw = raw.copy()
        raw[np.setdiff1d(np.arange(20), chosen)] = 0xFF
        return raw

    poisoned = Mixture(("f32", "f32"), n_experts=20, change=poison)
    assert poisoned.run(TOKENS[:4]).tobytes() == expected.tobytes()
    assert np.isnan(poisoned.run(TOKENS)).any()


def test_capture_gives_rows_by_token_and_slot() -> None:
    mixture = Mixture(("f32", "f32"))
    capture: dict[str, np.ndarray | None] = dict.fromkeys(
        ["route", "gate_up.gather", "gate_up", "glu", "down_bias", "norm"]
    )
    assert mixture.run(TOKENS, capture=capture).tobytes() == mixture.run(TOKENS).tobytes()
    _, chosen = mixture.expected(TOKENS, simulate=False)
    np.testing.assert_array_equal(capture["route"][:, 2:], chosen)
    np.testing.assert_array_equal(capture["gate_up.gather"], capture["norm"])
    gate = np.einsum("tsnk,tk->tsn", mixture.w["gate"][chosen], capture["norm"].astype(np.float64))
    np.testing.assert_allclose(capture["gate_up"], gate, atol=1e-5 * np.abs(gate).max())
    assert (capture["glu"].shape, capture["down_bias"].shape) == ((30, 2, 96), (30, 2, 64))


def test_stages_of_a_single_token_have_times() -> None:
    program = Mixture().program
    times = np.zeros(len(program.stage_names))
    logits = np.empty((1, VOCAB), np.float32)
    program.run([1], [(KVCache(1, 1, 2, 40), 0, 1)], [0], logits, times=times)
    assert (times > 0).all()


def test_programs_refuse_experts_that_do_not_fit() -> None:
    program = Program(4, 1)
    program.embed("x", PackedMatrix(8, 8, "f32").pack(np.zeros((8, 32), np.uint8)))
    experts = PackedExperts(8, 16, 8, "f32")
    with pytest.raises(ValueError, match="m: nothing routes to 'route'"):
        program.expert_matmul(["y"], "x", [experts], route="route", name="m")
    with pytest.raises(ValueError, match="c: nothing routes to 'route'"):
        program.combine("x", "x", route="route", name="c")
    with pytest.raises(ValueError, match="r: expected 1 to 8 experts a token, got 9"):
        program.route("route", "x", n_used=9, gating="softmax", name="r")
    program.route("route", "x", n_used=2, gating="softmax", name="r")
    with pytest.raises(ValueError, match="r: all routes in 'route' must choose in the same way"):
        program.route("route", "x", n_used=2, gating="softmax_chosen", name="r")
    with pytest.raises(ValueError, match="PackedMatrix: nothing was packed yet"):
        program.expert_matmul(["y"], "x", [experts], route="route", name="m")
    experts.pack(np.zeros((8, 16, 32), np.uint8))
    program.expert_matmul(["pairs"], "x", [experts], route="route", name="m")
    program.route("another", "x", n_used=2, gating="softmax", name="r")
    for outs, x, what in ((["pairs2"], "x", "x.by_expert"), (["pairs"], "x", "pairs")):
        with pytest.raises(ValueError, match=f"m: '{what}' has rows of the pairs of another route"):
            program.expert_matmul(outs, x, [experts], route="another", name="m")
    program.buffer("unwritten", 8, pairs=2)
    with pytest.raises(ValueError, match="m: nothing writes 'unwritten'"):
        program.expert_matmul(["z"], "unwritten", [experts], route="route", name="m")
    for outs, tensors in (([], []), (["y"], [experts] * 2), (list("abcde"), [experts] * 5)):
        with pytest.raises(ValueError, match=f"m: {len(outs)} outputs for {len(tensors)} tensors, at most 4"):
            program.expert_matmul(outs, "x", tensors, route="route", name="m")
    for shape in ((4, 16, 8), (8, 16, 4)):
        other = PackedExperts(*shape, "f32").pack(np.zeros((*shape[:2], 4 * shape[2]), np.uint8))
        message = rf"m: the experts are \({shape[0]}, 16, {shape[2]}\), the router knows 8 and 'x' has 8 columns"
        with pytest.raises(ValueError, match=message):
            program.expert_matmul(["y"], "x", [other], route="route", name="m")
    with pytest.raises(ValueError, match=r"m: expected values of shape \(8, 16\), got \(8, 15\)"):
        program.expert_matmul(["y"], "x", [experts], route="route", biases=[np.zeros((8, 15))], name="m")
    with pytest.raises(ValueError, match="c: 'y' has rows of 16 for 2 pairs a token, expected 8 for 2"):
        program.combine("x", "y", route="route", name="c")
    with pytest.raises(ValueError, match="buffer 'y' has rows for 2 pairs a token, not 0"):
        program.buffer("y", 16)
    program.select("last", "x")
    with pytest.raises(ValueError, match="r: experts come before the selection of outputs"):
        program.route("route", "x", n_used=2, gating="softmax", name="r")
