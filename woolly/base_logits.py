"""A file of next-token distributions over a text, as llama.cpp's perplexity tool writes and reads it.

    8 bytes  "_logits_"
    uint32   n_ctx, tokens of a window
    int32    n_vocab
    int32    n_windows
    int32    tokens  (n_windows, n_ctx)
    uint16   rows    (n_windows, n_ctx - 1 - n_ctx // 2, 4 + n_vocab, made even)

A row is of a position in a window's second half: two float32, step and least, then q of each token, padded; the
logarithm of its probability is least + step q. What is less likely than the likeliest by e^16 is cut there. Such a file
holds 2 bytes a token of the vocabulary, so that a base model too large for the machine at hand need not run again.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from woolly.errors import WoollyError
from woolly.stored_file import Closing, StoredFile

MAGIC = b"_logits_"
_SIZES = struct.Struct("<Iii")
_HEADER_BYTES = len(MAGIC) + _SIZES.size
_HEAD = 4  # uint16 of a row before its tokens
_CUT = 16.0  # how far below the likeliest token a logarithm may lie
_LOWEST, _HIGHEST = -100.0, 0.01  # what may be in a file, with room for rounding: the likeliest is above -log n_vocab
_MOST_CTX, _MOST_VOCAB = 1 << 24, 1 << 24


def is_base_logits(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins as one of these."""
    try:
        with open(path, "rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def row_values(n_vocab: int) -> int:
    """uint16 of a row."""
    return _HEAD + n_vocab + n_vocab % 2


def n_scored(n_ctx: int) -> int:
    """Positions of a window that have a row: those of its second half, but for the last, which no token follows."""
    return n_ctx - 1 - n_ctx // 2


class BaseLogits(Closing):
    """An open file.

    Attributes
    ----------
    windows : int32, (n_windows, n_ctx)
        Tokens of the text.
    n_vocab : int
    least : float
        Logarithms at or below it are cut ones, of probabilities next to 0.

    Raises
    ------
    WoollyError
        It is no such file, or its length is not what its header says.
    OSError
    """

    least = -_CUT

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._file = StoredFile(self.path, format="base logits", first_field="magic at byte 0", error=WoollyError)
        n_ctx, self.n_vocab, n_windows = self._read_sizes()
        tokens = self._file.read(_HEADER_BYTES, 4 * n_windows * n_ctx).view("<i4")
        self.windows: NDArray[np.int32] = tokens.reshape(n_windows, n_ctx).astype(np.int32)
        if self.windows.min() < 0 or self.windows.max() >= self.n_vocab:
            raise WoollyError(f"{self.path!r}: a token is outside the vocabulary of {self.n_vocab}")

    def log_probs(self, window: int) -> Iterator[NDArray[np.float64]]:
        """Logarithms of the probabilities of the token after each scored position: pieces of float64, (n, n_vocab)."""
        n_windows, n_ctx = self.windows.shape
        n_rows, width = n_scored(n_ctx), row_values(self.n_vocab)
        start = _HEADER_BYTES + 4 * n_windows * n_ctx + 2 * window * n_rows * width
        step = rows_of_a_piece(self.n_vocab)
        for first in range(0, n_rows, step):
            n = min(step, n_rows - first)
            raw = self._file.read(start + 2 * first * width, 2 * n * width).view("<u2").reshape(n, width)
            yield self._decoded(raw)

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def _decoded(self, raw: NDArray[np.uint16]) -> NDArray[np.float64]:
        scales = np.ascontiguousarray(raw[:, :_HEAD]).view("<f4").astype(np.float64)
        step, least = scales[:, :1], scales[:, 1:]
        if not ((step >= 0) & (least >= _LOWEST) & (least + 65535 * step <= _HIGHEST)).all():
            raise WoollyError(f"{self.path!r}: a row's step and least value give no logarithms of probabilities")
        return least + step * raw[:, _HEAD : _HEAD + self.n_vocab]

    def _read_sizes(self) -> tuple[int, int, int]:
        n_bytes = self._file.n_bytes
        head = self._file.read(0, min(n_bytes, _HEADER_BYTES)).tobytes()
        if not head.startswith(MAGIC):
            raise WoollyError(f"{self.path!r}: magic at byte 0: expected {MAGIC!r}, found {head[:8]!r}")
        if len(head) < _HEADER_BYTES:
            raise WoollyError(f"{self.path!r}: the header takes {_HEADER_BYTES} bytes, the file has {n_bytes}")
        n_ctx, n_vocab, n_windows = _SIZES.unpack_from(head, len(MAGIC))
        if not (4 <= n_ctx <= _MOST_CTX and 1 <= n_vocab <= _MOST_VOCAB and n_windows >= 1):
            sizes = f"windows of {n_ctx}, a vocabulary of {n_vocab}, {n_windows} windows"
            raise WoollyError(f"{self.path!r}: its sizes make no sense: {sizes}")
        expected = n_bytes_of(n_ctx, n_vocab, n_windows)
        if n_bytes != expected:
            raise WoollyError(f"{self.path!r}: its header asks for {expected} bytes, the file has {n_bytes}")
        return n_ctx, n_vocab, n_windows


def n_bytes_of(n_ctx: int, n_vocab: int, n_windows: int) -> int:
    """Bytes of a whole file."""
    return _HEADER_BYTES + n_windows * (4 * n_ctx + 2 * n_scored(n_ctx) * row_values(n_vocab))


def rows_of_a_piece(n_vocab: int) -> int:
    """How many rows are looked at at a time: 64 MB of float64, or one."""
    return max(1, (1 << 23) // n_vocab)


def write_header(out: BinaryIO, windows: NDArray[np.int32], n_vocab: int) -> None:
    """Everything before the rows."""
    out.write(MAGIC + _SIZES.pack(windows.shape[1], n_vocab, len(windows)))
    out.write(windows.astype("<i4").tobytes())


def write_rows(out: BinaryIO, log_probs: NDArray[np.float64]) -> None:
    """Rows of logarithms of probabilities: float64, (n, n_vocab)."""
    most = log_probs.max(axis=1, keepdims=True)
    least = np.maximum(log_probs.min(axis=1, keepdims=True), most - _CUT)
    scales = np.concatenate([(most - least) / 65535, least], axis=1).astype("<f4")
    steps = np.where(scales[:, :1] > 0, scales[:, :1], 1).astype(np.float64)
    rows = np.zeros((len(log_probs), row_values(log_probs.shape[1])), "<u2")
    rows[:, :_HEAD] = scales.view("<u2")
    rows[:, _HEAD : _HEAD + log_probs.shape[1]] = np.rint(((log_probs - least) / steps).clip(0, 65535))
    out.write(rows.tobytes())


def check_fits(path: Path, base: BaseLogits, windows: NDArray[np.int32], n_vocab: int) -> None:
    """Refuse a base of another text, vocabulary or length of windows.

    Raises
    ------
    WoollyError
    """
    if base.n_vocab != n_vocab:
        raise WoollyError(f"{path}: of a vocabulary of {base.n_vocab} tokens, the model's has {n_vocab}")
    if base.windows.shape[1] != windows.shape[1]:
        raise WoollyError(
            f"{path}: of windows of {base.windows.shape[1]} tokens, expected {windows.shape[1]}: choose with --ctx"
        )
    n = min(len(base.windows), len(windows))
    if (base.windows[:n] != windows[:n]).any():
        raise WoollyError(f"{path}: of another text: its tokens are not those that are measured")
    if n < len(windows):
        raise WoollyError(f"{path}: of {n} windows, the text has {len(windows)}: choose with --chunks {n}")
