"""Qwen 2 and 2.5: Llama's block, with biases on q, k and v, and RoPE over the halves of a head.

Qwen Team 2024, arXiv:2407.10671.
"""

from woolly.config import ModelConfig
from woolly.metadata import Metadata
from woolly.models import gguf_config
from woolly.models.llama import record

__all__ = ["read_config", "record"]


def read_config(metadata: Metadata) -> ModelConfig:
    """The configuration from a GGUF file's metadata."""
    return gguf_config.read_config(metadata, rope_pairing="neox")
