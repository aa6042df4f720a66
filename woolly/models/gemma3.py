"""Gemma 3, text.

    x = sqrt(hidden_size) embed(tokens)
    for each layer:
        x += rmsnorm(Wo attention(rmsnorm(x)))             q and k are normalised per head before RoPE
        x += rmsnorm(Wdown (gelu(Wgate h) * Wup h)),  h = rmsnorm(x)
    logits = head(rmsnorm(x))

Every sixth layer attends to all positions, with the file's RoPE base and scaling; the others to a sliding window, with
base 10,000. Gemma Team 2025, arXiv:2503.19786.
"""

from __future__ import annotations

from woolly import layers
from woolly._kernels import Program
from woolly.config import ModelConfig
from woolly.metadata import Metadata
from woolly.models import gemma, gguf_config
from woolly.weights import Weights

GLOBAL_EVERY = 6
LOCAL_ROPE_THETA = 10000.0
LAYERS_OF_27B = 62


def read_config(metadata: Metadata) -> ModelConfig:
    """The configuration from a GGUF file's metadata."""
    return gemma.read_config(
        metadata,
        layers_of_27b=LAYERS_OF_27B,
        sliding_window=gguf_config.read_window(metadata, "gemma3"),
        global_every=gguf_config.read_period(metadata, "gemma3", GLOBAL_EVERY),
        rope_theta=gguf_config.read_positive(metadata, "gemma3.rope.freq_base", 1e12, 1e6),
        rope_theta_local=gguf_config.read_positive(metadata, "gemma3.rope.freq_base_swa", 1e12, LOCAL_ROPE_THETA),
        logit_softcap=gguf_config.read_scale(metadata, "gemma3.final_logit_softcapping", 0.0),
    )


def record(p: Program, config: ModelConfig, weights: Weights, n_ctx: int) -> None:
    """Record the forward pass on a program."""
    rope_global = layers.rope_table(config, weights, n_ctx)
    rope_local = layers.RopeTable(n_ctx, config.rope_dim, config.rope_theta_local)
    x, embedding = layers.embed(p, config, weights)
    for i in range(config.n_layers):
        is_global = not config.sliding_window or (i + 1) % config.global_every == 0
        rope, window = (rope_global, 0) if is_global else (rope_local, config.sliding_window)
        layers.block(p, x, config, weights, i, rope=rope, window=window, qk_norm="head", post_norm=True)
    layers.head(p, x, config, weights, embedding)
