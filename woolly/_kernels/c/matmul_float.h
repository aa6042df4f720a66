/* out[c][r] = sum over k of w[r][k] x[c][k] in f32: one chain of fmas an element, k ascending.
 *
 * float_cols_* is the micro-kernel: FLOAT_RV groups of 16 rows by NC columns in registers. Attention uses it too, with
 * keys or value dimensions as rows. The sums are carried in memory between calls, so k can be cut without changing them.
 */
#ifndef WOOLLY_MATMUL_FLOAT_H
#define WOOLLY_MATMUL_FLOAT_H

#include "formats/fields.h"
#include "formats/floats.h"

#define FLOAT_ROWS (FLOAT_RV * 16)
#define FLOAT_K 256         /* k of one tile: 32 rows x 256 floats fill 32 KB of L1 */
#define FLOAT_K_BLOCK 512   /* k of all rows and columns before the next ones: activations that stay in L2 */
#define FLOAT_COL_BLOCK 264 /* columns and rows whose sums are carried from block to block: 132 KB */
#define FLOAT_ROW_BLOCK 128
#define FLOAT_DIRECT 4      /* up to as many columns, widening while reading is cheaper than a tile */

/* acc[c * acc_cols + rv * acc_rv + lane] += sum over k of w[k * w_k + rv * w_rv + lane] x[c * x_cols + k];
 * distances in elements. For an odd last group w_rv = acc_rv = 0: the same rows twice. float_stream_* are the same for up
 * to FLOAT_STREAM_MOST columns; they ask for each line of weights `ahead` bytes before it is used, as one burst of
 * requests would hold up what is read meanwhile */
#define FLOAT_COLS_ARGS(T)                                                                                             \
    const T *w, int64_t w_k, int64_t w_rv, const float *x, int64_t x_cols, int64_t n_k, float *acc, int64_t acc_cols,  \
        int64_t acc_rv

#define DEFINE_FLOAT_COLS_OF(NAME, T, LOAD, NC, STREAMS)                                                               \
    static __attribute__((noinline)) void NAME##_##NC(FLOAT_COLS_ARGS(T), int64_t ahead) {                             \
        (void)ahead;                                                                                                   \
        const float *x3[(NC + 2) / 3]; /* one pointer for three columns: at +0, +1 and +2 strides */                   \
        UNROLL for (int c = 0; c < (NC + 2) / 3; c++) x3[c] = x + 3 * c * x_cols;                                      \
        vf sum[NC][FLOAT_RV];                                                                                          \
        UNROLL for (int c = 0; c < NC; c++) UNROLL for (int v = 0; v < FLOAT_RV; v++)                                  \
            sum[c][v] = vf_load(acc + c * acc_cols + v * acc_rv);                                                      \
        _Pragma("GCC unroll 4") for (int64_t k = 0; k < n_k; k++) {                                                    \
            if (STREAMS && sizeof(T) == 4)                                                                             \
                UNROLL for (int v = 0; v < FLOAT_RV; v++) PREFETCH_L2((const char *)(w + v * w_rv) + ahead);           \
            else if (STREAMS) /* half a line: each group's every other time */                                         \
                PREFETCH_L2((const char *)(w + k % FLOAT_RV * w_rv) + ahead);                                          \
            vf wk[FLOAT_RV];                                                                                           \
            UNROLL for (int v = 0; v < FLOAT_RV; v++) wk[v] = LOAD(w + v * w_rv);                                      \
            UNROLL for (int c = 0; c < NC; c++) {                                                                      \
                vf xk = vf_set1(x3[c / 3][k + c % 3 * x_cols]);                                                        \
                UNROLL for (int v = 0; v < FLOAT_RV; v++) sum[c][v] = vf_fma(wk[v], xk, sum[c][v]);                    \
            }                                                                                                          \
            w += w_k;                                                                                                  \
        }                                                                                                              \
        UNROLL for (int c = 0; c < NC; c++) UNROLL for (int v = 0; v < FLOAT_RV; v++)                                  \
            vf_store(acc + c * acc_cols + v * acc_rv, sum[c][v]);                                                      \
    }
#define DEFINE_FLOAT_COLS(NAME, T, LOAD, NC) DEFINE_FLOAT_COLS_OF(float_cols_##NAME, T, LOAD, NC, 0)
#define DEFINE_FLOAT_STREAM(NAME, T, LOAD, NC) DEFINE_FLOAT_COLS_OF(float_stream_##NAME, T, LOAD, NC, 1)

#define EACH_FLOAT_NC(M, NAME, T, LOAD)                                                                                \
    M(NAME, T, LOAD, 1) M(NAME, T, LOAD, 2) M(NAME, T, LOAD, 3) M(NAME, T, LOAD, 4) M(NAME, T, LOAD, 5)                \
    M(NAME, T, LOAD, 6) FLOAT_NC_ABOVE_6(M, NAME, T, LOAD)
#if FLOAT_NC == 12
#define FLOAT_NC_ABOVE_6(M, NAME, T, LOAD)                                                                             \
    M(NAME, T, LOAD, 7) M(NAME, T, LOAD, 8) M(NAME, T, LOAD, 9) M(NAME, T, LOAD, 10) M(NAME, T, LOAD, 11)              \
    M(NAME, T, LOAD, 12)
#else
#define FLOAT_NC_ABOVE_6(M, NAME, T, LOAD)
#endif
#define FLOAT_COLS_CASE(NAME, T, LOAD, NC)                                                                             \
    case NC: float_cols_##NAME##_##NC(w, w_k, w_rv, x, x_cols, n_k, acc, acc_cols, acc_rv, 0); return;
#define FLOAT_STREAM_CASE(NAME, T, LOAD, NC)                                                                           \
    case NC: float_stream_##NAME##_##NC(w, w_k, w_rv, x, x_cols, n_k, acc, acc_cols, acc_rv, ahead); return;
#define EACH_STREAM_NC(M, NAME, T, LOAD)                                                                               \
    M(NAME, T, LOAD, 1) M(NAME, T, LOAD, 2) M(NAME, T, LOAD, 3) M(NAME, T, LOAD, 4) M(NAME, T, LOAD, 5)                \
    M(NAME, T, LOAD, 6) FLOAT_STREAM_ABOVE_6(M, NAME, T, LOAD)
#if FLOAT_NC == 12
#define FLOAT_STREAM_ABOVE_6(M, NAME, T, LOAD) M(NAME, T, LOAD, 7) M(NAME, T, LOAD, 8)
#define FLOAT_STREAM_MOST 8
#else
#define FLOAT_STREAM_ABOVE_6(M, NAME, T, LOAD)
#define FLOAT_STREAM_MOST 6
#endif

/* float_cols_NAME(n_cols, ...): any number of columns, FLOAT_NC at a time; float_stream_NAME: up to FLOAT_STREAM_MOST */
#define DEFINE_FLOAT_KERNEL(NAME, T, LOAD)                                                                             \
    EACH_FLOAT_NC(DEFINE_FLOAT_COLS, NAME, T, LOAD)                                                                    \
    EACH_STREAM_NC(DEFINE_FLOAT_STREAM, NAME, T, LOAD)                                                                 \
    static void float_stream_##NAME(int64_t n_cols, FLOAT_COLS_ARGS(T), int64_t ahead) {                               \
        switch (n_cols) { EACH_STREAM_NC(FLOAT_STREAM_CASE, NAME, T, LOAD) }                                           \
    }                                                                                                                  \
    static void float_cols_##NAME(int64_t n_cols, FLOAT_COLS_ARGS(T)) {                                                \
        for (; n_cols > FLOAT_NC_MOST; n_cols -= FLOAT_NC_MOST, x += FLOAT_NC_MOST * x_cols,                           \
                                       acc += FLOAT_NC_MOST * acc_cols)                                                \
            FLOAT_COLS_MOST(NAME)(w, w_k, w_rv, x, x_cols, n_k, acc, acc_cols, acc_rv, 0);                             \
        switch (n_cols) { EACH_FLOAT_NC(FLOAT_COLS_CASE, NAME, T, LOAD) }                                              \
    }
#if FLOAT_NC == 12
#define FLOAT_NC_MOST 12
#define FLOAT_COLS_MOST(NAME) float_cols_##NAME##_12
#else
#define FLOAT_NC_MOST 6
#define FLOAT_COLS_MOST(NAME) float_cols_##NAME##_6
#endif

DEFINE_FLOAT_KERNEL(f32, float, vf_load)
DEFINE_FLOAT_KERNEL(f16, uint16_t, vf_load_f16)
DEFINE_FLOAT_KERNEL(bf16, uint16_t, vf_load_bf16)

/* one vector of 16 rows of a finished column -> out */
static INLINE void store_rows(const woolly_matmul_args *a, int64_t col, int64_t row, vf sum) {
    float *out = a->out + col * a->out_stride + row;
    int64_t n = a->n_rows - row;
    if (n >= 16) {
        vf_store(out, a->accumulate ? vf_add(vf_load(out), sum) : sum);
    } else if (n > 0) {
        vf_store_n(out, a->accumulate ? vf_add(vf_load_n(out, n), sum) : sum, n);
    }
}

/* NAME_matmul: TILE says whether many columns go through a tile widened to f32. NAME_tiled takes columns
 * [col, col + n_cols) of n_groups groups, in blocks of k */
#define DEFINE_FLOAT_MATMUL(NAME, T, LOAD, TILE)                                                                       \
    DEFINE_PACKING(NAME)                                                                                               \
    static void NAME##_direct(const woolly_matmul_args *a, int64_t group, int64_t n_groups, float *acc) {              \
        int64_t size = a->n_k * 16, w_rv = n_groups == FLOAT_RV ? size : 0, acc_rv = n_groups == FLOAT_RV ? 16 : 0;    \
        const T *w = (const T *)a->w + group * size;                                                                   \
        if (!a->streams) {                                                                                             \
            float_cols_##NAME(a->n_cols, w, 16, w_rv, a->x, a->x_stride, a->n_k, acc, FLOAT_ROWS, acc_rv);             \
            return;                                                                                                    \
        }                                                                                                              \
        int64_t end_k = STREAM_AHEAD / 16 / (int64_t)sizeof(T), cut = a->n_k > end_k ? a->n_k - end_k : 0;             \
        int64_t skip = (FLOAT_RV - 1) * size * (int64_t)sizeof(T); /* what follows a group's end is the next but RV - 1 */ \
        float_stream_##NAME(a->n_cols, w, 16, w_rv, a->x, a->x_stride, cut, acc, FLOAT_ROWS, acc_rv, STREAM_AHEAD);    \
        float_stream_##NAME(a->n_cols, w + cut * 16, 16, w_rv, a->x + cut, a->x_stride, a->n_k - cut, acc, FLOAT_ROWS, \
                            acc_rv, STREAM_AHEAD + skip);                                                              \
    }                                                                                                                  \
    static void NAME##_tiled(const woolly_matmul_args *a, int64_t group, int64_t n_groups, int64_t col, int64_t n_cols, \
                             float *acc) {                                                                             \
        ALIGNED float tile[TILE ? FLOAT_RV * FLOAT_K * 16 : 1];                                                        \
        for (int64_t block = 0; block < a->n_k; block += FLOAT_K_BLOCK) {                                              \
            int64_t block_end = a->n_k - block < FLOAT_K_BLOCK ? a->n_k : block + FLOAT_K_BLOCK;                       \
            for (int64_t g = 0; g < n_groups; g += FLOAT_RV) {                                                         \
                int64_t is_pair = g + FLOAT_RV <= n_groups, w_rv = is_pair ? a->n_k * 16 : 0, acc_rv = is_pair ? 16 : 0; \
                const T *w = (const T *)a->w + (group + g) * a->n_k * 16;                                              \
                for (int64_t k = block; k < block_end; k += FLOAT_K) {                                                 \
                    int64_t n_k = block_end - k < FLOAT_K ? block_end - k : FLOAT_K;                                   \
                    const float *x = a->x + col * a->x_stride + k;                                                     \
                    float *sums = acc + g * 16 * n_cols;                                                               \
                    if (TILE) {                                                                                        \
                        for (int64_t i = 0; i < n_k; i++)                                                              \
                            for (int v = 0; v < FLOAT_RV; v++)                                                         \
                                vf_store(tile + (i * FLOAT_RV + v) * 16, LOAD(w + v * w_rv + (k + i) * 16));           \
                        float_cols_f32(n_cols, tile, FLOAT_ROWS, 16, x, a->x_stride, n_k, sums, FLOAT_ROWS, acc_rv);   \
                    } else {                                                                                           \
                        float_cols_##NAME(n_cols, w + k * 16, 16, w_rv, x, a->x_stride, n_k, sums, FLOAT_ROWS, acc_rv); \
                    }                                                                                                  \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
    }                                                                                                                  \
    static void NAME##_matmul(const woolly_matmul_args *a, int64_t group_begin, int64_t group_end) {                   \
        ALIGNED float acc[FLOAT_COL_BLOCK * FLOAT_ROW_BLOCK];                                                          \
        int64_t step = a->n_cols <= FLOAT_DIRECT ? FLOAT_RV : FLOAT_ROW_BLOCK / 16;                                    \
        for (int64_t group = group_begin; group < group_end; group += step) {                                          \
            int64_t n_groups = group_end - group < step ? group_end - group : step;                                    \
            for (int64_t col = 0; col < a->n_cols; col += FLOAT_COL_BLOCK) {                                           \
                int64_t n_cols = a->n_cols - col < FLOAT_COL_BLOCK ? a->n_cols - col : FLOAT_COL_BLOCK;                \
                int64_t n_sums = (n_groups + FLOAT_RV - 1) / FLOAT_RV * FLOAT_ROWS * n_cols;                           \
                memset(acc, 0, sizeof(float) * (size_t)n_sums);                                                        \
                if (a->n_cols <= FLOAT_DIRECT)                                                                         \
                    NAME##_direct(a, group, n_groups, acc);                                                            \
                else                                                                                                   \
                    NAME##_tiled(a, group, n_groups, col, n_cols, acc);                                                \
                for (int64_t g = 0; g < n_groups; g++)                                                                 \
                    for (int64_t c = 0; c < n_cols; c++)                                                               \
                        store_rows(a, col + c, (group + g) * 16,                                                       \
                                   vf_load(acc + (g / FLOAT_RV * n_cols + c) * FLOAT_ROWS + g % FLOAT_RV * 16));       \
            }                                                                                                          \
        }                                                                                                              \
    }

DEFINE_FLOAT_MATMUL(f32, float, vf_load, 0)
DEFINE_FLOAT_MATMUL(f16, uint16_t, vf_load_f16, 1)
DEFINE_FLOAT_MATMUL(bf16, uint16_t, vf_load_bf16, 1)

#endif
