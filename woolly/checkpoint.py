"""What a model is opened from: metadata under GGUF's keys and tensors under GGUF's names, whatever file holds them.

A GGUF file is one as it stands (`woolly.gguf_file`); `woolly.convert` makes one of a Hugging Face folder. So
architectures, weights, tokenizer and chat template need no second path.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Protocol

from woolly.gguf_file import TensorInfo
from woolly.metadata import Metadata
from woolly.stored_file import ByteSource


class Checkpoint(Protocol):
    """An open model.

    Attributes
    ----------
    path : str
        Of the file or folder, for messages.
    metadata : Metadata
    tensors : mapping of str to TensorInfo
    """

    @property
    def path(self) -> str: ...

    @property
    def metadata(self) -> Metadata: ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def bytes_of(self, name: str) -> ByteSource:
        """The bytes of a tensor as GGUF has them: a `FileRange` where a file has them so."""

    def close(self) -> None:
        """Let go of the files."""

    def __enter__(self) -> Checkpoint: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
