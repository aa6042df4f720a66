/* The integer matmul on AMX: exact integer arithmetic in tiles of bf16.
 *
 * A product of a weight and a digit of an activation, both small integers, and their sums over a block stay below 2^24, so
 * tdpbf16ps adds them up without rounding; the activations' scale, a power of two, is in them already. What a tile holds is
 * thus dx dot(q, x) as float, bit for bit what the other kernels convert from int32, and one fma with the weights' scale adds
 * it to the chain. Weights are q - bias here.
 *
 *   NARROW  |q| <= 16   a tile holds the sum of both digits over a block of 32
 *   RAISED  0 .. 31     the same of weights less 16: 16 sums of activations are added to what the tile holds
 *   WIDE    |q| <= 128  a tile for each digit: their sum is rounded as the conversion of the integer would be
 *   HALVES  |q| <= 32   a tile for each half of a block, where a scale covers 16 weights
 *
 * Of activations of 8 bits there is one digit: a tile for a block (NARROW, whatever the weights) or half a block, and their
 * scale, which is any number, multiplies sums.
 *
 * A few columns that are left over go to the vector unit. On a Sapphire Rapids core a block of 16 rows x 16 columns takes about
 * 40 ns, of which products are 14; int8 tiles, whose int32 sums the vector unit would convert, shift and scale, took longer.
 */
#ifndef WOOLLY_MATMUL_AMX_H
#define WOOLLY_MATMUL_AMX_H

#include "amx_config.h"

#define AMX __attribute__((target("amx-tile,amx-bf16")))
#define AMX_COLS 16
#define AMX_RV 8     /* most row groups that use the same activations while these are in L1 */
#define AMX_BLOCKS 4 /* blocks of their weights: 32 KB */
#define AMX_SUMS 4   /* tiles that are made in one step: of 4 row groups, or 2 of each of 2 row groups */
#define AMX_SLOTS 8  /* parts of a step: a dot product of each, and that much of the vector unit's work */
#define AMX_LAG 2    /* steps from a tile to its chain: it is stored one step later, and read another one later */
#define AMX_COL_BLOCK 256
#define AMX_MOST_REST 7 /* columns left over that go to the vector unit; more have a tile, though it is not full */
#define AMX_LEAST_COLS(N_BITS) ((N_BITS) == 8 ? 48 : WOOLLY_BF16_LEAST_COLS) /* bytes take longer to convert */

enum { AMX_NARROW, AMX_RAISED, AMX_WIDE, AMX_HALVES };

typedef struct {
    ALIGNED uint32_t q[AMX_BLOCKS][AMX_RV][16][16]; /* [pair of k][row]: two bf16 */
    ALIGNED float d[AMX_BLOCKS][AMX_RV][2][16];
    ALIGNED float m[AMX_BLOCKS][AMX_RV][2][16];
} amx_weights;

/* tmm0 .. 3: sums (16 columns, 16) f32; 4, 5: activations (16 columns, k) bf16; 6, 7: weights (k / 2, 16 rows of 2) bf16 */
static AMX __attribute__((noinline)) void amx_begin(int k) {
    amx_config config = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        config.rows[i] = (uint8_t)(i < 6 ? AMX_COLS : k / 2);
        config.row_bytes[i] = (uint16_t)(i < 4 || i > 5 ? 64 : 2 * k);
    }
    AMX_LOAD_CONFIG(config);
}

static AMX __attribute__((noinline)) void amx_end(void) { _tile_release(); }

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

/* Where one side of the pipeline stands: from columns to columns, for each their blocks, for each some groups of rows */
typedef struct {
    int64_t col;
    int block;
    int v;
} amx_place;

static INLINE void amx_next(amx_place *p, int n_blocks, int n_rv, int n_v) {
    if ((p->v += n_v) < n_rv) return;
    p->v = 0;
    if (++p->block < n_blocks) return;
    p->block = 0;
    p->col += AMX_COLS;
}

/* What activations of 16 columns have for a block beside their tiles: found when its first rows come, kept for all */
typedef struct {
    float d[AMX_COLS];
    float sums[AMX_COLS][2];
} amx_scalars;

static INLINE void amx_collect(int min, int c0, int nc, int64_t n, const q16_column x, int64_t xq_stride,
                               amx_scalars *of) {
    UNROLL for (int c = c0; c < c0 + nc; c++) {
        const int64_t col = (c < n ? c : 0) * xq_stride; /* what stands in for columns that are not there is not used */
        of->d[c] = *AT(x.d, col);
        minima_sums(min, *AT(x.sum, col), AT(x.corr16, col), of->d[c], of->sums[c]);
    }
}

/* The chains of nc columns take up a block of 16 rows: sums are its tile, or two */
static INLINE void amx_add(int digits, int kind, int min, int c0, int nc, const amx_weights *w, int block, int v,
                           const float (*sums)[16], const float (*sums2)[16], const amx_scalars *of, float *out) {
    vf d[2], m[2];
    UNROLL for (int half = 0; half <= (kind == AMX_HALVES); half++) d[half] = vf_load(w->d[block][v][half]);
    UNROLL for (int half = 0; half < min; half++) m[half] = vf_load(w->m[block][v][half]);
    UNROLL for (int c = c0; c < c0 + nc; c++) {
        vf chain = vf_load(out + c * AMX_RV * 16), dot[2] = {vf_load(sums[c])};
        chain = add_minima(min, chain, m, of->sums[c]);
        if (kind == AMX_RAISED) dot[0] = vf_add(dot[0], vf_set1(16 * of->sums[c][0]));
        if (kind == AMX_WIDE) dot[0] = vf_add(dot[0], vf_load(sums2[c]));
        if (kind == AMX_HALVES) dot[1] = vf_load(sums2[c]);
        UNROLL for (int half = 0; half <= (kind == AMX_HALVES); half++) {
            if (digits == 1) dot[half] = vf_mul(dot[half], vf_set1(of->d[c]));
            chain = vf_fma(dot[half], d[half], chain);
        }
        vf_store(out + c * AMX_RV * 16, chain);
    }
}

#define AMX_LOAD(T, P)                                                                                                 \
    do {                                                                                                               \
        if (is_made) _tile_loadd(T, P, 64);                                                                            \
    } while (0)

/* Tile T, of the step before, is stored, and has the first dot product of this one, or a further one */
#define AMX_FIRST(T, X, W)                                                                                             \
    do {                                                                                                               \
        if (is_stored) _tile_stored(T, stored[T], 64);                                                                 \
        if (is_made) _tile_zero(T);                                                                                    \
        AMX_THEN(T, X, W);                                                                                             \
    } while (0)
#define AMX_THEN(T, X, W)                                                                                              \
    do {                                                                                                               \
        if (is_made) _tile_dpbf16ps(T, X, W);                                                                          \
    } while (0)

/* acc (columns, 16 AMX_RV) += the n_blocks blocks from block0 on, for n_cols columns, 16 at a time. A pipeline: the tiles of
 * one step are made while those of the step before are stored, and those of the one before that are added to the chains, so
 * that tile and vector unit both have something to do. Loading tiles is the tile unit's time too: a step is one block of
 * several groups of rows, which share the tiles of activations; where a block's digits have one tile each, these stay for all. */
static INLINE AMX void amx_cols(int digits, int kind, int min, int64_t n_cols, const amx_weights *w, int n_rv, int n_blocks,
                                const uint16_t *bf16, const uint8_t *xq, int64_t xq_stride, int64_t n_k, int64_t block0,
                                int is_far, float *acc) {
    ALIGNED float sums[2][AMX_SUMS + 1][AMX_COLS][16]; /* one more, so that stores and loads are not whole pages apart */
    amx_scalars of = {{0}, {{0}}};
    const q16_column record = q16_at(xq, n_k, block0);
    const int n_v = kind == AMX_NARROW || kind == AMX_RAISED ? AMX_SUMS : AMX_SUMS / 2; /* groups of rows in a step */
    const int64_t n_units = (n_cols + AMX_COLS - 1) / AMX_COLS * n_blocks * ((n_rv + n_v - 1) / n_v);
    amx_place made = {0, 0, 0}, added = {0, 0, 0};
    for (int64_t unit = 0; unit < n_units + AMX_LAG; unit++) {
        const int is_made = unit < n_units, is_stored = unit > 0 && unit <= n_units, is_added = unit >= AMX_LAG;
        float (*stored)[AMX_COLS][16] = sums[(unit + 1) % 2];
        const float (*ready)[AMX_COLS][16] = (const float (*)[AMX_COLS][16])sums[unit % 2];
        const uint16_t *hi = bf16 + (made.col * n_k + (block0 + made.block) * 512) * digits, *lo = hi + 512;
        const int loads_x = kind == AMX_HALVES || made.v == 0, asks = is_far && is_made && made.v == 0;
        const uint32_t (*q)[16][16] = &w->q[made.block][made.v];
        const uint32_t *third = q[kind == AMX_HALVES ? 0 : 2][kind == AMX_HALVES ? 8 : 0], *fourth = third + 256;
        UNROLL for (int s = 0; s < AMX_SLOTS; s++) {
            UNROLL for (int line = 0; line < 2 * digits; line++) /* of the next columns */
                if (asks) __builtin_prefetch(hi + AMX_COLS * digits * n_k + 32 * (2 * digits * s + line));
            if (s == 0) {
                if (loads_x) AMX_LOAD(4, hi);
                AMX_LOAD(6, q[0]);
                AMX_FIRST(0, 4, 6);
            } else if (kind == AMX_WIDE) {
                if (s == 2) {
                    if (loads_x) AMX_LOAD(5, lo);
                    AMX_FIRST(1, 5, 6);
                } else if (s == 4) {
                    AMX_LOAD(7, q[1]);
                    AMX_FIRST(2, 4, 7);
                } else if (s == 6) {
                    AMX_FIRST(3, 5, 7);
                }
            } else if (s == 1) {
                AMX_LOAD(7, q[1]);
                AMX_FIRST(1, 4, 7);
            } else if (s == 2 && digits == 2) {
                if (loads_x) AMX_LOAD(5, lo);
                AMX_THEN(0, 5, 6);
            } else if (s == 3 && digits == 2) {
                AMX_THEN(1, 5, 7);
            } else if (s == 4) {
                if (kind == AMX_HALVES) AMX_LOAD(4, hi + 16);
                AMX_LOAD(6, third);
                AMX_FIRST(2, 4, 6);
            } else if (s == 5) {
                AMX_LOAD(7, fourth);
                AMX_FIRST(3, 4, 7);
            } else if (s == 6 && digits == 2) {
                if (kind == AMX_HALVES) AMX_LOAD(5, lo + 16);
                AMX_THEN(2, 5, 6);
            } else if (s == 7 && digits == 2) {
                AMX_THEN(3, 5, 7);
            }
            if (!is_added) continue;
            const int nc = AMX_COLS * n_v / AMX_SLOTS, c = s * nc % AMX_COLS, i = s * nc / AMX_COLS;
            const int t = kind == AMX_WIDE ? 2 * i : i, t2 = kind == AMX_WIDE ? t + 1 : kind == AMX_HALVES ? t + 2 : t;
            const int64_t col0 = added.col * xq_stride;
            const q16_column x = {.d = AT(record.d + added.block, col0),
                                  .sum = AT(record.sum + added.block, col0),
                                  .corr16 = AT(record.corr16 + 2 * added.block, col0)};
            if ((digits == 1 || min) && i == 0 && added.v == 0)
                amx_collect(min, c, nc, n_cols - added.col, x, xq_stride, &of);
            amx_add(digits, kind, min, c, nc, w, added.block, added.v + i, ready[t], ready[t2], &of,
                    acc + (added.col * AMX_RV + added.v + i) * 16);
        }
        if (is_added) amx_next(&added, n_blocks, n_rv, n_v);
        amx_next(&made, n_blocks, n_rv, n_v);
    }
}

#define AMX_TILE_ARGS                                                                                                  \
    int64_t n_cols, const amx_weights *w, int n_rv, int n_blocks, const uint16_t *bf16, const uint8_t *xq,             \
        int64_t xq_stride, int64_t n_k, int64_t block0, int is_far, float *acc

#define DEFINE_AMX_TILE(NAME, DIGITS, KIND, MIN)                                                                       \
    static AMX __attribute__((noinline)) void amx_tile_##NAME(AMX_TILE_ARGS) {                                        \
        amx_cols(DIGITS, KIND, MIN, n_cols, w, n_rv, n_blocks, bf16, xq, xq_stride, n_k, block0, is_far, acc);         \
    }
DEFINE_AMX_TILE(narrow_q16, 2, AMX_NARROW, 0)
DEFINE_AMX_TILE(narrow_min_q16, 2, AMX_NARROW, MIN_32)
DEFINE_AMX_TILE(raised_min_q16, 2, AMX_RAISED, MIN_32)
DEFINE_AMX_TILE(wide_q16, 2, AMX_WIDE, 0)
DEFINE_AMX_TILE(wide_min16_q16, 2, AMX_WIDE, MIN_16)
DEFINE_AMX_TILE(halves_q16, 2, AMX_HALVES, 0)
DEFINE_AMX_TILE(narrow_q8, 1, AMX_NARROW, 0)
DEFINE_AMX_TILE(narrow_min_q8, 1, AMX_NARROW, MIN_32)
DEFINE_AMX_TILE(wide_min16_q8, 1, AMX_NARROW, MIN_16)
DEFINE_AMX_TILE(halves_q8, 1, AMX_HALVES, 0)
#define amx_tile_wide_q8 amx_tile_narrow_q8
#define amx_tile_raised_min_q8 amx_tile_narrow_min_q8

/* What weights are less in tiles of 16 bits than in the format */
enum { amx_narrow_RAISE = 0, amx_narrow_min_RAISE = 0, amx_raised_min_RAISE = 16, amx_wide_RAISE = 0 };
enum { amx_wide_min16_RAISE = 0, amx_halves_RAISE = 0 };

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
        if (a->n_cols < AMX_LEAST_COLS(N_BITS) || !a->bf16) {                                                          \
            NAME##_matmul(a, group_begin, group_end);                                                                  \
            return;                                                                                                    \
        }                                                                                                              \
        amx_weights w;                                                                                                 \
        ALIGNED float acc[AMX_COL_BLOCK * AMX_RV * 16];                                                                \
        const amx_levels levels = amx_levels_of(NAME##_BIAS + (a->n_digits == 1 ? 0 : amx_##KIND##_RAISE));            \
        const int64_t n_blocks = a->n_k / NAME##_BLOCK, n_parts = n_blocks * NAME##_OUTER;                             \
        const int64_t step = AMX_BLOCKS / NAME##_INNER, n_left = a->n_cols % AMX_COLS;                                 \
        const int64_t n_tiled = n_left > AMX_MOST_REST ? a->n_cols : a->n_cols - n_left;                               \
        const int is_far = 2 * a->n_digits * a->n_k * n_tiled > WOOLLY_NEAR_BYTES;                                     \
        void (*multiply)(AMX_TILE_ARGS) = a->n_digits == 1 ? amx_tile_##KIND##_q8 : amx_tile_##KIND##_q16;             \
        woolly_matmul_args rest = *a;                                                                                  \
        rest.xq += n_tiled * a->xq_stride, rest.out += n_tiled * a->out_stride, rest.n_cols -= n_tiled;                \
        amx_begin(NAME##_HALVES ? 16 : 32);                                                                            \
        for (int64_t group = group_begin; group < group_end; group += AMX_RV) {                                        \
            const int64_t n_rv = group_end - group < AMX_RV ? group_end - group : AMX_RV;                              \
            for (int64_t col = 0; col < n_tiled; col += AMX_COL_BLOCK) {                                               \
                const int64_t n_cols = n_tiled - col < AMX_COL_BLOCK ? n_tiled - col : AMX_COL_BLOCK;                  \
                memset(acc, 0, sizeof(acc) / AMX_COL_BLOCK * (size_t)((n_cols + AMX_COLS - 1) / AMX_COLS * AMX_COLS)); \
                for (int64_t part = 0; part < n_parts; part += step) {                                                 \
                    const int n = (int)(n_parts - part < step ? n_parts - part : step);                                \
                    for (int v = 0; v < (n_rv + AMX_SUMS - 1) / AMX_SUMS * AMX_SUMS; v++) { /* as a step takes them */ \
                        const NAME##_group *from = (const NAME##_group *)a->w + (group + (v < n_rv ? v : 0)) * n_blocks;\
                        NAME##_fill_amx(&w, from, v, part, n, &levels);                                                \
                        const int64_t part_bytes = (int64_t)sizeof(NAME##_group) / NAME##_OUTER;                       \
                        if (a->streams && col == 0) prefetch_bytes((const uint8_t *)from + (part + n) * part_bytes, n * part_bytes);\
                    }                                                                                                  \
                    multiply(n_cols, &w, (int)n_rv, n * NAME##_INNER, a->bf16 + col * a->n_digits * a->n_k,            \
                             a->xq + col * a->xq_stride, a->xq_stride, a->n_k, part * NAME##_INNER, is_far, acc);      \
                }                                                                                                      \
                for (int64_t c = 0; c < n_cols; c++)                                                                   \
                    for (int64_t v = 0; v < n_rv; v++)                                                                 \
                        store_rows(a, col + c, (group + v) * 16, vf_load(acc + (c * AMX_RV + v) * 16));                \
            }                                                                                                          \
            if (rest.n_cols) NAME##_matmul(&rest, group, group + n_rv);                                                \
        }                                                                                                              \
        amx_end();                                                                                                     \
    }

#endif
