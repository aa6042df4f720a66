"""ERNIE 4.5, dense: Llama's block, in files of its own name.

RoPE pairs adjacent dimensions already in the model as it was trained. Baidu 2025, "ERNIE 4.5 Technical Report".
"""

from woolly.config import ModelConfig
from woolly.metadata import Metadata
from woolly.models import gguf_config
from woolly.models.llama import record

__all__ = ["read_config", "record"]


def read_config(metadata: Metadata) -> ModelConfig:
    """The configuration from a GGUF file's metadata."""
    return gguf_config.read_config(metadata)
