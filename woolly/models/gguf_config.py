"""Reading the configuration that all architectures share from GGUF metadata, with every value checked."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import numpy as np

from woolly.config import ModelConfig
from woolly.errors import GGUFError, UnsupportedModelError
from woolly.metadata import Metadata, StringArray, show

MAX_LAYERS = 256
MAX_SIZE = 1 << 24  # of a hidden, intermediate or context size
MAX_HEAD_DIM = 1024

# Keys under an architecture's name that say nothing about how logits are computed.
HARMLESS_KEYS = frozenset(
    {
        "embedding_length_out",
        "pooling_type",
        "rope.scaling.finetuned",
        "rope.scaling.original_context_length",  # counts only with a scaling type, which is read
        "tensor_data_layout",
        "vocab_size",  # the tokenizer's list and the embedding decide
    }
)


def read_config(metadata: Metadata, **differences: Any) -> ModelConfig:
    """The configuration under `general.architecture`'s keys; `differences` override what an architecture does its way.

    Raises
    ------
    GGUFError
        A key is missing, has the wrong type, or a value that no model can have.
    UnsupportedModelError
        A key asks for arithmetic that is not implemented.
    """
    arch = metadata.get_str("general.architecture")
    n_layers = read_int(metadata, f"{arch}.block_count", 1, MAX_LAYERS)
    hidden_size = read_int(metadata, f"{arch}.embedding_length", 1, MAX_SIZE)
    n_heads = read_int(metadata, f"{arch}.attention.head_count", 1, 4096)
    n_kv_heads = read_int(metadata, f"{arch}.attention.head_count_kv", 1, 4096, n_heads)
    if n_heads % n_kv_heads:
        raise GGUFError(f"{arch}.attention.head_count: {n_heads} heads are not a multiple of {n_kv_heads} KV heads")
    key_length = f"{arch}.attention.key_length"
    if key_length not in metadata and hidden_size % n_heads:
        raise GGUFError(f"{arch}.embedding_length: {hidden_size} is not a multiple of {n_heads} heads")
    head_dim = read_int(metadata, key_length, 1, MAX_HEAD_DIM, hidden_size // n_heads)
    value_dim = read_int(metadata, f"{arch}.attention.value_length", 1, MAX_HEAD_DIM, head_dim)
    if value_dim != head_dim:
        raise UnsupportedModelError(f"{arch}.attention.value_length: {value_dim} differs from the keys' {head_dim}")
    rope_dim = read_int(metadata, f"{arch}.rope.dimension_count", 2, head_dim, head_dim)
    if rope_dim % 2:
        raise GGUFError(f"{arch}.rope.dimension_count: expected an even number, got {rope_dim}")
    refuse_rope_scaling(metadata, arch)
    fields: dict[str, Any] = {
        "architecture": arch,
        "vocab_size": read_vocab_size(metadata, arch),
        "hidden_size": hidden_size,
        "intermediate_size": read_int(metadata, f"{arch}.feed_forward_length", 1, MAX_SIZE),
        "n_layers": n_layers,
        "n_heads": n_heads,
        "n_kv_heads": n_kv_heads,
        "head_dim": head_dim,
        "n_ctx_train": read_int(metadata, f"{arch}.context_length", 1, MAX_SIZE),
        "rms_norm_eps": read_positive(metadata, f"{arch}.attention.layer_norm_rms_epsilon", 1.0),
        "rope_theta": read_positive(metadata, f"{arch}.rope.freq_base", 1e12, 10000.0),
        "rope_dim": rope_dim,
        "attention_scale": head_dim**-0.5,
    }
    return ModelConfig(**{**fields, **differences})


def read_int(metadata: Metadata, key: str, least: int, most: int, *default: int) -> int:
    """An integer within bounds."""
    value = metadata.get_int(key, *default)
    if not least <= value <= most:
        raise GGUFError(f"{key}: expected an integer of {least} to {most}, got {value}")
    return value


def read_positive(metadata: Metadata, key: str, most: float, *default: float) -> float:
    """A finite number above zero."""
    value = metadata.get_float(key, *default)
    if not (math.isfinite(value) and 0 < value <= most):
        raise GGUFError(f"{key}: expected a number above 0 and at most {most:g}, got {value}")
    return value


def read_vocab_size(metadata: Metadata, arch: str) -> int:
    """The number of tokens: of the tokenizer's list, which the embedding must fit."""
    if "tokenizer.ggml.tokens" in metadata:
        return len(metadata.get_array("tokenizer.ggml.tokens", "string"))
    return read_int(metadata, f"{arch}.vocab_size", 1, MAX_SIZE)


def refuse_rope_scaling(metadata: Metadata, arch: str) -> None:
    """Scaled RoPE changes the arithmetic: say so instead of ignoring it."""
    kind = metadata.get_str(f"{arch}.rope.scaling.type", "none")
    if kind != "none":
        raise UnsupportedModelError(f"{arch}.rope.scaling.type: {kind!r} is not supported yet")
    if metadata.get_float(f"{arch}.rope.scale_linear", 1.0) != 1.0:
        raise UnsupportedModelError(f"{arch}.rope.scale_linear: scaled RoPE is not supported yet")


def refuse_unread(metadata: Metadata, ignored: Collection[str] = ()) -> None:
    """Refuse a key under the architecture's name that nobody has read: it may ask for other arithmetic.

    Parameters
    ----------
    metadata : Metadata
        After the architecture's `read_config`.
    ignored : collection of str
        Further keys, without the architecture's name, that change no logits.

    Raises
    ------
    UnsupportedModelError
        Names the first such key. Neutral values pass: zero, false, empty, "none", and scales and factors of one.
    """
    prefix = metadata.get_str("general.architecture") + "."
    for key in metadata.unread(prefix):
        name = key.removeprefix(prefix)
        if name in HARMLESS_KEYS or name in ignored:
            continue
        value = metadata[key]
        is_scale = "scale" in name or "factor" in name
        if isinstance(value, StringArray | np.ndarray) or (value and value != "none" and not (is_scale and value == 1)):
            raise UnsupportedModelError(f"{show(key)} is {show(value)}: it may change the arithmetic, and is not known")
