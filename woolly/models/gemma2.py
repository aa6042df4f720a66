"""Gemma 2: Gemma with norms behind each half of a block, soft caps, and a sliding window on every other layer.

    x += rmsnorm(Wo attention(rmsnorm(x)))             scores s become cap tanh(s / cap); even layers slide
    x += rmsnorm(Wdown (gelu(Wgate h) * Wup h)),  h = rmsnorm(x)
    logits = cap tanh(head(rmsnorm(x)) / cap)

Gemma Team 2024, arXiv:2408.00118.
"""

from __future__ import annotations

from woolly import layers
from woolly._kernels import Program
from woolly.config import ModelConfig
from woolly.metadata import Metadata
from woolly.models import gemma, gguf_config
from woolly.weights import Weights

WINDOW = 4096
GLOBAL_EVERY = 2
LAYERS_OF_27B = 46


def read_config(metadata: Metadata) -> ModelConfig:
    """The configuration from a GGUF file's metadata."""
    return gemma.read_config(
        metadata,
        layers_of_27b=LAYERS_OF_27B,
        sliding_window=gguf_config.read_window(metadata, "gemma2", WINDOW),
        global_every=gguf_config.read_period(metadata, "gemma2", GLOBAL_EVERY),
        attention_softcap=gguf_config.read_scale(metadata, "gemma2.attn_logit_softcapping", 50.0),
        logit_softcap=gguf_config.read_scale(metadata, "gemma2.final_logit_softcapping", 30.0),
    )


def record(p: Program, config: ModelConfig, weights: Weights, n_ctx: int) -> None:
    """Record the forward pass on a program."""
    rope = layers.rope_table(config, weights, n_ctx)
    x, embedding = layers.embed(p, config, weights)
    for i in range(config.n_layers):
        window = config.sliding_window if (i + 1) % config.global_every else 0
        layers.block(p, x, config, weights, i, rope=rope, window=window, post_norm=True)
    layers.head(p, x, config, weights, embedding)
