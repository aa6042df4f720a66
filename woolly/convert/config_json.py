"""config.json and its like: JSON files of a model folder, read with every value checked. Knows no architecture."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from woolly.errors import CheckpointError
from woolly.metadata import show

MAX_JSON_BYTES = 256 << 20  # the largest tokenizer.json have some 35 MB
_T = TypeVar("_T")
_REQUIRED: Any = object()


class JsonObject:
    """An object of a JSON file: its fields by name, checked for their type.

    Parameters
    ----------
    path : str
        Of the file, for messages.
    fields : mapping
    prefix : str
        Where in the file the object stands, such as "text_config.".

    Notes
    -----
    A field that is null is one that is missing, as in transformers.
    """

    def __init__(self, path: str, fields: Mapping[str, Any], prefix: str = "") -> None:
        self.path = path
        self.fields = fields
        self.prefix = prefix

    def __contains__(self, key: str) -> bool:
        return self.fields.get(key) is not None

    def get_str(self, key: str, default: _T = _REQUIRED) -> str | _T:
        """A string."""
        return self._get(key, "a string", default, lambda value: isinstance(value, str))

    def get_bool(self, key: str, default: _T = _REQUIRED) -> bool | _T:
        """A bool."""
        return self._get(key, "true or false", default, lambda value: isinstance(value, bool))

    def get_int(self, key: str, default: _T = _REQUIRED) -> int | _T:
        """A whole number of 0 to 2^31 - 1."""
        return self._get(key, "a whole number", default, lambda value: type(value) is int and 0 <= value < 1 << 31)

    def get_float(self, key: str, default: _T = _REQUIRED) -> float | _T:
        """A finite number, as a float."""
        value = self._get(key, "a number", default, _is_finite)
        return value if value is default else float(value)

    def get_list(self, key: str, default: _T = _REQUIRED) -> list[Any] | _T:
        """A list."""
        return self._get(key, "a list", default, lambda value: isinstance(value, list))

    def get_floats(self, key: str, length: int) -> list[float]:
        """A list of `length` finite numbers, which must be there."""
        values = self.get_list(key)
        if len(values) != length or not all(map(_is_finite, values)):
            self.refuse(key, f"expected {length} numbers")
        return [float(value) for value in values]

    def get_object(self, key: str, default: _T = _REQUIRED) -> JsonObject | _T:
        """An object."""
        value = self._get(key, "an object", default, lambda value: isinstance(value, dict))
        return value if value is default else JsonObject(self.path, value, f"{self.prefix}{key}.")

    def get_objects(self, key: str) -> list[JsonObject]:
        """A list of objects; empty where it is missing."""
        entries = self.get_list(key, [])
        for entry in entries:
            if not isinstance(entry, dict):
                raise CheckpointError(f"{self.path}: {self.prefix}{key}: expected objects, got {show(entry)}")
        return [JsonObject(self.path, entry, f"{self.prefix}{key}[{i}].") for i, entry in enumerate(entries)]

    def refuse(self, key: str, problem: str) -> NoReturn:
        """Raise CheckpointError for a field, with the value that the file has."""
        value = self.fields.get(key)
        found = "it is missing" if value is None else f"got {show(value)}"
        raise CheckpointError(f"{self.path}: {self.prefix}{key}: {problem}, {found}")

    def _get(self, key: str, expected: str, default: Any, is_valid: Any) -> Any:
        value = self.fields.get(key)
        if value is None and default is not _REQUIRED:
            return default
        if not is_valid(value):
            self.refuse(key, f"expected {expected}")
        return value


def _is_finite(value: Any) -> bool:
    # An integer of JSON may be too large for a float.
    return type(value) in (int, float) and abs(value) < 1e300 and math.isfinite(value)


def read_json(path: Path) -> JsonObject:
    """Read a JSON file that holds one object.

    Raises
    ------
    CheckpointError
        It is larger than `MAX_JSON_BYTES`, no JSON, or no object.
    OSError
        It cannot be read.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: the file is missing")
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise CheckpointError(f"{path}: {size} bytes, a JSON file may have {MAX_JSON_BYTES}")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: no JSON: {show(str(error) or type(error).__name__)}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {show(value)}")
    return JsonObject(str(path), value)


def read_json_if_there(path: Path) -> JsonObject:
    """As `read_json`; an empty object where there is no such file."""
    return read_json(path) if path.is_file() else JsonObject(str(path), {})
