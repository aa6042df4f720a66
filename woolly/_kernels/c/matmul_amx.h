/* The integer matmul on AMX: exact integer arithmetic in tiles of bf16.
 *
 * A product of a weight and a digit of an activation, both small integers, and their sums over a block stay below 2^24, so
 * tdpbf16ps adds them up without rounding; the activations' scale, a power of two, is in them already. What a tile holds is
 * thus dx dot(q, x) as float, bit for bit what the other kernels convert from int32, and one fma with the weights' scale adds
 * it to the chain. Weights are q - bias here.
 *
 *   NARROW  |q| <= 16   a tile holds the sum of both digits over a block of 32
 *   WIDE    |q| <= 128  a tile for each digit: their sum is rounded as the conversion of the integer would be
 *   HALVES  |q| <= 32   a tile for each half of a block, where a scale covers 16 weights
 *
 * Of activations of 8 bits there is one digit: a tile for a block (NARROW, whatever the weights) or half a block, and their
 * scale, which is any number, multiplies sums.
 *
 * On a Sapphire Rapids core this takes 34 ns for 16 rows x 16 columns x 32 where int8 tiles, which leave conversion, shift
 * and scaling of int32 sums to the vector unit, took 46.
 */
#ifndef WOOLLY_MATMUL_AMX_H
#define WOOLLY_MATMUL_AMX_H

#include "amx_config.h"

#define AMX __attribute__((target("amx-tile,amx-bf16")))
#define AMX_COLS 16
#define AMX_RV 4     /* row groups that use the same activations while these are in L1 */
#define AMX_BLOCKS 4 /* blocks of weights in L1: with the activations and the sums, 40 of 48 KB */
#define AMX_SUMS 4   /* tiles that are made in one step: of 4 blocks, or 2 of each of 2 blocks */
#define AMX_LAG 2    /* steps from a tile to its chain: it is stored one step later, and read another one later */
#define AMX_COL_BLOCK 256

enum { AMX_NARROW, AMX_WIDE, AMX_HALVES };

typedef struct {
    ALIGNED uint32_t q[AMX_BLOCKS][AMX_RV][16][16]; /* [pair of k][row]: two bf16 */
    ALIGNED float d[AMX_BLOCKS][AMX_RV][2][16];
    ALIGNED float m[AMX_BLOCKS][AMX_RV][2][16];
} amx_weights;

/* tmm0 .. 3: sums (n_cols, 16) f32; 4, 5: activations (n_cols, k) bf16; 6, 7: weights (k / 2, 16 rows of 2) bf16 */
static INLINE amx_config amx_shapes(int n_cols, int k) {
    amx_config config = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        config.rows[i] = (uint8_t)(i < 6 ? n_cols : k / 2);
        config.row_bytes[i] = (uint16_t)(i < 4 || i > 5 ? 64 : 2 * k);
    }
    return config;
}

/* What weights of up to 6 bits can be, as bf16 */
typedef struct {
    vi q[2]; /* 0 .. 31 and 32 .. 63, less the bias */
} amx_levels;

static INLINE amx_levels amx_levels_of(int bias) {
    ALIGNED uint16_t level[64];
    const vi upto16 = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (int q = 0; q < 64; q += 16) store_bf16(level + q, vf_from_vi(vi_add(upto16, vi_set1(q - bias))));
    return (amx_levels){{vi_load(level), vi_load(level + 32)}};
}

/* 16 rows by 4 weights, bytes biased by `bias`, as two rows of a tile: weights 0 and 2, and 1 and 3, in which order
 * bf16_of_q16 has the activations. Those of up to 6 bits are looked up by the low bits of every other byte. */
static INLINE void amx_store_weights(uint32_t (*pair)[16], vb q, int n_bits, int bias, const amx_levels *levels) {
    if (n_bits <= 5) {
        vi_store(pair[0], _mm512_permutexvar_epi16(q, levels->q[0]));
        vi_store(pair[1], _mm512_permutexvar_epi16(vi_srl(q, 8), levels->q[0]));
    } else if (n_bits == 6) {
        vi_store(pair[0], _mm512_permutex2var_epi16(levels->q[0], q, levels->q[1]));
        vi_store(pair[1], _mm512_permutex2var_epi16(levels->q[0], vi_srl(q, 8), levels->q[1]));
    } else {
        const vi upper = vi_set1((int32_t)0xffff0000);
        vf w[4];
        if (bias) q = vi_xor(rebias(q, bias, 128), vi_set1((int32_t)0x80808080)); /* to signed bytes */
        UNROLL for (int k = 0; k < 4; k++) w[k] = vf_from_vi(vi_sra(vi_sll(q, 24 - 8 * k), 24));
        UNROLL for (int k = 0; k < 2; k++)
            vi_store(pair[k], vi_or(vi_srl(vf_bits(w[k]), 16), vi_and(vf_bits(w[k + 2]), upper)));
    }
}

/* Where one side of the pipeline stands: steps along k, for each group of rows, for each group of columns */
typedef struct {
    int64_t col;
    int v;
    int step;
} amx_place;

static INLINE void amx_next(amx_place *p, int n_steps) {
    if (++p->step < n_steps) return;
    p->step = 0;
    if (++p->v < AMX_RV) return;
    p->v = 0;
    p->col += AMX_COLS;
}

/* Tile T is stored, cleared and made again: a dot product over the digits at x (and those at lo) with weight tile W */
#define AMX_SUM(T, W)                                                                                                  \
    do {                                                                                                               \
        if (is_stored) _tile_stored(T, stored[T], 64);                                                                 \
        if (!is_made) break;                                                                                           \
        _tile_zero(T);                                                                                                 \
        _tile_dpbf16ps(T, 4, W);                                                                                       \
        if (kind == AMX_WIDE || digits == 1) break;                                                                    \
        _tile_loadd(5, x + 512, 64);                                                                                   \
        _tile_dpbf16ps(T, 5, W);                                                                                       \
    } while (0)

/* acc (n_cols, 16 AMX_RV) += the n_blocks blocks from block0 on, for n_groups groups of n columns. A pipeline: the tiles of
 * one step are made while those of the step before are stored, and those of the one before that are added to the chains, so
 * that tile and vector unit both have something to do. */
static INLINE AMX void amx_cols(int digits, int kind, int min, int n, int64_t n_groups, const amx_weights *w,
                                int n_blocks, const uint16_t *bf16, const uint8_t *xq, int64_t xq_stride, int64_t n_k,
                                int64_t block0, float *acc) {
    ALIGNED float sums[2][AMX_SUMS][AMX_COLS][16];
    const q16_column record = q16_at(xq, n_k, block0);
    const int per_step = kind == AMX_NARROW ? AMX_SUMS : AMX_SUMS / 2, n_steps = (n_blocks + per_step - 1) / per_step;
    const int64_t n_units = n_groups * AMX_RV * n_steps;
    amx_place made = {0, 0, 0}, added = {0, 0, 0};
    vf chain[AMX_COLS];
    UNROLL for (int c = 0; c < AMX_COLS; c++) chain[c] = vf_set1(0);
    for (int64_t unit = 0; unit < n_units + AMX_LAG; unit++) {
        const int is_made = unit < n_units, is_stored = unit > 0 && unit <= n_units, is_added = unit >= AMX_LAG;
        float (*stored)[AMX_COLS][16] = sums[(unit + 1) % 2], (*ready)[AMX_COLS][16] = sums[unit % 2];
        float *out = acc + added.col * AMX_RV * 16 + added.v * 16;
        const int first = added.step * per_step, n_added = n_blocks - first < per_step ? n_blocks - first : per_step;
        vf d[AMX_SUMS], m[AMX_SUMS][2];
        UNROLL for (int j = 0; j < per_step; j++) {
            int b = j < n_added ? first + j : first;
            UNROLL for (int half = 0; half < min; half++) m[j][half] = vf_load(w->m[b][added.v][half]);
            if (kind == AMX_HALVES) d[2 * j] = vf_load(w->d[b][added.v][0]), d[2 * j + 1] = vf_load(w->d[b][added.v][1]);
            else d[j] = vf_load(w->d[b][added.v][0]);
        }
        if (is_added && added.step == 0)
            UNROLL for (int c = 0; c < AMX_COLS; c++) if (c < n) chain[c] = vf_load(out + c * AMX_RV * 16);
        const uint16_t *columns = bf16 + made.col * digits * n_k + block0 * digits * 512;
        UNROLL for (int t = 0; t < AMX_SUMS; t++) {
            int b = made.step * per_step + (kind == AMX_NARROW ? t : t / 2);
            if (b >= n_blocks) b = n_blocks - 1;
            const uint16_t *x = columns + b * digits * 512 + (kind == AMX_NARROW ? 0 : kind == AMX_WIDE ? t % 2 * 512 : t % 2 * 16);
            if (is_made) {
                /* the next columns' share, as they come from the L2 cache or from further away */
                const int n_lines = digits * AMX_BLOCKS;
                const char *next = (const char *)(columns + 16 * digits * n_k) + (made.v * AMX_SUMS + t) * 64 * n_lines;
                UNROLL for (int line = 0; line < n_lines; line++) if (made.step == 0) __builtin_prefetch(next + 64 * line);
                _tile_loadd(4, x, 64);
                const uint32_t *q = w->q[b][made.v][kind == AMX_HALVES ? t % 2 * 8 : 0];
                if (kind == AMX_WIDE ? t == 0 : t % 2 == 0) _tile_loadd(6, q, 64);
                else if (kind != AMX_WIDE || t == 2) _tile_loadd(7, q, 64);
            }
            if (t == 0) AMX_SUM(0, 6);
            if (t == 1 && kind == AMX_WIDE) AMX_SUM(1, 6);
            if (t == 1 && kind != AMX_WIDE) AMX_SUM(1, 7);
            if (t == 2 && kind == AMX_WIDE) AMX_SUM(2, 7);
            if (t == 2 && kind != AMX_WIDE) AMX_SUM(2, 6);
            if (t == 3) AMX_SUM(3, 7);
            if (!is_added) continue;
            const int64_t col0 = (added.col + 4 * t) * xq_stride;
            const float *sum = AT(record.sum + first, col0), *dx = AT(record.d + first, col0);
            const int32_t *corr16 = AT(record.corr16 + 2 * first, col0);
            UNROLL for (int c = 4 * t; c < 4 * t + 4; c++) {
                if (c >= n) continue;
                const int64_t col = c % 4 * xq_stride;
                UNROLL for (int j = 0; j < per_step; j++) {
                    if (j >= n_added) continue;
                    if (min) chain[c] = add_minima(min, chain[c], m[j], AT(sum, col)[j], AT(corr16, col) + 2 * j, AT(dx, col)[j]);
                    vf dot = vf_load(ready[kind == AMX_NARROW ? j : 2 * j][c]);
                    const vf scale = vf_set1(AT(dx, col)[j]);
                    if (kind == AMX_WIDE) dot = vf_add(dot, vf_load(ready[2 * j + 1][c]));
                    if (digits == 1) dot = vf_mul(dot, scale);
                    chain[c] = vf_fma(dot, d[kind == AMX_HALVES ? 2 * j : j], chain[c]);
                    if (kind != AMX_HALVES) continue;
                    dot = vf_load(ready[2 * j + 1][c]);
                    if (digits == 1) dot = vf_mul(dot, scale);
                    chain[c] = vf_fma(dot, d[2 * j + 1], chain[c]);
                }
            }
        }
        if (is_added && added.step == n_steps - 1)
            UNROLL for (int c = 0; c < AMX_COLS; c++) if (c < n) vf_store(out + c * AMX_RV * 16, chain[c]);
        if (is_added) amx_next(&added, n_steps);
        amx_next(&made, n_steps);
    }
}

#define AMX_TILE_ARGS                                                                                                  \
    int64_t n_cols, const amx_weights *w, int n_blocks, const uint16_t *bf16, const uint8_t *xq, int64_t xq_stride,    \
        int64_t n_k, int64_t block0, float *acc

/* amx_tile_NAME: any number of columns, 16 at a time, then what is left */
#define DEFINE_AMX_TILE(NAME, DIGITS, KIND, MIN)                                                                       \
    static AMX __attribute__((noinline)) void amx_tile_##NAME(AMX_TILE_ARGS) {                                        \
        for (int64_t col = 0; col < n_cols;) {                                                                         \
            const int64_t rest = n_cols - col;                                                                         \
            const int n = rest < AMX_COLS ? (int)rest : AMX_COLS;                                                      \
            amx_config config = amx_shapes(n, KIND == AMX_HALVES ? 16 : 32);                                           \
            AMX_LOAD_CONFIG(config);                                                                                   \
            amx_cols(DIGITS, KIND, MIN, n, rest / n, w, n_blocks, bf16 + col * DIGITS * n_k, xq + col * xq_stride,     \
                     xq_stride, n_k, block0, acc + col * AMX_RV * 16);                                                 \
            col += rest / n * n;                                                                                       \
        }                                                                                                              \
        _tile_release();                                                                                               \
    }
DEFINE_AMX_TILE(narrow_q16, 2, AMX_NARROW, 0)
DEFINE_AMX_TILE(narrow_min_q16, 2, AMX_NARROW, MIN_32)
DEFINE_AMX_TILE(wide_q16, 2, AMX_WIDE, 0)
DEFINE_AMX_TILE(wide_min_q16, 2, AMX_WIDE, MIN_32)
DEFINE_AMX_TILE(wide_min16_q16, 2, AMX_WIDE, MIN_16)
DEFINE_AMX_TILE(halves_q16, 2, AMX_HALVES, 0)
DEFINE_AMX_TILE(narrow_q8, 1, AMX_NARROW, 0)
DEFINE_AMX_TILE(narrow_min_q8, 1, AMX_NARROW, MIN_32)
DEFINE_AMX_TILE(wide_min16_q8, 1, AMX_NARROW, MIN_16)
DEFINE_AMX_TILE(halves_q8, 1, AMX_HALVES, 0)
#define amx_tile_wide_q8 amx_tile_narrow_q8
#define amx_tile_wide_min_q8 amx_tile_narrow_min_q8

/* NAME_matmul_amx, for a format that DEFINE_INT_MATMUL has defined; KIND names the tile kernel, N_BITS are those of what
 * NAME_quants gives */
#define DEFINE_AMX_MATMUL(NAME, KIND, N_BITS)                                                                          \
    _Static_assert(AMX_BLOCKS % NAME##_INNER == 0, "a tile holds whole parts of " #NAME);                              \
                                                                                                                       \
    /* n parts, of INNER blocks of 32 each, from the part-th on of a row group */                                      \
    static void NAME##_fill_amx(amx_weights *w, const NAME##_group *group, int v, int64_t part, int n,                 \
                                const amx_levels *levels) {                                                            \
        _Pragma("GCC unroll 1") for (int p = 0; p < n; p++) {                                                          \
            const NAME##_group *b = group + (part + p) / NAME##_OUTER;                                                 \
            int o = (int)((part + p) % NAME##_OUTER);                                                                  \
            UNROLL for (int i = 0; i < NAME##_INNER; i++) {                                                            \
                int s = p * NAME##_INNER + i;                                                                          \
                UNROLL for (int g = 0; g < 8; g++)                                                                     \
                    amx_store_weights(w->q[s][v] + 2 * g, NAME##_quants(b, o, i, g), N_BITS, NAME##_BIAS, levels);     \
                vf d[2] = {vf_set1(0), vf_set1(0)}, m[2] = {vf_set1(0), vf_set1(0)};                                   \
                NAME##_scales(b, o, i, d, m);                                                                          \
                UNROLL for (int half = 0; half <= NAME##_HALVES; half++) vf_store(w->d[s][v][half], d[half]);          \
                UNROLL for (int half = 0; half < NAME##_MIN; half++) vf_store(w->m[s][v][half], m[half]);              \
            }                                                                                                          \
        }                                                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    static void NAME##_matmul_amx(const woolly_matmul_args *a, int64_t group_begin, int64_t group_end) {              \
        if (a->n_cols < WOOLLY_BF16_LEAST_COLS || !a->bf16) {                                                          \
            NAME##_matmul(a, group_begin, group_end);                                                                  \
            return;                                                                                                    \
        }                                                                                                              \
        amx_weights w;                                                                                                 \
        const amx_levels levels = amx_levels_of(NAME##_BIAS);                                                          \
        ALIGNED float acc[AMX_COL_BLOCK * AMX_RV * 16];                                                                \
        const int64_t n_blocks = a->n_k / NAME##_BLOCK, n_parts = n_blocks * NAME##_OUTER;                             \
        const int64_t step = AMX_BLOCKS / NAME##_INNER;                                                                \
        void (*multiply)(AMX_TILE_ARGS) = a->n_digits == 1 ? amx_tile_##KIND##_q8 : amx_tile_##KIND##_q16;             \
        for (int64_t group = group_begin; group < group_end; group += AMX_RV) {                                        \
            const int64_t n_rv = group_end - group < AMX_RV ? group_end - group : AMX_RV;                              \
            for (int64_t col = 0; col < a->n_cols; col += AMX_COL_BLOCK) {                                             \
                const int64_t n_cols = a->n_cols - col < AMX_COL_BLOCK ? a->n_cols - col : AMX_COL_BLOCK;              \
                memset(acc, 0, sizeof(float) * (size_t)(n_cols * AMX_RV * 16));                                        \
                for (int64_t part = 0; part < n_parts; part += step) {                                                 \
                    const int n = (int)(n_parts - part < step ? n_parts - part : step);                                \
                    for (int v = 0; v < AMX_RV; v++)                                                                   \
                        NAME##_fill_amx(&w, (const NAME##_group *)a->w + (group + (v < n_rv ? v : 0)) * n_blocks, v,   \
                                        part, n, &levels);                                                             \
                    multiply(n_cols, &w, n * NAME##_INNER, a->bf16 + col * a->n_digits * a->n_k,                       \
                             a->xq + col * a->xq_stride, a->xq_stride, a->n_k, part * NAME##_INNER, acc);              \
                }                                                                                                      \
                for (int64_t c = 0; c < n_cols; c++)                                                                   \
                    for (int64_t v = 0; v < n_rv; v++)                                                                 \
                        store_rows(a, col + c, (group + v) * 16, vf_load(acc + (c * AMX_RV + v) * 16));                \
            }                                                                                                          \
        }                                                                                                              \
    }

#endif
