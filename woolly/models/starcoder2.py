"""StarCoder 2: Llama's block with LayerNorms, biases everywhere, and an MLP without a gate.

    x += Wo attention(layernorm(x)) + bo
    x += Wdown gelu(Wup h + bup) + bdown,  h = layernorm(x)
    logits = head(layernorm(x))

Lozhkov et al. 2024, arXiv:2402.19173.
"""

from woolly.config import ModelConfig
from woolly.metadata import Metadata
from woolly.models import gguf_config
from woolly.models.llama import record

__all__ = ["read_config", "record"]


def read_config(metadata: Metadata) -> ModelConfig:
    """The configuration from a GGUF file's metadata."""
    return gguf_config.read_config(
        metadata,
        rope_pairing="neox",
        activation="gelu_tanh",
        has_gate=False,
        has_layer_norm=True,
        sliding_window=gguf_config.read_window(metadata, "starcoder2"),
    )
