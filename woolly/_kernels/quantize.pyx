"""Quantising: rows of float32 into the blocks of a GGUF file.

Owns the arguments and how blocks are shared out among threads; what becomes of a block is c/quantizers.h's business.
"""

import numpy as np

from cython.parallel cimport prange
from libc.stdint cimport int64_t, uint8_t

from woolly._kernels.threads import check_threads
from woolly.errors import UnsupportedFormatError

ctypedef void (*rows_fn)(const float *x, int64_t n_blocks, uint8_t *out) noexcept nogil

cdef extern from "quantizers.h" nogil:
    ctypedef struct woolly_quantizer:
        const char *name
        int block_size
        int block_bytes
        float most
        rows_fn rows
        rows_fn searched_rows

    const woolly_quantizer *WOOLLY_QUANTIZERS
    enum:
        WOOLLY_N_QUANTIZERS
    int64_t find_unfit(const float *x, int64_t n, float most)

cdef int64_t WEIGHTS_A_TASK = 16384  # 64 blocks of 256: a multiple of every step that a quantiser takes

cdef int quantizer_of(format) except -1:
    """Place of a format in the table of quantisers."""
    return _INDEX[format]


cdef void quantize_blocks(int quantizer, const float *x, int64_t n_blocks, uint8_t *out) noexcept nogil:
    """Blocks of weights that the format holds."""
    WOOLLY_QUANTIZERS[quantizer].rows(x, n_blocks, out)


_INDEX = {WOOLLY_QUANTIZERS[i].name.decode(): i for i in range(WOOLLY_N_QUANTIZERS)}
QUANTIZED_FORMATS = tuple(_INDEX)


def quantize_rows(const float[:, ::1] x not None, format, /, *, searched=False, n_threads=None):
    """Store rows of weights in a format.

    Parameters
    ----------
    x : float32, (n_rows, n_cols), C-contiguous
    format : str
        One of `QUANTIZED_FORMATS`.
    searched : bool
        Search for the scales of Q5_0 and Q5_1 too, as a mix wants whose rows fell back to them.
    n_threads : int, optional

    Returns
    -------
    uint8, (n_rows, row_bytes)
        Each row's blocks as GGUF has them.

    Raises
    ------
    UnsupportedFormatError
        The format is none of those.
    ValueError
        n_cols is no multiple of the format's block, or a weight is NaN, infinite, or more than the format holds (65504
        where scales are F16).

    Notes
    -----
    Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 and MXFP4 are those of `gguf.quants`, bit for bit, unless `searched` says otherwise of
    Q5_0 and Q5_1. The K formats, IQ4_NL and IQ4_XS are always searched for the least squared error, weighted by the
    importance of large weights. A block depends on its weights alone: the result is the same for any number of threads
    and on any instruction set. Runs without the GIL.
    """
    if format not in _INDEX:
        raise UnsupportedFormatError(
            f"quantize_rows: cannot make {format!r}; formats that can be: {', '.join(QUANTIZED_FORMATS)}"
        )
    cdef const woolly_quantizer *quantizer = &WOOLLY_QUANTIZERS[<int>_INDEX[format]]
    cdef rows_fn rows = quantizer.searched_rows if searched and quantizer.searched_rows != NULL else quantizer.rows
    if x.shape[1] % quantizer.block_size:
        raise ValueError(
            f"quantize_rows: {format} wants a multiple of {quantizer.block_size} columns, got {x.shape[1]}"
        )
    cdef int threads = check_threads(n_threads)
    cdef int64_t n_weights = x.shape[0] * x.shape[1], task
    cdef int64_t n_tasks = (n_weights + WEIGHTS_A_TASK - 1) // WEIGHTS_A_TASK
    out = np.empty((x.shape[0], x.shape[1] // quantizer.block_size * quantizer.block_bytes), dtype=np.uint8)
    if n_weights == 0:
        return out
    cdef const float *weights = &x[0, 0]
    cdef uint8_t[:, ::1] blocks = out
    cdef uint8_t *bytes = &blocks[0, 0]
    unfit = np.empty(n_tasks, dtype=np.int64)
    cdef int64_t[::1] unfit_view = unfit
    cdef int64_t *places = &unfit_view[0]
    for task in prange(n_tasks, nogil=True, num_threads=threads, schedule="dynamic"):
        places[task] = quantize_task(quantizer, rows, weights, n_weights, task, bytes)
    first = int(unfit.min())
    if first < n_weights:
        row, column = divmod(first, x.shape[1])
        raise ValueError(
            f"weight {x[row, column]:g} in row {row}, column {column}: {format} holds numbers up to {quantizer.most:g}"
        )
    return out


cdef int64_t quantize_task(const woolly_quantizer *quantizer, rows_fn rows, const float *x, int64_t n, int64_t task,
                           uint8_t *out) noexcept nogil:
    """Quantise one task's blocks; return the place of a weight that the format does not hold, or n."""
    cdef int64_t begin = task * WEIGHTS_A_TASK, end = min(n, begin + WEIGHTS_A_TASK)
    cdef int64_t place = find_unfit(x + begin, end - begin, quantizer.most)
    if place < end - begin:
        return begin + place
    rows(x + begin, (end - begin) // quantizer.block_size,
         out + begin // quantizer.block_size * quantizer.block_bytes)
    return n
