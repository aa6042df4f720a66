from libc.stdint cimport int64_t, uint8_t

cdef int quantizer_of(format) except -1
cdef void quantize_blocks(int quantizer, const float *x, int64_t n_blocks, uint8_t *out) noexcept nogil
