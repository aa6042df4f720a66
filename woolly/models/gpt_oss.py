"""gpt-oss: mixtures of experts, attention sinks, and a sliding window on every other layer.

    x += Wo attention(rmsnorm(x))        each head's softmax has one more score, its sink; even layers slide
    x += sum over the best experts e of weight[e] (Wdown[e] glu(Wgate[e] h, Wup[e] h)),  h = rmsnorm(x)
         glu(g, u) = g sigmoid(1.702 g) (u + 1), with g <= 7 and |u| <= 7
    logits = head(rmsnorm(x))

Weights are a softmax over the chosen experts' scores. All matrices of a layer have biases. RoPE is scaled by YaRN, the
ends of whose ramp are not rounded to whole dimensions. OpenAI 2025, arXiv:2508.10925.
"""

from __future__ import annotations

import dataclasses

from woolly import layers
from woolly._kernels import Program
from woolly.config import ModelConfig
from woolly.metadata import Metadata
from woolly.models import gguf_config
from woolly.weights import Weights

GLOBAL_EVERY = 2


def read_config(metadata: Metadata) -> ModelConfig:
    """The configuration from a GGUF file's metadata."""
    return gguf_config.read_config(
        metadata,
        rope_pairing="neox",
        activation="swiglu_clamped",
        sliding_window=gguf_config.read_window(metadata, "gpt-oss"),
        global_every=gguf_config.read_period(metadata, "gpt-oss", GLOBAL_EVERY),
        experts=gguf_config.read_experts(metadata, gating="softmax_chosen", required=True),
    )


def record(p: Program, config: ModelConfig, weights: Weights, n_ctx: int) -> None:
    """Record the forward pass on a program."""
    scaling = dataclasses.replace(config.rope_scaling, rounded=False)
    rope = layers.RopeTable(n_ctx, config.rope_dim, config.rope_theta, scaling=scaling)
    x, embedding = layers.embed(p, config, weights)
    for i in range(config.n_layers):
        window = config.sliding_window if (i + 1) % config.global_every else 0
        layers.block(p, x, config, weights, i, rope=rope, window=window, sinks=True, mlp_norm="post_attention_norm")
    layers.head(p, x, config, weights, embedding)
