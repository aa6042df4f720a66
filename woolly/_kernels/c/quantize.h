/* Quantising tiles: one block of each of 16 rows, tile[k][row], lanes are rows.
 *
 * Q8_0, Q4_0, Q4_1, Q5_0 and Q5_1 come out as gguf.quants makes them, bit for bit. Q4_K and Q6_K are those of generated
 * weights, and plain: scales from each sub-block's extremes; files get those of search.h. Loops over 16 lanes that the
 * compiler vectorises, with the same roundings on every instruction set.
 */
#ifndef WOOLLY_QUANTIZE_H
#define WOOLLY_QUANTIZE_H

#include <math.h>

#include "kernels.h"

#define EACH_ROW(r) for (int r = 0; r < 16; r++)
#define MAX_BLOCK 256

typedef float tile_row[16];

/* magnitude of the largest of n values of each row, and that value with its sign: the first, where several are */
static void tile_absmax(const tile_row *x, int n, float *magnitude, float *value) {
    EACH_ROW(r) magnitude[r] = value[r] = 0;
    for (int k = 0; k < n; k++)
        EACH_ROW(r) {
            float v = x[k][r], a = fabsf(v);
            value[r] = a > magnitude[r] ? v : value[r];
            magnitude[r] = a > magnitude[r] ? a : magnitude[r];
        }
}

static void tile_range(const tile_row *x, int n, float *least, float *most) {
    EACH_ROW(r) least[r] = most[r] = x[0][r];
    for (int k = 1; k < n; k++)
        EACH_ROW(r) {
            least[r] = x[k][r] < least[r] ? x[k][r] : least[r];
            most[r] = x[k][r] > most[r] ? x[k][r] : most[r];
        }
}

/* q[k][row] = min(most, trunc((x - offset) * inverse + bias)), of numbers that are not negative by then */
static void tile_quants(const tile_row *x, int n, const float *offset, const float *inverse, float bias, int most,
                        uint8_t (*q)[16]) {
    for (int k = 0; k < n; k++)
        EACH_ROW(r) {
            int v = (int)((x[k][r] - offset[r]) * inverse[r] + bias);
            v = v < 0 ? 0 : v;
            q[k][r] = (uint8_t)(v > most ? most : v);
        }
}

static INLINE float inverse_or_0(float d) { return d == 0 ? 0 : 1 / d; }

static const float NO_OFFSET[16];

static void q8_0_quantize(const tile_row *x, uint8_t *blocks) {
    q8_0_block *b = (q8_0_block *)blocks;
    float magnitude[16], value[16], inverse[16];
    int8_t q[32][16];
    tile_absmax(x, 32, magnitude, value);
    EACH_ROW(r) inverse[r] = inverse_or_0(magnitude[r] / 127);
    for (int k = 0; k < 32; k++)
        EACH_ROW(r) { /* halves away from zero */
            float v = x[k][r] * inverse[r], a = fabsf(v);
            int i = (int)a;
            i += a - (float)i >= 0.5f;
            q[k][r] = (int8_t)(v < 0 ? -i : i);
        }
    EACH_ROW(r) {
        b[r].d = f16_of_f32(magnitude[r] / 127);
        for (int k = 0; k < 32; k++) b[r].qs[k] = q[k][r];
    }
}

static INLINE void store_nibbles(uint8_t (*q)[16], int r, uint8_t *qs) {
    for (int k = 0; k < 16; k++) qs[k] = (uint8_t)((q[k][r] & 15) | (q[k + 16][r] & 15) << 4);
}

/* nibbles as above, and the fifth bits in qh */
static INLINE void store_fives(uint8_t (*q)[16], int r, uint8_t *qs, void *qh) {
    uint32_t bits = 0;
    for (int k = 0; k < 32; k++) bits |= (uint32_t)(q[k][r] >> 4) << k;
    memcpy(qh, &bits, 4);
    store_nibbles(q, r, qs);
}

/* w = d (q - bias), q in 0 .. 2 bias - 1: the largest weight becomes q = 0 */
static INLINE void tile_symmetric(const tile_row *x, int bias, float *d, uint8_t (*q)[16]) {
    float magnitude[16], value[16], inverse[16];
    tile_absmax(x, 32, magnitude, value);
    EACH_ROW(r) d[r] = value[r] / (float)-bias;
    EACH_ROW(r) inverse[r] = inverse_or_0(d[r]);
    tile_quants(x, 32, NO_OFFSET, inverse, (float)bias + 0.5f, 2 * bias - 1, q);
}

/* w = d q + m, q in 0 .. most */
static INLINE void tile_affine(const tile_row *x, int most, float *d, float *m, uint8_t (*q)[16]) {
    float largest[16], inverse[16];
    tile_range(x, 32, m, largest);
    EACH_ROW(r) d[r] = (largest[r] - m[r]) / (float)most;
    EACH_ROW(r) inverse[r] = inverse_or_0(d[r]);
    tile_quants(x, 32, m, inverse, 0.5f, most, q);
}

static void q4_0_quantize(const tile_row *x, uint8_t *blocks) {
    q4_0_block *b = (q4_0_block *)blocks;
    float d[16];
    uint8_t q[32][16];
    tile_symmetric(x, 8, d, q);
    EACH_ROW(r) {
        b[r].d = f16_of_f32(d[r]);
        store_nibbles(q, r, b[r].qs);
    }
}

static void q5_0_quantize(const tile_row *x, uint8_t *blocks) {
    q5_0_block *b = (q5_0_block *)blocks;
    float d[16];
    uint8_t q[32][16];
    tile_symmetric(x, 16, d, q);
    EACH_ROW(r) {
        b[r].d = f16_of_f32(d[r]);
        store_fives(q, r, b[r].qs, &b[r].qh);
    }
}

static void q4_1_quantize(const tile_row *x, uint8_t *blocks) {
    q4_1_block *b = (q4_1_block *)blocks;
    float d[16], m[16];
    uint8_t q[32][16];
    tile_affine(x, 15, d, m, q);
    EACH_ROW(r) {
        b[r].d = f16_of_f32(d[r]);
        b[r].m = f16_of_f32(m[r]);
        store_nibbles(q, r, b[r].qs);
    }
}

static void q5_1_quantize(const tile_row *x, uint8_t *blocks) {
    q5_1_block *b = (q5_1_block *)blocks;
    float d[16], m[16];
    uint8_t q[32][16];
    tile_affine(x, 31, d, m, q);
    EACH_ROW(r) {
        b[r].d = f16_of_f32(d[r]);
        b[r].m = f16_of_f32(m[r]);
        store_fives(q, r, b[r].qs, &b[r].qh);
    }
}

/* --- how the integers of K blocks are stored: scales of sub-blocks, and the levels of 256 weights in their order --- */

static INLINE void put_k_scales(const uint8_t *sc, const uint8_t *mn, uint8_t *scales) {
    for (int s = 0; s < 4; s++) {
        scales[s] = (uint8_t)(sc[s] | sc[s + 4] >> 4 << 6);
        scales[s + 4] = (uint8_t)(mn[s] | mn[s + 4] >> 4 << 6);
        scales[s + 8] = (uint8_t)((sc[s + 4] & 15) | (mn[s + 4] & 15) << 4);
    }
}

/* low 4 bits of the levels: those of sub-blocks 2 c and 2 c + 1 share 32 bytes */
static INLINE void put_k_nibbles(const uint8_t *l, uint8_t *qs) {
    for (int k = 0; k < 128; k++) {
        const uint8_t *at = l + k / 32 * 64 + k % 32;
        qs[k] = (uint8_t)((at[0] & 15) | (at[32] & 15) << 4);
    }
}

static INLINE void put_q6_k_levels(const uint8_t *l, q6_k_block *b) {
    for (int k = 0; k < 128; k++) {
        const uint8_t *at = l + k / 64 * 128 + k % 64;
        b->ql[k] = (uint8_t)((at[0] & 15) | (at[64] & 15) << 4);
    }
    for (int k = 0; k < 64; k++) {
        const uint8_t *at = l + k / 32 * 128 + k % 32;
        b->qh[k] = (uint8_t)(at[0] >> 4 | at[32] >> 4 << 2 | at[64] >> 4 << 4 | at[96] >> 4 << 6);
    }
}

/* the levels of one row of a tile */
static INLINE void take_row(uint8_t (*q)[16], int r, uint8_t *l) {
    for (int k = 0; k < 256; k++) l[k] = q[k][r];
}

/* x / unit to the nearest of 0 .. most */
static INLINE int quant_of(float x, float unit, int most) {
    int v = unit > 0 ? (int)(x / unit + 0.5f) : 0;
    return v > most ? most : v;
}

/* sub-blocks of 32 span min(0, least) to most: w = (d sc) q - (dmin mn) */
static void q4_k_quantize(const tile_row *x, uint8_t *blocks) {
    q4_k_block *b = (q4_k_block *)blocks;
    float step[8][16], low[8][16], step_max[16] = {0}, low_max[16] = {0}, offset[8][16], inverse[8][16];
    uint8_t q[256][16];
    for (int s = 0; s < 8; s++) {
        float least[16], most[16];
        tile_range(x + 32 * s, 32, least, most);
        EACH_ROW(r) {
            low[s][r] = least[r] < 0 ? -least[r] : 0;
            step[s][r] = (most[r] + low[s][r]) / 15;
            step_max[r] = step[s][r] > step_max[r] ? step[s][r] : step_max[r];
            low_max[r] = low[s][r] > low_max[r] ? low[s][r] : low_max[r];
        }
    }
    EACH_ROW(r) {
        b[r].d = f16_of_f32(step_max[r] / 63);
        b[r].dmin = f16_of_f32(low_max[r] / 63);
        float d = f32_of_f16(b[r].d), dmin = f32_of_f16(b[r].dmin);
        uint8_t sc[8], mn[8];
        for (int s = 0; s < 8; s++) {
            sc[s] = (uint8_t)quant_of(step[s][r], d, 63);
            mn[s] = (uint8_t)quant_of(low[s][r], dmin, 63);
            offset[s][r] = -dmin * (float)mn[s];
            inverse[s][r] = inverse_or_0(d * (float)sc[s]);
        }
        put_k_scales(sc, mn, b[r].scales);
    }
    for (int s = 0; s < 8; s++) tile_quants(x + 32 * s, 32, offset[s], inverse[s], 0.5f, 15, q + 32 * s);
    EACH_ROW(r) {
        uint8_t l[256];
        take_row(q, r, l);
        put_k_nibbles(l, b[r].qs);
    }
}

/* sub-blocks of 16 span -magnitude to magnitude in 63 steps: w = (d sc) (q - 32) */
static void q6_k_quantize(const tile_row *x, uint8_t *blocks) {
    q6_k_block *b = (q6_k_block *)blocks;
    float magnitude[16][16], value[16], step_max[16] = {0}, inverse[16][16];
    uint8_t q[256][16];
    for (int s = 0; s < 16; s++) {
        tile_absmax(x + 16 * s, 16, magnitude[s], value);
        EACH_ROW(r) step_max[r] = magnitude[s][r] / 31 > step_max[r] ? magnitude[s][r] / 31 : step_max[r];
    }
    EACH_ROW(r) {
        b[r].d = f16_of_f32(step_max[r] / 127);
        float d = f32_of_f16(b[r].d);
        for (int s = 0; s < 16; s++) {
            b[r].scales[s] = (int8_t)quant_of(magnitude[s][r] / 31, d, 127);
            inverse[s][r] = inverse_or_0(d * (float)b[r].scales[s]);
        }
    }
    for (int s = 0; s < 16; s++) tile_quants(x + 16 * s, 16, NO_OFFSET, inverse[s], 32.5f, 63, q + 16 * s);
    EACH_ROW(r) {
        uint8_t l[256];
        take_row(q, r, l);
        put_q6_k_levels(l, &b[r]);
    }
}

#endif
