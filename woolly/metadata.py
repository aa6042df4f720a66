"""The key-value pairs of a model file: a mapping, typed accessors that explain themselves, and lazy string arrays.

Owns how metadata are looked up and what is said when a key is missing or has the wrong type. It does not know how a
file is laid out (`woolly.gguf_file` does) nor what any key means.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from woolly._kernels.scan import decode_strings
from woolly.errors import GGUFError

_T = TypeVar("_T")


def show(value: object) -> str:
    """Return `value` for an error message: on one line, control characters escaped, shortened."""
    # Cut before repr: a hostile string may have megabytes. The repr of an array has several lines.
    if isinstance(value, str | bytes | np.ndarray):
        value = value[:100]
    text = repr(value.tolist() if isinstance(value, np.ndarray) else value)
    return text if len(text) <= 80 else text[:80] + "…"


class StringArray(Sequence[str]):
    """The strings of a metadata array, decoded from the header when they are asked for.

    Indexing and iteration give ``str``, slices give ``list[str]``; `tolist` decodes all at once, and fast. Bytes that
    are not UTF-8 become U+FFFD; `raw` returns them as they are.
    """

    __slots__ = ("_bytes", "_lengths", "_starts")

    def __init__(self, data: NDArray[np.uint8], starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> None:
        self._bytes = data  # uint8, (n_bytes,): the header
        self._starts = starts  # int64, (n_strings,): the byte at which each begins
        self._lengths = lengths  # int64, (n_strings,)

    @classmethod
    def from_strings(cls, strings: Iterable[str]) -> StringArray:
        """The same array of strings that do not come from a GGUF file; lone surrogates become ?."""
        encoded = [string.encode("utf-8", "replace") for string in strings]
        lengths = np.array([len(string) for string in encoded], np.int64)
        return cls(np.frombuffer(b"".join(encoded) + b"\0", np.uint8), np.cumsum(lengths) - lengths, lengths)

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            # A strided slice is no C-contiguous view, which the kernel asks for.
            starts, lengths = (np.ascontiguousarray(array[index]) for array in (self._starts, self._lengths))
            return decode_strings(self._bytes, starts, lengths)
        return self.raw(index).decode("utf-8", "replace")

    def __iter__(self) -> Iterator[str]:
        return iter(self.tolist())

    def __repr__(self) -> str:
        return f"<StringArray of {len(self)} strings>"

    @property
    def n_bytes(self) -> int:
        """Bytes of all strings."""
        return int(self._lengths.sum())

    def raw(self, index: int) -> bytes:
        """Return the bytes of one string as the file has them."""
        start = int(self._starts[index])
        return self._bytes[start : start + int(self._lengths[index])].tobytes()

    def tolist(self) -> list[str]:
        """Decode every string."""
        return self[:]


class Entry(NamedTuple):
    """One key's value, and where it came from: the key and its value take a GGUF file's bytes from offset to end.

    What was made, not read, has the offset -1.
    """

    value: Any
    type_name: str
    offset: int
    end: int = 0


_REQUIRED: Any = object()
# What get_array calls each kind, and which of numpy's dtype kinds it is.
_ARRAY_KINDS = {"string": "strings", "int": "integers", "float": "floats", "bool": "booleans"}
_KIND_OF_DTYPE = {"i": "int", "u": "int", "f": "float", "b": "bool"}


class Metadata(Mapping[str, Any]):
    """The key-value pairs of a GGUF file, in the file's order.

    As a mapping it gives Python values for scalars, numpy arrays (aligned copies) for numeric and boolean arrays, and
    a `StringArray` for arrays of strings. The accessors below also check the type: they raise `GGUFError` naming
    the key, what was expected and what the file has. A missing key returns `default` where one is given.

    Attributes
    ----------
    asked : set of str
        Keys that an accessor was asked for.
    """

    def __init__(self, path: str, entries: dict[str, Entry]) -> None:
        self._path = path
        self._entries = entries
        self.asked: set[str] = set()

    @classmethod
    def from_values(cls, path: str, values: Mapping[str, Any]) -> Metadata:
        """Pairs that were made from another file: str, bool, int, float, numpy arrays, lists of str; None is left out.

        An integer becomes a uint32 where it can, else an int32 or an int64; a float a float32.
        """
        return cls(path, {key: _entry_of(value) for key, value in values.items() if value is not None})

    def items_with_types(self) -> Iterator[tuple[str, Any, str]]:
        """Key, value and the name of the value's type, such as "uint32" or "array of string"."""
        return ((key, entry.value, entry.type_name) for key, entry in self._entries.items())

    def __getitem__(self, key: str) -> Any:
        return self._entries[key].value

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"<Metadata of {self._path!r}: {len(self)} keys>"

    def get_str(self, key: str, default: _T = _REQUIRED) -> str | _T:
        """Return a string."""
        return self._scalar(key, str, "a string", default)

    def get_int(self, key: str, default: _T = _REQUIRED) -> int | _T:
        """Return an integer of any width; a bool or a float is refused."""
        return self._scalar(key, int, "an integer", default)

    def get_float(self, key: str, default: _T = _REQUIRED) -> float | _T:
        """Return a float32 or float64, as a float; an integer is refused. NaN and infinities pass."""
        return self._scalar(key, float, "a float", default)

    def get_bool(self, key: str, default: _T = _REQUIRED) -> bool | _T:
        """Return a bool."""
        return self._scalar(key, bool, "a bool", default)

    def get_array(
        self, key: str, kind: str, *, length: int | None = None, default: _T = _REQUIRED
    ) -> StringArray | NDArray[Any] | _T:
        """Return an array of one kind.

        Parameters
        ----------
        key : str
        kind : {"string", "int", "float", "bool"}
            What the elements must be, of any width.
        length : int, optional
            How many elements there must be.
        default : optional
            What to return where the key is missing.

        Returns
        -------
        StringArray or numpy.ndarray
            One-dimensional; integers and floats in the width that the file has.
        """
        expected = f"an array of {'' if length is None else f'{length} '}{_ARRAY_KINDS[kind]}"
        self.asked.add(key)
        entry = self._entries.get(key)
        if entry is None:
            return self._missing(key, expected, default)
        if isinstance(entry.value, StringArray):
            found = "string"
        elif isinstance(entry.value, np.ndarray):
            found = _KIND_OF_DTYPE[entry.value.dtype.kind]
        else:
            self._refuse(key, expected, entry)
        if found != kind or (length is not None and len(entry.value) != length):
            self._refuse(key, expected, entry)
        return entry.value

    def place(self, key: str) -> tuple[int, int]:
        """Return the first byte of a key in the file, and the one after its value."""
        return self._entries[key].offset, self._entries[key].end

    def error(self, key: str, problem: str) -> GGUFError:
        """Return what to raise for a key whose value has the right type, but cannot be."""
        place = self.at(key)
        return GGUFError(f"{key}: {problem}{place}" if place else f"{self._path}: {key}: {problem}")

    def at(self, key: str) -> str:
        """Return where a key is, to end a message with; empty where it is in no GGUF file."""
        entry = self._entries.get(key)
        return "" if entry is None or entry.offset < 0 else f" (key at byte {entry.offset})"

    def _scalar(self, key: str, kind: type, expected: str, default: Any) -> Any:
        self.asked.add(key)
        entry = self._entries.get(key)
        if entry is None:
            return self._missing(key, expected, default)
        # Not isinstance: a bool is an int to Python.
        if type(entry.value) is not kind:
            self._refuse(key, expected, entry)
        return entry.value

    def _missing(self, key: str, expected: str, default: Any) -> Any:
        if default is _REQUIRED:
            raise GGUFError(f"{self._path!r}: metadata has no key {show(key)}, expected {expected}")
        return default

    def _refuse(self, key: str, expected: str, entry: Entry) -> NoReturn:
        if isinstance(entry.value, StringArray | np.ndarray):
            found = f"{entry.type_name} of length {len(entry.value)}"
        else:
            found = f"{entry.type_name} {show(entry.value)}"
        place = f"{self._path!r}: key {show(key)}" + (f" at byte {entry.offset}" if entry.offset >= 0 else "")
        raise GGUFError(f"{place}: expected {expected}, got {found}")


def _entry_of(value: Any) -> Entry:
    if isinstance(value, np.ndarray):
        return Entry(value, f"array of {value.dtype.name}", -1)
    if isinstance(value, list):
        return Entry(StringArray.from_strings(value), "array of string", -1)
    if isinstance(value, bool):
        return Entry(value, "bool", -1)
    if isinstance(value, int):
        name = "uint32" if 0 <= value < 1 << 32 else "int32" if -(1 << 31) <= value < 0 else "int64"
        return Entry(value, name, -1)
    if isinstance(value, float):
        return Entry(float(np.float32(value)), "float32", -1)
    return Entry(str(value), "string", -1)
