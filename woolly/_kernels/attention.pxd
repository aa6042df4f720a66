from libc.stdint cimport int64_t, uint8_t

from woolly._kernels.kernels cimport woolly_kernels, woolly_kv_head, woolly_queries


cdef class KVCache:
    cdef readonly int64_t n_layers
    cdef readonly int64_t n_kv_heads
    cdef readonly int64_t head_dim
    cdef readonly int64_t n_ctx
    cdef readonly str dtype
    cdef object k, v               # elements of dtype: (n_layers, n_kv_heads, n / 16, padded, 16), (…, n, padded)
    cdef uint8_t *k_base
    cdef uint8_t *v_base
    cdef int64_t head_bytes        # of one layer and head, keys or values alike
    cdef int64_t padded            # head_dim, up to a multiple of 16
    cdef int kv_type
    cdef woolly_kv_head head(self, int64_t layer, int64_t kv_head) noexcept nogil


# Attention of one sequence's tokens in one layer: what tasks are cut from
cdef struct AttentionJob:
    woolly_queries queries         # of head 0
    int64_t n_tokens
    int64_t n_kv_heads
    uint8_t *k                     # of KV head 0
    uint8_t *v
    int64_t head_bytes
    int64_t padded
    int kv_type
    float *out                     # (n_tokens, out_stride): heads side by side
    int64_t out_stride
    int64_t rep_block              # queries heads of a KV head in one task
    int64_t token_block            # tokens in one task
    int64_t tile0                  # tiles that any token sees
    int64_t n_tiles
    bint split                     # one token: tiles are computed one by one and merged afterwards
    int64_t tile_run               # split: consecutive tiles in one task
    float *partial                 # split: (n_heads, n_tiles, padded + 2)
    const float *sinks             # (n_heads,): scores of keys whose values are zero; NULL for none

cdef void plan_job(AttentionJob *job, bint split, int n_threads) noexcept nogil
cdef int64_t n_job_tasks(const AttentionJob *job) noexcept nogil
cdef void run_job_task(const woolly_kernels *kernels, const AttentionJob *job, int64_t task,
                       float *scratch) noexcept nogil
cdef int64_t n_merge_tasks(const AttentionJob *job) noexcept nogil
cdef void run_merge_task(const woolly_kernels *kernels, const AttentionJob *job, int64_t head,
                         float *scratch) noexcept nogil
cdef int64_t job_scratch(int64_t padded) noexcept nogil
