"""OLMo 2 and 3: no norms before the halves of a block but behind them, and over the whole width of q and k.

    x += rmsnorm(Wo attention(x)),  q = rope(rmsnorm(Wq x)), k = rope(rmsnorm(Wk x))
    x += rmsnorm(Wdown (silu(Wgate x) * Wup x))
    logits = head(rmsnorm(x))

OLMo 3 is the same with a sliding window, and RoPE without scaling, on three layers of four, where the file does not say
which. OLMo Team 2024, arXiv:2501.00656.
"""

from __future__ import annotations

from woolly import layers
from woolly._kernels import Program
from woolly.config import ModelConfig
from woolly.metadata import Metadata
from woolly.models import gguf_config
from woolly.weights import Weights

GLOBAL_EVERY = 4


def read_config(metadata: Metadata) -> ModelConfig:
    """The configuration from a GGUF file's metadata."""
    theta = gguf_config.read_positive(metadata, "olmo2.rope.freq_base", 1e12, 10000.0)
    return gguf_config.read_config(
        metadata,
        rope_pairing="neox",
        sliding_window=gguf_config.read_window(metadata, "olmo2"),
        global_every=gguf_config.read_period(metadata, "olmo2", GLOBAL_EVERY),
        rope_theta_local=gguf_config.read_positive(metadata, "olmo2.rope.freq_base_swa", 1e12, theta),
    )


def record(p: Program, config: ModelConfig, weights: Weights, n_ctx: int) -> None:
    """Record the forward pass on a program."""
    rope_global = layers.rope_table(config, weights, n_ctx)
    rope_local = layers.RopeTable(n_ctx, config.rope_dim, config.rope_theta_local)
    x, embedding = layers.embed(p, config, weights)
    for i in range(config.n_layers):
        slides = config.sliding_window and (i + 1) % config.global_every
        rope, window = (rope_local, config.sliding_window) if slides else (rope_global, 0)
        layers.block(
            p, x, config, weights, i, rope=rope, window=window, qk_norm="width", pre_norm=False, post_norm=True
        )
    layers.head(p, x, config, weights, embedding)
