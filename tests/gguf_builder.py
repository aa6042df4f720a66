"""Small GGUF files, byte by byte, honest by default: counts, lengths and types can each be set to a lie.

Independent of both `woolly` and the `gguf` package, so that tests can write what neither would.
"""

from __future__ import annotations

import os
import random
import struct

UINT8, INT8, UINT16, INT16, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64, INT64, FLOAT64 = range(13)
F32, F16, Q4_0, Q8_0 = 0, 1, 2, 8


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def f32(value: float) -> bytes:
    return struct.pack("<f", value)


def string(text: str | bytes, *, length: int | None = None) -> bytes:
    """A string; `length` is what the file says of it."""
    raw = text.encode() if isinstance(text, str) else text
    return u64(len(raw) if length is None else length) + raw


def array(element_type: int, elements: list[bytes], *, length: int | None = None) -> bytes:
    """The value of an array; `length` is what the file says of it."""
    return u32(element_type) + u64(len(elements) if length is None else length) + b"".join(elements)


# Seconds of CPU for a file that is refused: sanitizers take several times as long.
REFUSED_S = 5 if "ASAN_OPTIONS" in os.environ else 1


class GGUFBuilder:
    """Collects keys and tensors, and puts a file together.

    Methods return the builder, so that a test can be one expression. The tensors' data are laid out one after the
    other at multiples of the alignment; an `offset` given for a tensor changes only what its entry says.
    """

    def __init__(self, *, magic: bytes = b"GGUF", version: int = 3, alignment: int = 32) -> None:
        self.magic = magic
        self.version = version
        self.alignment = alignment
        self._keys: list[bytes] = []
        self._tensors: list[bytes] = []
        self._data = b""

    def key(self, key: str | bytes, value_type: int, value: bytes, *, key_length: int | None = None) -> GGUFBuilder:
        self._keys.append(string(key, length=key_length) + u32(value_type) + value)
        return self

    def tensor(
        self,
        name: str | bytes,
        dims: list[int],
        ggml_type: int = F32,
        data: bytes = b"",
        *,
        offset: int | None = None,
        n_dims: int | None = None,
    ) -> GGUFBuilder:
        """Add a tensor; `dims` come innermost first, as the file has them."""
        self._data += bytes(-len(self._data) % self.alignment)
        entry = string(name) + u32(len(dims) if n_dims is None else n_dims) + b"".join(map(u64, dims))
        self._tensors.append(entry + u32(ggml_type) + u64(len(self._data) if offset is None else offset))
        self._data += data
        return self

    def header(self, *, n_tensors: int | None = None, n_keys: int | None = None) -> bytes:
        """Everything before the padding; the counts are what the file says of them."""
        counts = u64(len(self._tensors) if n_tensors is None else n_tensors)
        counts += u64(len(self._keys) if n_keys is None else n_keys)
        return self.magic + u32(self.version) + counts + b"".join(self._keys) + b"".join(self._tensors)

    def build(self, *, n_tensors: int | None = None, n_keys: int | None = None) -> bytes:
        header = self.header(n_tensors=n_tensors, n_keys=n_keys)
        return header + bytes(-len(header) % self.alignment) + self._data


class ModelParts:
    """A whole `llama` model in a few kilobytes, any key or tensor of which can be replaced or removed before `build`.

    Attributes
    ----------
    keys : dict of str to (value type, bytes of the value)
    tensors : dict of str to (dims innermost first, ggml type, bytes)
    """

    def __init__(self, *, tokenizer: str = "llama", matrix_type: int = Q8_0, hidden: int = 32, seed: int = 0) -> None:
        self._random = random.Random(seed)
        tokens = ["<unk>", "<s>", "</s>", "▁", "a", "b", "c", "ab", "▁a", "▁ab", "d", "e"]
        self.keys: dict[str | bytes, tuple[int, bytes]] = {
            "general.architecture": (STRING, string("llama")),
            "general.alignment": (UINT32, u32(32)),
            "llama.block_count": (UINT32, u32(1)),
            "llama.context_length": (UINT32, u32(64)),
            "llama.embedding_length": (UINT32, u32(hidden)),
            "llama.feed_forward_length": (UINT32, u32(hidden)),
            "llama.attention.head_count": (UINT32, u32(2)),
            "llama.attention.head_count_kv": (UINT32, u32(1)),
            "llama.attention.layer_norm_rms_epsilon": (FLOAT32, f32(1e-5)),
            "llama.rope.dimension_count": (UINT32, u32(hidden // 2)),
            "llama.rope.freq_base": (FLOAT32, f32(1e4)),
            "tokenizer.ggml.model": (STRING, string(tokenizer)),
            "tokenizer.ggml.tokens": (ARRAY, array(STRING, [string(token) for token in tokens])),
            "tokenizer.ggml.scores": (ARRAY, array(FLOAT32, [f32(-i) for i in range(len(tokens))])),
            "tokenizer.ggml.token_type": (ARRAY, array(INT32, [u32(kind) for kind in (2, 3, 3, *[1] * 9)])),
            "tokenizer.ggml.merges": (ARRAY, array(STRING, [string("a b"), string("▁ a"), string("▁ ab")])),
            "tokenizer.ggml.bos_token_id": (UINT32, u32(1)),
            "tokenizer.ggml.eos_token_id": (UINT32, u32(2)),
            "tokenizer.chat_template": (STRING, string("{% for m in messages %}{{ m['content'] }}{% endfor %}")),
        }
        if tokenizer == "gpt2":
            self.keys["tokenizer.ggml.pre"] = (STRING, string("gpt-2"))
        self.tensors: dict[str | bytes, tuple[list[int], int, bytes]] = {}
        self._add_tensors(hidden, len(tokens), matrix_type)

    def _add_tensors(self, hidden: int, vocab: int, matrix_type: int) -> None:
        self._matrix("token_embd.weight", hidden, vocab, matrix_type)
        for name in ("attn_norm", "ffn_norm"):
            self.tensors[f"blk.0.{name}.weight"] = ([hidden], F32, f32(1) * hidden)
        for name, rows in (("attn_q", hidden), ("attn_k", hidden // 2), ("attn_v", hidden // 2)):
            self._matrix(f"blk.0.{name}.weight", hidden, rows, matrix_type)
        for name in ("attn_output", "ffn_gate", "ffn_up", "ffn_down"):
            self._matrix(f"blk.0.{name}.weight", hidden, hidden, matrix_type)
        self.tensors["output_norm.weight"] = ([hidden], F32, f32(1) * hidden)

    def _matrix(self, name: str, cols: int, rows: int, matrix_type: int) -> None:
        """Values of some 0.1, each row a whole number of blocks."""
        if matrix_type == F32:
            data = b"".join(f32(self._random.gauss(0, 0.1)) for _ in range(rows * cols))
        else:  # Q8_0: an fp16 scale and 32 signed bytes
            block = lambda: struct.pack("<e", 0.002) + self._random.randbytes(32)  # noqa: E731
            data = b"".join(block() for _ in range(rows * cols // 32))
        self.tensors[name] = ([cols, rows], matrix_type, data)

    def set(self, key: str, value_type: int, value: bytes) -> ModelParts:
        """Replace or add a key."""
        self.keys[key] = (value_type, value)
        return self

    def drop(self, *names: str) -> ModelParts:
        """Remove keys and tensors."""
        for name in names:
            self.keys.pop(name, None)
            self.tensors.pop(name, None)
        return self

    def tensor(self, name: str | bytes, dims: list[int], ggml_type: int, data: bytes) -> ModelParts:
        """Replace or add a tensor."""
        self.tensors[name] = (dims, ggml_type, data)
        return self

    def builder(self) -> GGUFBuilder:
        """The parts as a builder, to add what no dict can hold, such as a key twice."""
        builder = GGUFBuilder()
        for key, (value_type, value) in self.keys.items():
            builder.key(key, value_type, value)
        for name, (dims, ggml_type, data) in self.tensors.items():
            builder.tensor(name, dims, ggml_type, data)
        return builder

    def build(self) -> bytes:
        """The file."""
        return self.builder().build()
