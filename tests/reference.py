"""Float64 references of every kernel, and of a whole forward pass: the oracle of the tests.

Plain numpy that follows the published equations and imports nothing of woolly. It knows nothing of threads, tiles or
packed layouts: where an engine and this file disagree by more than rounding, the engine is wrong.

Shapes are written row first. n is a number of tokens, k the length of a matmul's inner dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Pairing = Literal["neox", "norm"]

ACTIVATION_BLOCK = 32
"""Activations of a quantised matmul share one scale per this many values."""

ACTIVATION_MOST = 127 * 256 + 127
"""The largest quantised activation: both of its digits, 256 hi + lo, are 127."""

UNQUANTISED = {gguf.GGMLQuantizationType[name] for name in ("F32", "F16", "BF16", "F64")}


# Formats


def dequantize(raw: npt.NDArray[np.uint8], ggml_type: str | gguf.GGMLQuantizationType) -> npt.NDArray[np.float32]:
    """Values of stored rows, bit for bit as `gguf.quants` defines them.

    raw : uint8, (n_rows, row_bytes). Returns float32, (n_rows, n_values).
    """
    if isinstance(ggml_type, str):
        ggml_type = gguf.GGMLQuantizationType[ggml_type.upper()]
    if ggml_type == gguf.GGMLQuantizationType.F64:  # which gguf leaves alone
        return np.ascontiguousarray(raw).view(np.float64).astype(np.float32)
    return gguf.quants.dequantize(np.ascontiguousarray(raw), ggml_type)


def quantize_activations(x: npt.ArrayLike) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Quantise rows to 16 bits with one scale per 32 values: q = round_half_even(x / d).

    d is the least power of two that keeps |q| within 32639. q is written in two int8 digits, q = 256 hi + lo, and -128
    is no lower digit: such a q is one more.

    x : (..., k), k a multiple of 32. Returns q int32 (..., k) and d float32 (..., k / 32). A block whose absmax is
    below 1e-32 gives zeros.
    """
    x = np.asarray(x, np.float64)
    blocks = x.reshape(*x.shape[:-1], x.shape[-1] // ACTIVATION_BLOCK, ACTIVATION_BLOCK)
    absmax = np.abs(blocks).max(axis=-1, keepdims=True)
    absmax = np.where(absmax < np.float32(1e-32), 0, absmax)
    mantissa, exponent = np.frexp(absmax / ACTIVATION_MOST)  # of 0.5 to 1: a power of two has the mantissa 0.5
    d = np.where(absmax > 0, np.ldexp(1.0, exponent - (mantissa == 0.5)), 0)
    q = np.where(absmax > 0, np.rint(blocks / np.where(absmax > 0, d, 1)), 0)
    high = np.floor((q + 128) / 256)
    q = 256 * high + np.maximum(q - 256 * high, -127)
    return q.astype(np.int32).reshape(x.shape), d[..., 0].astype(np.float32)


def dequantize_activations(q: npt.NDArray[np.int32], d: npt.NDArray[np.float32]) -> Array:
    """q int32 (..., k) times its scale d float32 (..., k / 32), as float64 (..., k)."""
    return q.astype(np.float64) * np.repeat(d.astype(np.float64), ACTIVATION_BLOCK, axis=-1)


# Kernels


def matmul(w: npt.ArrayLike, x: npt.ArrayLike) -> Array:
    """y[i, r] = Σ_j x[i, j] w[r, j]: w (rows, k), x (n, k) or (k,), y (n, rows) or (rows,)."""
    return np.asarray(x, np.float64) @ np.asarray(w, np.float64).T


def embedding(w: npt.ArrayLike, tokens: Sequence[int]) -> Array:
    """Rows of w (vocab, hidden) at tokens (n,): (n, hidden)."""
    return np.asarray(w)[np.asarray(tokens, np.int64)].astype(np.float64)


def rmsnorm(x: npt.ArrayLike, weight: npt.ArrayLike, *, eps: float) -> Array:
    """weight · x / sqrt(mean(x²) + eps) along the last axis: x (..., k), weight (k,)."""
    x = np.asarray(x, np.float64)
    mean_square = np.mean(x * x, axis=-1, keepdims=True)
    return np.asarray(weight, np.float64) * (x / np.sqrt(mean_square + eps))


def layernorm(x: npt.ArrayLike, weight: npt.ArrayLike, bias: npt.ArrayLike, *, eps: float) -> Array:
    """weight · (x - mean(x)) / sqrt(var(x) + eps) + bias along the last axis: x (..., k), weight and bias (k,)."""
    x = np.asarray(x, np.float64)
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = np.mean(centred * centred, axis=-1, keepdims=True)
    return np.asarray(weight, np.float64) * (centred / np.sqrt(variance + eps)) + np.asarray(bias, np.float64)


def softcap(x: npt.ArrayLike, cap: float) -> Array:
    """cap · tanh(x / cap), elementwise."""
    return cap * np.tanh(np.asarray(x, np.float64) / cap)


def rope(
    x: npt.ArrayLike,
    positions: npt.ArrayLike,
    *,
    theta: float,
    pairing: Pairing,
    n_dims: int | None = None,
    freq_factors: npt.ArrayLike | None = None,
) -> Array:
    """Rotate pair j of a head at position p by the angle p · theta^(-2j / n_dims) / freq_factors[j].

    Su et al. 2021, "RoFormer", section 3.4.

    x : (n, n_heads, head_dim); positions : (n,); freq_factors : (n_dims / 2,), ones where not given.
    pairing : "neox" pairs (j, j + n_dims / 2), "norm" pairs (2j, 2j + 1).
    n_dims : how many leading dimensions rotate (all of them where not given); the others pass through.
    """
    x = np.asarray(x, np.float64)
    n_dims = x.shape[-1] if n_dims is None else n_dims
    half = n_dims // 2
    frequency = theta ** (-2.0 * np.arange(half) / n_dims)  # (half,)
    if freq_factors is not None:
        frequency = frequency / np.asarray(freq_factors, np.float64)
    angle = np.asarray(positions, np.float64)[:, None, None] * frequency  # (n, 1, half)
    cos, sin = np.cos(angle), np.sin(angle)

    first = {"neox": slice(0, half), "norm": slice(0, n_dims, 2)}[pairing]
    second = {"neox": slice(half, n_dims), "norm": slice(1, n_dims, 2)}[pairing]
    a, b = x[..., first], x[..., second]  # (n, n_heads, half)
    out = x.copy()
    out[..., first] = a * cos - b * sin
    out[..., second] = a * sin + b * cos
    return out


def softmax(x: npt.ArrayLike) -> Array:
    """exp(x - max) / Σ exp(x - max) along the last axis; -inf gives exactly 0."""
    x = np.asarray(x, np.float64)
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def attention(
    q: npt.ArrayLike,
    k: npt.ArrayLike,
    v: npt.ArrayLike,
    *,
    pos: int,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: npt.ArrayLike | None = None,
) -> Array:
    """softmax(scale · q kᵀ + mask) v, causal, over a cache whose row j holds position j.

    q : (n_q, n_heads, head_dim), its first row at position pos; k, v : (n_kv, n_kv_heads, head_dim), n_kv >= pos + n_q.
    Head h reads key/value head h // (n_heads / n_kv_heads). The query at position i sees keys j <= i and, with a
    sliding window, i - j < window: itself and the window - 1 keys before it. scale is 1 / sqrt(head_dim) by default;
    softcap bends the scores s to softcap · tanh(s / softcap) before the mask. sinks (n_heads,) are scores that join the
    softmax with no value. Returns (n_q, n_heads, head_dim).
    """
    q, k, v = (np.asarray(array, np.float64) for array in (q, k, v))
    n_q, n_heads, head_dim = q.shape
    n_kv, n_kv_heads, _ = k.shape
    if n_kv < pos + n_q:
        raise ValueError(f"attention: the cache holds {n_kv} positions, the queries end at {pos + n_q}")
    k, v = (np.repeat(array, n_heads // n_kv_heads, axis=1).transpose(1, 0, 2) for array in (k, v))
    scale = head_dim**-0.5 if scale is None else scale

    i = pos + np.arange(n_q)[:, None]
    j = np.arange(n_kv)[None, :]
    visible = (j <= i) & (i - j < (n_kv if window is None else window))  # (n_q, n_kv)
    scores = scale * (q.transpose(1, 0, 2) @ k.transpose(0, 2, 1))  # (n_heads, n_q, n_kv)
    if softcap is not None:
        scores = softcap * np.tanh(scores / softcap)
    scores = np.where(visible, scores, -np.inf)
    if sinks is not None:
        column = np.broadcast_to(np.asarray(sinks, np.float64)[:, None, None], (n_heads, n_q, 1))
        return (softmax(np.concatenate([scores, column], axis=-1))[..., :-1] @ v).transpose(1, 0, 2)
    return (softmax(scores) @ v).transpose(1, 0, 2)


def sigmoid(x: npt.ArrayLike) -> Array:
    """1 / (1 + exp(-x)), to full relative precision at both ends."""
    x = np.asarray(x, np.float64)
    e = np.exp(-np.abs(x))  # never overflows
    return np.where(x >= 0, 1, e) / (1 + e)


def silu(x: npt.ArrayLike) -> Array:
    """x · sigmoid(x)."""
    return np.asarray(x, np.float64) * sigmoid(x)


def gelu_tanh(x: npt.ArrayLike) -> Array:
    """x/2 · (1 + tanh(y)) = x · sigmoid(2y) with y = √(2/π) (x + 0.044715 x³), as Gemma was trained."""
    x = np.asarray(x, np.float64)
    return x * sigmoid(2 * np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))


def swiglu(gate: npt.ArrayLike, up: npt.ArrayLike) -> Array:
    """silu(gate) · up, elementwise."""
    return silu(gate) * np.asarray(up, np.float64)


def geglu(gate: npt.ArrayLike, up: npt.ArrayLike) -> Array:
    """gelu_tanh(gate) · up, elementwise."""
    return gelu_tanh(gate) * np.asarray(up, np.float64)


def swiglu_clamped(gate: npt.ArrayLike, up: npt.ArrayLike) -> Array:
    """g · sigmoid(1.702 g) · (u + 1), g = min(gate, 7), u = up within ±7: gpt-oss."""
    g, u = np.minimum(np.asarray(gate, np.float64), 7), np.clip(np.asarray(up, np.float64), -7, 7)
    return g * sigmoid(1.702 * g) * (u + 1)


def best_experts(
    scores: npt.ArrayLike, n_used: int, *, gating: str = "softmax", normalise: bool = True, scale: float = 1.0
) -> tuple[Array, npt.NDArray[np.int64]]:
    """Weights and indices of each token's n_used best experts, best first, each (n, n_used): scores (n, n_experts).

    gating : "softmax" over all experts, or "softmax_chosen" over the chosen ones.
    """
    scores = np.asarray(scores, np.float64)
    experts = np.argsort(-scores, axis=-1, kind="stable")[:, :n_used]
    over = softmax(scores) if gating == "softmax" else scores
    weights = np.take_along_axis(over, experts, axis=-1)
    weights = weights if gating == "softmax" else softmax(weights)
    if normalise:
        weights = weights / weights.sum(axis=-1, keepdims=True)
    return scale * weights, experts


# A whole model


@dataclass(frozen=True)
class Hyperparameters:
    """What the forward pass needs to know of a model besides its weights."""

    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_dims: int
    rope_pairing: Pairing
    rope_theta: float  # of global layers
    local_rope_theta: float  # of sliding layers
    sliding_window: int | None  # positions that a sliding layer sees, itself included
    global_every: int  # layer i is global when (i + 1) % global_every == 0
    embedding_scale: float
    gated_activation: Callable[[Array, Array], Array]

    def is_global(self, layer: int) -> bool:
        """Whether the layer sees the whole context."""
        return self.sliding_window is None or (layer + 1) % self.global_every == 0

    @classmethod
    def from_reader(cls, reader: gguf.GGUFReader) -> Hyperparameters:
        """Read the metadata; ValueError for an architecture that is neither `llama` nor `gemma3`."""

        def read(key: str, default: Any = None) -> Any:
            stored = reader.get_field(key)
            if stored is None and default is None:
                raise KeyError(key)
            return default if stored is None else stored.contents()

        arch = read("general.architecture")
        if arch not in ("llama", "gemma3"):
            raise ValueError(f"the reference knows the architectures llama and gemma3, not {arch!r}")
        gemma = arch == "gemma3"
        hidden, n_heads = read(f"{arch}.embedding_length"), read(f"{arch}.attention.head_count")
        head_dim = read(f"{arch}.attention.key_length", hidden // n_heads)
        return cls(
            n_layers=read(f"{arch}.block_count"),
            n_heads=n_heads,
            n_kv_heads=read(f"{arch}.attention.head_count_kv", n_heads),
            head_dim=head_dim,
            rms_norm_eps=read(f"{arch}.attention.layer_norm_rms_epsilon"),
            rope_dims=read(f"{arch}.rope.dimension_count", head_dim),
            rope_pairing="neox" if gemma else "norm",  # conversion to GGUF permutes llama's q and k to adjacent pairs
            rope_theta=read(f"{arch}.rope.freq_base", 1_000_000.0 if gemma else 10_000.0),
            local_rope_theta=10_000.0,
            sliding_window=read("gemma3.attention.sliding_window") if gemma else None,
            global_every=6,
            embedding_scale=hidden**0.5 if gemma else 1.0,
            gated_activation=geglu if gemma else swiglu,
        )


@dataclass
class ReferenceCache:
    """Keys (rotated) and values of every layer, each (n_past, n_kv_heads, head_dim), rounded to dtype."""

    dtype: npt.DTypeLike = np.float64
    keys: dict[int, Array] = field(default_factory=dict)
    values: dict[int, Array] = field(default_factory=dict)
    n_past: int = 0

    def append(self, layer: int, k: Array, v: Array) -> tuple[Array, Array]:
        """Add the rows of the new tokens and return all rows of the layer."""
        k, v = k.astype(self.dtype).astype(np.float64), v.astype(self.dtype).astype(np.float64)
        if layer in self.keys:
            k, v = np.concatenate([self.keys[layer], k]), np.concatenate([self.values[layer], v])
        self.keys[layer], self.values[layer] = k, v
        return k, v


class ReferenceModel:
    """A `llama` or `gemma3` model evaluated in float64 on its dequantised weights.

    Optional tensors decide what a block does: `attn_q_norm` and `attn_k_norm` (QK-norm) and `post_attention_norm` and
    `post_ffw_norm` (sandwich norms) take part where the file has them, and a missing `output` means tied embeddings.
    Norm weights in a Gemma GGUF already include the + 1.

    Parameters
    ----------
    weights : float64 arrays by GGUF tensor name, matrices (rows, k)
    quantised : the names of those that the file stores in blocks
    simulate_activation_quantisation : pass the inputs of matmuls with quantised weights through `quantize_activations`,
        as the engine does, so that the two differ by float32 rounding alone
    cache_dtype : what keys and values are rounded to in a cache that the model makes
    """

    def __init__(
        self,
        hyperparameters: Hyperparameters,
        weights: dict[str, Array],
        *,
        quantised: frozenset[str] = frozenset(),
        simulate_activation_quantisation: bool = False,
        cache_dtype: npt.DTypeLike = np.float64,
    ) -> None:
        self.hyperparameters = hyperparameters
        self.weights = weights
        self.quantised = quantised
        self.simulate_activation_quantisation = simulate_activation_quantisation
        self.cache_dtype = cache_dtype

    @classmethod
    def from_gguf(cls, path: str | Path, **options: Any) -> ReferenceModel:
        """Dequantise every tensor of the file to float64 (8 bytes a parameter); options are the constructor's."""
        reader = gguf.GGUFReader(path)
        weights = {t.name: dequantize(t.data, t.tensor_type).astype(np.float64) for t in reader.tensors}
        quantised = frozenset(t.name for t in reader.tensors if t.tensor_type not in UNQUANTISED)
        return cls(Hyperparameters.from_reader(reader), weights, quantised=quantised, **options)

    def new_cache(self) -> ReferenceCache:
        """An empty cache for `forward` and `step`."""
        return ReferenceCache(self.cache_dtype)

    def forward(
        self,
        tokens: Sequence[int],
        *,
        cache: ReferenceCache | None = None,
        capture: dict[str, Array] | None = None,
    ) -> Array:
        """Logits (n, vocab) of tokens (n,) that follow what the cache holds; the cache grows by n positions.

        `capture` receives, each (n, hidden) but for the heads: `embd` (scaled); `result_norm`; and of every layer i

        - `blk.i.attn_norm`, and `blk.i.attn_heads` (n, n_heads · head_dim), the input of the output projection
        - `blk.i.attn_out`, its output, before Gemma's post-norm
        - `blk.i.ffn_norm`, and `blk.i.ffn_out`, the down projection's output, before Gemma's post-norm
        - `blk.i.out`, the residual stream behind the block
        """
        cache = self.new_cache() if cache is None else cache
        capture = {} if capture is None else capture
        h = embedding(self.weights["token_embd.weight"], tokens) * self.hyperparameters.embedding_scale
        capture["embd"] = h
        for layer in range(self.hyperparameters.n_layers):
            h = h + self._attention(layer, h, cache, capture)
            h = h + self._mlp(layer, h, capture)
            capture[f"blk.{layer}.out"] = h
        cache.n_past += len(tokens)
        capture["result_norm"] = self._norm("output_norm", h)
        output = "output" if "output.weight" in self.weights else "token_embd"
        return self._linear(output, capture["result_norm"])

    def step(self, token: int, cache: ReferenceCache) -> Array:
        """Logits (vocab,) of one token that follows what the cache holds."""
        return self.forward([token], cache=cache)[0]

    def greedy(self, tokens: Sequence[int], n_tokens: int) -> list[int]:
        """The n_tokens most likely tokens after a prompt, one by one."""
        cache = self.new_cache()
        chosen: list[int] = []
        logits = self.forward(tokens, cache=cache)[-1] if n_tokens else None
        while len(chosen) < n_tokens:
            if chosen:
                logits = self.step(chosen[-1], cache)
            chosen.append(int(np.argmax(logits)))
        return chosen

    def _attention(self, layer: int, h: Array, cache: ReferenceCache, capture: dict[str, Array]) -> Array:
        hp, blk, n = self.hyperparameters, f"blk.{layer}", len(h)
        x = capture[f"{blk}.attn_norm"] = self._norm(f"{blk}.attn_norm", h)
        q = self._linear(f"{blk}.attn_q", x).reshape(n, hp.n_heads, hp.head_dim)
        k = self._linear(f"{blk}.attn_k", x).reshape(n, hp.n_kv_heads, hp.head_dim)
        v = self._linear(f"{blk}.attn_v", x).reshape(n, hp.n_kv_heads, hp.head_dim)
        q, k = self._norm_if_present(f"{blk}.attn_q_norm", q), self._norm_if_present(f"{blk}.attn_k_norm", k)
        q, k = self._rope(layer, q, cache.n_past), self._rope(layer, k, cache.n_past)
        k, v = cache.append(layer, k, v)
        window = None if hp.is_global(layer) else hp.sliding_window
        heads = attention(q, k, v, pos=cache.n_past, window=window).reshape(n, hp.n_heads * hp.head_dim)
        capture[f"{blk}.attn_heads"] = heads
        out = capture[f"{blk}.attn_out"] = self._linear(f"{blk}.attn_output", heads)
        return self._norm_if_present(f"{blk}.post_attention_norm", out)

    def _mlp(self, layer: int, h: Array, capture: dict[str, Array]) -> Array:
        blk = f"blk.{layer}"
        x = capture[f"{blk}.ffn_norm"] = self._norm(f"{blk}.ffn_norm", h)
        gate, up = self._linear(f"{blk}.ffn_gate", x), self._linear(f"{blk}.ffn_up", x)  # (n, intermediate)
        out = self._linear(f"{blk}.ffn_down", self.hyperparameters.gated_activation(gate, up))
        capture[f"{blk}.ffn_out"] = out
        return self._norm_if_present(f"{blk}.post_ffw_norm", out)

    def _rope(self, layer: int, x: Array, pos: int) -> Array:
        hp = self.hyperparameters
        return rope(
            x,
            pos + np.arange(len(x)),
            theta=hp.rope_theta if hp.is_global(layer) else hp.local_rope_theta,
            pairing=hp.rope_pairing,
            n_dims=hp.rope_dims,
            freq_factors=self.weights.get("rope_freqs.weight"),
        )

    def _linear(self, name: str, x: Array) -> Array:
        name += ".weight"
        if self.simulate_activation_quantisation and name in self.quantised:
            x = dequantize_activations(*quantize_activations(x))
        return matmul(self.weights[name], x)

    def _norm(self, name: str, x: Array) -> Array:
        return rmsnorm(x, self.weights[f"{name}.weight"], eps=self.hyperparameters.rms_norm_eps)

    def _norm_if_present(self, name: str, x: Array) -> Array:
        return self._norm(name, x) if f"{name}.weight" in self.weights else x


# Judging an engine


def perplexity(
    forward: Callable[[list[int]], np.ndarray],
    tokens: Sequence[int],
    *,
    n_ctx: int = 512,
    bos: int | None = None,
    n_chunks: int | None = None,
) -> list[float]:
    """Running perplexity after each window of n_ctx tokens, by the convention of llama.cpp's perplexity tool.

    tokens : of the whole text, with BOS in front where the model adds one; the incomplete last window is dropped.
    bos : the token that replaces the first of every window, None where the model adds none.
    forward : logits (n_ctx, vocab) of one window from an empty cache. Those at n_ctx / 2 .. n_ctx - 2 score the token
    that follows; the first half is context only.
    """
    total, running = 0.0, []
    rows, targets = slice(n_ctx // 2, n_ctx - 1), slice(n_ctx // 2 + 1, n_ctx)
    n_available = len(tokens) // n_ctx
    for i in range(n_available if n_chunks is None else min(n_chunks, n_available)):
        window = list(tokens[i * n_ctx : (i + 1) * n_ctx])
        scored = window[targets]
        if bos is not None:
            window[0] = bos
        for logits, target in zip(forward(window)[rows], scored, strict=True):
            shifted = logits.astype(np.float64) - logits.max()
            total += np.log(np.exp(shifted).sum()) - shifted[target]
        running.append(float(np.exp(total / (len(running) + 1) / len(scored))))
    return running


def greedy_disagreements(logits: Array, chosen: Sequence[int], *, near_tie: float = 0.05) -> list[int]:
    """Rows where the chosen token falls short of the best by near_tie or more: logits (n, vocab), chosen (n,).

    Give it the oracle's logits over the engine's own continuation, so that a near tie early on does not hide the rest.
    """
    gap = logits.max(axis=-1) - logits[np.arange(len(chosen)), np.asarray(chosen, np.int64)]
    return [int(row) for row in np.flatnonzero(gap >= near_tie)]
