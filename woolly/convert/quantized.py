"""A checkpoint whose matrices of floats are quantised, or rounded to another float format, as they are read."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from woolly._kernels import check_threads, dequantize, quantize_rows
from woolly.checkpoint import Checkpoint
from woolly.convert.tensors import is_kept_f32
from woolly.formats import FLOATS, Format
from woolly.gguf_file import TensorInfo
from woolly.mixes import plan_formats, resolve_mix
from woolly.quantizing import CHUNK_VALUES, naming, read_rows, row_chunks
from woolly.stored_file import ByteSource, Closing, HeldBytes


class QuantizedCheckpoint(Closing):
    """Shows a checkpoint with its matrices in another format. A `woolly.checkpoint.Checkpoint` itself.

    Parameters
    ----------
    source : Checkpoint
    type : str
        A name of `woolly.mixes.MIXES`, such as "q8_0", "q4_k_m" or "f16".
    n_threads : int, optional

    Raises
    ------
    WoollyError
        There is no such type.

    Notes
    -----
    Matrices that are quantised already stay as they are, and so do norms, biases and the router of experts.
    """

    def __init__(self, source: Checkpoint, type: str, *, n_threads: int | None = None) -> None:
        self.path, self.metadata = source.path, source.metadata
        self._source = source
        self._n_threads: int = check_threads(n_threads)
        self._searched = resolve_mix(type).is_searched
        formats = target_formats(source, type)
        self.tensors = {name: _converted(info, formats[name]) for name, info in source.tensors.items()}

    def bytes_of(self, name: str) -> ByteSource:
        """The bytes of a tensor, quantised now if it is to be."""
        before, after = self._source.tensors[name], self.tensors[name]
        stored = self._source.bytes_of(name)
        if before.format == after.format:
            return stored
        n_rows, n_cols = math.prod(before.shape[:-1]), before.shape[-1]
        out = np.empty((n_rows, after.format.nbytes(n_cols)), np.uint8)

        def fill(chunk: slice) -> None:
            rows = read_rows(stored, chunk, before.format.nbytes(n_cols))
            with naming(self.path, name, chunk.start):
                out[chunk] = convert_rows(rows, before.format.name, after.format.name, searched=self._searched)

        for_each_chunk(fill, n_rows, n_cols, self._n_threads)
        return HeldBytes(out.reshape(-1))

    def close(self) -> None:
        """Close the checkpoint that it shows."""
        self._source.close()


def convert_rows(rows: NDArray[np.uint8], source: str, target: str, *, searched: bool = False) -> NDArray[np.uint8]:
    """Rows of a tensor in another format.

    Parameters
    ----------
    rows : uint8, (n_rows, row_bytes)
    source, target : str
        Formats; the target one that can be made.
    searched : bool
        As for `quantize_rows`.

    Returns
    -------
    uint8, (n_rows, row_bytes of the target)

    Raises
    ------
    ValueError
        A weight is NaN, infinite or too large for a quantised target.
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
    return quantize_rows(values, target, searched=searched, n_threads=1)


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


def target_formats(source: Checkpoint, type: str | None) -> dict[str, Format]:
    """The format that each tensor gets, by its name; None leaves all as they are.

    Raises
    ------
    WoollyError
        There is no such type.
    """
    formats = {name: info.format for name, info in source.tensors.items()}
    if type is not None:
        planned = plan_formats(source.tensors, source.metadata, resolve_mix(type))
        for name, info in source.tensors.items():
            if info.format.name in FLOATS and not is_kept_f32(name, info.shape):
                formats[name] = planned[name]
    return formats


def _converted(info: TensorInfo, target: Format) -> TensorInfo:
    return TensorInfo(info.name, info.shape, target, info.offset, target.nbytes(math.prod(info.shape)))
