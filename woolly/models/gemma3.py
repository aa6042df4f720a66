"""Gemma 3, text.

    x = sqrt(hidden_size) embed(tokens)
    for each layer:
        x += rmsnorm(Wo attention(rmsnorm(x)))             q and k are normalised per head before RoPE
        x += rmsnorm(Wdown (gelu(Wgate h) * Wup h)),  h = rmsnorm(x)
    logits = head(rmsnorm(x))

Every sixth layer attends to all positions, with the file's RoPE base; the others to a sliding window, with base 10,000.
Gemma Team 2025, arXiv:2503.19786. GGUF files hold norm weights with the architecture's + 1 added already.
"""

from __future__ import annotations

import math

from woolly import layers
from woolly._kernels import Program
from woolly.config import ModelConfig
from woolly.errors import UnsupportedModelError
from woolly.metadata import Metadata
from woolly.models import gguf_config
from woolly.weights import Weights

GLOBAL_EVERY = 6
LOCAL_ROPE_THETA = 10000.0
LAYERS_OF_27B = 62  # the one size whose attention scale is not head_dim ** -0.5


def read_config(metadata: Metadata) -> ModelConfig:
    """The configuration from a GGUF file's metadata."""
    config = gguf_config.read_config(
        metadata,
        activation="gelu_tanh",
        embedding_scale=math.sqrt(gguf_config.read_int(metadata, "gemma3.embedding_length", 1, gguf_config.MAX_SIZE)),
        sliding_window=gguf_config.read_int(metadata, "gemma3.attention.sliding_window", 0, gguf_config.MAX_SIZE, 0),
        rope_theta=gguf_config.read_positive(metadata, "gemma3.rope.freq_base", 1e12, 1e6),
        rope_theta_local=gguf_config.read_positive(metadata, "gemma3.rope.freq_base_swa", 1e12, LOCAL_ROPE_THETA),
    )
    if config.n_layers == LAYERS_OF_27B:
        raise UnsupportedModelError("gemma3.block_count: the 27B model's attention scale is not supported yet")
    return config


def record(p: Program, config: ModelConfig, weights: Weights, n_ctx: int) -> None:
    """Record the forward pass on a program."""
    rope_global = layers.RopeTable(n_ctx, config.rope_dim, config.rope_theta)
    rope_local = layers.RopeTable(n_ctx, config.rope_dim, config.rope_theta_local)
    embedding = weights.matrix("token_embd.weight", (config.vocab_size, config.hidden_size))
    q_size = config.n_heads * config.head_dim

    x = p.embed("x", embedding, factor=config.embedding_scale)
    for i in range(config.n_layers):
        blk = f"blk.{i}."
        is_global = (i + 1) % GLOBAL_EVERY == 0
        h = layers.rmsnorm(p, "h", x, config, weights, blk + "attn_norm")
        heads = layers.attention(
            p,
            h,
            config,
            weights,
            i,
            rope=rope_global if is_global else rope_local,
            pairing="neox",
            window=0 if is_global else config.sliding_window,
            qk_norm=True,
        )
        w_out = weights.matrix(blk + "attn_output.weight", (config.hidden_size, q_size))
        out = p.matmul(["out"], heads, [w_out], name=blk + "attn_out")
        layers.rmsnorm(p, x, out, config, weights, blk + "post_attention_norm", accumulate=True)
        h = layers.rmsnorm(p, "h", x, config, weights, blk + "ffn_norm")
        gated = layers.gated_mlp(p, h, config, weights, i)
        w_down = weights.matrix(blk + "ffn_down.weight", (config.hidden_size, config.intermediate_size))
        out = p.matmul(["out"], gated, [w_down], name=blk + "ffn_out")
        layers.rmsnorm(p, x, out, config, weights, blk + "post_ffw_norm", accumulate=True)
    layers.head(p, x, config, weights, embedding)
