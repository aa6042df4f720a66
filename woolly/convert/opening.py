"""Which kind of checkpoint a path is, and opening it."""

from __future__ import annotations

import os
from pathlib import Path

from woolly.checkpoint import Checkpoint
from woolly.convert.folder import ModelFolder
from woolly.convert.self_contained import METADATA_NAME, SelfContained
from woolly.errors import CheckpointError
from woolly.gguf_split import open_gguf
from woolly.safetensors_file import SafetensorsFile

SUFFIX = ".safetensors"


def is_gguf(path: str | os.PathLike[str]) -> bool:
    """Whether a path is taken for a GGUF file: it is no folder and its name does not say safetensors."""
    path = Path(path)
    return not path.is_dir() and path.suffix != SUFFIX


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a GGUF file, a Hugging Face folder, or a safetensors file.

    A safetensors file is one that `woolly dequantize` wrote, which holds everything, or one of a folder, which is then
    opened.

    Raises
    ------
    WoollyError
        The file is malformed or not supported; see `open_gguf`, `ModelFolder.open`.
    OSError
        It cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        return ModelFolder.open(path)
    if path.suffix != SUFFIX:
        return open_gguf(path)
    file = SafetensorsFile.open(path)
    if METADATA_NAME in file.metadata:
        return SelfContained(file)
    file.close()
    if not (path.parent / "config.json").is_file():
        raise CheckpointError(f"{path}: it has no configuration, and there is no config.json beside it")
    return ModelFolder.open(path.parent)
