/* Rows of float32 -> GGUF blocks, for every format that Woolly writes. Compiled once, for the machine's baseline.
 *
 * The legacy formats and MXFP4 come out as gguf.quants makes them, bit for bit. The K formats and IQ4 are searched for, see
 * search.h; more trials than these left no less error in the outputs of a model's matrices. Q5_0 and Q5_1 are made in both
 * ways: searched for where rows of Q4_K and Q5_K fall back to them, which leaves 0.9 and 0.8 of the squared error.
 */
#ifndef WOOLLY_QUANTIZERS_H
#define WOOLLY_QUANTIZERS_H

#include "formats/fields.h"
#include "formats/q8_0.h"
#include "formats/q4_0.h"
#include "formats/q4_1.h"
#include "formats/q5_0.h"
#include "formats/q5_1.h"
#include "formats/q4_k.h"
#include "formats/q5_k.h"
#include "formats/q6_k.h"
#include "formats/q3_k.h"
#include "formats/q2_k.h"
#include "formats/iq4_nl.h"
#include "formats/iq4_xs.h"
#include "formats/mxfp4.h"

#include "search.h"

/* --- plain --- */

static void f32_rows(const float *x, int64_t n_blocks, uint8_t *out) { memcpy(out, x, (size_t)n_blocks * 4); }

static void f16_rows(const float *x, int64_t n_blocks, uint8_t *out) {
    for (int64_t k = 0; k < n_blocks; k++) {
        uint16_t half = f16_of_f32(x[k]);
        memcpy(out + 2 * k, &half, 2);
    }
}

static void bf16_rows(const float *x, int64_t n_blocks, uint8_t *out) {
    for (int64_t k = 0; k < n_blocks; k++) {
        uint32_t bits;
        memcpy(&bits, x + k, 4);
        uint16_t half = (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16); /* to nearest even */
        memcpy(out + 2 * k, &half, 2);
    }
}

/* --- blocks of 32 as the 16 lanes of a tile; what is missing of the last 16 is zeros --- */

#define DEFINE_TILED_ROWS(NAME)                                                                                        \
    static void NAME##_rows(const float *x, int64_t n_blocks, uint8_t *out) {                                          \
        for (; n_blocks > 0; n_blocks -= 16, x += 16 * 32, out += 16 * sizeof(NAME##_block)) {                         \
            tile_row tile[32] ALIGNED;                                                                                 \
            NAME##_block blocks[16];                                                                                   \
            int n = n_blocks < 16 ? (int)n_blocks : 16;                                                                \
            for (int r = 0; r < 16; r++)                                                                               \
                for (int k = 0; k < 32; k++) tile[k][r] = r < n ? x[32 * r + k] : 0;                                   \
            NAME##_quantize((const tile_row *)tile, (uint8_t *)blocks);                                                \
            memcpy(out, blocks, (size_t)n * sizeof *blocks);                                                           \
        }                                                                                                              \
    }
DEFINE_TILED_ROWS(q8_0)
DEFINE_TILED_ROWS(q4_0)
DEFINE_TILED_ROWS(q4_1)
DEFINE_TILED_ROWS(q5_0)
DEFINE_TILED_ROWS(q5_1)

/* low nibbles: weights 0 .. 15 of 32, high ones: 16 .. 31 */
static INLINE void put_nibble_halves(const uint8_t *l, uint8_t *qs) {
    for (int k = 0; k < 16; k++) qs[k] = (uint8_t)(l[k] | l[k + 16] << 4);
}

/* E2M1 values doubled are 0, 1, 2, 3, 4, 6, 8, 12; the largest |x| gets the exponent of 4, so that it may be cut to 6 */
static void mxfp4_rows(const float *x, int64_t n_blocks, uint8_t *out) {
    static const float between[7] = {0.5f, 1.5f, 2.5f, 3.5f, 5, 7, 10};
    mxfp4_block *b = (mxfp4_block *)out;
    for (; n_blocks--; x += 32, b++) {
        float most = 0;
        uint8_t l[32];
        for (int k = 0; k < 32; k++) most = fabsf(x[k]) > most ? fabsf(x[k]) : most;
        int exponent = 0;
        if (most > 0) frexpf(most, &exponent); /* 2^(exponent - 1) <= most */
        exponent += 127 - 3;
        b->e = most > 0 && exponent > 0 ? (uint8_t)exponent : 0;
        float inverse = ldexpf(1, 128 - b->e > 127 ? 127 : 128 - b->e);
        for (int k = 0; k < 32; k++) {
            int level = 0;
            for (int i = 0; i < 7; i++) level += fabsf(x[k]) * inverse > between[i];
            l[k] = (uint8_t)(level && x[k] < 0 ? level + 8 : level);
        }
        put_nibble_halves(l, b->qs);
    }
}

/* --- what the searches may do --- */

#define MOST_F16 65504.0f

static const affine_kind Q2_K_KIND = {16, 4, 3, 15, 9, -0.5f, 0.2f, 0};
static const affine_kind Q4_K_KIND = {32, 2, 15, 63, 11, -1, 0.2f, 0};
static const affine_kind Q5_K_KIND = {32, 2, 31, 63, 14, -1.5f, 0.2f, 0};
static const affine_kind Q5_1_KIND = {32, 1, 31, 0, 14, -1.5f, 0.2f, 1};
static const scale_kind Q3_K_KIND = {16, 4, 0, 4, 3, -32, 10, -0.9f, 0.2f};
static const scale_kind Q6_K_KIND = {16, 4, 0, 32, 31, -128, 10, -0.9f, 0.2f};
static const scale_kind IQ4_XS_KIND = {32, 2, 1, 127, 113, -32, 8, -21, 6};
static const scale_kind IQ4_NL_KIND = {32, 1, 1, 127, 113, 0, 8, -21, 6};
static const scale_kind Q5_0_KIND = {32, 1, 0, 16, 15, 0, 10, -0.9f, 0.2f};

/* numbers of sub-blocks, of either kind, in their order; lanes are sub-blocks */
static INLINE void integers_in_order(const f4 *v, int fours, int offset, uint8_t *out) {
    for (int s = 0; s < 4 * fours; s++) out[s] = (uint8_t)((int)v[s / 4][s % 4] + offset);
}

static INLINE void levels_in_order(tiles l, int n, int fours, int offset, uint8_t *out) {
    for (int g = 0; g < fours; g++)
        for (int k = 0; k < n; k++)
            for (int r = 0; r < 4; r++) out[(4 * g + r) * n + k] = (uint8_t)((int)l[g][k][r] + offset);
}

static INLINE void iq4_in_order(tiles l, int fours, uint8_t *out) {
    for (int g = 0; g < fours; g++)
        for (int k = 0; k < 32; k++) {
            i4 q = {0};
            for (int i = 1; i < 16; i++) q -= l[g][k] >= IQ4_VALUES[i];
            for (int r = 0; r < 4; r++) out[(4 * g + r) * 32 + k] = (uint8_t)q[r];
        }
}

/* low 2 bits of levels l, l + 32, l + 64, l + 96 of 128 in a byte */
static INLINE void put_bit_pairs(const uint8_t *l, uint8_t *qs) {
    for (int i = 0; i < 64; i++) {
        const uint8_t *at = l + i / 32 * 128 + i % 32;
        qs[i] = (uint8_t)((at[0] & 3) | (at[32] & 3) << 2 | (at[64] & 3) << 4 | (at[96] & 3) << 6);
    }
}

/* the next bit of all levels: bit s of byte k is that of weight 32 s + k */
static INLINE void put_bits(const uint8_t *l, int shift, uint8_t *bits) {
    memset(bits, 0, 32);
    for (int k = 0; k < 256; k++) bits[k % 32] |= (uint8_t)(l[k] >> shift << k / 32);
}

/* --- one block each --- */

static void q2_k_search(const float *x, q2_k_block *b) {
    affine_block q;
    uint8_t l[256], sc[16], mn[16];
    quantize_affine(Q2_K_KIND, x, &q);
    integers_in_order(q.sc, 4, 0, sc);
    integers_in_order(q.mn, 4, 0, mn);
    levels_in_order(q.l, 16, 4, 0, l);
    b->d = f16_of_f32(q.unit);
    b->dmin = f16_of_f32(q.unit_m);
    for (int s = 0; s < 16; s++) b->scales[s] = (uint8_t)(sc[s] | mn[s] << 4);
    put_bit_pairs(l, b->qs);
}

static void q3_k_search(const float *x, q3_k_block *b) {
    scale_block q;
    uint8_t l[256], sc[16];
    quantize_scaled(Q3_K_KIND, x, &q);
    integers_in_order(q.sc, 4, 32, sc);
    levels_in_order(q.l, 16, 4, 4, l);
    b->d = f16_of_f32(q.unit);
    for (int s = 0; s < 8; s++) b->scales[s] = (uint8_t)((sc[s] & 15) | (sc[s + 8] & 15) << 4);
    for (int s = 0; s < 4; s++)
        b->scales[s + 8] = (uint8_t)(sc[s] >> 4 | sc[s + 4] >> 4 << 2 | sc[s + 8] >> 4 << 4 | sc[s + 12] >> 4 << 6);
    put_bit_pairs(l, b->qs);
    put_bits(l, 2, b->hmask);
}

/* what Q4_K and Q5_K have in common; the levels are left in l */
static INLINE void search_k(affine_kind kind, const float *x, uint16_t *d, uint16_t *dmin, uint8_t *scales, uint8_t *qs,
                            uint8_t *l) {
    affine_block q;
    uint8_t sc[8], mn[8];
    quantize_affine(kind, x, &q);
    integers_in_order(q.sc, 2, 0, sc);
    integers_in_order(q.mn, 2, 0, mn);
    levels_in_order(q.l, 32, 2, 0, l);
    *d = f16_of_f32(q.unit);
    *dmin = f16_of_f32(q.unit_m);
    put_k_scales(sc, mn, scales);
    put_k_nibbles(l, qs);
}

static void q4_k_search(const float *x, q4_k_block *b) {
    uint8_t l[256];
    uint16_t d, dmin;
    search_k(Q4_K_KIND, x, &d, &dmin, b->scales, b->qs, l);
    b->d = d;
    b->dmin = dmin;
}

static void q5_k_search(const float *x, q5_k_block *b) {
    uint8_t l[256];
    uint16_t d, dmin;
    search_k(Q5_K_KIND, x, &d, &dmin, b->scales, b->qs, l);
    b->d = d;
    b->dmin = dmin;
    put_bits(l, 4, b->qh);
}

static void q6_k_search(const float *x, q6_k_block *b) {
    scale_block q;
    uint8_t l[256];
    quantize_scaled(Q6_K_KIND, x, &q);
    levels_in_order(q.l, 16, 4, 32, l);
    b->d = f16_of_f32(q.unit);
    for (int s = 0; s < 16; s++) b->scales[s] = (int8_t)q.sc[s / 4][s % 4];
    put_q6_k_levels(l, b);
}

static void iq4_xs_search(const float *x, iq4_xs_block *b) {
    scale_block q;
    uint8_t l[256], sc[8];
    quantize_scaled(IQ4_XS_KIND, x, &q);
    integers_in_order(q.sc, 2, 32, sc);
    iq4_in_order(q.l, 2, l);
    b->d = f16_of_f32(q.unit);
    unsigned high = 0;
    for (int s = 0; s < 8; s++) {
        high |= (unsigned)(sc[s] >> 4) << 2 * s;
        put_nibble_halves(l + 32 * s, b->qs + 16 * s);
    }
    b->scales_h = (uint16_t)high;
    for (int s = 0; s < 4; s++) b->scales_l[s] = (uint8_t)((sc[2 * s] & 15) | (sc[2 * s + 1] & 15) << 4);
}

/* --- four blocks of 32, which share nothing; Q5_0 and Q5_1 are what K formats fall back to --- */

static INLINE f4 rounded_to_halves(f4 x, uint16_t *halves) {
    x = f4_clamp(x, -MOST_F16, MOST_F16);
    for (int r = 0; r < 4; r++) {
        halves[r] = f16_of_f32(x[r]);
        x[r] = f32_of_f16(halves[r]);
    }
    return x;
}

static INLINE void search_scaled_four(scale_kind kind, const float *x, uint16_t *d, f4 *l) {
    f4 tile[32], w[32];
    load_four(x, 32, tile);
    importance(tile, 32, w);
    f4 inverse = f4_ratio(f4_set1(1), rounded_to_halves(search_scale(kind, tile, w), d));
    for (int k = 0; k < 32; k++) l[k] = signed_level(kind, tile[k] * inverse);
}

static INLINE void put_fives(const uint8_t *l, uint8_t *qs, void *qh) {
    uint32_t bits = 0;
    for (int k = 0; k < 32; k++) bits |= (uint32_t)(l[k] >> 4) << k;
    memcpy(qh, &bits, 4);
    for (int k = 0; k < 16; k++) qs[k] = (uint8_t)((l[k] & 15) | (l[k + 16] & 15) << 4);
}

static void iq4_nl_search(const float *x, iq4_nl_block *b) {
    tiles levels;
    uint8_t l[128];
    uint16_t d[4];
    search_scaled_four(IQ4_NL_KIND, x, d, levels[0]);
    iq4_in_order(levels, 1, l);
    for (int r = 0; r < 4; r++) {
        b[r].d = d[r];
        put_nibble_halves(l + 32 * r, b[r].qs);
    }
}

static void q5_0_search(const float *x, q5_0_block *b) {
    tiles levels;
    uint8_t l[128];
    uint16_t d[4];
    search_scaled_four(Q5_0_KIND, x, d, levels[0]);
    levels_in_order(levels, 32, 1, 16, l);
    for (int r = 0; r < 4; r++) {
        b[r].d = d[r];
        put_fives(l + 32 * r, b[r].qs, &b[r].qh);
    }
}

static void q5_1_search(const float *x, q5_1_block *b) {
    tiles tile, w, levels;
    uint8_t l[128];
    uint16_t d[4], m[4];
    load_four(x, 32, tile[0]);
    importance(tile[0], 32, w[0]);
    affine_fit fit = search_affine(Q5_1_KIND, tile[0], w[0]);
    f4 low = rounded_to_halves(-fit.m, m);
    affine_levels(Q5_1_KIND, tile[0], rounded_to_halves(fit.d, d), -low, levels[0]);
    levels_in_order(levels, 32, 1, 0, l);
    for (int r = 0; r < 4; r++) {
        b[r].d = d[r];
        b[r].m = m[r];
        put_fives(l + 32 * r, b[r].qs, &b[r].qh);
    }
}

#define DEFINE_SEARCHED_ROWS(NAME)                                                                                     \
    static void NAME##_rows(const float *x, int64_t n_blocks, uint8_t *out) {                                          \
        for (int64_t i = 0; i < n_blocks; i++) NAME##_search(x + 256 * i, (NAME##_block *)out + i);                    \
    }
DEFINE_SEARCHED_ROWS(q2_k)
DEFINE_SEARCHED_ROWS(q3_k)
DEFINE_SEARCHED_ROWS(q4_k)
DEFINE_SEARCHED_ROWS(q5_k)
DEFINE_SEARCHED_ROWS(q6_k)
DEFINE_SEARCHED_ROWS(iq4_xs)

#define DEFINE_ROWS_BY_FOUR(NAME, ROWS)                                                                                \
    static void ROWS(const float *x, int64_t n_blocks, uint8_t *out) {                                                 \
        for (; n_blocks > 0; n_blocks -= 4, x += 128, out += 4 * sizeof(NAME##_block)) {                               \
            float four[128] = {0};                                                                                     \
            NAME##_block blocks[4];                                                                                    \
            size_t n = n_blocks < 4 ? (size_t)n_blocks : 4;                                                            \
            memcpy(four, x, n * 32 * sizeof *x);                                                                       \
            NAME##_search(four, blocks);                                                                               \
            memcpy(out, blocks, n * sizeof *blocks);                                                                   \
        }                                                                                                              \
    }
DEFINE_ROWS_BY_FOUR(iq4_nl, iq4_nl_rows)
DEFINE_ROWS_BY_FOUR(q5_0, q5_0_searched_rows)
DEFINE_ROWS_BY_FOUR(q5_1, q5_1_searched_rows)

/* --- the table --- */

typedef struct {
    const char *name;
    int block_size, block_bytes;
    float most; /* larger weights are refused: their scales, in f16, might be infinite */
    void (*rows)(const float *x, int64_t n_blocks, uint8_t *out);
    void (*searched_rows)(const float *x, int64_t n_blocks, uint8_t *out); /* NULL: there is one way only */
} woolly_quantizer;

#define MOST_BF16 0x1.fep127f
#define MOST_F32 0x1.fffffep127f
#define QUANTIZER(NAME, SIZE, MOST) {#NAME, SIZE, sizeof(NAME##_block), MOST, NAME##_rows, NULL}
#define FALLBACK(NAME) {#NAME, 32, sizeof(NAME##_block), MOST_F16, NAME##_rows, NAME##_searched_rows}

static const woolly_quantizer WOOLLY_QUANTIZERS[] = {
    {"f32", 1, 4, MOST_F32, f32_rows, NULL},
    {"f16", 1, 2, MOST_F16, f16_rows, NULL},
    {"bf16", 1, 2, MOST_BF16, bf16_rows, NULL},
    QUANTIZER(q8_0, 32, MOST_F16), FALLBACK(q5_1), FALLBACK(q5_0), QUANTIZER(q4_1, 32, MOST_F16),
    QUANTIZER(q4_0, 32, MOST_F16), QUANTIZER(q6_k, 256, MOST_F16), QUANTIZER(q5_k, 256, MOST_F16),
    QUANTIZER(q4_k, 256, MOST_F16), QUANTIZER(q3_k, 256, MOST_F16), QUANTIZER(q2_k, 256, MOST_F16),
    QUANTIZER(iq4_nl, 32, MOST_F16), QUANTIZER(iq4_xs, 256, MOST_F16), QUANTIZER(mxfp4, 32, MOST_F16),
};
enum { WOOLLY_N_QUANTIZERS = sizeof WOOLLY_QUANTIZERS / sizeof *WOOLLY_QUANTIZERS };

/* where the first of n weights is whose magnitude is above most, or NaN; n if there is none */
static int64_t find_unfit(const float *x, int64_t n, float most) {
    for (int64_t begin = 0; begin < n; begin += 1024) {
        int64_t end = n - begin < 1024 ? n : begin + 1024;
        int unfit = 0;
        for (int64_t i = begin; i < end; i++) unfit |= !(fabsf(x[i]) <= most);
        if (!unfit) continue;
        for (int64_t i = begin; i < end; i++)
            if (!(fabsf(x[i]) <= most)) return i;
    }
    return n;
}

#endif
