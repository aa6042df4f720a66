from woolly._kernels.kernels cimport woolly_bf16_of_fn, woolly_bf16_unit, woolly_kernels, woolly_quantize_fn

# What a matmul of the active instruction set reads, by the way to compute
cdef struct Activations:
    const woolly_bf16_unit *unit    # of bf16, from WOOLLY_ROUNDED_LEAST_COLS columns on; NULL otherwise
    woolly_quantize_fn quantize     # for quantised weights
    int n_digits
    woolly_bf16_of_fn bf16_of       # a record for tiles of bf16, which WOOLLY_BF16_LEAST_COLS columns have; or NULL

cdef const woolly_kernels *active() noexcept nogil
cdef Activations active_activations(compute) except *
