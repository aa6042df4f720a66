"""The parts that transformer blocks are made of, as operations recorded on a `Program`.

Each function takes the program, names of its activation buffers, and weights by their prefix in the file, and says in
a line or two what it computes. How the parts go together is an architecture's business, in `woolly.models`.

    x   the residual stream        h   its normalised copy        q k v   heads, side by side
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from woolly._kernels import PackedMatrix, Program
from woolly.config import ExpertConfig, ModelConfig, RopeScaling, yarn_attention_factor
from woolly.errors import GGUFError
from woolly.weights import Weights

NOT_SCALED = RopeScaling()


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
    scaling : RopeScaling, optional

    Attributes
    ----------
    cos, sin : float32, (n_ctx, n_rot / 2)
        Times the attention factor.

    Raises
    ------
    GGUFError
        The base does not make finite frequencies.
    """

    def __init__(
        self,
        n_ctx: int,
        n_rot: int,
        theta: float,
        *,
        freq_factors: NDArray[np.float32] | None = None,
        scaling: RopeScaling = NOT_SCALED,
    ) -> None:
        with np.errstate(over="ignore"):
            frequencies = theta ** (-np.arange(0, n_rot, 2, dtype=np.float64) / n_rot)
        if not np.isfinite(frequencies * n_ctx).all():
            raise GGUFError(f"rope.freq_base: {theta} makes frequencies that are not finite")
        if freq_factors is not None:
            frequencies = frequencies / freq_factors.astype(np.float64)
        factor = scaling.attention_factor
        if scaling.kind == "linear":
            frequencies = frequencies / scaling.factor
        elif scaling.kind == "yarn":
            slow = yarn_ramp(n_rot, theta, scaling)
            frequencies = frequencies * (1 - slow) + frequencies / scaling.factor * slow
            factor *= yarn_attention_factor(scaling.factor)
        cos, sin = _turns(n_ctx, frequencies)
        self.cos = (factor * cos).astype(np.float32)
        self.sin = (factor * sin).astype(np.float32)


def _turns(n_ctx: int, frequencies: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """cos and sin of pos f for every position, (n_ctx, n_rot / 2): a turn by 64 a f, then one by b f.

    A product costs a tenth of a cosine, and its rounding is as far below float32's.
    """
    a = np.arange(0, n_ctx, 64, dtype=np.float64)[:, None, None] * frequencies
    b = np.arange(64, dtype=np.float64)[:, None] * frequencies
    cos_a, sin_a, cos_b, sin_b = np.cos(a), np.sin(a), np.cos(b), np.sin(b)
    cos, sin = cos_a * cos_b, sin_a * cos_b
    cos -= sin_a * sin_b
    sin += cos_a * sin_b
    return tuple(table.reshape(-1, len(frequencies))[:n_ctx] for table in (cos, sin))


def yarn_ramp(n_rot: int, theta: float, scaling: RopeScaling) -> NDArray[np.float64]:
    """How slow each frequency is, float64 (n_rot / 2,): 0 where it is kept, 1 where it is divided by the factor.

    Peng et al. 2023, arXiv:2309.00071, section 3.2; where the ends are rounded, then outwards to whole dimensions.
    """

    def dimension(turns: float) -> float:
        """Where a frequency makes so many turns within the original context."""
        return n_rot * math.log(scaling.n_ctx_original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.rounded:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, n_rot - 1)
    return np.clip((np.arange(n_rot // 2) - first) / max(0.001, last - first), 0, 1)


def rope_table(config: ModelConfig, weights: Weights, n_ctx: int) -> RopeTable:
    """The rotations of a model with one RopeTable, by the file's frequency factors where it has them.

    LongRoPE has two sets of factors: n_ctx chooses, so that a position turns by one angle whatever has been read.
    Ding et al. 2024, arXiv:2402.13753.
    """
    factors = None
    if config.rope_scaling.kind == "longrope" or "rope_factors_long.weight" in weights:
        short, long = (_factors(weights, f"rope_factors_{name}.weight", config) for name in ("short", "long"))
        factors = long if n_ctx > config.rope_scaling.n_ctx_original else short
    elif "rope_freqs.weight" in weights:
        factors = _factors(weights, "rope_freqs.weight", config)
    return RopeTable(n_ctx, config.rope_dim, config.rope_theta, freq_factors=factors, scaling=config.rope_scaling)


def _factors(weights: Weights, name: str, config: ModelConfig) -> NDArray[np.float32]:
    factors = weights.vector(name, config.rope_dim // 2)
    if not (np.isfinite(factors) & (factors > 0)).all():
        raise GGUFError(f"tensor {name!r}: expected finite frequency factors above 0")
    return factors


def embed(p: Program, config: ModelConfig, weights: Weights) -> tuple[str, PackedMatrix]:
    """The residual stream, and the embedding, which may serve as the head.

    The stream is kept divided by `residual_scale`, so that what is added to it needs no scaling: norms undo the
    difference when their eps is divided by its square.
    """
    embedding = weights.matrix("token_embd.weight", (config.vocab_size, config.hidden_size))
    return p.embed("x", embedding, factor=config.embedding_scale / config.residual_scale), embedding


def block(
    p: Program,
    x: str,
    config: ModelConfig,
    weights: Weights,
    layer: int,
    *,
    rope: RopeTable | None,
    window: int = 0,
    qk_norm: str = "",
    pre_norm: bool = True,
    post_norm: bool = False,
    sinks: bool = False,
    mlp_norm: str = "ffn_norm",
) -> None:
    """x += post(Wo attention(pre(x))); x += post(Wdown mlp(pre(x))), where pre and post are norms, or nothing.

    Where the model has experts, they stand in place of the MLP. mlp_norm is the name of the norm before either.
    """
    blk = f"blk.{layer}."
    post = (blk + "post_attention_norm", blk + "post_ffw_norm") if post_norm else (None, None)
    h = norm(p, "h", x, config, weights, blk + "attn_norm") if pre_norm else x
    heads = attention(p, h, config, weights, layer, rope=rope, window=window, qk_norm=qk_norm, sinks=sinks)
    add_output(p, x, heads, config, weights, blk + "attn_output", blk + "attn", post[0])
    h = norm(p, "h", x, config, weights, blk + mlp_norm) if pre_norm else x
    if config.experts is not None:
        assert not post_norm
        add_experts(p, x, h, config, weights, layer)
        return
    hidden = mlp(p, h, config, weights, layer)
    add_output(p, x, hidden, config, weights, blk + "ffn_down", blk + "ffn", post[1])


def attention(
    p: Program,
    h: str,
    config: ModelConfig,
    weights: Weights,
    layer: int,
    *,
    rope: RopeTable | None,
    window: int = 0,
    qk_norm: str = "",
    sinks: bool = False,
) -> str:
    """Grouped-query attention up to its output projection: softmax(scale * q k) v, heads side by side in "heads".

    qk_norm : q and k are normalised by "head", over the whole "width", or "" not at all.
    sinks : each head has a score that takes part in its softmax with no value.
    """
    blk, name = f"blk.{layer}.", f"blk.{layer}.attn_"
    sizes = {"q": config.n_heads * config.head_dim}
    sizes["k"] = sizes["v"] = config.n_kv_heads * config.head_dim
    if f"{name}qkv.weight" in weights:
        matrices = weights.matrices(f"{name}qkv.weight", list(sizes.values()), config.hidden_size)
    else:
        matrices = [weights.matrix(f"{name}{i}.weight", (n, config.hidden_size)) for i, n in sizes.items()]
    p.matmul(list(sizes), h, matrices, name=name + "qkv")
    if f"{name}qkv.bias" in weights:
        bias = weights.vector(f"{name}qkv.bias", sum(sizes.values()))
        for i, part in zip(sizes, np.split(bias, np.cumsum(list(sizes.values()))[:-1]), strict=True):
            p.bias(i, part, name=f"{name}{i}_bias")
    else:
        for i in sizes:
            add_bias(p, i, weights, name + i)
    if qk_norm == "width":
        for i in "qk":
            weight = weights.vector(f"{name}{i}_norm.weight", sizes[i])
            p.rmsnorm(i, i, weight, eps=config.rms_norm_eps, name=f"{name}{i}_norm")
    p.rope_store(
        "q",
        "k",
        "v",
        layer=layer,
        n_heads=config.n_heads,
        n_kv_heads=config.n_kv_heads,
        head_dim=config.head_dim,
        cos=rope.cos if rope else None,
        sin=rope.sin if rope else None,
        pairing=config.rope_pairing,
        scale=config.attention_scale,
        q_norm=weights.vector(blk + "attn_q_norm.weight", config.head_dim) if qk_norm == "head" else None,
        k_norm=weights.vector(blk + "attn_k_norm.weight", config.head_dim) if qk_norm == "head" else None,
        eps=config.rms_norm_eps,
        name=name + "rope",
    )
    return p.attention(
        "heads",
        "q",
        layer=layer,
        n_heads=config.n_heads,
        window=window,
        softcap=config.attention_softcap,
        sinks=weights.vector(f"{name}sinks.weight", config.n_heads) if sinks else None,
        name=name + "heads",
    )


def mlp(p: Program, h: str, config: ModelConfig, weights: Weights, layer: int) -> str:
    """activation(gate h) * (up h), or activation(up h) where there is no gate, up to the down projection."""
    blk, n, n_cols = f"blk.{layer}.", config.intermediate_size, config.hidden_size
    if not config.has_gate:
        p.matmul(["up"], h, [weights.matrix(blk + "ffn_up.weight", (n, n_cols))], name=blk + "ffn_up")
        add_bias(p, "up", weights, blk + "ffn_up")
        return p.activate("up", "up", activation=config.activation, name=blk + "ffn_act")
    if blk + "ffn_gate.weight" in weights:
        matrices = [weights.matrix(f"{blk}ffn_{name}.weight", (n, n_cols)) for name in ("gate", "up")]
    else:  # one tensor, the gate's rows first
        matrices = weights.matrices(blk + "ffn_up.weight", (n, n), n_cols)
    p.matmul(["gate", "up"], h, matrices, name=blk + "ffn_gate_up")
    add_bias(p, "gate", weights, blk + "ffn_gate")
    add_bias(p, "up", weights, blk + "ffn_up")
    return p.glu("gate", "gate", "up", activation=config.activation, name=blk + "ffn_glu")


def add_experts(p: Program, x: str, h: str, config: ModelConfig, weights: Weights, layer: int) -> None:
    """x += sum over a token's best experts e of weight[e] (Wdown[e] (activation(Wgate[e] h) * Wup[e] h))."""
    experts, blk = config.experts, f"blk.{layer}.ffn_"
    assert experts is not None
    router = weights.matrix(blk + "gate_inp.weight", (experts.n_experts, config.hidden_size))
    p.matmul(["scores"], h, [router], exact=True, name=blk + "scores")  # rounding could change the choice
    add_bias(p, "scores", weights, blk + "gate_inp")
    p.route(
        "route",
        "scores",
        n_used=experts.n_used,
        gating=experts.gating,
        normalise=experts.normalise,
        scale=experts.scale,
        name=blk + "route",
    )
    inner = {"expert_gate": blk + "gate_exps", "expert_up": blk + "up_exps"}
    multiply_experts(p, inner, h, experts, weights, experts.intermediate_size, blk + "gate_up")
    p.glu("expert_gate", "expert_gate", "expert_up", activation=config.activation, name=blk + "glu")
    outer = {"expert_out": blk + "down_exps"}
    multiply_experts(p, outer, "expert_gate", experts, weights, config.hidden_size, blk + "down")
    p.combine(x, "expert_out", route="route", name=blk + "residual")


def multiply_experts(
    p: Program, tensors: dict[str, str], x: str, experts: ExpertConfig, weights: Weights, n_rows: int, name: str
) -> None:
    """out = W[e] x (+ b[e]) of each token's experts e, for each output and its tensor."""
    shape = (experts.n_experts, n_rows, p.width(x))
    matrices = [weights.experts(f"{tensor}.weight", shape) for tensor in tensors.values()]
    biases = [
        weights.table(f"{tensor}.bias", shape[:2]) if f"{tensor}.bias" in weights else None
        for tensor in tensors.values()
    ]
    p.expert_matmul(list(tensors), x, matrices, route="route", biases=biases, name=name)


def add_output(
    p: Program, x: str, h: str, config: ModelConfig, weights: Weights, tensor: str, name: str, post_norm: str | None
) -> None:
    """x += W h + b, or x += norm(W h + b) by the weights `post_norm`."""
    w = weights.matrix(tensor + ".weight", (config.hidden_size, p.width(h)))
    if post_norm is not None:
        out = p.matmul(["out"], h, [w], name=name + "_out")
        add_bias(p, out, weights, tensor)
        norm(p, x, out, config, weights, post_norm, accumulate=True)
    else:
        p.matmul([x], h, [w], accumulate=True, name=name + "_residual")
        add_bias(p, x, weights, tensor)


def add_bias(p: Program, x: str, weights: Weights, tensor: str) -> None:
    """x += b, where the file has `tensor`.bias."""
    if tensor + ".bias" in weights:
        p.bias(x, weights.vector(tensor + ".bias", p.width(x)), name=tensor + "_bias")


def norm(
    p: Program, out: str, x: str, config: ModelConfig, weights: Weights, name: str, *, accumulate: bool = False
) -> str:
    """The model's norm by the weights `name`.weight: of the residual stream, or added to it."""
    weight = weights.vector(name + ".weight", config.hidden_size)
    eps = config.rms_norm_eps if accumulate else config.rms_norm_eps / config.residual_scale**2
    if config.has_layer_norm:
        assert not accumulate
        bias = weights.vector(name + ".bias", config.hidden_size)
        return p.layernorm(out, x, weight, bias, eps=eps, name=name)
    return p.rmsnorm(out, x, weight, eps=eps, accumulate=accumulate, name=name)


def head(p: Program, x: str, config: ModelConfig, weights: Weights, embedding: PackedMatrix) -> None:
    """Final norm and logits, for the rows that are wanted; the embedding serves as the head where the file has none."""
    last = norm(p, "h", p.select("last", x), config, weights, "output_norm")
    if config.logit_scale != 1:
        last = p.scale(last, last, config.logit_scale, name="output_scale")
    output = embedding
    if "output.weight" in weights:
        output = weights.matrix("output.weight", (config.vocab_size, config.hidden_size))
    p.matmul(["logits"], last, [output], name="logits")
    if config.logit_softcap:
        p.softcap_logits(config.logit_softcap)
