/* The integer matmul: quantised weights by activations quantised to 16 bits per 32 values, or to 8.
 *
 *   out[c][r] = sum over blocks b, ascending, of m[r][b] (dx[c][b] sum(x[c][b])) + d[r][b] (dx[c][b] dot(q[r][b], x[c][b]))
 *
 * (formats with a scale or a minimum for 16 weights have two terms of that kind in a block).
 *
 * Dot products are exact in int32, and so are products with dx, a power of two; each term then is an fma of the element's
 * chain in f32. Of 8 bits, dx is any number: the product with it is rounded. A lane is a row, so neither k nor a sum is ever
 * split. A few columns are computed from the packed blocks as they stream by, from bytes: as x = 256 hi + lo, a dot
 * product is one over hi, shifted by 8 bits, and on over lo. For more, a tile of INT_RV groups of rows is unpacked once and
 * used by all columns: to words of 16 bits, for activations of as many, or to bytes for those of 8. Two words are multiplied
 * with what two digits by four bytes take, or less, and neither shift nor bias is left to do for each element.
 */
#ifndef WOOLLY_MATMUL_INT_H
#define WOOLLY_MATMUL_INT_H

#include "matmul_float.h"

#define INT_ROWS (INT_RV * 16)
#define INT_TILE 16       /* blocks of 32 bytes in a tile, half as many of words: with 32 rows, 16 KB of L1 */
#define INT_COL_BLOCK 128 /* columns that use a tile before the next one is made */
#define INT_DIRECT 4      /* columns that are computed at once without a tile */
#ifndef INT_TILED
#define INT_TILED (INT_DIRECT + 1) /* columns from which there is a tile */
#endif
#ifndef INT_DIRECT_K
#define INT_DIRECT_K INT_DIRECT /* most columns without a tile, of formats in blocks of 256 */
#endif
#ifndef INT_DIRECT_RARE
#define INT_DIRECT_RARE INT_DIRECT /* and of the rarer formats: fewer where the compiler takes long over them */
#endif

typedef struct {
    ALIGNED uint8_t q[INT_TILE * 8][INT_RV][64]; /* of a block, 8 groups of 4 bytes, or 16 of 2 words */
    ALIGNED float d[INT_TILE][INT_RV][2][16];
    ALIGNED float m[INT_TILE][INT_RV][2][16];
} int_tile;

/* From the dot product over hi, or 0, to where that over lo starts: 256 hi - bias * sum(x), from corr = -128 * sum(x) */
static INLINE vi next_digit(int bias, vi dot, const int32_t *corr) {
    dot = vi_sll(dot, 8);
    if (bias == 0 || (bias == 128 && !DOT_FULL_BIASED)) return dot;
    vi start = vi_set1(*corr);
    return vi_add(dot, bias == 128 ? start : vi_sra(start, __builtin_ctz(128 / bias))); /* a power of two */
}

static INLINE vi dot4(int bias, vi acc, vb w, const int8_t *x) {
    return bias == 128 ? dot_full(acc, w, x) : dot_low(acc, w, x);
}

/* What a block's minima are multiplied with: the sum of its activations, or those of its halves */
static INLINE void minima_sums(int min, float sum, const int32_t *corr16, float dx, float *sums) {
    if (min == MIN_32) sums[0] = sum;
    UNROLL for (int half = 0; min == MIN_16 && half < 2; half++) sums[half] = (float)corr16[half] * (dx * -0x1p-7f);
}

static INLINE vf add_minima(int min, vf acc, const vf *m, const float *sums) {
    UNROLL for (int i = 0; i < min; i++) acc = vf_fma(m[i], vf_set1(sums[i]), acc);
    return acc;
}

/* A block's scaled dot product, or one for each of its halves */
static INLINE vf add_dots(int halves, vf acc, const vi *dot, const vf *d, float dx) {
    acc = vf_fma(vf_mul(vf_from_vi(dot[0]), vf_set1(dx)), d[0], acc);
    return halves ? vf_fma(vf_mul(vf_from_vi(dot[1]), vf_set1(dx)), d[1], acc) : acc;
}

/* Three columns share a pointer, see float_cols */
typedef struct {
    const int8_t *digits[2]; /* hi, lo */
    const int16_t *words;
    const float *d;
    const float *sum;
    const int32_t *corr;
    const int32_t *corr16;
} q16_column;

static INLINE q16_column q16_at(const uint8_t *record, int64_t n_k, int64_t block) {
    int64_t n_blocks = n_k / WOOLLY_QBLOCK;
    const int8_t *hi = (const int8_t *)record + block * WOOLLY_QBLOCK;
    const int16_t *words = (const int16_t *)(record + 2 * n_k) + block * WOOLLY_QBLOCK;
    const float *d = (const float *)(record + woolly_q16_scales(n_k));
    const int32_t *corr = (const int32_t *)(d + 2 * n_blocks);
    return (q16_column){{hi, hi + n_k}, words,        d + block, d + n_blocks + block,
                        corr + block,   corr + n_blocks + 2 * block};
}
#define AT(pointer, offset_bytes) ((__typeof__(pointer))((const char *)(pointer) + (offset_bytes)))

/* acc (nc, INT_ROWS) += the tile's n_blocks blocks, for nc columns from record xq on, the tile being at block0 */
static INLINE void int_tile_cols(int words, int bias, int halves, int min, int nc, const int_tile *tile, int n_blocks,
                                 const uint8_t *xq, int64_t xq_stride, int64_t n_k, int64_t block0, float *acc) {
    q16_column x3[(INT_NC + 2) / 3];
    UNROLL for (int c = 0; c < (nc + 2) / 3; c++) x3[c] = q16_at(xq + 3 * c * xq_stride, n_k, block0);
    vf sum[INT_NC][INT_RV];
    UNROLL for (int c = 0; c < nc; c++) UNROLL for (int v = 0; v < INT_RV; v++)
        if (INT_SUMS_STAY) sum[c][v] = vf_load(acc + c * INT_ROWS + v * 16);
    for (int b = 0; b < n_blocks; b++) {
        vi dot[INT_NC][INT_RV][2];
        UNROLL for (int half = 0; half <= halves; half++) {
            const int n_groups = words ? 16 : 8, first = half * n_groups / 2, end = halves ? first + n_groups / 2 : n_groups;
            UNROLL for (int c = 0; c < nc; c++) {
                const int32_t *corr = halves ? x3[c / 3].corr16 + 2 * b + half : x3[c / 3].corr + b;
                UNROLL for (int v = 0; v < INT_RV; v++)
                    dot[c][v][half] = words ? vi_set1(0) : next_digit(bias, vi_set1(0), AT(corr, c % 3 * xq_stride));
            }
            UNROLL for (int g = first; g < end; g++) {
                vi w[INT_RV];
                UNROLL for (int v = 0; v < INT_RV; v++) w[v] = vi_load(tile->q[b * n_groups + g][v]);
                UNROLL for (int c = 0; c < nc; c++) {
                    const int8_t *x = AT(x3[c / 3].digits[1] + 32 * b + 4 * g, c % 3 * xq_stride);
                    const int16_t *x16 = AT(x3[c / 3].words + 32 * b + 2 * g, c % 3 * xq_stride);
                    UNROLL for (int v = 0; v < INT_RV; v++)
                        dot[c][v][half] = words ? dot_words(dot[c][v][half], w[v], x16) : dot4(bias, dot[c][v][half], w[v], x);
                }
            }
        }
        UNROLL for (int v = 0; v < INT_RV; v++) {
            vf d[2] = {vf_load(tile->d[b][v][0]), halves ? vf_load(tile->d[b][v][1]) : vf_set1(0)};
            vf m[2] = {min ? vf_load(tile->m[b][v][0]) : vf_set1(0), min == MIN_16 ? vf_load(tile->m[b][v][1]) : vf_set1(0)};
            UNROLL for (int c = 0; c < nc; c++) {
                float dx = *AT(x3[c / 3].d + b, c % 3 * xq_stride);
                if (!INT_SUMS_STAY) sum[c][v] = vf_load(acc + c * INT_ROWS + v * 16);
                float sums[2];
                minima_sums(min, *AT(x3[c / 3].sum + b, c % 3 * xq_stride), AT(x3[c / 3].corr16 + 2 * b, c % 3 * xq_stride),
                            dx, sums);
                sum[c][v] = add_minima(min, sum[c][v], m, sums);
                sum[c][v] = add_dots(halves, sum[c][v], dot[c][v], d, dx);
                if (!INT_SUMS_STAY) vf_store(acc + c * INT_ROWS + v * 16, sum[c][v]);
            }
        }
    }
    UNROLL for (int c = 0; c < nc; c++) UNROLL for (int v = 0; v < INT_RV; v++)
        if (INT_SUMS_STAY) vf_store(acc + c * INT_ROWS + v * 16, sum[c][v]);
}

#define INT_TILE_ARGS                                                                                                  \
    int64_t n_cols, const int_tile *tile, int n_blocks, const uint8_t *xq, int64_t xq_stride, int64_t n_k,             \
        int64_t block0, float *acc

/* int_tile_KIND_q16 and _q8: any number of columns, INT_NC at a time, then 4, 2, 1; of 8, twice 4 */
#define DEFINE_INT_TILE_OF(NAME, WORDS, BIAS, HALVES, MIN)                                                             \
    static __attribute__((noinline)) void int_tile_##NAME(INT_TILE_ARGS) {                                             \
        for (; n_cols >= INT_NC && n_cols != 8; n_cols -= INT_NC, xq += INT_NC * xq_stride, acc += INT_NC * INT_ROWS)  \
            int_tile_cols(WORDS, BIAS, HALVES, MIN, INT_NC, tile, n_blocks, xq, xq_stride, n_k, block0, acc);         \
        for (; INT_NC > 4 && n_cols >= 4; n_cols -= 4, xq += 4 * xq_stride, acc += 4 * INT_ROWS)                       \
            int_tile_cols(WORDS, BIAS, HALVES, MIN, 4, tile, n_blocks, xq, xq_stride, n_k, block0, acc);              \
        for (; n_cols >= 2; n_cols -= 2, xq += 2 * xq_stride, acc += 2 * INT_ROWS)                                     \
            int_tile_cols(WORDS, BIAS, HALVES, MIN, 2, tile, n_blocks, xq, xq_stride, n_k, block0, acc);              \
        if (n_cols) int_tile_cols(WORDS, BIAS, HALVES, MIN, 1, tile, n_blocks, xq, xq_stride, n_k, block0, acc);      \
    }
#define DEFINE_INT_TILE(KIND, BIAS, HALVES, MIN)                                                                       \
    DEFINE_INT_TILE_OF(KIND##_q16, 1, 0, HALVES, MIN)                                                                  \
    DEFINE_INT_TILE_OF(KIND##_q8, 0, BIAS, HALVES, MIN)

/* A tile's words have no bias. Its bytes: all formats without minima are brought to bias 128 where the dot product takes any
 * byte, otherwise to the least that suits all formats of the kind */
enum { full_BIAS = 128, low_BIAS = DOT_FULL_BIASED ? 128 : 16, halves_BIAS = DOT_FULL_BIASED ? 128 : 64 };
enum { min_BIAS = 0, min16_BIAS = 0 };
DEFINE_INT_TILE(full, full_BIAS, 0, 0)
DEFINE_INT_TILE(halves, halves_BIAS, 1, 0)
DEFINE_INT_TILE(min, min_BIAS, 0, MIN_32)
DEFINE_INT_TILE(min16, min16_BIAS, 0, MIN_16)
#define int_tile_low_q16 int_tile_full_q16
#if DOT_FULL_BIASED
#define int_tile_low_q8 int_tile_full_q8
#else
DEFINE_INT_TILE_OF(low_q8, 0, low_BIAS, 0, 0)
#endif

/* Bytes as the tile kernel wants them: at most 127, plus a constant that carries over no byte */
static INLINE vb rebias(vb q, int bias, int tile_bias) {
    return tile_bias != bias ? vi_add(q, vi_set1((tile_bias - bias) * 0x01010101)) : q;
}

/* part[column][row group][digit][PART] = DOT of the groups BEGIN .. END of FOURS, each from chain to chain anew */
#define INT_PARTS(FOURS, BEGIN, END, DOT, PART)                                                                        \
    UNROLL for (int c = 0; c < nc; c++) UNROLL for (int v = 0; v < INT_RV; v++) UNROLL for (int digit = 0; digit < 2; digit++) \
        part[c][v][digit][0] = part[c][v][digit][1] = vi_set1(0);                                                      \
    UNROLL for (int g = BEGIN; g < END; g++) {                                                                         \
        vb q[INT_RV];                                                                                                  \
        UNROLL for (int v = 0; v < INT_RV; v++) q[v] = FOURS(w[v], o, i, g);                                           \
        UNROLL for (int c = 0; c < nc; c++) UNROLL for (int digit = 2 - digits; digit < 2; digit++) {                  \
            const int8_t *four = x[c].digits[digit] + 32 * s + 4 * g;                                                  \
            UNROLL for (int v = 0; v < INT_RV; v++) part[c][v][digit][PART] = DOT(part[c][v][digit][PART], q[v], four); \
        }                                                                                                              \
    }

#define INT_DOTS_ARGS(NAME)                                                                                            \
    const NAME##_group *const *w, int o, int i, int digits, int nc, const q16_column *x, int64_t s, vi dot[][INT_RV][2]

/* NAME_dots from NAME_quants: dot products of INT_RV row groups by block s of nc columns, or of each of its halves */
#define DEFINE_INT_DOTS(NAME)                                                                                          \
    static INLINE vi NAME##_dot4(vi acc, vb q, const int8_t *x) { return dot4(NAME##_BIAS, acc, q, x); }               \
    static INLINE void NAME##_dots(INT_DOTS_ARGS(NAME)) {                                                              \
        const int n_g = NAME##_HALVES ? 4 : 8, n_chains = nc == 1 && !NAME##_HALVES ? 2 : 1;                           \
        vi part[INT_DIRECT][INT_RV][2][2]; /* [digit][chain] */                                                        \
        UNROLL for (int half = 0; half <= NAME##_HALVES; half++) {                                                     \
            INT_PARTS(NAME##_quants, half * 4, half * 4 + n_g, NAME##_dot4, g % n_chains)                              \
            UNROLL for (int c = 0; c < nc; c++) UNROLL for (int v = 0; v < INT_RV; v++) {                              \
                const int32_t *corr = NAME##_HALVES ? x[c].corr16 + 2 * s + half : x[c].corr + s;                      \
                UNROLL for (int digit = 0; n_chains == 2 && digit < 2; digit++)                                        \
                    part[c][v][digit][0] = vi_add(part[c][v][digit][0], part[c][v][digit][1]);                         \
                dot[c][v][half] = vi_add(next_digit(NAME##_BIAS, part[c][v][0][0], corr), part[c][v][1][0]);           \
            }                                                                                                          \
        }                                                                                                              \
    }

/* NAME_matmul from NAME_quants and NAME_scales; KIND names the tile kernel, DIRECT the most columns computed without it */
#define DEFINE_INT_MATMUL(NAME, KIND, DIRECT)                                                                          \
    DEFINE_INT_DOTS(NAME)                                                                                              \
    DEFINE_INT_LOOPS(NAME, KIND, DIRECT, DIRECT == INT_DIRECT && !NAME##_HALVES ? INT_TILED : DIRECT + 1, NAME##_dots)

/* The same from NAME_dots, of one or two columns from FEW_DOTS; TILED columns are the least that have a tile */
#define DEFINE_INT_LOOPS(NAME, KIND, DIRECT, TILED, FEW_DOTS)                                                          \
    DEFINE_PACKING(NAME)                                                                                               \
    enum { NAME##_SUB = NAME##_OUTER * NAME##_INNER }; /* blocks of 32 in one of the format's blocks */                \
    enum { NAME##_TILED = TILED };                                                                                     \
                                                                                                                       \
    static INLINE void NAME##_direct(const woolly_matmul_args *a, int digits, int nc, int64_t col, int64_t group,      \
                                     int64_t n_rv) {                                                                   \
        const NAME##_group *w[INT_RV];                                                                                 \
        const int64_t n_blocks = a->n_k / NAME##_BLOCK;                                                                \
        const int64_t size = n_blocks * (int64_t)sizeof(NAME##_group), near = size < STREAM_AHEAD ? size : STREAM_AHEAD; \
        /* where a row group ends, the one that takes its place in the next pair */                                    \
        const int64_t far = near + (INT_RV - 1) * size, n_near = (size - near) / (int64_t)sizeof(NAME##_group);        \
        UNROLL for (int v = 0; v < INT_RV; v++)                                                                        \
            w[v] = (const NAME##_group *)a->w + (group + (v < n_rv ? v : 0)) * n_blocks;                               \
        q16_column x[INT_DIRECT];                                                                                      \
        UNROLL for (int c = 0; c < nc; c++) x[c] = q16_at(a->xq + (col + c) * a->xq_stride, a->n_k, 0);                \
        vf sum[INT_DIRECT][INT_RV];                                                                                    \
        UNROLL for (int c = 0; c < nc; c++) UNROLL for (int v = 0; v < INT_RV; v++) sum[c][v] = vf_set1(0);            \
        const int keeps = INT_KEEPS_SCALES && nc == 1 && NAME##_INNER > 1; /* what is read but for quants */           \
        for (int64_t b = 0; b < n_blocks; b++) {                                                                       \
            const int64_t ahead = b < n_near ? near : far;                                                             \
            _Pragma("GCC unroll 1") for (int o = 0; o < NAME##_OUTER; o++) {                                           \
                UNROLL for (int i = 0; i < NAME##_INNER; i++) {                                                        \
                    if (!keeps) READ_AGAIN;                                                                            \
                    const int64_t s = (b * NAME##_OUTER + o) * NAME##_INNER + i;                                       \
                    const int part_size = (int)sizeof(NAME##_group) / NAME##_OUTER;                                    \
                    if (a->streams)                                                                                    \
                        UNROLL for (int v = 0; v < INT_RV; v++)                                                        \
                            prefetch_part((const char *)(w[v] + b) + ahead + o * part_size, part_size, i, NAME##_INNER); \
                    const NAME##_group *at[INT_RV];                                                                    \
                    UNROLL for (int v = 0; v < INT_RV; v++) at[v] = keeps ? NOT_KEPT(w[v] + b) : w[v] + b;             \
                    vi dot[INT_DIRECT][INT_RV][2];                                                                     \
                    (nc < 3 ? FEW_DOTS : NAME##_dots)(at, o, i, digits, nc, x, s, dot);                                \
                    UNROLL for (int v = 0; v < INT_RV; v++) {                                                          \
                        vf d[2] = {vf_set1(0), vf_set1(0)}, m[2] = {vf_set1(0), vf_set1(0)};                           \
                        NAME##_scales(w[v] + b, o, i, d, m);                                                           \
                        UNROLL for (int c = 0; c < nc; c++) {                                                          \
                            const float dx = x[c].d[s];                                                                \
                            float sums[2];                                                                             \
                            minima_sums(NAME##_MIN, x[c].sum[s], x[c].corr16 + 2 * s, dx, sums);                       \
                            sum[c][v] = add_minima(NAME##_MIN, sum[c][v], m, sums);                                    \
                            sum[c][v] = add_dots(NAME##_HALVES, sum[c][v], dot[c][v], d, dx);                          \
                        }                                                                                              \
                    }                                                                                                  \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
        UNROLL for (int c = 0; c < nc; c++) UNROLL for (int v = 0; v < INT_RV; v++)                                    \
            if (v < n_rv) store_rows(a, col + c, (group + v) * 16, sum[c][v]);                                         \
    }                                                                                                                  \
                                                                                                                       \
    static INLINE void NAME##_fill(int words, int_tile *tile, const NAME##_group *w, int v, int n_blocks) {            \
        const vi bias = vi_set1(NAME##_BIAS * 0x10001);                                                                \
        for (int b = 0; b < n_blocks; b++)                                                                             \
            _Pragma("GCC unroll 1") for (int o = 0; o < NAME##_OUTER; o++) {                                           \
                UNROLL for (int i = 0; i < NAME##_INNER; i++) {                                                        \
                    int s = (b * NAME##_OUTER + o) * NAME##_INNER + i;                                                 \
                    UNROLL for (int g = 0; g < 8; g++) {                                                               \
                        vb q = NAME##_quants(w + b, o, i, g);                                                          \
                        if (words) {                                                                                   \
                            vi_store(tile->q[16 * s + 2 * g][v], vi_sub16(vb_low_words(q), bias));                     \
                            vi_store(tile->q[16 * s + 2 * g + 1][v], vi_sub16(vb_high_words(q), bias));                \
                        } else {                                                                                       \
                            vi_store(tile->q[8 * s + g][v], rebias(q, NAME##_BIAS, KIND##_BIAS));                      \
                        }                                                                                              \
                    }                                                                                                  \
                    vf d[2] = {vf_set1(0), vf_set1(0)}, m[2] = {vf_set1(0), vf_set1(0)};                               \
                    NAME##_scales(w + b, o, i, d, m);                                                                  \
                    vf_store(tile->d[s][v][0], d[0]);                                                                  \
                    if (NAME##_HALVES) vf_store(tile->d[s][v][1], d[1]);                                               \
                    if (NAME##_MIN) vf_store(tile->m[s][v][0], m[0]);                                                  \
                    if (NAME##_MIN == MIN_16) vf_store(tile->m[s][v][1], m[1]);                                        \
                }                                                                                                      \
            }                                                                                                          \
    }                                                                                                                  \
                                                                                                                       \
    static INLINE void NAME##_tiled(int words, const woolly_matmul_args *a, int64_t group, int64_t n_rv) {             \
        int_tile tile;                                                                                                 \
        ALIGNED float acc[INT_COL_BLOCK * INT_ROWS];                                                                   \
        void (*multiply)(INT_TILE_ARGS) = words ? int_tile_##KIND##_q16 : int_tile_##KIND##_q8;                        \
        const int most = words ? INT_TILE / 2 : INT_TILE;                                                              \
        int64_t n_blocks = a->n_k / NAME##_BLOCK, n_tiles = (n_blocks * NAME##_SUB + most - 1) / most;                 \
        int64_t step = (n_blocks + n_tiles - 1) / n_tiles; /* tiles of even length */                                  \
        for (int64_t col = 0; col < a->n_cols; col += INT_COL_BLOCK) {                                                 \
            int64_t n_cols = a->n_cols - col < INT_COL_BLOCK ? a->n_cols - col : INT_COL_BLOCK;                        \
            memset(acc, 0, sizeof(float) * (size_t)(n_cols * INT_ROWS));                                               \
            for (int64_t b = 0; b < n_blocks; b += step) {                                                             \
                int n = (int)(n_blocks - b < step ? n_blocks - b : step);                                              \
                for (int v = 0; v < INT_RV; v++) {                                                                     \
                    const NAME##_group *w = (const NAME##_group *)a->w + (group + (v < n_rv ? v : 0)) * n_blocks + b;  \
                    NAME##_fill(words, &tile, w, v, n);                                                                \
                    if (a->streams && col == 0) prefetch_bytes(w + n, n * (int64_t)sizeof(NAME##_group));              \
                }                                                                                                      \
                multiply(n_cols, &tile, n * NAME##_SUB, a->xq + col * a->xq_stride, a->xq_stride, a->n_k,              \
                                b * NAME##_SUB, acc);                                                                  \
            }                                                                                                          \
            for (int64_t c = 0; c < n_cols; c++)                                                                       \
                for (int64_t v = 0; v < n_rv; v++)                                                                     \
                    store_rows(a, col + c, (group + v) * 16, vf_load(acc + c * INT_ROWS + v * 16));                    \
        }                                                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    static INLINE void NAME##_streamed(const woolly_matmul_args *a, int digits, int64_t group, int64_t n_rv) {         \
        int64_t col = 0;                                                                                               \
        for (; DIRECT >= 4 && col + 4 <= a->n_cols; col += 4) NAME##_direct(a, digits, 4, col, group, n_rv);           \
        if (DIRECT >= 2 && a->n_cols - col >= 2) NAME##_direct(a, digits, 2, col, group, n_rv), col += 2;              \
        if (a->n_cols - col == 1) NAME##_direct(a, digits, 1, col, group, n_rv);                                       \
    }                                                                                                                  \
                                                                                                                       \
    static void NAME##_matmul(const woolly_matmul_args *a, int64_t group_begin, int64_t group_end) {                   \
        for (int64_t group = group_begin; group < group_end; group += INT_RV) {                                        \
            int64_t n_rv = group_end - group < INT_RV ? group_end - group : INT_RV;                                    \
            if (a->n_cols >= NAME##_TILED && a->n_digits == 1) NAME##_tiled(0, a, group, n_rv);                         \
            else if (a->n_cols >= NAME##_TILED) NAME##_tiled(1, a, group, n_rv);                                       \
            else if (a->n_digits == 1) NAME##_streamed(a, 1, group, n_rv);                                             \
            else NAME##_streamed(a, 2, group, n_rv);                                                                   \
        }                                                                                                              \
    }

#include "matmul_levels.h"
#if HAS_AMX
#include "matmul_amx.h"
#endif

#endif
