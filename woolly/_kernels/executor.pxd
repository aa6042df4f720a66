from libc.stdint cimport int32_t

from woolly._kernels.operations cimport Run


cdef class Stop:
    cdef volatile int _asked
    cdef double _deadline_s


cdef class Executor:
    cdef object _lock, _interrupt
    cdef int _n_forks
    cdef volatile int _reason, _closed
    cdef enter(self, Stop stop)
    cdef leave(self)
    cdef close(self)
    cdef execute(self, Run *run, int n_threads, Stop stop)
    cdef void _work(self, Run *run, int thread, int n_threads) noexcept nogil
    cdef int32_t _next_turn(self, Run *run, int32_t turn, float *scratch) noexcept nogil
    cdef void _look_for_reasons(self, Run *run) noexcept nogil
    cdef bint _signalled(self) noexcept with gil
