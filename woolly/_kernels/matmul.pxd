from libc.stdint cimport int64_t, uint8_t

from woolly._kernels.kernels cimport woolly_kernels


# What a kernel needs to know of a packed matrix; valid as long as its PackedMatrix
cdef struct MatrixView:
    uint8_t *w                 # (n_groups, group_bytes), NULL before it is packed
    int64_t n_rows
    int64_t n_cols
    int64_t n_groups
    int64_t n_blocks           # in a row
    int64_t row_bytes          # of stored blocks: GGUF's own, or what they are converted to
    int64_t group_bytes
    int format                 # index in the kernel table
    bint quantised


cdef class PackedMatrix:
    cdef readonly object data      # uint8 (n_groups, group_bytes), or None before it is packed
    cdef readonly str format
    cdef MatrixView view

cdef void matrix_row(const woolly_kernels *kernels, const MatrixView *m, int64_t row, uint8_t *blocks,
                     float *out) noexcept nogil
