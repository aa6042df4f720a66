"""A GGUF file written again with its matrices in other formats, tensor by tensor.

Owns reading, converting and writing; which tensor gets which format is `woolly.mixes`' business. Metadata are copied
byte for byte, but for the keys that say how the file is stored.
"""

from __future__ import annotations

import contextlib
import math
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from woolly._kernels import QUANTIZED_FORMATS, dequantize, kernel_formats, quantize_rows
from woolly.atomic import replacing, reserve
from woolly.errors import UnsupportedFormatError, WoollyError
from woolly.formats import FLOATS, Format
from woolly.gguf_file import GGUFFile, TensorInfo
from woolly.mixes import Mix, plan_formats, resolve_mix
from woolly.stored_file import ByteSource, aligned

CHUNK_VALUES = 1 << 20  # 4 MB as float32: a few times a core's L2, and little to hold for each thread
CHUNK_OF_ALL_THREADS = 1 << 24  # 64 MB
QUANTIZATION_VERSION = 2  # ggml's, since its formats last changed, in 2023
_UINT32 = 4
_OWN_KEYS = ("general.file_type", "general.quantization_version")


@dataclass(frozen=True)
class TensorPlan:
    """A tensor of the file to be written.

    Attributes
    ----------
    source : TensorInfo
    format : Format
        What it will be stored in.
    """

    source: TensorInfo
    format: Format

    @property
    def n_bytes(self) -> int:
        """Bytes that it will take."""
        return self.format.nbytes(math.prod(self.source.shape))


@dataclass(frozen=True)
class QuantizePlan:
    """What a file will hold.

    Attributes
    ----------
    mix : Mix
    tensors : tuple of TensorPlan
        In the order of the source.
    """

    mix: Mix
    tensors: tuple[TensorPlan, ...]

    @property
    def n_weights(self) -> int:
        """Numbers in all tensors."""
        return sum(math.prod(tensor.source.shape) for tensor in self.tensors)

    @property
    def bytes_before(self) -> int:
        """Bytes of all tensors of the source."""
        return sum(tensor.source.n_bytes for tensor in self.tensors)

    @property
    def bytes_after(self) -> int:
        """Bytes of all tensors to be written."""
        return sum(tensor.n_bytes for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """Of all tensors together."""
        return 8 * self.bytes_after / self.n_weights if self.n_weights else 0.0


def plan_quantization(
    file: GGUFFile,
    type: str,
    /,
    *,
    allow_requantize: bool = False,
    output_type: str | None = None,
    token_embd_type: str | None = None,
    pure: bool = False,
) -> QuantizePlan:
    """Choose each tensor's format, and check that all of them can be made.

    Parameters
    ----------
    file : GGUFFile
    type : str
        A name of `woolly.mixes.MIXES`, in any case.
    allow_requantize : bool
        Also take tensors that are quantised already, and so have lost something.
    output_type, token_embd_type : str, optional
        Formats of these two.
    pure : bool
        All matrices in the type's base format.

    Raises
    ------
    WoollyError
        The type is unknown, or a tensor is quantised already and that was not allowed.
    UnsupportedFormatError
        A format for a tensor that cannot be written, or a tensor's format that cannot be read.
    """
    mix = resolve_mix(type)
    for option, name in (("output type", output_type), ("token embedding type", token_embd_type)):
        if name is not None and name not in QUANTIZED_FORMATS:
            raise UnsupportedFormatError(f"{option} {name!r}: expected one of {', '.join(QUANTIZED_FORMATS)}")
    formats = plan_formats(
        file.tensors, file.metadata, mix, output_type=output_type, token_embd_type=token_embd_type, pure=pure
    )
    plan = QuantizePlan(mix, tuple(TensorPlan(info, formats[name]) for name, info in file.tensors.items()))
    for tensor in plan.tensors:
        _check_source(file.path, tensor, allow_requantize)
    return plan


def quantize_file(
    file: GGUFFile,
    target: str | os.PathLike[str],
    plan: QuantizePlan,
    /,
    *,
    n_threads: int | None = None,
    on_progress: Callable[[TensorPlan, int], object] = lambda tensor, n_bytes: None,
) -> None:
    """Write the file that was planned; its name appears when all of it is there.

    Parameters
    ----------
    file : GGUFFile
        The source.
    target : path
        Replaced if it is there.
    plan : QuantizePlan
    n_threads : int, optional
    on_progress : callable
        Called with a tensor and how many more bytes of its source have been done.

    Raises
    ------
    WoollyError
        A weight is NaN, infinite or too large for its format: the message names the tensor. Or the disk has too little
        room.
    OSError

    Notes
    -----
    Holds 64 MB of float32 weights at a time, or one row. The result is the same for any number of threads.
    """
    with replacing(Path(target)) as temporary, temporary.open("wb") as out:
        out.write(_header(file, plan))
        _pad(out, file.alignment)
        end = out.tell() + sum(aligned(tensor.n_bytes, file.alignment) for tensor in plan.tensors)
        reserve(out.fileno(), Path(target), end)
        for tensor in plan.tensors:
            for blocks, n_bytes in _converted(file, tensor, plan.mix.is_searched, n_threads):
                out.write(blocks)
                on_progress(tensor, n_bytes)
            _pad(out, file.alignment)


def _check_source(path: str, tensor: TensorPlan, allow_requantize: bool) -> None:
    name, before = tensor.source.name, tensor.source.format.name
    if before == tensor.format.name:
        return  # copied
    if before not in kernel_formats():
        raise UnsupportedFormatError(f"{path}: tensor {name!r} is stored as {before}, which cannot be read")
    if before not in FLOATS and not allow_requantize:
        raise WoollyError(
            f"{path}: tensor {name!r} is quantised already ({before}); a file in f32, f16 or bf16 gives better "
            "results, --allow-requantize takes this one"
        )


def _converted(
    file: GGUFFile, tensor: TensorPlan, searched: bool, n_threads: int | None
) -> Iterator[tuple[NDArray[np.uint8], int]]:
    """A tensor's bytes in its new format, chunk by chunk, with how many bytes of the source each was."""
    source = tensor.source
    stored = file.bytes_of(source.name)
    for part in row_chunks(math.prod(source.shape[:-1]), source.shape[-1], CHUNK_OF_ALL_THREADS):
        chunk = read_rows(stored, part, source.format.nbytes(source.shape[-1]))
        if source.format == tensor.format:
            yield chunk, chunk.nbytes
            continue
        values = chunk.view(np.float32) if source.format.name == "f32" else dequantize(chunk, source.format.name)
        with naming(file.path, source.name, part.start):
            blocks = quantize_rows(values, tensor.format.name, searched=searched, n_threads=n_threads)
        yield blocks, chunk.nbytes


def read_rows(stored: ByteSource, rows: slice, row_bytes: int) -> NDArray[np.uint8]:
    """Rows of a tensor, uint8, (n_rows, row_bytes)."""
    return stored.read(rows.start * row_bytes, rows.stop * row_bytes).reshape(-1, row_bytes)


def row_chunks(n_rows: int, n_cols: int, chunk_values: int = CHUNK_VALUES) -> Iterator[slice]:
    """Ranges of whole rows, each of about `chunk_values` values."""
    step = max(1, chunk_values // n_cols)
    for first in range(0, n_rows, step):
        yield slice(first, min(first + step, n_rows))


@contextlib.contextmanager
def naming(path: str, name: str, first_row: int) -> Iterator[None]:
    """Say of which tensor a weight could not be quantised."""
    try:
        yield
    except ValueError as error:
        raise WoollyError(f"{path}: tensor {name!r}, rows from {first_row}: {error}") from None


def _header(file: GGUFFile, plan: QuantizePlan) -> bytes:
    """Everything before the tensors' data; see `woolly.gguf_file` for the layout."""
    kept = [key for key in file.metadata if key not in _OWN_KEYS and not key.startswith("split.")]
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(plan.tensors), len(kept) + len(_OWN_KEYS))]
    with open(file.path, "rb") as source:
        for key in kept:
            begin, end = file.metadata.place(key)
            source.seek(begin)
            parts.append(source.read(end - begin))
    for key, value in zip(_OWN_KEYS, (plan.mix.file_type, QUANTIZATION_VERSION), strict=True):
        parts += [_string(key), struct.pack("<II", _UINT32, value)]
    offset = 0
    for tensor in plan.tensors:
        dims = tensor.source.shape[::-1]
        parts += [_string(tensor.source.name), struct.pack(f"<I{len(dims)}Q", len(dims), *dims)]
        parts.append(struct.pack("<IQ", tensor.format.ggml_type, offset))
        offset += aligned(tensor.n_bytes, file.alignment)
    return b"".join(parts)


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _pad(out: BinaryIO, alignment: int) -> None:
    out.write(bytes(-out.tell() % alignment))
