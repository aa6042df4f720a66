"""Matrices of generated weights: what a machine can be measured with when there is no model file.

Owns the arguments and how groups of rows are shared out among threads; the generator itself is in c/generate.h.
"""

from cython.parallel cimport prange
from libc.stdint cimport int64_t, uint64_t

from woolly._kernels.dispatch cimport active
from woolly._kernels.kernels cimport woolly_generate_args, woolly_kernels
from woolly._kernels.matmul cimport PackedMatrix

from woolly._kernels.threads import check_threads
from woolly.errors import UnsupportedFormatError

# Those that c/generate.h can store
GENERATED_FORMATS = ("f32", "f16", "bf16", "q8_0", "q5_0", "q4_1", "q4_0", "q6_k", "q4_k")

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
    if matrix.format not in GENERATED_FORMATS:
        raise UnsupportedFormatError(
            f"generate: cannot make {matrix.format}; formats that can be: {', '.join(GENERATED_FORMATS)}"
        )
    for name, value in (("seed", seed), ("tensor", tensor)):
        if not 0 <= value < 2**64:
            raise ValueError(f"generate: {name} must be in [0, 2^64), got {value}")
    if not 0 < bound < 1e30:
        raise ValueError(f"generate: bound must be a positive number, got {bound}")
    matrix.reserve()
    cdef int threads = check_threads(n_threads)
    cdef const woolly_kernels *kernels = active()
    cdef woolly_generate_args args
    cdef int64_t group
    args.seed, args.tensor = seed, tensor
    args.scale = bound / ODD_INTEGERS
    args.format = &kernels.formats[matrix.view.format]
    args.n_rows, args.n_cols, args.w = matrix.view.n_rows, matrix.view.n_cols, matrix.view.w
    for group in prange(matrix.view.n_groups, nogil=True, num_threads=threads, schedule="dynamic"):
        kernels.generate(&args, group)
    return matrix
