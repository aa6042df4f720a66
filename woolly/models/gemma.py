"""Gemma: Llama's block with GeGLU, and embeddings times sqrt(hidden_size).

Gemma Team 2024, arXiv:2403.08295. GGUF files hold norm weights with the architecture's + 1 added already.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from woolly.config import ModelConfig
from woolly.metadata import Metadata
from woolly.models import gguf_config
from woolly.models.llama import record

__all__ = ["read_config", "record"]


def read_config(metadata: Metadata, *, layers_of_27b: int = 0, **differences: Any) -> ModelConfig:
    """The configuration from a GGUF file's metadata; `differences` are what later Gemmas do their way.

    Their size of 27B, known by its number of layers, is the one whose attention scale is not head_dim ** -0.5.
    """
    arch = metadata.get_str("general.architecture")
    hidden_size = gguf_config.read_int(metadata, f"{arch}.embedding_length", 1, gguf_config.MAX_SIZE)
    config = gguf_config.read_config(
        metadata,
        rope_pairing="neox",
        activation="gelu_tanh",
        embedding_scale=math.sqrt(hidden_size),
        **differences,
    )
    if config.n_layers == layers_of_27b:
        config = dataclasses.replace(config, attention_scale=(hidden_size / config.n_heads) ** -0.5)
    return config
