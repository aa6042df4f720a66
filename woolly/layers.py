"""The parts that transformer blocks are made of, as operations recorded on a `Program`.

Each function takes the program, names of its activation buffers, and weights by their prefix in the file, and says in
a line or two what it computes. How the parts go together is an architecture's business, in `woolly.models`.

    x   the residual stream        h   its normalised copy        q k v   heads, side by side
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from woolly._kernels import PackedMatrix, Program
from woolly.config import ModelConfig
from woolly.errors import GGUFError
from woolly.weights import Weights


class RopeTable:
    """cos and sin of every position's rotation angles, made in float64.

    Parameters
    ----------
    n_ctx : int
    n_rot : int
        Dimensions of a head that are rotated.
    theta : float
    freq_factors : float32, (n_rot / 2,), optional
        Divide the frequencies (Llama 3's long contexts).

    Attributes
    ----------
    cos, sin : float32, (n_ctx, n_rot / 2)

    Raises
    ------
    GGUFError
        The base and the factors do not make finite angles.
    """

    def __init__(
        self, n_ctx: int, n_rot: int, theta: float, *, freq_factors: NDArray[np.float32] | None = None
    ) -> None:
        if freq_factors is not None and not (np.isfinite(freq_factors) & (freq_factors > 0)).all():
            raise GGUFError("rope_freqs: expected frequency factors above 0, found others")
        with np.errstate(over="ignore"):
            frequencies = theta ** (-np.arange(0, n_rot, 2, dtype=np.float64) / n_rot)
        if not np.isfinite(frequencies * n_ctx).all():
            raise GGUFError(f"rope.freq_base: {theta} makes frequencies that are not finite")
        if freq_factors is not None:
            frequencies = frequencies / freq_factors.astype(np.float64)
        angles = np.arange(n_ctx, dtype=np.float64)[:, None] * frequencies
        self.cos = np.cos(angles).astype(np.float32)
        self.sin = np.sin(angles).astype(np.float32)


def attention(
    p: Program,
    h: str,
    config: ModelConfig,
    weights: Weights,
    layer: int,
    *,
    rope: RopeTable | None,
    pairing: str,
    window: int = 0,
    qk_norm: bool = False,
) -> str:
    """Grouped-query attention up to its output projection: softmax(scale * q k) v, heads side by side in "heads"."""
    blk, name = f"blk.{layer}.", f"blk.{layer}.attn_"
    q_size, kv_size = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    q, k, v = p.matmul(
        ["q", "k", "v"],
        h,
        [
            weights.matrix(blk + "attn_q.weight", (q_size, config.hidden_size)),
            weights.matrix(blk + "attn_k.weight", (kv_size, config.hidden_size)),
            weights.matrix(blk + "attn_v.weight", (kv_size, config.hidden_size)),
        ],
        name=name + "qkv",
    )
    p.rope_store(
        q,
        k,
        v,
        layer=layer,
        n_heads=config.n_heads,
        n_kv_heads=config.n_kv_heads,
        head_dim=config.head_dim,
        cos=rope.cos if rope else None,
        sin=rope.sin if rope else None,
        pairing=pairing,
        scale=config.attention_scale,
        q_norm=weights.vector(blk + "attn_q_norm.weight", config.head_dim) if qk_norm else None,
        k_norm=weights.vector(blk + "attn_k_norm.weight", config.head_dim) if qk_norm else None,
        eps=config.rms_norm_eps,
        name=name + "rope",
    )
    return p.attention("heads", q, layer=layer, n_heads=config.n_heads, window=window, name=name + "heads")


def gated_mlp(p: Program, h: str, config: ModelConfig, weights: Weights, layer: int) -> str:
    """activation(gate h) * (up h), up to the down projection."""
    blk = f"blk.{layer}."
    shape = (config.intermediate_size, config.hidden_size)
    gate, up = p.matmul(
        ["gate", "up"],
        h,
        [weights.matrix(blk + "ffn_gate.weight", shape), weights.matrix(blk + "ffn_up.weight", shape)],
        name=blk + "ffn_gate_up",
    )
    return p.glu(gate, gate, up, activation=config.activation, name=blk + "ffn_glu")


def rmsnorm(p: Program, out: str, x: str, config: ModelConfig, weights: Weights, name: str, **options: bool) -> str:
    """RMSNorm by the weights `name`.weight."""
    weight = weights.vector(name + ".weight", config.hidden_size)
    return p.rmsnorm(out, x, weight, eps=config.rms_norm_eps, name=name, **options)


def head(p: Program, x: str, config: ModelConfig, weights: Weights, embedding: PackedMatrix) -> None:
    """Final norm and logits, for the rows that are wanted; the embedding serves as the head where the file has none."""
    last = rmsnorm(p, "h", p.select("last", x), config, weights, "output_norm")
    output = embedding
    if "output.weight" in weights:
        output = weights.matrix("output.weight", (config.vocab_size, config.hidden_size))
    p.matmul(["logits"], last, [output], name="logits")
