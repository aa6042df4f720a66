"""A GGUF file, validated, as metadata and the places of its tensors.

Owns the container: magic, counts, key-value pairs, tensor places. A file is untrusted: whatever its bytes are, opening
it either succeeds or raises `GGUFError` with the field, its byte offset and the value found, and what has been opened
can be read without further checks. It does not know what a key means (apart from ``general.alignment``) and computes
nothing.

Layout (the GGUF specification in ggml's docs/gguf.md), all little-endian::

    magic "GGUF" · version u32 · n_tensors u64 · n_keys u64
    n_keys times     key string · type u32 · value               a string is its bytes' count as u64, then UTF-8
    n_tensors times  name string · n_dims u32 · dims u64[n_dims], innermost first · ggml type u32 · offset u64
    padding to the alignment
    tensor data      each tensor at its offset, a multiple of the alignment, counted from here
"""

from __future__ import annotations

import itertools
import math
import os
import struct
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from woolly._kernels.scan import scan_strings
from woolly.errors import GGUFError, UnsupportedFormatError
from woolly.formats import Format, format_of_ggml_type
from woolly.metadata import Entry, Metadata, StringArray, show
from woolly.stored_file import Closing, FileRange, StoredFile, aligned

# Limits. Each is far above what real models need (the largest vocabularies make a header of 15 MB; a model with every
# expert as a tensor of its own has some ten thousand) and low enough that refusing a hostile file stays cheap.
MAX_HEADER_BYTES = 128 << 20
MAX_KEYS = 8_192
MAX_TENSORS = 32_768
MAX_NAME_BYTES = 65_535  # the specification's limit for keys, used for tensor names too
MAX_STRING_BYTES = 64 << 20  # one string value; tokenizer.huggingface.json can take tens of megabytes
MAX_DIMS = 4
MAX_ALIGNMENT = 2 << 20  # a huge page
MIN_ALIGNMENT = 8  # the specification asks for a multiple of 8
DEFAULT_ALIGNMENT = 32
_MAX_INT64 = 2**63 - 1

# The smallest possible entry bounds every count by the bytes left: key "k" with a uint8; name "n" with one dimension.
_MIN_KEY_BYTES = 8 + 1 + 4 + 1
_MIN_TENSOR_BYTES = 8 + 1 + 4 + 8 + 4 + 8

_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
# What follows a tensor's n_dims: the dimensions, the type, the offset.
_TENSOR_PLACE = {n_dims: struct.Struct(f"<{n_dims}QIQ") for n_dims in range(1, MAX_DIMS + 1)}
_UINT32, _BOOL, _STRING, _ARRAY = 4, 7, 8, 9
_LEAST_READ = 256 << 10  # bytes of a file's beginning that are read at once


class _ScalarType(NamedTuple):
    """A value type of fixed size: its name, and how `struct` and numpy read it."""

    name: str
    reader: struct.Struct
    dtype: np.dtype[Any]


_SCALARS = {
    type_id: _ScalarType(name, struct.Struct(code), np.dtype(code))
    for type_id, name, code in [
        (0, "uint8", "<B"),
        (1, "int8", "<b"),
        (2, "uint16", "<H"),
        (3, "int16", "<h"),
        (_UINT32, "uint32", "<I"),
        (5, "int32", "<i"),
        (6, "float32", "<f"),
        (_BOOL, "bool", "<B"),  # read as a byte, so that 2 is refused and not taken for True
        (10, "uint64", "<Q"),
        (11, "int64", "<q"),
        (12, "float64", "<d"),
    ]
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies and how to read it.

    Attributes
    ----------
    name : str
    shape : tuple of int
        In numpy's order, outermost dimension first: (n_rows, n_columns) for a matrix. One to four dimensions, each at
        least 1. The innermost is a whole number of the format's blocks.
    format : Format
    offset : int
        Byte in the file at which the data begin; a multiple of the file's alignment.
    n_bytes : int
    """

    name: str
    shape: tuple[int, ...]
    format: Format
    offset: int
    n_bytes: int


class _Cursor:
    """Reads the header front to back; every read is checked against the file's end before it happens.

    Attributes
    ----------
    path : str
    file_size : int
    bytes : uint8, (at most MAX_HEADER_BYTES,)
        As much of the file as its header may take. Those that were not read yet are undefined, and take no memory.
    pos : int
    """

    def __init__(self, file: StoredFile) -> None:
        self.path = file.path
        self.file_size = file.n_bytes
        self.bytes = np.empty(min(file.n_bytes, MAX_HEADER_BYTES), np.uint8)
        self.pos = 0
        self._view = memoryview(self.bytes)
        self._file = file
        self._n_read = 0

    @property
    def left(self) -> int:
        """Bytes that the header may still take."""
        return len(self.bytes) - self.pos

    def fail(self, field: str, offset: int, problem: str) -> NoReturn:
        raise GGUFError(f"{self.path!r}: {field} at byte {offset}: {problem}")

    def fail_at_end(self, field: str, offset: int, problem: str) -> NoReturn:
        """Refuse something that does not fit into what is left: of the file, or of what a header may take."""
        end = f"the file ends at {self.file_size}"
        if self.file_size > MAX_HEADER_BYTES:
            end = f"a header may take {MAX_HEADER_BYTES} bytes"
        self.fail(field, offset, f"{problem}, {end}")

    def take(self, n_bytes: int) -> memoryview:
        """Step over bytes, of which at least so many are left, and return them."""
        self.pos += n_bytes
        if self.pos > self._n_read:
            self._read_to(self.pos)
        return self._view[self.pos - n_bytes : self.pos]

    def _read_to(self, end: int) -> None:
        """Read on, at least to `end`: in pieces that double, as nobody knows where the header ends."""
        end = min(max(end, 2 * self._n_read, _LEAST_READ), len(self.bytes))
        self._file.read_into(self.bytes[self._n_read : end], self._n_read)
        self._n_read = end

    def numbers(self, reader: struct.Struct, field: str) -> tuple[Any, ...]:
        """Read the numbers that `reader` describes."""
        if reader.size > self.left:
            self.fail_at_end(field, self.pos, f"needs {reader.size} bytes")
        return reader.unpack(self.take(reader.size))

    def number(self, reader: struct.Struct, field: str) -> Any:
        """Read one number."""
        return self.numbers(reader, field)[0]

    def count(self, field: str, *, limit: int, entry_bytes: int) -> int:
        """Read a uint64 that counts entries of at least `entry_bytes` each, and make sure that they can be there."""
        offset = self.pos
        value: int = self.number(_U64, field)
        if value > limit:
            self.fail(field, offset, f"{value} is more than the limit of {limit}")
        if value * entry_bytes > self.left:
            self.fail_at_end(field, offset, f"{value} entries need at least {value * entry_bytes} bytes")
        return value

    def string_bytes(self, field: str, *, limit: int) -> bytes:
        """Read a length and that many bytes."""
        length = self.count(f"length of {field}", limit=limit, entry_bytes=1)
        return bytes(self.take(length))

    def name(self, field: str) -> str:
        """Read a key or a tensor's name: UTF-8, not empty."""
        offset = self.pos
        raw = self.string_bytes(field, limit=MAX_NAME_BYTES)
        if not raw:
            self.fail(field, offset, "is empty")
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            self.fail(field, offset, f"{show(raw)} is not UTF-8: byte {raw[error.start]:#04x} at {error.start}")

    def strings(self, count: int, field: str) -> StringArray:
        """Find that many strings, each a length and its bytes, without decoding them."""
        start = self.pos
        while True:
            try:
                starts, lengths, self.pos = scan_strings(self.bytes[: self._n_read], start, count)
            except ValueError as error:
                if self._n_read == len(self.bytes):
                    self.fail_at_end(field, start, str(error))
                self._read_to(self._n_read + 1)
            else:
                return StringArray(self.bytes, starts, lengths)


class GGUFFile(Closing):
    """An open GGUF file, version 2 or 3, little-endian; see `open`.

    Attributes
    ----------
    path : str
    version : int
    alignment : int
        Bytes; a power of two.
    metadata : Metadata
        The key-value pairs.
    tensors : dict of str to TensorInfo
        In the file's order.

    Notes
    -----
    Reading from several threads at once is safe. Tensors are read when they are asked for: writers should replace files
    by renaming. A loaded model needs no file any more.
    """

    def __init__(self, stored: StoredFile, version: int, metadata: Metadata, tensors: dict[str, TensorInfo]) -> None:
        self.path = stored.path
        self.version = version
        self.metadata = metadata
        self.tensors = tensors
        self.alignment: int = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        self._stored = stored

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> GGUFFile:
        """Open a file and check everything about it but the tensors' contents.

        Raises
        ------
        GGUFError
            If the file is not well formed, or is no regular file.
        OSError
            If the system cannot open or read it: `FileNotFoundError`, `PermissionError` and so on.

        Notes
        -----
        Strings that are values, not names, are decoded with U+FFFD for what is not UTF-8, for vocabularies may hold
        odd bytes. Tensors may stand in any order and leave gaps, but not overlap.
        """
        stored = StoredFile(os.fsdecode(path), format="GGUF", first_field="magic at byte 0", error=GGUFError)
        cursor = _Cursor(stored)
        version = _read_version(cursor)
        n_tensors = cursor.count("number of tensors", limit=MAX_TENSORS, entry_bytes=_MIN_TENSOR_BYTES)
        n_keys = cursor.count("number of keys", limit=MAX_KEYS, entry_bytes=_MIN_KEY_BYTES)
        metadata = _read_metadata(cursor, n_keys)
        tensors = _read_tensors(cursor, n_tensors, metadata.get("general.alignment", DEFAULT_ALIGNMENT))
        return cls(stored, version, metadata, tensors)

    @property
    def n_bytes(self) -> int:
        """Bytes of the whole file."""
        return self._stored.n_bytes

    def bytes_of(self, name: str) -> FileRange:
        """Return the bytes of a tensor, to be read whole or in pieces.

        Raises
        ------
        KeyError
            If the file has no tensor of this name.
        """
        info = self.tensors[name]
        return FileRange(self._stored, info.offset, info.n_bytes)

    def tensor_bytes(self, name: str) -> NDArray[np.uint8]:
        """Read the bytes of a tensor.

        Returns
        -------
        uint8, (n_bytes,)

        Raises
        ------
        KeyError
            If the file has no tensor of this name.
        ValueError
            If the file is closed.
        GGUFError
            If the file has been shortened since it was opened.
        OSError
            If the system cannot read it.
        """
        return self.bytes_of(name).read()

    def close(self) -> None:
        """Let go of the file; what has been read stays valid."""
        self._stored.close()

    def __repr__(self) -> str:
        return f"<GGUFFile {self.path!r}: {len(self.metadata)} keys, {len(self.tensors)} tensors>"


def _read_version(cursor: _Cursor) -> int:
    """Check the magic bytes, and return the version."""
    magic = bytes(cursor.take(min(4, cursor.left)))
    if magic != b"GGUF":
        cursor.fail("magic", 0, f"expected b'GGUF', found {show(magic)}: not a GGUF file")
    version: int = cursor.number(_U32, "version")
    if version in (1 << 24, 2 << 24, 3 << 24):
        cursor.fail("version", 4, f"{version:#010x} belongs to a big-endian file, only little-endian ones are read")
    if version not in (2, 3):
        cursor.fail("version", 4, f"expected 2 or 3, found {version}")
    return version


def _read_metadata(cursor: _Cursor, n_keys: int) -> Metadata:
    """Read all key-value pairs."""
    entries: dict[str, Entry] = {}
    for index in range(n_keys):
        offset = cursor.pos
        key = cursor.name(f"key {index}")
        if key in entries:
            cursor.fail(f"key {index}", offset, f"{show(key)} was already at byte {entries[key].offset}")
        field = f"value of key {show(key)}"
        type_id = cursor.number(_U32, f"type of key {show(key)}")
        value, type_name = _read_value(cursor, type_id, field)
        if key == "general.alignment":
            _check_alignment(cursor, offset, type_id, type_name, value)
        entries[key] = Entry(value, type_name, offset, cursor.pos)
    return Metadata(cursor.path, entries)


def _read_value(cursor: _Cursor, type_id: int, field: str) -> tuple[Any, str]:
    """Read a value of the given type; return it with its type's name."""
    offset = cursor.pos
    if type_id == _STRING:
        return cursor.string_bytes(field, limit=MAX_STRING_BYTES).decode("utf-8", "replace"), "string"
    if type_id == _ARRAY:
        return _read_array(cursor, field)
    scalar = _SCALARS.get(type_id)
    if scalar is None:
        cursor.fail(field, offset - 4, f"value type {type_id} is unknown")
    value = cursor.number(scalar.reader, field)
    if type_id == _BOOL:
        if value > 1:
            cursor.fail(field, offset, f"expected the byte 0 or 1 for a bool, found {value}")
        value = value == 1
    return value, scalar.name


def _read_array(cursor: _Cursor, field: str) -> tuple[StringArray | NDArray[Any], str]:
    """Read an array: element type u32, length u64, elements."""
    offset = cursor.pos
    element_type = cursor.number(_U32, f"element type of {field}")
    if element_type == _ARRAY:
        cursor.fail(f"element type of {field}", offset, "arrays of arrays are not supported")
    if element_type == _STRING:
        return _read_string_array(cursor, field), "array of string"
    scalar = _SCALARS.get(element_type)
    if scalar is None:
        cursor.fail(f"element type of {field}", offset, f"value type {element_type} is unknown")
    length = cursor.count(f"length of {field}", limit=MAX_HEADER_BYTES, entry_bytes=scalar.dtype.itemsize)
    start = cursor.pos
    # A copy, because an array may stand at an odd address in the file.
    array = np.frombuffer(bytes(cursor.take(length * scalar.dtype.itemsize)), scalar.dtype)
    if element_type == _BOOL:
        if length and array.max() > 1:
            index = int(np.argmax(array > 1))
            cursor.fail(field, start + index, f"expected the byte 0 or 1 for a bool, found {array[index]}")
        array = array.view(np.bool_)
    return array, f"array of {scalar.name}"


def _read_string_array(cursor: _Cursor, field: str) -> StringArray:
    """Read an array of strings without decoding them."""
    return cursor.strings(cursor.count(f"length of {field}", limit=MAX_HEADER_BYTES, entry_bytes=8), field)


def _check_alignment(cursor: _Cursor, offset: int, type_id: int, type_name: str, value: Any) -> None:
    """Refuse an alignment that is not a sensible power of two."""
    if type_id != _UINT32:
        cursor.fail("key 'general.alignment'", offset, f"expected uint32, got {type_name}")
    if not MIN_ALIGNMENT <= value <= MAX_ALIGNMENT or value & (value - 1):
        expected = f"a power of two from {MIN_ALIGNMENT} to {MAX_ALIGNMENT}"
        cursor.fail("key 'general.alignment'", offset, f"expected {expected}, found {value}")


def _read_tensors(cursor: _Cursor, n_tensors: int, alignment: int) -> dict[str, TensorInfo]:
    """Read the places of all tensors, and check that their data lie in the file, apart from each other."""
    tensors: dict[str, TensorInfo] = {}
    offset_at: dict[str, int] = {}
    for index in range(n_tensors):
        entry_at = cursor.pos
        info = _read_tensor(cursor, index, alignment)
        if info.name in tensors:
            cursor.fail(f"tensor {index}", entry_at, f"the name {show(info.name)} is taken by an earlier tensor")
        tensors[info.name] = info
        offset_at[info.name] = cursor.pos - _U64.size

    # Offsets count from here, which is known only now.
    data_start = aligned(cursor.pos, alignment)
    for name, info in tensors.items():
        start = data_start + info.offset
        if start + info.n_bytes > cursor.file_size:
            place = f"{info.n_bytes} bytes from byte {start} on end past the file's {cursor.file_size}"
            cursor.fail(f"offset of tensor {show(name)}", offset_at[name], f"found {info.offset}: {place}")
        tensors[name] = TensorInfo(name, info.shape, info.format, start, info.n_bytes)
    _check_overlaps(cursor, tensors, offset_at)
    return tensors


def _read_tensor(cursor: _Cursor, number: int, alignment: int) -> TensorInfo:
    """Read one tensor's entry; its offset still counts from the beginning of the data."""
    name = cursor.name(f"name of tensor {number}")
    field = f"tensor {show(name)}"
    n_dims = cursor.number(_U32, f"n_dims of {field}")
    if not 1 <= n_dims <= MAX_DIMS:
        cursor.fail(f"n_dims of {field}", cursor.pos - 4, f"expected 1 to {MAX_DIMS}, found {n_dims}")
    dims_at = cursor.pos
    type_at = dims_at + 8 * n_dims
    *dims, type_id, offset = cursor.numbers(_TENSOR_PLACE[n_dims], f"dimensions, type and offset of {field}")

    if 0 in dims:
        axis = dims.index(0)
        cursor.fail(f"dimension {axis} of {field}", dims_at + 8 * axis, "expected at least 1, found 0")
    n_elements = math.prod(dims)
    if n_elements > _MAX_INT64:
        cursor.fail(f"dimensions of {field}", dims_at, f"the product of {dims} passes 2**63 - 1")
    try:
        tensor_format = format_of_ggml_type(type_id)
    except UnsupportedFormatError as error:
        cursor.fail(f"type of {field}", type_at, str(error))
    if dims[0] % tensor_format.block_size:
        expected = f"expected a multiple of {tensor_format.name}'s block of {tensor_format.block_size}"
        cursor.fail(f"dimension 0 of {field}", dims_at, f"{expected}, found {dims[0]}")
    n_bytes = tensor_format.nbytes(n_elements)
    if n_bytes > cursor.file_size:
        cursor.fail(f"dimensions of {field}", dims_at, f"{dims} need {n_bytes} bytes, the file has {cursor.file_size}")
    if offset % alignment:
        cursor.fail(f"offset of {field}", type_at + 4, f"expected a multiple of {alignment}, found {offset}")
    return TensorInfo(name, tuple(reversed(dims)), tensor_format, offset, n_bytes)


def _check_overlaps(cursor: _Cursor, tensors: dict[str, TensorInfo], offset_at: dict[str, int]) -> None:
    """Refuse tensors whose bytes overlap: sorted by place, each must end before the next begins."""
    ordered = sorted(tensors.values(), key=lambda info: info.offset)
    for before, after in itertools.pairwise(ordered):
        end = before.offset + before.n_bytes
        if end > after.offset:
            overlap = f"its data begin at {after.offset}, those of tensor {show(before.name)} end at {end}"
            cursor.fail(f"offset of tensor {show(after.name)}", offset_at[after.name], overlap)
