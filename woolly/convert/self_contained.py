"""A safetensors file that holds a whole model: tensors under GGUF's names, GGUF's keys in the header.

`woolly dequantize` writes such files. The keys stand under ``__metadata__`` as one text of JSON, so that any reader of
safetensors can open the file::

    {"general.architecture": ["string", "llama"], "llama.block_count": ["uint32", 30], …}
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from woolly.convert.tensors import FORMAT_OF_DTYPE
from woolly.errors import CheckpointError
from woolly.formats import FORMATS
from woolly.gguf_file import TensorInfo
from woolly.metadata import Entry, Metadata, StringArray, show
from woolly.safetensors_file import SafetensorsFile
from woolly.stored_file import Closing, FileRange

METADATA_NAME = "gguf"
_NUMBERS = {"uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float32", "float64"}


class SelfContained(Closing):
    """An open file of this kind. A `woolly.checkpoint.Checkpoint`.

    Parameters
    ----------
    file : SafetensorsFile

    Raises
    ------
    CheckpointError
        The keys are malformed, or a tensor is not of floats.
    """

    def __init__(self, file: SafetensorsFile) -> None:
        self.path, self.n_bytes = file.path, file.n_bytes
        self._file = file
        self.metadata = decode_metadata(file.path, file.metadata[METADATA_NAME])
        self.tensors: dict[str, TensorInfo] = {}
        for name, tensor in file.tensors.items():
            if tensor.dtype not in FORMAT_OF_DTYPE or not 1 <= len(tensor.shape) <= 4 or 0 in tensor.shape:
                raise CheckpointError(
                    f"{file.path!r}: tensor {show(name)}: expected floats of one to four dimensions, "
                    f"found {tensor.dtype} of shape {tensor.shape}"
                )
            tensor_format = FORMATS[FORMAT_OF_DTYPE[tensor.dtype]]
            self.tensors[name] = TensorInfo(name, tensor.shape, tensor_format, tensor.offset, tensor.n_bytes)

    def bytes_of(self, name: str) -> FileRange:
        """The bytes of a tensor, to be read."""
        return self._file.bytes_of(self._file.tensors[name])

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()


def encode_metadata(metadata: Metadata, file_type: int) -> str:
    """GGUF's keys as the text that such a file holds, with the type of file that it is now."""
    plain: dict[str, Any] = {}
    for key, value, type_name in metadata.items_with_types():
        if key.startswith("split."):
            continue
        is_array = isinstance(value, StringArray | np.ndarray)
        plain[key] = [type_name, value.tolist() if is_array else value]
    plain.pop("general.quantization_version", None)
    plain["general.file_type"] = ["uint32", file_type]
    return json.dumps(plain, ensure_ascii=False, separators=(",", ":"))


def decode_metadata(path: str, text: str) -> Metadata:
    """The keys that `encode_metadata` wrote.

    Raises
    ------
    CheckpointError
        The text is something else.
    """
    try:
        plain = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path!r}: {METADATA_NAME}: no JSON: {show(str(error))}") from None
    if not isinstance(plain, dict):
        raise CheckpointError(f"{path!r}: {METADATA_NAME}: expected an object, found {show(plain)}")
    entries = {}
    for key, pair in plain.items():
        try:
            type_name, value = pair
            entries[key] = Entry(_decode(type_name, value), type_name, -1)
        except (TypeError, ValueError, OverflowError):
            raise CheckpointError(
                f"{path!r}: {METADATA_NAME}: {show(key)}: expected a type and a value of it, found {show(pair)}"
            ) from None
    return Metadata(path, entries)


def _decode(type_name: str, value: Any) -> Any:
    """A value of a type; ValueError or TypeError where it is none."""
    element = type_name.removeprefix("array of ")
    if element != type_name:
        if not isinstance(value, list) or not all(isinstance(item, _python_type(element)) for item in value):
            raise TypeError
        return StringArray.from_strings(value) if element == "string" else np.array(value, element)
    if type(value) is not _python_type(type_name):
        raise TypeError
    return value


def _python_type(name: str) -> type:
    if name not in _NUMBERS | {"string", "bool"}:
        raise ValueError
    return {"string": str, "bool": bool}.get(name, float if name.startswith("float") else int)
