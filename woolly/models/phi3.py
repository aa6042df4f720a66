"""Phi 3, 3.5 and 4: Llama's block with q, k and v in one tensor, gate and up in another, and RoPE over halves.

The rows of `attn_qkv` are those of q, k and v, the rows of `ffn_up` those of gate and up. Models for long contexts have
frequency factors of their own (LongRoPE). Microsoft 2024, arXiv:2404.14219.
"""

from woolly.config import ModelConfig
from woolly.metadata import Metadata
from woolly.models import gguf_config
from woolly.models.llama import record

__all__ = ["read_config", "record"]


def read_config(metadata: Metadata) -> ModelConfig:
    """The configuration from a GGUF file's metadata."""
    window = gguf_config.read_window(metadata, "phi3")
    return gguf_config.read_config(metadata, rope_pairing="neox", sliding_window=window)
