"""Matrices of generated weights: what a machine can be measured with when there is no model file.

Owns the arguments and how groups of rows are shared out among threads; the generator itself is in c/generate.h.
"""

import numpy as np

from cython.parallel cimport prange, threadid
from libc.stdint cimport int64_t, uint8_t

from woolly._kernels.dispatch cimport active
from woolly._kernels.kernels cimport woolly_format, woolly_generate_args, woolly_kernels
from woolly._kernels.matmul cimport PackedMatrix
from woolly._kernels.quantize cimport quantize_blocks, quantizer_of

from woolly._kernels.dispatch import format_index
from woolly._kernels.threads import check_threads
from woolly.errors import UnsupportedFormatError

# Those that c/generate.h stores, and those that are made as `quantize_rows` makes them
_DIRECT = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "q6_k", "q4_k")
_QUANTISED = ("q5_k", "q3_k", "q2_k", "iq4_nl", "iq4_xs", "mxfp4")
GENERATED_FORMATS = _DIRECT + _QUANTISED

cdef double ODD_INTEGERS = 2.0**24  # weights are odd integers below this, times bound / this


def generate(PackedMatrix matrix not None, /, *, seed, tensor, bound, n_threads=None):
    """Fill a matrix with weights uniform on (-bound, bound).

    weight (row, col) = bound / 2^24 (i | 1), with i the upper 25 bits, as a signed number, of word col % 4 of
    Philox4x32-7 with key = seed and counter = (col // 4, row, tensor); then quantised if the matrix is.

    Parameters
    ----------
    matrix : PackedMatrix
        Written; its memory is reserved if it has none yet.
    seed, tensor : int
        In [0, 2^64): which numbers, and which of their independent streams.
    bound : float
        Above 0.
    n_threads : int, optional

    Returns
    -------
    PackedMatrix
        The same matrix.

    Raises
    ------
    UnsupportedFormatError
        The generator does not make this format.
    ValueError
        seed or tensor is not in [0, 2^64), or bound is not a positive number.

    Notes
    -----
    A weight depends on seed, tensor, row and col alone: not on the shape, the threads or the instruction set. Runs
    without the GIL. Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """
    generate_all([(matrix, tensor, bound)], seed=seed, n_threads=n_threads)
    return matrix


def generate_all(items, /, *, seed, n_threads=None):
    """Fill several matrices in one parallel region: thousands of small ones cost no more than a large one.

    Parameters
    ----------
    items : sequence of (PackedMatrix, tensor, bound)
        As for `generate`.
    seed : int
    n_threads : int, optional

    Raises
    ------
    UnsupportedFormatError, ValueError
        As `generate` does, before anything is written.
    """
    cdef int threads = check_threads(n_threads)
    cdef const woolly_kernels *kernels = active()
    cdef PackedMatrix matrix
    cdef woolly_generate_args *args
    cdef int64_t n_items = len(items), i, group
    for matrix, tensor, bound in items:
        _check(matrix, seed, tensor, bound)
    if n_items == 0:
        return
    records = np.empty(n_items * sizeof(woolly_generate_args), dtype=np.uint8)
    args = <woolly_generate_args *><size_t>records.ctypes.data
    cdef int[::1] quantizers = np.full(n_items, -1, dtype=np.intc)
    cdef int64_t scratch_bytes = 64
    cdef int64_t[::1] ends = np.cumsum([(<PackedMatrix>item[0]).view.n_groups for item in items], dtype=np.int64)
    for i in range(n_items):
        matrix, tensor, bound = items[i]
        matrix.reserve()
        args[i].seed, args[i].tensor = seed, tensor
        args[i].scale = bound / ODD_INTEGERS
        args[i].format = &kernels.formats[matrix.view.format]
        args[i].n_rows, args[i].n_cols, args[i].w = matrix.view.n_rows, matrix.view.n_cols, matrix.view.w
        if matrix.format in _QUANTISED:
            quantizers[i] = quantizer_of(matrix.format)
            scratch_bytes = max(scratch_bytes, 16 * (8 * matrix.view.n_cols + matrix.view.row_bytes))
    cdef int64_t n_groups = ends[n_items - 1]
    cdef Batch batch
    batch.args, batch.ends, batch.quantizers = args, &ends[0], &quantizers[0]
    batch.f32 = &kernels.formats[<int>format_index("f32")]
    cdef uint8_t[:, ::1] scratch = np.empty((threads, scratch_bytes), dtype=np.uint8)
    cdef uint8_t *memory = &scratch[0, 0]
    for group in prange(n_groups, nogil=True, num_threads=threads, schedule="dynamic"):
        generate_one(kernels, &batch, group, memory + threadid() * scratch_bytes)


cdef struct Batch:
    const woolly_generate_args *args
    const int64_t *ends           # where the groups of each matrix end, in a row of all groups
    const int *quantizers         # -1 where the generator stores the format itself
    const woolly_format *f32


cdef void generate_one(const woolly_kernels *kernels, const Batch *batch, int64_t group,
                       uint8_t *scratch) noexcept nogil:
    """One group of all matrices' groups in a row."""
    cdef int64_t i = 0
    while group >= batch.ends[i]:
        i += 1
    if i:
        group -= batch.ends[i - 1]
    if batch.quantizers[i] < 0:
        kernels.generate(&batch.args[i], group)
    else:
        generate_quantised(kernels, batch, i, group, scratch)


cdef void generate_quantised(const woolly_kernels *kernels, const Batch *batch, int64_t i, int64_t group,
                             uint8_t *scratch) noexcept nogil:
    """One group as float32, then its rows, their blocks, and these packed."""
    cdef const woolly_generate_args *g = &batch.args[i]
    cdef const woolly_format *f = g.format
    cdef int64_t n_cols = g.n_cols, n_blocks = n_cols // f.block_size, row_bytes = n_blocks * f.block_bytes, row, col
    cdef int64_t n_rows = min(16, g.n_rows - 16 * group)
    cdef float *tile = <float *>scratch
    cdef float *rows = tile + 16 * n_cols
    cdef uint8_t *blocks = <uint8_t *>(rows + 16 * n_cols)
    cdef woolly_generate_args plain = g[0]
    plain.format = batch.f32
    plain.w = scratch - group * (64 * n_cols)  # where group 0 would be
    kernels.generate(&plain, group)
    for row in range(n_rows):
        for col in range(n_cols):
            rows[row * n_cols + col] = tile[col * 16 + row]
    quantize_blocks(batch.quantizers[i], rows, n_rows * n_blocks, blocks)
    f.pack(blocks, row_bytes, n_rows, n_blocks, g.w + group * 16 * row_bytes)


def _check(PackedMatrix matrix not None, seed, tensor, bound):
    if matrix.format not in GENERATED_FORMATS:
        raise UnsupportedFormatError(
            f"generate: cannot make {matrix.format}; formats that can be: {', '.join(GENERATED_FORMATS)}"
        )
    for name, value in (("seed", seed), ("tensor", tensor)):
        if not 0 <= value < 2**64:
            raise ValueError(f"generate: {name} must be in [0, 2^64), got {value}")
    if not 0 < bound < 1e30:
        raise ValueError(f"generate: bound must be a positive number, got {bound}")
