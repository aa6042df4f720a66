"""What a model will take in memory, from its configuration: before any of it is allocated.

Owns the estimates of the KV cache, of activations and of a vocabulary's Python objects. Weights are the business of who
reads or generates them, what there is of `woolly.memory`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from woolly._kernels import KVCache, activation_bytes, pair_columns, row_stride
from woolly.config import ModelConfig
from woolly.metadata import StringArray

# Of CPython: a str and its place in a list, an int, a place in each of two dictionaries, a float and its place.
# Measured: 63.4 MB for Gemma 3's vocabulary, where this says 65.2; 16.8 for SmolLM2's, where this says 16.0.
_TOKEN_BYTES, _MERGE_BYTES = 240, 70


def cache_bytes(config: ModelConfig, n_ctx: int, cache_dtype: str = "f16") -> int:
    """Bytes of the KV cache of one session of n_ctx tokens."""
    return KVCache.bytes_for(config.n_layers, config.n_kv_heads, config.head_dim, n_ctx, dtype=cache_dtype)


def scratch_bytes(config: ModelConfig, max_tokens: int, *, quantised: bool, compute: str = "exact") -> int:
    """Bytes, about, of the activations of a batch of max_tokens, and of a row of logits.

    quantised : whether matmuls read activations as integers, as those of quantised weights do; bf16 takes its own.
    """
    c = config
    q_size, kv_size = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    values = 4 * row_stride(c.hidden_size) + 2 * sum(map(row_stride, (q_size, kv_size, c.intermediate_size)))
    integers = 0
    if quantised or compute == "bf16":
        widths = (c.hidden_size, q_size, c.intermediate_size)
        integers = sum(activation_bytes(n, compute=compute) for n in widths)
    experts = _pair_bytes(config, max_tokens, quantised=quantised, compute=compute)
    return max_tokens * (4 * values + integers) + experts + 4 * c.vocab_size


def _pair_bytes(config: ModelConfig, max_tokens: int, *, quantised: bool, compute: str) -> int:
    """Bytes, about, of the rows of a token's pairs with its experts: their input, gate, up and output."""
    if config.experts is None:
        return 0
    hidden, inner = config.hidden_size, config.experts.intermediate_size
    n_pairs = max_tokens * config.experts.n_used
    n_bytes = n_pairs * 8 * (row_stride(hidden) + row_stride(inner))
    if quantised:
        plain = sum(activation_bytes(n, tiles=False) for n in (hidden, inner))
        tiles = 0 if compute == "bf16" else sum(map(activation_bytes, (hidden, inner))) - plain
        n_columns = pair_columns(config.experts.n_experts, config.experts.n_used, max_tokens)
        n_bytes += n_pairs * plain + n_columns * tiles
    return n_bytes


def vocabulary_bytes(metadata: Mapping[str, Any]) -> int:
    """Bytes, about, of the Python objects that a tokenizer makes of a file's vocabulary."""
    total = 0
    for key, each in (("tokenizer.ggml.tokens", _TOKEN_BYTES), ("tokenizer.ggml.merges", _MERGE_BYTES)):
        strings = metadata.get(key)
        if isinstance(strings, StringArray):
            total += len(strings) * each + strings.n_bytes
    return total
