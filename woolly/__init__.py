"""Woolly: LLM inference on CPUs at the hardware's limit, with the same bits every time.

>>> import woolly
>>> model = woolly.load("smollm2")
>>> print(model.chat([{"role": "user", "content": "Hi"}]).text)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> module that defines it. Imported at first use: `woolly --help` should not pay for the kernels.
_HOME = {
    "CancelledError": "errors",
    "ChatTemplate": "chat",
    "CheckpointError": "errors",
    "Completion": "session",
    "ContextFullError": "errors",
    "DownloadError": "errors",
    "GGUFError": "errors",
    "GGUFFile": "gguf_file",
    "KVCache": "_kernels",
    "MemoryPlan": "model",
    "Model": "model",
    "ModelConfig": "config",
    "NonFiniteError": "errors",
    "NotEnoughMemoryError": "errors",
    "PackedMatrix": "_kernels",
    "Piece": "session",
    "PromptExplanation": "prompts",
    "SamplingParams": "sampling",
    "Session": "session",
    "TemplateError": "errors",
    "Timing": "session",
    "Tokenizer": "tokenizer",
    "UnsupportedFormatError": "errors",
    "UnsupportedISAError": "errors",
    "UnsupportedModelError": "errors",
    "WoollyError": "errors",
    "load": "loading",
    "load_fast_fp32": "loading",
    "load_gguf": "loading",
    "show_config": "environment",
    "use_isa": "_kernels",
}

__all__ = [
    "CancelledError",
    "ChatTemplate",
    "CheckpointError",
    "Completion",
    "ContextFullError",
    "DownloadError",
    "GGUFError",
    "GGUFFile",
    "KVCache",
    "MemoryPlan",
    "Model",
    "ModelConfig",
    "NonFiniteError",
    "NotEnoughMemoryError",
    "PackedMatrix",
    "Piece",
    "PromptExplanation",
    "SamplingParams",
    "Session",
    "TemplateError",
    "Timing",
    "Tokenizer",
    "UnsupportedFormatError",
    "UnsupportedISAError",
    "UnsupportedModelError",
    "WoollyError",
    "__version__",
    "load",
    "load_fast_fp32",
    "load_gguf",
    "show_config",
    "use_isa",
]

if TYPE_CHECKING:
    from woolly._kernels import KVCache, PackedMatrix, use_isa
    from woolly.chat import ChatTemplate
    from woolly.config import ModelConfig
    from woolly.environment import show_config
    from woolly.errors import (
        CancelledError,
        CheckpointError,
        ContextFullError,
        DownloadError,
        GGUFError,
        NonFiniteError,
        NotEnoughMemoryError,
        TemplateError,
        UnsupportedFormatError,
        UnsupportedISAError,
        UnsupportedModelError,
        WoollyError,
    )
    from woolly.gguf_file import GGUFFile
    from woolly.loading import load, load_fast_fp32, load_gguf
    from woolly.model import MemoryPlan, Model
    from woolly.prompts import PromptExplanation
    from woolly.sampling import SamplingParams
    from woolly.session import Completion, Piece, Session, Timing
    from woolly.tokenizer import Tokenizer


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'woolly' has no attribute {name!r}")
    value = getattr(import_module(f"woolly.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
