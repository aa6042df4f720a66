"""Small GGUF files, byte by byte, honest by default: counts, lengths and types can each be set to a lie.

Independent of both `woolly` and the `gguf` package, so that tests can write what neither would.
"""

from __future__ import annotations

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
