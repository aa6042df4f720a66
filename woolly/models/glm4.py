"""GLM-4 (0414), dense: norms before and behind both halves of a block, and RoPE on half of each head.

    x += rmsnorm(Wo attention(rmsnorm(x)))
    x += rmsnorm(Wdown (silu(Wgate h) * Wup h)),  h = rmsnorm(x)
    logits = head(rmsnorm(x))

RoPE pairs adjacent dimensions, as the model was trained. Team GLM 2024, arXiv:2406.12793.
"""

from __future__ import annotations

from woolly import layers
from woolly._kernels import Program
from woolly.config import ModelConfig
from woolly.metadata import Metadata
from woolly.models import gguf_config
from woolly.weights import Weights


def read_config(metadata: Metadata) -> ModelConfig:
    """The configuration from a GGUF file's metadata."""
    return gguf_config.read_config(metadata)


def record(p: Program, config: ModelConfig, weights: Weights, n_ctx: int) -> None:
    """Record the forward pass on a program."""
    rope = layers.rope_table(config, weights, n_ctx)
    x, embedding = layers.embed(p, config, weights)
    for i in range(config.n_layers):
        layers.block(p, x, config, weights, i, rope=rope, post_norm=True)
    layers.head(p, x, config, weights, embedding)
