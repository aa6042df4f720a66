"""Sizes of models by name, and the matrices that a layer of each multiplies by."""

from __future__ import annotations

from dataclasses import dataclass

from woolly.config import ModelConfig
from woolly.errors import WoollyError


@dataclass(frozen=True)
class Size:
    """The dimensions of a transformer with grouped-query attention."""

    vocab_size: int
    hidden_size: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    intermediate_size: int

    def matrices(self) -> dict[str, tuple[int, int]]:
        """(n_rows, n_cols) of each matmul of a decode step: matrices that share their input are one."""
        q_size, kv_size = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        return {
            "qkv": (q_size + 2 * kv_size, self.hidden_size),
            "output": (self.hidden_size, q_size),
            "gate_up": (2 * self.intermediate_size, self.hidden_size),
            "down": (self.hidden_size, self.intermediate_size),
            "head": (self.vocab_size, self.hidden_size),
        }


SIZES = {
    "tiny": Size(320, 64, 2, 4, 2, 16, 128),
    "smollm2": Size(49152, 576, 30, 9, 3, 64, 1536),
    "gemma3-270m": Size(262144, 640, 18, 4, 1, 256, 2048),
    "small": Size(32000, 1024, 24, 16, 4, 64, 2816),
    "1b": Size(49152, 2048, 22, 32, 4, 64, 5632),
    "7b": Size(32000, 4096, 32, 32, 32, 128, 11008),
}


def size_named(name: str) -> Size:
    """A size of the table.

    Raises
    ------
    WoollyError
        There is no such name; the message lists those that are.
    """
    if name not in SIZES:
        raise WoollyError(f"size {name!r} is unknown; those that are known: {', '.join(SIZES)}")
    return SIZES[name]


def size_of(config: ModelConfig) -> Size:
    """The dimensions of a model."""
    c = config
    return Size(c.vocab_size, c.hidden_size, c.n_layers, c.n_heads, c.n_kv_heads, c.head_dim, c.intermediate_size)
