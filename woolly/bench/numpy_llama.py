"""A llama in plain numpy float32, as one would write it first: what the optimisations of `stack` begin from.

It computes what `woolly.models.llama` records, so both can be compared; it knows one sequence, and is not made to be
fast. The matmul can be replaced, which is the second step of the stack.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from woolly.config import ModelConfig
from woolly.layers import RopeTable

Array = NDArray[np.float32]
Matmul = Callable[[str, Array], Array]  # name of a matrix and x (n, n_cols) -> (n, n_rows)


class NumpyLlama:
    """The forward pass over float32 tensors.

    Parameters
    ----------
    config : ModelConfig
    tensors : dict of str to float32 array
        By their GGUF names, dequantised.
    n_ctx : int
    matmul : callable, optional
        (name, x) -> x W^T; numpy's by default.
    """

    def __init__(
        self, config: ModelConfig, tensors: dict[str, Array], n_ctx: int, *, matmul: Matmul | None = None
    ) -> None:
        self.config = config
        self.tensors = tensors
        factors = tensors.get("rope_freqs.weight")
        self.rope = RopeTable(n_ctx, config.rope_dim, config.rope_theta, freq_factors=factors)
        self.matmul = matmul or (lambda name, x: x @ tensors[name].T)
        shape = (config.n_layers, n_ctx, config.n_kv_heads, config.head_dim)
        self.k, self.v = np.zeros(shape, dtype=np.float32), np.zeros(shape, dtype=np.float32)

    def forward(self, ids: NDArray[np.int32], pos: int) -> Array:
        """Logits of the last of n tokens at positions pos on, with the keys and values of those before in the cache."""
        x = self.tensors["token_embd.weight"][ids].copy()
        for layer in range(self.config.n_layers):
            blk = f"blk.{layer}."
            x += self._attention(layer, self._norm(x, blk + "attn_norm.weight"), pos)
            h = self._norm(x, blk + "ffn_norm.weight")
            gate, up = self.matmul(blk + "ffn_gate.weight", h), self.matmul(blk + "ffn_up.weight", h)
            x += self.matmul(blk + "ffn_down.weight", gate / (1 + np.exp(-gate)) * up)
        head = "output.weight" if "output.weight" in self.tensors else "token_embd.weight"
        return self.matmul(head, self._norm(x[-1:], "output_norm.weight"))[0]

    def _norm(self, x: Array, name: str) -> Array:
        scale = np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(self.config.rms_norm_eps))
        return x / scale * self.tensors[name]

    def _attention(self, layer: int, h: Array, pos: int) -> Array:
        c, n, blk = self.config, len(h), f"blk.{layer}.attn_"
        q = self._rotate(self.matmul(blk + "q.weight", h).reshape(n, c.n_heads, c.head_dim), pos)
        self.k[layer, pos : pos + n] = self._rotate(self.matmul(blk + "k.weight", h).reshape(n, -1, c.head_dim), pos)
        self.v[layer, pos : pos + n] = self.matmul(blk + "v.weight", h).reshape(n, -1, c.head_dim)
        n_rep, end = c.n_heads // c.n_kv_heads, pos + n
        k = np.repeat(self.k[layer, :end], n_rep, axis=1).transpose(1, 2, 0)  # (n_heads, head_dim, end)
        v = np.repeat(self.v[layer, :end], n_rep, axis=1).transpose(1, 0, 2)
        scores = q.transpose(1, 0, 2) @ k * np.float32(c.attention_scale)
        future = np.arange(end) > pos + np.arange(n)[:, None]
        scores = np.where(future, np.float32(-np.inf), scores)
        p = np.exp(scores - scores.max(axis=-1, keepdims=True))
        heads = (p / p.sum(axis=-1, keepdims=True)) @ v
        return self.matmul(blk + "output.weight", np.ascontiguousarray(heads.transpose(1, 0, 2)).reshape(n, -1))

    def _rotate(self, x: Array, pos: int) -> Array:
        """RoPE over adjacent pairs, as llama's GGUF files are permuted for."""
        cos = self.rope.cos[pos : pos + len(x), None]
        sin = self.rope.sin[pos : pos + len(x), None]
        half = cos.shape[-1]
        out = x.copy()
        a, b = x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]
        out[..., 0 : 2 * half : 2], out[..., 1 : 2 * half : 2] = a * cos - b * sin, b * cos + a * sin
        return out
