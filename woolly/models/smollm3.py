"""SmolLM3: Llama's block, with no RoPE on every fourth layer.

Hugging Face 2025, "SmolLM3: smol, multilingual, long-context reasoner"; Yang et al. 2025, arXiv:2501.18795.
"""

from __future__ import annotations

from woolly import layers
from woolly._kernels import Program
from woolly.config import ModelConfig
from woolly.metadata import Metadata
from woolly.models import gguf_config
from woolly.weights import Weights

NO_ROPE_EVERY = 4


def read_config(metadata: Metadata) -> ModelConfig:
    """The configuration from a GGUF file's metadata."""
    return gguf_config.read_config(metadata)


def record(p: Program, config: ModelConfig, weights: Weights, n_ctx: int) -> None:
    """Record the forward pass on a program."""
    rope = layers.rope_table(config, weights, n_ctx)
    x, embedding = layers.embed(p, config, weights)
    for i in range(config.n_layers):
        layers.block(p, x, config, weights, i, rope=rope if (i + 1) % NO_ROPE_EVERY else None)
    layers.head(p, x, config, weights, embedding)
