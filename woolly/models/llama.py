"""Llama and its many descendants (Llama 1 to 3, Mistral, SmolLM2, TinyLlama, Yi …).

    x = embed(tokens)
    for each layer:
        x += Wo attention(rmsnorm(x))
        x += Wdown (silu(Wgate h) * Wup h),  h = rmsnorm(x)
    logits = head(rmsnorm(x))

Touvron et al. 2023, arXiv:2302.13971. GGUF files hold Wq and Wk permuted so that RoPE pairs adjacent dimensions.
"""

from __future__ import annotations

from woolly import layers
from woolly._kernels import Program
from woolly.config import ModelConfig
from woolly.errors import UnsupportedModelError
from woolly.metadata import Metadata
from woolly.models import gguf_config
from woolly.weights import Weights


def read_config(metadata: Metadata) -> ModelConfig:
    """The configuration from a GGUF file's metadata."""
    if metadata.get_int("llama.expert_count", 0):
        raise UnsupportedModelError("llama.expert_count: mixtures of experts are not supported yet")
    return gguf_config.read_config(metadata)


def record(p: Program, config: ModelConfig, weights: Weights, n_ctx: int) -> None:
    """Record the forward pass on a program."""
    freq_factors = None
    if "rope_freqs.weight" in weights:
        freq_factors = weights.vector("rope_freqs.weight", config.rope_dim // 2)
    rope = layers.RopeTable(n_ctx, config.rope_dim, config.rope_theta, freq_factors=freq_factors)
    embedding = weights.matrix("token_embd.weight", (config.vocab_size, config.hidden_size))
    q_size = config.n_heads * config.head_dim

    x = p.embed("x", embedding)
    for i in range(config.n_layers):
        blk = f"blk.{i}."
        h = layers.rmsnorm(p, "h", x, config, weights, blk + "attn_norm")
        heads = layers.attention(p, h, config, weights, i, rope=rope, pairing="norm")
        w_out = weights.matrix(blk + "attn_output.weight", (config.hidden_size, q_size))
        p.matmul([x], heads, [w_out], accumulate=True, name=blk + "attn_residual")
        h = layers.rmsnorm(p, "h", x, config, weights, blk + "ffn_norm")
        gated = layers.gated_mlp(p, h, config, weights, i)
        w_down = weights.matrix(blk + "ffn_down.weight", (config.hidden_size, config.intermediate_size))
        p.matmul([x], gated, [w_down], accumulate=True, name=blk + "ffn_residual")
    layers.head(p, x, config, weights, embedding)
