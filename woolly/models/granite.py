"""Granite 3 and the dense models of Granite 4: Llama's block with multipliers.

They are of the embeddings, attention scores, residual branches and logits:

    x = embedding_scale embed(tokens)
    x += residual_scale Wo attention(rmsnorm(x)),  scores are attention_scale (q . k)
    x += residual_scale Wdown (silu(Wgate h) * Wup h),  h = rmsnorm(x)
    logits = head(rmsnorm(x)) / logit_divisor

The residual stream that `capture` shows is x / residual_scale (see `layers.embed`). IBM 2024, "Granite 3.0 Language
Models".
"""

from __future__ import annotations

from woolly.config import ModelConfig
from woolly.errors import UnsupportedModelError
from woolly.metadata import Metadata
from woolly.models import gguf_config
from woolly.models.llama import record

__all__ = ["read_config", "record"]


def read_config(metadata: Metadata) -> ModelConfig:
    """The configuration from a GGUF file's metadata."""
    if not metadata.get_bool("granite.rope.scaling.finetuned", True):
        raise UnsupportedModelError("granite.rope.scaling.finetuned: models without RoPE are not supported yet")
    scales = {
        name: gguf_config.read_scale(metadata, f"granite.{name}") for name in ("embedding_scale", "residual_scale")
    }
    if metadata.get_float("granite.attention.scale", 0.0):
        scales["attention_scale"] = gguf_config.read_scale(metadata, "granite.attention.scale")
    # Dense models of Granite 4 give the MLP's size again as that of experts which they do not have.
    metadata.get_int("granite.expert_shared_feed_forward_length", 0)
    return gguf_config.read_config(
        metadata, logit_scale=1 / gguf_config.read_scale(metadata, "granite.logit_scale"), **scales
    )
