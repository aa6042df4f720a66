"""Loops at the machine's limit, for `woolly.bench`: arithmetic in registers, memory, threads. They compute nothing.

Each function does a given amount of work and returns; who calls it takes the time.
"""

import numpy as np

cimport openmp
from cython.parallel cimport parallel, prange
from libc.stdint cimport int32_t, int64_t, uint8_t, uint64_t

from woolly._kernels.dispatch cimport active
from woolly._kernels.kernels cimport WOOLLY_QBLOCK, woolly_kernels, woolly_q16_stride

from woolly._kernels.dispatch import available_isas
from woolly._kernels.matmul import aligned_empty
from woolly._kernels.threads import check_threads

cdef extern from "peaks.h" nogil:
    ctypedef struct woolly_peak:
        const char *isa
        const char *kind
        const char *instruction
        void (*loop)(int64_t n) noexcept nogil
        int ops_a_step
    const woolly_peak *limits_peak(int i)
    bint limits_has(const woolly_peak *peak)
    uint64_t limits_read(const char *isa, const uint8_t *data, int64_t n_bytes)
    void limits_write(const char *isa, uint8_t *data, int64_t n_bytes, uint64_t value)

cdef extern from "team.h" nogil:
    ctypedef struct woolly_team:
        pass
    int32_t team_enter(woolly_team *team)
    bint team_leave(woolly_team *team, int32_t turn)
    void team_wait(woolly_team *team, int32_t turn, const uint8_t *ahead, int64_t n_ahead)
    void team_open(woolly_team *team, int32_t turn)

LINE_BYTES = 512  # what one step of the memory loops covers


def peaks():
    """The arithmetic loops that this machine runs.

    Returns
    -------
    list of (isa, kind, instruction, operations a step)
        kind is "fma_f32", "dot_int8", "dot_int16" or "dot_bf16"; a multiplication and an addition are two operations.
    """
    found, machine = [], available_isas()
    cdef int i = 0
    cdef const woolly_peak *peak = limits_peak(0)
    while peak != NULL:
        if peak.isa.decode() in machine and limits_has(peak):
            found.append((peak.isa.decode(), peak.kind.decode(), peak.instruction.decode(), peak.ops_a_step))
        i += 1
        peak = limits_peak(i)
    return found


def run_peak(isa, kind, n_steps, /, *, n_threads=None):
    """Run one arithmetic loop for n_steps on each thread.

    Raises
    ------
    ValueError
        This machine does not run such a loop.
    """
    if not any((isa, kind) == entry[:2] for entry in peaks()):
        raise ValueError(f"run_peak: no {kind} loop for {isa} runs on this machine")
    cdef int i = 0, threads = check_threads(n_threads)
    while (limits_peak(i).isa.decode(), limits_peak(i).kind.decode()) != (isa, kind):
        i += 1
    cdef const woolly_peak *peak = limits_peak(i)
    cdef int64_t n = n_steps
    with nogil, parallel(num_threads=threads):
        peak.loop(n)


cdef _check_buffer(name, const uint8_t[::1] data):
    if data.shape[0] < LINE_BYTES or data.shape[0] % LINE_BYTES or <size_t>&data[0] % 64:
        raise ValueError(f"{name}: expected a multiple of {LINE_BYTES} bytes at a multiple of 64, got {data.shape[0]}")


def read_memory(const uint8_t[::1] data not None, /, *, isa, n_passes=1, n_threads=None):
    """Read every byte of a buffer n_passes times; each thread reads its own part of it.

    Returns
    -------
    int
        The bits that are set anywhere, so that nothing can be left out.

    Raises
    ------
    ValueError
        The buffer is no multiple of 512 bytes, or not aligned to 64.
    """
    _check_buffer("read_memory", data)
    cdef int threads = check_threads(n_threads), thread
    cdef bytes name = isa.encode()
    cdef const char *isa_name = name
    cdef int64_t n_blocks = data.shape[0] // 512, _k, passes = n_passes
    cdef const uint8_t *base = &data[0]
    cdef uint64_t[::1] found = np.zeros(threads * 8, dtype=np.uint64)
    cdef uint64_t *bits = &found[0]
    for thread in prange(threads, nogil=True, num_threads=threads, schedule="static"):
        for _k in range(passes):
            bits[thread * 8] |= limits_read(isa_name, base + 512 * (n_blocks * thread // threads),
                                            512 * (n_blocks * (thread + 1) // threads - n_blocks * thread // threads))
    return int(np.bitwise_or.reduce(found))


def write_memory(uint8_t[::1] data not None, /, *, isa, n_passes=1, n_threads=None):
    """Write every byte of a buffer n_passes times; parts and errors as for `read_memory`."""
    _check_buffer("write_memory", data)
    cdef int threads = check_threads(n_threads), thread
    cdef bytes name = isa.encode()
    cdef const char *isa_name = name
    cdef int64_t n_blocks = data.shape[0] // 512, _k, passes = n_passes
    cdef uint8_t *base = &data[0]
    for thread in prange(threads, nogil=True, num_threads=threads, schedule="static"):
        for _k in range(passes):
            limits_write(isa_name, base + 512 * (n_blocks * thread // threads),
                         512 * (n_blocks * (thread + 1) // threads - n_blocks * thread // threads), _k)


def run_regions(n, /, *, n_threads=None):
    """Enter and leave n empty parallel regions."""
    cdef int threads = check_threads(n_threads)
    cdef int64_t _k, count = n
    cdef int64_t[::1] counts = np.zeros(8 * threads, dtype=np.int64)
    cdef int64_t *seen = &counts[0]
    for _k in range(count):
        with nogil, parallel(num_threads=threads):
            seen[8 * openmp.omp_get_thread_num()] += 1


def run_barriers(n, /, *, n_threads=None):
    """Go through n stages without tasks, as a program does through its own, within one parallel region."""
    cdef int threads = check_threads(n_threads)
    memory = aligned_empty(sizeof(woolly_team))
    memory[:] = 0
    cdef woolly_team *team = <woolly_team *><size_t>memory.ctypes.data
    cdef int32_t count = n
    with nogil, parallel(num_threads=threads):
        go_through(team, count)


cdef void go_through(woolly_team *team, int32_t n) noexcept nogil:
    cdef int32_t turn = team_enter(team)
    while turn < n:
        if team_leave(team, turn):
            turn += 1
            team_open(team, turn)
        else:
            team_wait(team, turn, NULL, 0)
            turn = team_enter(team)


def quantize_rows(const float[:, ::1] x not None, /, *, n_threads=None):
    """Quantise rows of activations to records, as a matmul of quantised weights wants them, and keep nothing.

    Parameters
    ----------
    x : float32, (n_tokens, n), C-contiguous
        n is a multiple of 32.

    Raises
    ------
    ValueError
        n is no multiple of 32.
    """
    cdef int64_t n = x.shape[1], t, stride = woolly_q16_stride(n)
    if n % WOOLLY_QBLOCK or n == 0:
        raise ValueError(f"quantize_rows: expected a multiple of {WOOLLY_QBLOCK} columns, got {n}")
    cdef int threads = check_threads(n_threads)
    if x.shape[0] == 0:
        return
    memory = aligned_empty(stride * x.shape[0])
    cdef uint8_t *records = <uint8_t *><size_t>memory.ctypes.data
    cdef const float *rows = &x[0, 0]
    cdef const woolly_kernels *kernels = active()
    for t in prange(x.shape[0], nogil=True, num_threads=threads):
        kernels.quantize_q16(rows + t * n, n, records + t * stride)
