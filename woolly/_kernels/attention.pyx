"""The KV cache, and attention over it.

Owns how attention is cut into tasks: by KV head, then by blocks of tokens; for a single token by runs of tiles of 128
keys, whose results are merged in ascending order. Either way a query gets the same bits.
"""

import numpy as np

from cython.parallel cimport prange, threadid
from libc.math cimport INFINITY
from libc.stdint cimport int64_t, uint8_t
from libc.string cimport memcpy, memset

from woolly._kernels.dispatch cimport active
from woolly._kernels.kernels cimport (
    WOOLLY_ATTENTION_COLS, WOOLLY_KV_F16, WOOLLY_KV_F32, WOOLLY_KV_TILE, woolly_attention_scratch, woolly_kernels,
    woolly_kv_head, woolly_queries,
)

from woolly._kernels.matmul import check_out
from woolly._kernels.pages import sparse_zeros
from woolly._kernels.threads import check_threads

cdef enum:
    TASKS_A_THREAD = 6
    MAX_TILE_RUN = 8

KV_DTYPES = {"f16": (np.uint16, WOOLLY_KV_F16), "f32": (np.float32, WOOLLY_KV_F32)}


cdef class KVCache:
    """Keys and values of one sequence, for every layer.

    Parameters
    ----------
    n_layers, n_kv_heads, head_dim : int
    n_ctx : int
        Positions, in tokens.
    dtype : {"f16", "f32"}

    Notes
    -----
    Memory is taken from the system as positions are first written. Keys lie 16 positions side by side, so that scores
    of 16 keys are one vector; values lie as they are. Writing is for one thread at a time.
    """

    def __init__(self, n_layers, n_kv_heads, head_dim, n_ctx, *, dtype="f16"):
        if min(n_layers, n_kv_heads, head_dim, n_ctx) < 1:
            raise ValueError(f"KVCache: sizes must be positive, got {n_layers} layers, {n_kv_heads} heads of "
                             f"{head_dim}, {n_ctx} positions")
        if dtype not in KV_DTYPES:
            raise ValueError(f"KVCache: unknown dtype {dtype!r}, known: {', '.join(KV_DTYPES)}")
        numpy_dtype, self.kv_type = KV_DTYPES[dtype]
        self.n_layers, self.n_kv_heads, self.head_dim, self.n_ctx = n_layers, n_kv_heads, head_dim, n_ctx
        self.dtype = dtype
        self.padded = (head_dim + 15) // 16 * 16
        n_groups = (n_ctx + 15) // 16
        self.k = sparse_zeros((n_layers, n_kv_heads, n_groups, self.padded, 16), numpy_dtype)
        self.v = sparse_zeros((n_layers, n_kv_heads, n_groups * 16, self.padded), numpy_dtype)
        self.k_base = <uint8_t *><size_t>self.k.ctypes.data
        self.v_base = <uint8_t *><size_t>self.v.ctypes.data
        self.head_bytes = n_groups * 16 * self.padded * self.k.itemsize

    @staticmethod
    def bytes_for(n_layers, n_kv_heads, head_dim, n_ctx, *, dtype="f16"):
        """Bytes that a full cache of these sizes takes.

        Returns
        -------
        int
        """
        padded, positions = (head_dim + 15) // 16 * 16, (n_ctx + 15) // 16 * 16
        return 2 * n_layers * n_kv_heads * positions * padded * np.dtype(KV_DTYPES[dtype][0]).itemsize

    @property
    def nbytes(self):
        """Bytes of the whole cache, touched or not."""
        return self.k.nbytes + self.v.nbytes

    def keys(self, layer, n, /):
        """Keys of the first n positions, as attention sees them: after RoPE, rounded to the cache's dtype.

        Returns
        -------
        float16 or float32, (n, n_kv_heads, head_dim)
        """
        k = self.k[layer].swapaxes(-1, -2).reshape(self.n_kv_heads, -1, self.padded)
        return self._heads(k, n)

    def values(self, layer, n, /):
        """Values of the first n positions.

        Returns
        -------
        float16 or float32, (n, n_kv_heads, head_dim)
        """
        return self._heads(self.v[layer], n)

    def _heads(self, array, n):
        if not 0 <= n <= self.n_ctx:
            raise ValueError(f"KVCache: {n} positions asked for, it holds {self.n_ctx}")
        out = np.ascontiguousarray(array[:, :n, :self.head_dim].swapaxes(0, 1))
        return out.view(np.float16) if self.dtype == "f16" else out

    def store(self, layer, pos, const float[:, :, ::1] k not None, const float[:, :, ::1] v not None, /):
        """Write the keys and values of n tokens from position pos on.

        Parameters
        ----------
        layer, pos : int
        k, v : float32, (n, n_kv_heads, head_dim), C-contiguous

        Raises
        ------
        ValueError
            The shapes do not fit the cache, or the positions are beyond it.
        """
        for name, shape in (("k", np.shape(k)), ("v", np.shape(v))):
            if shape != (len(k), self.n_kv_heads, self.head_dim):
                raise ValueError(f"store: {name} must be (n, {self.n_kv_heads}, {self.head_dim}), got {shape}")
        if not 0 <= layer < self.n_layers or pos < 0 or pos + k.shape[0] > self.n_ctx:
            raise ValueError(f"store: layer {layer}, positions {pos} to {pos + k.shape[0]} are not in a cache of "
                             f"{self.n_layers} layers and {self.n_ctx} positions")
        cdef int64_t t, h
        cdef woolly_kv_head head
        for h in range(self.n_kv_heads):
            head = self.head(layer, h)
            for t in range(k.shape[0]):
                active().store_kv(&head, self.head_dim, pos + t, &k[t, h, 0], &v[t, h, 0])

    cdef woolly_kv_head head(self, int64_t layer, int64_t kv_head) noexcept nogil:
        cdef woolly_kv_head head
        cdef int64_t offset = (layer * self.n_kv_heads + kv_head) * self.head_bytes
        head.k = self.k_base + offset
        head.v = self.v_base + offset
        head.head_dim = self.padded
        head.kv_type = self.kv_type
        return head


cdef int64_t job_scratch(int64_t padded) noexcept nogil:
    """Floats of scratch for any task: the state of its columns, and what the tile kernel needs."""
    return WOOLLY_ATTENTION_COLS * (padded + 2) + woolly_attention_scratch(padded)


cdef void plan_job(AttentionJob *job, bint split, int n_threads) noexcept nogil:
    """Decide blocks and tiles; queries, sizes and pointers are set by the caller.

    Blocks and runs are as large as leaves each thread some tasks: a large one reads keys and values less often, and
    knows what it reads next.
    """
    cdef woolly_queries *queries = &job.queries
    cdef int64_t last = queries.pos + job.n_tokens - 1, heads, n_tasks = TASKS_A_THREAD * n_threads
    job.split = split and job.n_tokens == 1
    job.rep_block = min(queries.n_rep, <int64_t>WOOLLY_ATTENTION_COLS)
    heads = job.n_kv_heads * n_rep_blocks(job)
    job.token_block = max(<int64_t>1, min(WOOLLY_ATTENTION_COLS // job.rep_block, job.n_tokens * heads // n_tasks))
    job.tile0 = 0
    if queries.window and queries.pos + 1 > queries.window:
        job.tile0 = (queries.pos + 1 - queries.window) // WOOLLY_KV_TILE
    job.n_tiles = last // WOOLLY_KV_TILE + 1 - job.tile0
    job.tile_run = max(<int64_t>1, min(MAX_TILE_RUN, job.n_tiles * heads // n_tasks))


cdef int64_t n_rep_blocks(const AttentionJob *job) noexcept nogil:
    return (job.queries.n_rep + job.rep_block - 1) // job.rep_block


cdef int64_t n_tile_runs(const AttentionJob *job) noexcept nogil:
    return (job.n_tiles + job.tile_run - 1) // job.tile_run


cdef int64_t n_job_tasks(const AttentionJob *job) noexcept nogil:
    cdef int64_t heads = job.n_kv_heads * n_rep_blocks(job)
    if job.split:
        return heads * n_tile_runs(job)
    return heads * ((job.n_tokens + job.token_block - 1) // job.token_block)


cdef void run_job_task(const woolly_kernels *kernels, const AttentionJob *job, int64_t task,
                       float *scratch) noexcept nogil:
    """One KV head, one block of its query heads, and a block of tokens (or, split, a run of tiles)."""
    cdef int64_t heads = job.n_kv_heads * n_rep_blocks(job)
    cdef int64_t head = task % heads, block = task // heads
    cdef int64_t kv_head = head // n_rep_blocks(job), rep0 = head % n_rep_blocks(job) * job.rep_block
    cdef woolly_queries queries = job.queries
    cdef int64_t q_head = kv_head * queries.n_rep + rep0, t0, t1, tile0 = job.tile0, c, n_cols
    cdef woolly_kv_head kv
    cdef float *m = scratch
    cdef float *total = m + WOOLLY_ATTENTION_COLS
    cdef float *acc = total + WOOLLY_ATTENTION_COLS
    cdef float *rest = acc + WOOLLY_ATTENTION_COLS * job.padded
    kv.k = job.k + kv_head * job.head_bytes
    kv.v = job.v + kv_head * job.head_bytes
    kv.head_dim = job.padded
    kv.kv_type = job.kv_type
    queries.q = queries.q + q_head * queries.q_head_stride
    queries.n_rep = min(job.rep_block, queries.n_rep - rep0)
    if job.split:
        run_tiles(kernels, job, &kv, &queries, q_head, block * job.tile_run, m, total, acc, rest)
        return
    t0 = block * job.token_block
    t1 = min(job.n_tokens, t0 + job.token_block)
    if queries.window and queries.pos + t0 + 1 > queries.window:
        tile0 = (queries.pos + t0 + 1 - queries.window) // WOOLLY_KV_TILE
    cdef int64_t tile_end = (queries.pos + t1 - 1) // WOOLLY_KV_TILE + 1
    n_cols = (t1 - t0) * queries.n_rep
    clear_state(n_cols, job.padded, m, total, acc)
    kernels.attention_tiles(&kv, &queries, t0, t1, tile0, tile_end, tile_end, m, total, acc, rest)
    for c in range(n_cols):
        finish_column(kernels, job, m + c, total + c, acc + c * job.padded, t0 + c // queries.n_rep,
                      q_head + c % queries.n_rep, rest)


cdef void clear_state(int64_t n_cols, int64_t padded, float *m, float *total, float *acc) noexcept nogil:
    cdef int64_t c
    for c in range(n_cols):
        m[c] = -INFINITY
        total[c] = 0
    memset(acc, 0, n_cols * padded * sizeof(float))


cdef void run_tiles(const woolly_kernels *kernels, const AttentionJob *job, const woolly_kv_head *kv,
                    const woolly_queries *queries, int64_t q_head, int64_t first, float *m, float *total, float *acc,
                    float *rest) noexcept nogil:
    """One token: each tile of a run by itself, to be merged with those of other runs."""
    cdef int64_t end = min(first + job.tile_run, job.n_tiles), i, c, padded = job.padded, tile
    cdef float *partial
    for i in range(first, end):
        tile = job.tile0 + i
        clear_state(queries.n_rep, padded, m, total, acc)
        kernels.attention_tiles(kv, queries, 0, 1, tile, tile + 1, job.tile0 + end, m, total, acc, rest)
        for c in range(queries.n_rep):
            partial = job.partial + ((q_head + c) * job.n_tiles + i) * (padded + 2)
            partial[0] = m[c]
            partial[1] = total[c]
            memcpy(partial + 2, acc + c * padded, padded * sizeof(float))


cdef void finish_column(const woolly_kernels *kernels, const AttentionJob *job, float *m, float *total, float *acc,
                        int64_t t, int64_t q_head, float *zeros) noexcept nogil:
    """The sink comes last, as one more tile: a key of that score whose value is zero; zeros is scratch."""
    cdef float one = 1
    if job.sinks != NULL:
        memset(zeros, 0, job.padded * sizeof(float))
        kernels.attention_merge(1, job.padded, m, total, acc, job.sinks + q_head, &one, zeros)
    kernels.scale(acc, 1 / total[0], job.queries.head_dim, job.out + t * job.out_stride + q_head * job.queries.head_dim)


cdef int64_t n_merge_tasks(const AttentionJob *job) noexcept nogil:
    return job.n_kv_heads * job.queries.n_rep if job.split else 0


cdef void run_merge_task(const woolly_kernels *kernels, const AttentionJob *job, int64_t head,
                         float *scratch) noexcept nogil:
    """Merge the tiles of one query head, in ascending order."""
    cdef float *m = scratch
    cdef float *total = m + 1
    cdef float *acc = m + 16
    cdef const float *partial = job.partial + head * job.n_tiles * (job.padded + 2)
    cdef int64_t _tile
    m[0] = -INFINITY
    total[0] = 0
    memset(acc, 0, job.padded * sizeof(float))
    for _tile in range(job.n_tiles):
        kernels.attention_merge(1, job.padded, m, total, acc, partial, partial + 1, partial + 2)
        partial += job.padded + 2
    finish_column(kernels, job, m, total, acc, 0, head, acc + job.padded)


def attention_f32(const float[:, :, ::1] q not None, KVCache cache not None, /, *, layer, pos, window=0, softcap=0.0,
                  const float[::1] sinks=None, split=False, out=None, n_threads=None):
    """Causal attention of consecutive tokens over a cache that holds their keys and values already.

    out[t, h] = softmax(q[t, h] . k) v over positions up to pos + t (and after pos + t - window, if there is a window).

    Parameters
    ----------
    q : float32, (n_tokens, n_heads, head_dim), C-contiguous
        Rotated and scaled. n_heads is a multiple of the cache's n_kv_heads; head h uses KV head
        h // (n_heads / n_kv_heads).
    cache : KVCache
    layer : int
    pos : int
        Position of the first token.
    window : int
        Keys a token sees, itself included; 0 for all.
    softcap : float
        Scores become softcap * tanh(score / softcap); 0 for none.
    sinks : float32, (n_heads,), optional
        A score a head that takes part in its softmax with no value: exp(sinks[h]) joins the denominator.
    split : bool
        Cut tasks by tiles of keys, too, when there is one token.
    out : float32, (n_tokens, n_heads, head_dim), optional
    n_threads : int, optional

    Returns
    -------
    float32, (n_tokens, n_heads, head_dim)

    Raises
    ------
    ValueError
        Shapes, layer or positions do not fit the cache.

    Notes
    -----
    Accumulates in float32. Online softmax over tiles, Milakov and Gimelshein 2018, arXiv:1805.02867. Sinks: Xiao et
    al. 2023, arXiv:2309.17453, as gpt-oss has them.
    """
    cdef int64_t n_tokens = q.shape[0], n_heads = q.shape[1]
    if q.shape[2] != cache.head_dim or n_heads < 1 or n_heads % cache.n_kv_heads:
        raise ValueError(f"attention_f32: q is ({n_tokens}, {n_heads}, {q.shape[2]}), the cache has "
                         f"{cache.n_kv_heads} heads of {cache.head_dim}")
    if not 0 <= layer < cache.n_layers or pos < 0 or pos + n_tokens > cache.n_ctx or window < 0:
        raise ValueError(f"attention_f32: layer {layer}, positions {pos} to {pos + n_tokens}, window {window} are not "
                         f"in a cache of {cache.n_layers} layers and {cache.n_ctx} positions")
    if sinks is not None and sinks.shape[0] != n_heads:
        raise ValueError(f"attention_f32: {sinks.shape[0]} sinks for {n_heads} heads")
    out = check_out(out, (q.shape[0], q.shape[1], q.shape[2]), "attention_f32")
    if n_tokens == 0:
        return out
    cdef float[:, :, ::1] y = out
    cdef woolly_kv_head head = cache.head(layer, 0)
    cdef AttentionJob job
    job.queries.q = &q[0, 0, 0]
    job.queries.q_stride = n_heads * cache.head_dim
    job.queries.q_head_stride = cache.head_dim
    job.queries.head_dim = cache.head_dim
    job.queries.n_rep = n_heads // cache.n_kv_heads
    job.queries.pos = pos
    job.queries.window = window
    job.queries.softcap = softcap
    job.n_tokens = n_tokens
    job.n_kv_heads = cache.n_kv_heads
    job.k = <uint8_t *>head.k
    job.v = <uint8_t *>head.v
    job.head_bytes = cache.head_bytes
    job.padded = cache.padded
    job.kv_type = cache.kv_type
    job.out = &y[0, 0, 0]
    job.out_stride = n_heads * cache.head_dim
    job.sinks = &sinks[0] if sinks is not None else NULL
    cdef int threads = check_threads(n_threads)
    plan_job(&job, split, threads)
    cdef float[::1] partial = np.empty(n_heads * job.n_tiles * (cache.padded + 2) if job.split else 1, dtype=np.float32)
    job.partial = &partial[0]
    cdef int64_t task, n_tasks = n_job_tasks(&job), n_merges = n_merge_tasks(&job)
    cdef float[:, ::1] scratch = np.empty((threads, job_scratch(cache.padded)), dtype=np.float32)
    cdef const woolly_kernels *kernels = active()
    for task in prange(n_tasks, nogil=True, num_threads=threads, schedule="dynamic"):
        run_job_task(kernels, &job, task, &scratch[threadid(), 0])
    # A region of its own: within one, a loop does not wait for the one before it
    for task in prange(n_merges, nogil=True, num_threads=threads, schedule="dynamic"):
        run_merge_task(kernels, &job, task, &scratch[threadid(), 0])
    return out
