"""Llama and its many descendants (Llama 1 to 3, Mistral, SmolLM2, TinyLlama, Yi …).

    x = embed(tokens)
    for each layer:
        x += Wo attention(rmsnorm(x))
        x += Wdown (silu(Wgate h) * Wup h),  h = rmsnorm(x)
    logits = head(rmsnorm(x))

Touvron et al. 2023, arXiv:2302.13971. GGUF files hold Wq and Wk permuted so that RoPE pairs adjacent dimensions. Where
the file has biases, they are added; where it has a sliding window, all layers have it. Mixtral is a Llama whose MLPs
are mixtures of experts: Jiang et al. 2024, arXiv:2401.04088.
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
    return gguf_config.read_config(
        metadata,
        sliding_window=gguf_config.read_window(metadata, "llama"),
        experts=gguf_config.read_experts(metadata),
    )


def record(p: Program, config: ModelConfig, weights: Weights, n_ctx: int) -> None:
    """Record the forward pass on a program."""
    rope = layers.rope_table(config, weights, n_ctx)
    x, embedding = layers.embed(p, config, weights)
    for i in range(config.n_layers):
        layers.block(p, x, config, weights, i, rope=rope, window=config.sliding_window)
    layers.head(p, x, config, weights, embedding)
