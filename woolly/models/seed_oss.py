"""Seed-OSS: Llama's block with biases on q, k and v, and RoPE over the halves of a head.

The norm before the MLP has the name of one behind the attention in GGUF files. ByteDance Seed Team 2025,
"Seed-OSS Open-Source Models".
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
    return gguf_config.read_config(metadata, rope_pairing="neox")


def record(p: Program, config: ModelConfig, weights: Weights, n_ctx: int) -> None:
    """Record the forward pass on a program."""
    rope = layers.rope_table(config, weights, n_ctx)
    x, embedding = layers.embed(p, config, weights)
    for i in range(config.n_layers):
        layers.block(p, x, config, weights, i, rope=rope, mlp_norm="post_attention_norm")
    layers.head(p, x, config, weights, embedding)
