"""A checkpoint whose matrices of floats are quantised, or rounded to another float format, as they are read."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import gguf
import numpy as np
from numpy.typing import NDArray

from woolly._kernels import check_threads, dequantize
from woolly.checkpoint import Checkpoint
from woolly.convert.tensors import is_kept_f32
from woolly.errors import UnsupportedFormatError
from woolly.formats import FORMATS, Format
from woolly.gguf_file import TensorInfo

FLOATS = ("f32", "f16", "bf16")
QUANTISED = ("q8_0", "q4_0", "q4_1", "q5_0")
CHUNK_VALUES = 1 << 20  # 4 MB as float32: a few times a core's L2, and little to hold for each thread


class QuantizedCheckpoint:
    """Shows a checkpoint with its matrices in another format. A `woolly.checkpoint.Checkpoint` itself.

    Parameters
    ----------
    source : Checkpoint
    format : str
        One of `FLOATS` or `QUANTISED`.
    n_threads : int, optional

    Raises
    ------
    UnsupportedFormatError
        The format is none of them.

    Notes
    -----
    Matrices that are quantised already stay as they are, and so do norms, biases, the router of experts, and matrices
    whose rows are no whole blocks of the format.
    """

    def __init__(self, source: Checkpoint, format: str, *, n_threads: int | None = None) -> None:
        self.path, self.metadata = source.path, source.metadata
        self._source = source
        self._n_threads: int = check_threads(n_threads)
        self.tensors = {name: _converted(info, format) for name, info in source.tensors.items()}

    def tensor_bytes(self, name: str) -> NDArray[np.uint8]:
        """The bytes of a tensor, quantised now if it is to be: uint8, (n_bytes,)."""
        before, after = self._source.tensors[name], self.tensors[name]
        raw = self._source.tensor_bytes(name)
        if before.format == after.format:
            return raw
        rows = raw.reshape(-1, before.format.nbytes(before.shape[-1]))
        out = np.empty((len(rows), after.format.nbytes(after.shape[-1])), np.uint8)

        def fill(chunk: slice) -> None:
            out[chunk] = convert_rows(rows[chunk], before.format.name, after.format.name)

        for_each_chunk(fill, len(rows), before.shape[-1], self._n_threads)
        return out.reshape(-1)

    def release(self, name: str) -> None:
        """Let the pages behind a tensor leave the process's memory."""
        self._source.release(name)

    def close(self) -> None:
        """Close the checkpoint that it shows."""
        self._source.close()

    def __enter__(self) -> QuantizedCheckpoint:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def convert_rows(rows: NDArray[np.uint8], source: str, target: str) -> NDArray[np.uint8]:
    """Rows of a tensor in another format.

    Parameters
    ----------
    rows : uint8, (n_rows, row_bytes)
    source, target : str
        Formats; the target one of `FLOATS` or `QUANTISED`.

    Returns
    -------
    uint8, (n_rows, row_bytes of the target)
    """
    if source == target:
        return rows
    values = dequantize(rows, source)
    if target == "f32":
        return values.view(np.uint8)
    if target == "bf16":
        return round_to_bf16(values).view(np.uint8)
    if target == "f16":
        with np.errstate(over="ignore"):  # what F16 cannot hold becomes infinite, as everywhere
            return values.astype(np.float16).view(np.uint8)
    kind = gguf.GGMLQuantizationType[target.upper()]
    return np.ascontiguousarray(gguf.quants.quantize(values, kind)).view(np.uint8).reshape(len(rows), -1)


def round_to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """float32 to BF16, to nearest with halves to even; NaN stays NaN."""
    bits = values.view(np.uint32)
    rounded = bits >> 16
    rounded &= 1
    rounded += bits
    rounded += 0x7FFF
    rounded >>= 16
    halves = rounded.astype(np.uint16)
    if np.isnan(values.max(initial=0)):  # rounding could carry a NaN over to a number
        where = np.isnan(values)
        halves[where] = (bits[where] >> 16 | 0x40).astype(np.uint16)
    return halves


def for_each_chunk(
    run: Callable[[slice], None], n_rows: int, n_cols: int, n_threads: int, *, chunk_values: int = CHUNK_VALUES
) -> None:
    """Call `run` for ranges of rows of about `chunk_values` values each, on `n_threads` Python threads.

    Kernels and numpy let go of the interpreter's lock, so that the threads run side by side.
    """
    chunks = list(row_chunks(n_rows, n_cols, chunk_values))
    if len(chunks) == 1 or n_threads == 1:
        for chunk in chunks:
            run(chunk)
        return
    with ThreadPoolExecutor(min(n_threads, len(chunks), os.cpu_count() or 1)) as pool:
        for _ in pool.map(run, chunks):
            pass


def row_chunks(n_rows: int, n_cols: int, chunk_values: int = CHUNK_VALUES) -> Iterator[slice]:
    """Ranges of whole rows, each of about `chunk_values` values."""
    step = max(1, chunk_values // n_cols)
    for first in range(0, n_rows, step):
        yield slice(first, min(first + step, n_rows))


def target_format(info: TensorInfo, format: str | None) -> Format:
    """The format that a tensor gets where its matrices are asked for in `format`; None leaves all as they are.

    Raises
    ------
    UnsupportedFormatError
        `format` is not one that can be made.
    """
    if format is not None and format not in FLOATS + QUANTISED:
        raise UnsupportedFormatError(f"expected a format of {', '.join(FLOATS + QUANTISED)}, got {format!r}")
    if format is None or info.format.name not in FLOATS or is_kept_f32(info.name, info.shape):
        return info.format
    target = FORMATS[format]
    return info.format if info.shape[-1] % target.block_size else target


def _converted(info: TensorInfo, format: str) -> TensorInfo:
    target = target_format(info, format)
    return TensorInfo(info.name, info.shape, target, info.offset, target.nbytes(math.prod(info.shape)))
