from woolly._kernels.kernels cimport woolly_kernels

cdef const woolly_kernels *active() noexcept nogil
