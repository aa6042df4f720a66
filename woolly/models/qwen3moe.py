"""Qwen 3 with mixtures of experts: Qwen 3's attention, and experts in place of every MLP.

    x += Wo attention(h),  q = rope(rmsnorm(Wq h)), k = rope(rmsnorm(Wk h)), h = rmsnorm(x)
    x += sum over the best experts e of weight[e] Wdown[e] (silu(Wgate[e] h) * Wup[e] h),  h = rmsnorm(x)

Weights are a softmax over all scores, divided by the sum of the chosen ones. Qwen Team 2025, arXiv:2505.09388.
"""

from woolly.config import ModelConfig
from woolly.metadata import Metadata
from woolly.models import gguf_config
from woolly.models.qwen3 import record

__all__ = ["read_config", "record"]


def read_config(metadata: Metadata) -> ModelConfig:
    """The configuration from a GGUF file's metadata."""
    return gguf_config.read_config(
        metadata, rope_pairing="neox", experts=gguf_config.read_experts(metadata, required=True)
    )
