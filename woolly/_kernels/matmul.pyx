"""Packed matrices and their product with activations.

Owns validation, packing and how a matmul is shared out among threads; a range of rows is the micro-kernels' business.
"""

import numpy as np

from cython.parallel cimport prange, threadid
from libc.errno cimport EINTR, errno
from libc.stdint cimport int64_t, uint8_t, uint16_t
from libc.stdlib cimport free, malloc

from woolly._kernels.dispatch cimport Activations, active, active_activations
from woolly._kernels.kernels cimport (
    WOOLLY_BF16_LEAST_COLS, WOOLLY_GROUP, WOOLLY_NEAR_BYTES, WOOLLY_QBLOCK, WOOLLY_ROUNDED_LEAST_COLS,
    woolly_bf16_bytes, woolly_format, woolly_kernels, woolly_matmul_args, woolly_matmul_fn, woolly_q16_stride,
    woolly_rounded_bytes,
)

from woolly._kernels.dispatch import format_index
from woolly._kernels.threads import check_threads

cdef extern from "<unistd.h>" nogil:
    ssize_t pread(int descriptor, void *to, size_t n_bytes, int64_t offset)

cdef int64_t ROWS_A_TASK = 128  # eight groups: so many share activations on AMX; half of them where rows are few
cdef int64_t BYTES_A_READ = 256 << 10  # of a file, by a thread: they are packed from its L2 cache


def aligned_empty(n_bytes, /, *, align=64):
    """Uninitialised bytes at an aligned address.

    Parameters
    ----------
    n_bytes : int
    align : int
        A power of two.

    Returns
    -------
    uint8, (n_bytes,)
    """
    whole = np.empty(n_bytes + align, dtype=np.uint8)
    start = -whole.ctypes.data % align
    return whole[start:start + n_bytes]


def activation_bytes(n, /, *, compute="exact", tiles=True):
    """Bytes that n activations of a token take as quantised matmuls of the active instruction set read them.

    Without tiles, less what those of bf16 take, or values that are rounded to bf16.
    """
    cdef int64_t n_k = (n + WOOLLY_QBLOCK - 1) // WOOLLY_QBLOCK * WOOLLY_QBLOCK
    if not tiles:
        return woolly_q16_stride(n_k)
    if compute == "bf16":
        return woolly_q16_stride(n_k) + woolly_rounded_bytes(n_k, 16) // 16
    return woolly_q16_stride(n_k) + (woolly_bf16_bytes(n_k, 16) // 16 if active().bf16_of_q16 != NULL else 0)


cdef class PackedMatrix:
    """A weight matrix in the layout of the kernels: 16 rows side by side, still quantised.

    Parameters
    ----------
    n_rows, n_cols : int
        Shape of the matrix: y = w x has n_rows values for n_cols.
    format : str
        A format with kernels, see `kernel_formats`.

    Notes
    -----
    Packing permutes bits and inflates nothing: `unpack` gives the source back exactly. Formats without kernels of
    their own are converted to one that has them instead, which changes no value: those of 1 to 3 bits (IQ1 to IQ3, TQ)
    take 4.66 bits a weight; only F64 is rounded, to F32. The layout is the same for all instruction sets. Reading is
    safe from several threads.
    """

    def __cinit__(self, n_rows, n_cols, format, /):
        cdef MatrixView *m = &self.view
        m.format = format_index(format)
        cdef const woolly_format *f = &active().formats[m.format]
        if n_rows < 1 or n_cols < 1:
            raise ValueError(f"PackedMatrix: expected a shape of at least (1, 1), got ({n_rows}, {n_cols})")
        if n_cols % f.block_size:
            raise ValueError(f"PackedMatrix: {format} wants a multiple of {f.block_size} columns, got {n_cols}")
        self.format = format
        self.data = None
        m.n_rows, m.n_cols = n_rows, n_cols
        m.n_groups = (m.n_rows + WOOLLY_GROUP - 1) // WOOLLY_GROUP
        m.n_blocks = m.n_cols // f.block_size
        m.row_bytes = m.n_blocks * f.stored_bytes
        m.group_bytes = m.row_bytes * WOOLLY_GROUP
        m.quantised = f.quantised
        m.w = NULL

    @property
    def n_rows(self):
        """Rows: values that the product has."""
        return self.view.n_rows

    @property
    def n_cols(self):
        """Columns: values that the product takes."""
        return self.view.n_cols

    @property
    def shape(self):
        """(n_rows, n_cols)."""
        return self.view.n_rows, self.view.n_cols

    @property
    def nbytes(self):
        """Bytes of the packed matrix, padding to whole groups of 16 rows included."""
        return self.view.n_groups * self.view.group_bytes

    def reserve(self, *, take=None):
        """Reserve the matrix's memory without touching it, so that its address is known before its weights are.

        Parameters
        ----------
        take : callable, optional
            From a number of bytes to as many, uint8, at an address that is a multiple of 64; else `aligned_empty`.

        Returns
        -------
        PackedMatrix
            self
        """
        if self.data is None:
            data = (aligned_empty if take is None else take)(self.nbytes)
            self.view.w = <uint8_t *><size_t>data.ctypes.data
            self.data = data.reshape(self.view.n_groups, self.view.group_bytes)
        return self

    def pack(self, const uint8_t[:, ::1] rows not None, *, first=None, n_threads=None):
        """Fill the matrix, or some of its rows, from GGUF rows.

        Parameters
        ----------
        rows : uint8, (n_rows, row_bytes), C-contiguous
            Each row's blocks as the file has them. Not referenced afterwards.
        first : int, optional
            The row that the first one is, a multiple of 16, where these are not all rows. Those before a later multiple
            of 16, or before the matrix's end, must be there.
        n_threads : int, optional

        Returns
        -------
        PackedMatrix
            self

        Raises
        ------
        ValueError
            The shape is not (n_rows, row_bytes), or the rows from `first` on are no whole groups of 16.
        """
        cdef MatrixView *m = &self.view
        cdef const woolly_format *f = &active().formats[m.format]
        cdef int64_t row_bytes = m.n_blocks * f.block_bytes, group, begin = 0, n = rows.shape[0]
        if rows.shape[1] != row_bytes or first is None and n != m.n_rows:
            raise ValueError(f"pack: expected {self.format} rows of shape ({m.n_rows}, {row_bytes}) bytes, "
                             f"got ({rows.shape[0]}, {rows.shape[1]})")
        if first is not None:
            begin = first
            self._check_groups(begin, n)
        if n == 0:
            return self
        cdef int threads = check_threads(n_threads)
        cdef const uint8_t *source = &rows[0, 0]
        self.reserve()
        cdef uint8_t *groups = m.w + begin // WOOLLY_GROUP * m.group_bytes
        cdef int64_t n_groups = (n + WOOLLY_GROUP - 1) // WOOLLY_GROUP
        for group in prange(n_groups, nogil=True, num_threads=threads, schedule="dynamic"):
            pack_group(f, m, source, n, group, row_bytes, groups)
        return self

    def pack_file(self, file, offset, /, *, first=0, n_rows=None, n_threads=None):
        """Fill the matrix, or some of its rows, from GGUF rows that lie one after another in a file.

        Parameters
        ----------
        file : object with a fileno
            Of a regular file; where it is read next does not change.
        offset : int
            Byte at which the first of them begins.
        first, n_rows : int, optional
            Which rows they are; by default all. As for `pack`.
        n_threads : int, optional

        Returns
        -------
        PackedMatrix
            self

        Raises
        ------
        ValueError
            The rows are no whole groups of 16.
        EOFError
            The file ends before they do.
        OSError
            The system cannot read it.

        Notes
        -----
        Each thread reads and packs 256 kB at a time, so that nothing is inflated meanwhile. After an error, some of
        the rows are undefined.
        """
        cdef MatrixView *m = &self.view
        cdef const woolly_format *f = &active().formats[m.format]
        cdef int64_t begin = first, n = m.n_rows - begin if n_rows is None else n_rows, at = offset
        self._check_groups(begin, n)
        if n == 0:
            return self
        cdef int64_t row_bytes = m.n_blocks * f.block_bytes, task
        cdef int64_t step = max(1, BYTES_A_READ // (WOOLLY_GROUP * row_bytes)) * WOOLLY_GROUP
        cdef int64_t n_tasks = (n + step - 1) // step, task_bytes = step * row_bytes
        cdef int descriptor = file.fileno(), threads = min(check_threads(n_threads), n_tasks)
        scratch, problems = aligned_empty(threads * task_bytes), np.empty(n_tasks, np.int32)
        cdef uint8_t *rows = <uint8_t *><size_t>scratch.ctypes.data
        cdef int[::1] problem = problems
        self.reserve()
        cdef uint8_t *groups = m.w + begin // WOOLLY_GROUP * m.group_bytes
        for task in prange(n_tasks, nogil=True, num_threads=threads, schedule="dynamic"):
            problem[task] = read_and_pack(
                f, m, descriptor, at + task * task_bytes, min(step, n - task * step), row_bytes,
                rows + threadid() * task_bytes, groups + task * step // WOOLLY_GROUP * m.group_bytes,
            )
        for code in problems[problems != 0]:
            raise EOFError if code == FILE_ENDS else OSError(int(code), "the rows cannot be read")
        return self

    def _check_groups(self, int64_t begin, int64_t n):
        if not 0 <= begin <= begin + n <= self.view.n_rows or begin % WOOLLY_GROUP or \
                n % WOOLLY_GROUP and begin + n < self.view.n_rows:
            raise ValueError(f"pack: expected whole groups of {WOOLLY_GROUP} of the {self.view.n_rows} rows, "
                             f"got {n} from {begin} on")

    def _check_packed(self):
        if self.view.w == NULL:
            raise ValueError("PackedMatrix: nothing was packed yet")

    def unpack(self):
        """The rows as the file had them.

        Returns
        -------
        uint8, (n_rows, row_bytes)

        Raises
        ------
        ValueError
            Nothing was packed, or the format was converted when it was.
        """
        self._check_packed()
        cdef const MatrixView *m = &self.view
        cdef const woolly_format *f = &active().formats[m.format]
        if f.is_converted:
            raise ValueError(f"unpack: {self.format} is converted when it is packed; dequantize gives its values")
        out = np.empty((m.n_rows, m.row_bytes), dtype=np.uint8)
        cdef uint8_t[:, ::1] view = out
        cdef int64_t row
        for row in range(m.n_rows):
            f.unpack(m.w + row // WOOLLY_GROUP * m.group_bytes, row % WOOLLY_GROUP, m.n_blocks, &view[row, 0])
        return out

    def rows(self, const int64_t[::1] index not None, /):
        """Dequantised rows: the embedding lookup.

        Parameters
        ----------
        index : int64, (n,)

        Returns
        -------
        float32, (n, n_cols)

        Raises
        ------
        IndexError
            An index is not in [0, n_rows).
        """
        self._check_packed()
        out = np.empty((index.shape[0], self.view.n_cols), dtype=np.float32)
        cdef float[:, ::1] view = out
        cdef int64_t i
        for i in range(index.shape[0]):
            if not 0 <= index[i] < self.view.n_rows:
                raise IndexError(f"rows: index {index[i]} is not in [0, {self.view.n_rows})")
        cdef uint8_t *blocks = <uint8_t *>malloc(self.view.row_bytes)
        if blocks == NULL:
            raise MemoryError
        with nogil:
            for i in range(index.shape[0]):
                matrix_row(active(), &self.view, index[i], blocks, &view[i, 0])
        free(blocks)
        return out

    def dequantize(self):
        """The whole matrix.

        Returns
        -------
        float32, (n_rows, n_cols)
        """
        return self.rows(np.arange(self.n_rows, dtype=np.int64))


cdef int FILE_ENDS = -1


cdef int read_and_pack(const woolly_format *f, const MatrixView *m, int descriptor, int64_t offset, int64_t n_rows,
                       int64_t row_bytes, uint8_t *rows, uint8_t *groups) noexcept nogil:
    """Read rows from a file and pack them; 0, FILE_ENDS or an errno comes back."""
    cdef int64_t n_bytes = n_rows * row_bytes, n_read = 0, group
    cdef ssize_t n
    while n_read < n_bytes:
        n = pread(descriptor, rows + n_read, n_bytes - n_read, offset + n_read)
        if n > 0:
            n_read += n
        elif n == 0:
            return FILE_ENDS
        elif errno != EINTR:
            return errno
    for group in range((n_rows + WOOLLY_GROUP - 1) // WOOLLY_GROUP):
        pack_group(f, m, rows, n_rows, group, row_bytes, groups)
    return 0


cdef inline void pack_group(const woolly_format *f, const MatrixView *m, const uint8_t *rows, int64_t n_rows,
                            int64_t group, int64_t row_bytes, uint8_t *groups) noexcept nogil:
    """Pack one group of the n_rows rows to its place among the groups."""
    cdef int64_t row = group * WOOLLY_GROUP
    f.pack(rows + row * row_bytes, row_bytes, min(WOOLLY_GROUP, n_rows - row), m.n_blocks,
           groups + group * m.group_bytes)


cdef void matrix_row(const woolly_kernels *kernels, const MatrixView *m, int64_t row, uint8_t *blocks,
                     float *out) noexcept nogil:
    """Dequantise one row to out (n_cols,); blocks holds row_bytes of scratch."""
    cdef const woolly_format *f = &kernels.formats[m.format]
    f.unpack(m.w + row // WOOLLY_GROUP * m.group_bytes, row % WOOLLY_GROUP, m.n_blocks, blocks)
    f.dequantize_stored(blocks, m.n_blocks, out)


def dequantize(const uint8_t[:, ::1] rows not None, format, /):
    """Dequantise GGUF rows, equal to `gguf.quants.dequantize` bit for bit.

    Parameters
    ----------
    rows : uint8, (n_rows, row_bytes), C-contiguous
    format : str

    Returns
    -------
    float32, (n_rows, n_cols)
    """
    cdef const woolly_format *f = &active().formats[<int>format_index(format)]
    if rows.shape[1] % f.block_bytes:
        raise ValueError(f"dequantize: {format} rows are multiples of {f.block_bytes} bytes, got {rows.shape[1]}")
    cdef int64_t n_blocks = rows.shape[1] // f.block_bytes, row
    out = np.empty((rows.shape[0], n_blocks * f.block_size), dtype=np.float32)
    cdef float[:, ::1] view = out
    if out.size == 0:
        return out
    with nogil:
        for row in range(rows.shape[0]):
            f.dequantize(&rows[row, 0], n_blocks, &view[row, 0])
    return out


def matmul(PackedMatrix w not None, const float[:, ::1] x not None, /, *, out=None, compute="exact",
           n_threads=None):
    """out[t] = w x[t], one chain of fused multiply-adds an element.

    Parameters
    ----------
    w : PackedMatrix, (n_rows, n_cols)
    x : float32, (n_tokens, n_cols), C-contiguous
    out : float32, (n_tokens, n_rows), C-contiguous, optional
    compute : {"exact", "int8", "bf16"}
        int8: for quantised formats x is quantised to 8 bits, not 16. bf16: from 8 tokens on, w and x are rounded to
        bf16 and multiplied by the BF16 dot unit.
    n_threads : int, optional

    Returns
    -------
    float32, (n_tokens, n_rows)

    Raises
    ------
    UnsupportedISAError
        There is no BF16 dot unit beside the active instruction set.
    ValueError
        Shapes do not fit, or `out` is not float32, C-contiguous and writable, or shares memory with x.

    Notes
    -----
    For quantised formats x is quantised to 16 bits per 32 values first, see `quantize_q16` and `quantize_q8`.
    Accumulates in float32, in ascending blocks (ascending k for float formats); the result does not depend on
    n_threads, n_tokens or the instruction set. In bf16 it depends on the instruction set, and on whether
    there are 8 tokens.
    """
    cdef Activations how = active_activations(compute)
    cdef bint rounds = how.unit != NULL and x.shape[0] >= WOOLLY_ROUNDED_LEAST_COLS
    cdef const MatrixView *m = &w.view
    if x.shape[1] != m.n_cols:
        raise ValueError(f"matmul: x has {x.shape[1]} columns, w ({w.format}) expects {m.n_cols}")
    w._check_packed()
    out = check_out(out, (x.shape[0], m.n_rows), "matmul")
    if np.may_share_memory(out, x):
        raise ValueError("matmul: out shares memory with x, which is read until the end")
    if x.shape[0] == 0:
        return out
    cdef float[:, ::1] y = out
    cdef int threads = check_threads(n_threads)
    cdef const woolly_kernels *kernels = active()
    cdef woolly_matmul_args args
    cdef int64_t n_tokens = x.shape[0], t, task, step = ROWS_A_TASK // WOOLLY_GROUP
    cdef int64_t stride = woolly_q16_stride(m.n_cols)
    if m.n_groups < 4 * step * threads:
        step //= 2
    args.w, args.n_rows, args.n_k = m.w, m.n_rows, m.n_cols
    args.x, args.x_stride = &x[0, 0], m.n_cols
    args.xq, args.xq_stride, args.n_digits = NULL, stride, how.n_digits
    args.out, args.out_stride = &y[0, 0], m.n_rows
    args.n_cols = n_tokens
    args.accumulate = 0
    args.streams = m.n_groups * m.group_bytes > threads * <int64_t>WOOLLY_NEAR_BYTES
    cdef uint8_t[::1] records, wide
    cdef uint16_t *bf16 = NULL
    cdef woolly_matmul_fn multiply = how.unit.matmul[m.format] if rounds else kernels.formats[m.format].matmul
    if rounds:
        wide = aligned_empty(woolly_rounded_bytes(m.n_cols, n_tokens))
        bf16 = <uint16_t *>&wide[0]
        for t in prange(n_tokens, nogil=True, num_threads=threads):
            how.unit.round(&x[t, 0], m.n_cols, t, bf16)
    elif m.quantised and how.bf16_of != NULL and n_tokens >= WOOLLY_BF16_LEAST_COLS:
        wide = aligned_empty(woolly_bf16_bytes(m.n_cols, n_tokens))
        bf16 = <uint16_t *>&wide[0]
    args.bf16 = bf16
    if m.quantised and not rounds:
        records = aligned_empty(n_tokens * stride)
        args.xq = &records[0]
        for t in prange(n_tokens, nogil=True, num_threads=threads):
            how.quantize(&x[t, 0], m.n_cols, &records[t * stride])
            if bf16 != NULL:
                how.bf16_of(&records[t * stride], m.n_cols, t, bf16)
    for task in prange((m.n_groups + step - 1) // step, nogil=True, num_threads=threads, schedule="dynamic"):
        multiply(&args, task * step, min(m.n_groups, task * step + step))
    return out


def check_out(out, shape, name, /):
    """A result array: new when out is None, otherwise out itself, checked and never copied."""
    if out is None:
        return np.empty(shape, dtype=np.float32)
    if not isinstance(out, np.ndarray) or out.shape != shape or out.dtype != np.float32:
        got = f"{out.dtype} {out.shape}" if isinstance(out, np.ndarray) else type(out).__name__
        raise ValueError(f"{name}: out must be a float32 array of shape {shape}, got {got}")
    if not out.flags.c_contiguous or not out.flags.writeable:
        raise ValueError(f"{name}: out must be C-contiguous and writable")
    return out
