# The C interface of kernels.h, as the extensions see it.
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint64_t


cdef extern from "kernels.h" nogil:
    enum:
        WOOLLY_GROUP
        WOOLLY_QBLOCK
        WOOLLY_BF16_COLS
        WOOLLY_BF16_LEAST_COLS
        WOOLLY_BF16_ROW_STEP
        WOOLLY_ROW_STEP
        WOOLLY_NEAR_BYTES
        WOOLLY_ROUNDED_LEAST_COLS
        WOOLLY_KV_TILE
        WOOLLY_ATTENTION_COLS
        WOOLLY_KV_F16
        WOOLLY_KV_F32
        WOOLLY_ACT_SILU
        WOOLLY_ACT_GELU_TANH
        WOOLLY_ACT_SWIGLU_CLAMPED
        WOOLLY_ROPE_NORM
        WOOLLY_ROPE_NEOX

    int64_t woolly_q16_scales(int64_t n_k)
    int64_t woolly_q16_stride(int64_t n_k)
    int64_t woolly_bf16_bytes(int64_t n_k, int64_t n_cols)
    int64_t woolly_rounded_k(int64_t n_k)
    int64_t woolly_rounded_bytes(int64_t n_k, int64_t n_cols)
    int64_t woolly_attention_scratch(int64_t head_dim)

    ctypedef struct woolly_matmul_args:
        const uint8_t *w
        int64_t n_rows
        int64_t n_k
        const float *x
        int64_t x_stride
        const uint8_t *xq
        int64_t xq_stride
        int n_digits
        const uint16_t *bf16
        float *out
        int64_t out_stride
        int64_t n_cols
        int accumulate
        int streams

    ctypedef struct woolly_format:
        const char *name
        int ggml_type
        int block_size
        int block_bytes
        int quantised
        int is_converted
        int stored_bytes
        void (*pack)(const uint8_t *rows, int64_t row_bytes, int64_t n_rows, int64_t n_blocks,
                     uint8_t *group) noexcept nogil
        void (*unpack)(const uint8_t *group, int64_t row, int64_t n_blocks, uint8_t *blocks) noexcept nogil
        void (*dequantize)(const uint8_t *blocks, int64_t n_blocks, float *out) noexcept nogil
        void (*dequantize_stored)(const uint8_t *blocks, int64_t n_blocks, float *out) noexcept nogil
        void (*matmul)(const woolly_matmul_args *args, int64_t group_begin, int64_t group_end) noexcept nogil

    ctypedef void (*woolly_matmul_fn)(const woolly_matmul_args *args, int64_t group_begin,
                                      int64_t group_end) noexcept nogil

    ctypedef struct woolly_bf16_unit:
        const char *name
        void (*round)(const float *x, int64_t n_k, int64_t col, uint16_t *bf16) noexcept nogil
        woolly_matmul_fn *matmul

    ctypedef struct woolly_kv_head:
        void *k
        void *v
        int64_t head_dim
        int kv_type

    ctypedef struct woolly_queries:
        const float *q
        int64_t q_stride
        int64_t q_head_stride
        int64_t head_dim
        int64_t n_rep
        int64_t pos
        int64_t window
        float softcap

    ctypedef struct woolly_generate_args:
        uint64_t seed
        uint64_t tensor
        float scale
        const woolly_format *format
        int64_t n_rows
        int64_t n_cols
        uint8_t *w

    ctypedef void (*woolly_quantize_fn)(const float *x, int64_t n_k, uint8_t *record) noexcept nogil
    ctypedef void (*woolly_bf16_of_fn)(const uint8_t *record, int64_t n_k, int64_t col, uint16_t *bf16) noexcept nogil

    ctypedef struct woolly_kernels:
        const char *name
        int n_formats
        woolly_format *formats
        woolly_quantize_fn quantize_q16
        woolly_quantize_fn quantize_q8
        void (*dequantize_q16)(const uint8_t *record, int64_t n_k, float *out) noexcept nogil
        woolly_bf16_of_fn bf16_of_q16
        woolly_bf16_of_fn bf16_of_q8
        void (*rmsnorm)(const float *x, const float *weight, int64_t n, float eps, float *out) noexcept nogil
        void (*layernorm)(const float *x, const float *weight, const float *bias, int64_t n, float eps,
                          float *out) noexcept nogil
        void (*act)(int act, const float *x, int64_t n, float *out) noexcept nogil
        void (*softcap)(const float *x, float cap, int64_t n, float *out) noexcept nogil
        void (*glu)(int act, const float *gate, const float *up, int64_t n, float *out) noexcept nogil
        void (*exp)(const float *x, int64_t n, float *out) noexcept nogil
        void (*softmax)(const float *x, int64_t n, float *out) noexcept nogil
        void (*add)(const float *x, const float *y, int64_t n, float *out) noexcept nogil
        void (*scale)(const float *x, float factor, int64_t n, float *out) noexcept nogil
        void (*rope)(int pairing, float *x, int64_t n_rot, const float *cos, const float *sin) noexcept nogil
        void (*store_kv)(const woolly_kv_head *kv, int64_t head_dim, int64_t pos, const float *k,
                         const float *v) noexcept nogil
        void (*attention_tiles)(const woolly_kv_head *kv, const woolly_queries *queries, int64_t t0, int64_t t1,
                                int64_t tile0, int64_t tile_end, int64_t ahead_end, float *m, float *l, float *acc,
                                float *scratch) noexcept nogil
        void (*attention_merge)(int64_t n_cols, int64_t head_dim, float *m, float *l, float *acc, const float *m2,
                                const float *l2, const float *acc2) noexcept nogil
        void (*generate)(const woolly_generate_args *args, int64_t group) noexcept nogil
