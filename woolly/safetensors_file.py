"""A safetensors file, validated, as the names, types and places of its tensors.

Owns the container: the header's length and JSON, and that the tensors' bytes fill the rest of the file without gap or
overlap. A file is untrusted: opening it either succeeds or raises `CheckpointError` with the tensor and the value
found. It does not know what a tensor is for.

Layout (https://huggingface.co/docs/safetensors)::

    n u64, little-endian · n bytes of JSON, padded with spaces · the tensors' bytes
    JSON: {"NAME": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [begin, end]}, …, "__metadata__": {"key": "text"}}

Offsets count from the end of the JSON. Shapes are outermost dimension first, rows contiguous.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from typing import Any, NoReturn

from woolly.errors import CheckpointError
from woolly.metadata import show
from woolly.stored_file import FileRange, StoredFile

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_TENSORS = 1 << 18  # a model with every expert as a tensor of its own has some 50,000
MAX_DIMS = 8
METADATA_KEY = "__metadata__"

# Bits of an element; F4 and F6 types hold parts of a byte.
_DTYPE_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}


@dataclass(frozen=True, slots=True)
class SafeTensor:
    """Where a tensor lies: its dtype as the file spells it, such as "BF16", its shape, and its bytes in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    n_bytes: int


class SafetensorsFile:
    """An open safetensors file; see `open`.

    Attributes
    ----------
    path : str
    n_bytes : int
        Of the file.
    tensors : dict of str to SafeTensor
        In the order of their bytes.
    metadata : dict of str to str
        What the file says under ``__metadata__``.

    Notes
    -----
    Reading from several threads at once is safe. Tensors are read when they are asked for: writers should replace files
    by renaming.
    """

    def __init__(self, stored: StoredFile) -> None:
        self.path, self.n_bytes = stored.path, stored.n_bytes
        self._stored = stored
        self.tensors: dict[str, SafeTensor] = {}
        self.metadata: dict[str, str] = {}

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> SafetensorsFile:
        """Open a file and check everything about it but the tensors' contents.

        Raises
        ------
        CheckpointError
            It is not well formed, or is no regular file.
        OSError
            The system cannot open or read it.
        """
        path = os.fsdecode(path)
        file = cls(StoredFile(path, format="safetensors", first_field="header", error=CheckpointError))
        file._read_header()
        return file

    def bytes_of(self, tensor: SafeTensor) -> FileRange:
        """The bytes of a tensor, to be read whole or in pieces."""
        return FileRange(self._stored, tensor.offset, tensor.n_bytes)

    def close(self) -> None:
        """Let go of the file; what has been read stays valid."""
        self._stored.close()

    def _read_header(self) -> None:
        size = self.n_bytes
        length = int.from_bytes(self._stored.read(0, min(size, 8)).tobytes(), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            self._fail("header", f"{length} bytes long, the file has {size} and a header may take {MAX_HEADER_BYTES}")
        raw = self._stored.read(8, length).tobytes()
        # Lists and objects take many times their bytes in memory: bound them before they are made.
        if raw.count(b"[") + raw.count(b"{") > 4 * MAX_TENSORS:
            self._fail("header", f"more than {4 * MAX_TENSORS} lists and objects")
        try:
            header = json.loads(raw, object_pairs_hook=_without_duplicates)
        except (ValueError, RecursionError) as error:
            self._fail("header", f"no JSON: {show(str(error) or type(error).__name__)}")
        if not isinstance(header, dict):
            self._fail("header", f"expected a JSON object, found {show(header)}")
        metadata = header.pop(METADATA_KEY, {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            self._fail(METADATA_KEY, f"expected an object of strings, found {show(metadata)}")
        if len(header) > MAX_TENSORS:
            self._fail("header", f"{len(header)} tensors, the limit is {MAX_TENSORS}")
        tensors = [self._read_tensor(name, entry, 8 + length) for name, entry in header.items()]
        tensors.sort(key=lambda tensor: (tensor.offset, tensor.n_bytes))
        self._check_layout(tensors, 8 + length, size)
        self.tensors, self.metadata = {tensor.name: tensor for tensor in tensors}, metadata

    def _read_tensor(self, name: str, entry: Any, data_start: int) -> SafeTensor:
        field = f"tensor {show(name)}"
        if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
            self._fail(field, f"expected dtype, shape and data_offsets, found {show(entry)}")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _DTYPE_BITS:
            self._fail(field, f"dtype {show(dtype)} is unknown")
        if not _is_counts(shape) or len(shape) > MAX_DIMS:
            self._fail(field, f"expected a shape of at most {MAX_DIMS} whole numbers, found {show(shape)}")
        if not _is_counts(offsets) or len(offsets) != 2:
            self._fail(field, f"expected two data_offsets, found {show(offsets)}")
        begin, end = offsets
        n_bits = math.prod(shape) * _DTYPE_BITS[dtype]
        if n_bits != 8 * (end - begin):
            self._fail(field, f"{dtype} of shape {shape} takes {n_bits / 8:g} bytes, data_offsets are {offsets}")
        return SafeTensor(name, dtype, tuple(shape), data_start + begin, end - begin)

    def _check_layout(self, tensors: list[SafeTensor], start: int, size: int) -> None:
        """Each tensor begins where the one before it ends, and the last ends with the file."""
        for tensor in tensors:
            if tensor.offset != start:
                begins = f"its bytes begin at {tensor.offset}, those before it end at {start}"
                self._fail(f"tensor {show(tensor.name)}", begins)
            start += tensor.n_bytes
        if start != size:
            self._fail("header", f"the tensors end at byte {start}, the file at {size}")

    def _fail(self, field: str, problem: str) -> NoReturn:
        raise CheckpointError(f"{self.path!r}: {field}: {problem}")


def _is_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in value)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        name = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{name!r} occurs twice")
    return found
