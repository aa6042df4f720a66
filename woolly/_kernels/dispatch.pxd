from woolly._kernels.kernels cimport woolly_bf16_unit, woolly_kernels

cdef const woolly_kernels *active() noexcept nogil
cdef const woolly_bf16_unit *active_bf16_unit() noexcept nogil
