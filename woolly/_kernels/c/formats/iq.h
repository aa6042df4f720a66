/* IQ1, IQ2, IQ3, TQ1 and TQ2: blocks of 256 weights, unpacked to LUT4.
 *
 * An index of 8 to 11 bits stands for a group of 8 weights (4 in IQ3) of a grid; their signs, a scale for 16 or 32 weights
 * and d follow. NAME_convert writes one block's LUT4 exactly: d, small integer scales, indices into a table.
 */
#include "grids.h"

/* the sign bits of 8 weights from 7 of them: the number of minuses is even */
static INLINE int even_signs(int seven) { return seven | (__builtin_popcount((unsigned)seven) & 1) << 7; }

/* 8 weights from k on: 2 bits a weight of IQ2's grids choose the magnitude 8, 25 or 43 */
static INLINE void set_iq2(lut4_block *b, int k, int word, int signs) {
    for (int e = 0; e < 8; e++) {
        int code = word >> 2 * e & 3;
        lut4_set(b, k + e, signs >> e & 1 ? 2 - code : 3 + code);
    }
}

/* 4 weights from k on: 4 bits a weight of IQ3's grids choose one of 8 magnitudes */
static INLINE void set_iq3(lut4_block *b, int k, int word, int signs) {
    for (int e = 0; e < 4; e++) {
        int code = word >> 4 * e & 7;
        lut4_set(b, k + e, signs >> e & 1 ? 7 - code : 8 + code);
    }
}

/* 8 weights from k on, in eighths: 8 (code - 1) + 1, or - 1 */
static INLINE void set_iq1(lut4_block *b, int k, int word, int is_minus) {
    for (int e = 0; e < 8; e++) lut4_set(b, k + e, 6 + 2 * (word >> 2 * e & 3) + !is_minus);
}

static INLINE int nibble(const uint8_t *bytes, int i) { return bytes[i / 2] >> 4 * (i % 2) & 15; }

typedef struct {
    uint16_t d; /* f16 */
    uint32_t qs[8][2]; /* of 32 weights: four indices of 8 bits; four times 7 signs, and 4 bits of scale */
} __attribute__((packed)) iq2_xxs_block;
_Static_assert(sizeof(iq2_xxs_block) == 66, "IQ2_XXS");

static void iq2_xxs_convert(const iq2_xxs_block *b, lut4_block *out) {
    out->d = f32_of_f16(b->d) / 8;
    for (int s = 0; s < 8; s++) {
        uint32_t index = b->qs[s][0], rest = b->qs[s][1];
        out->scales[2 * s] = out->scales[2 * s + 1] = (int8_t)(2 * (rest >> 28) + 1);
        for (int l = 0; l < 4; l++)
            set_iq2(out, 32 * s + 8 * l, iq2_xxs_grid[index >> 8 * l & 255], even_signs(rest >> 7 * l & 127));
    }
}

typedef struct {
    uint16_t d; /* f16 */
    uint16_t qs[32]; /* of 8 weights: an index of 9 bits, 7 signs */
    uint8_t scales[8];
} __attribute__((packed)) iq2_xs_block;
_Static_assert(sizeof(iq2_xs_block) == 74, "IQ2_XS");

static void iq2_xs_convert(const iq2_xs_block *b, lut4_block *out) {
    out->d = f32_of_f16(b->d) / 8;
    for (int j = 0; j < 16; j++) out->scales[j] = (int8_t)(2 * nibble(b->scales, j) + 1);
    for (int l = 0; l < 32; l++) set_iq2(out, 8 * l, iq2_xs_grid[b->qs[l] & 511], even_signs(b->qs[l] >> 9));
}

typedef struct {
    uint16_t d; /* f16 */
    uint8_t qs[32];
    uint8_t signs[32];
    uint8_t qh[8]; /* 2 upper bits of each index */
    uint8_t scales[8];
} __attribute__((packed)) iq2_s_block;
_Static_assert(sizeof(iq2_s_block) == 82, "IQ2_S");

static void iq2_s_convert(const iq2_s_block *b, lut4_block *out) {
    out->d = f32_of_f16(b->d) / 8;
    for (int j = 0; j < 16; j++) out->scales[j] = (int8_t)(2 * nibble(b->scales, j) + 1);
    for (int l = 0; l < 32; l++) {
        int index = b->qs[l] | (b->qh[l / 4] >> 2 * (l % 4) & 3) << 8;
        set_iq2(out, 8 * l, iq2_s_grid[index], b->signs[l]);
    }
}

typedef struct {
    uint16_t d; /* f16 */
    uint8_t qs[64];
    uint32_t rest[8]; /* of 32 weights: four times 7 signs, and 4 bits of scale */
} __attribute__((packed)) iq3_xxs_block;
_Static_assert(sizeof(iq3_xxs_block) == 98, "IQ3_XXS");

static void iq3_xxs_convert(const iq3_xxs_block *b, lut4_block *out) {
    out->d = f32_of_f16(b->d) / 4;
    out->table = LUT4_IQ3_XXS;
    for (int s = 0; s < 8; s++) {
        uint32_t rest = b->rest[s];
        out->scales[2 * s] = out->scales[2 * s + 1] = (int8_t)(2 * (rest >> 28) + 1);
        for (int l = 0; l < 8; l++) {
            int signs = even_signs(rest >> 7 * (l / 2) & 127) >> 4 * (l % 2);
            set_iq3(out, 32 * s + 4 * l, iq3_xxs_grid[b->qs[8 * s + l]], signs);
        }
    }
}

typedef struct {
    uint16_t d; /* f16 */
    uint8_t qs[64];
    uint8_t qh[8]; /* the upper bit of each index */
    uint8_t signs[32];
    uint8_t scales[4];
} __attribute__((packed)) iq3_s_block;
_Static_assert(sizeof(iq3_s_block) == 110, "IQ3_S");

static void iq3_s_convert(const iq3_s_block *b, lut4_block *out) {
    out->d = f32_of_f16(b->d);
    out->table = LUT4_IQ3_S;
    for (int j = 0; j < 16; j++) out->scales[j] = (int8_t)(2 * nibble(b->scales, j / 2) + 1);
    for (int l = 0; l < 64; l++) {
        int index = b->qs[l] | (b->qh[l / 8] >> l % 8 & 1) << 8;
        set_iq3(out, 4 * l, iq3_s_grid[index], b->signs[l / 2] >> 4 * (l % 2));
    }
}

typedef struct {
    uint16_t d; /* f16 */
    uint8_t qs[32];
    uint16_t qh[8]; /* of 32 weights: four times 3 upper bits of an index, 3 bits of scale, the shift's sign */
} __attribute__((packed)) iq1_s_block;
_Static_assert(sizeof(iq1_s_block) == 50, "IQ1_S");

static void iq1_s_convert(const iq1_s_block *b, lut4_block *out) {
    out->d = f32_of_f16(b->d) / 8;
    for (int j = 0; j < 16; j++) out->scales[j] = (int8_t)(2 * (b->qh[j / 2] >> 12 & 7) + 1);
    for (int l = 0; l < 32; l++) {
        int qh = b->qh[l / 4];
        set_iq1(out, 8 * l, iq1_grid[b->qs[l] | (qh >> 3 * (l % 4) & 7) << 8], qh >> 15);
    }
}

typedef struct {
    uint8_t qs[32];
    uint8_t qh[16];     /* of 8 weights: 3 upper bits of the index, the shift's sign */
    uint16_t scales[4]; /* of 64 weights: four times 3 bits; the upper 4 bits of all are the f16 d */
} __attribute__((packed)) iq1_m_block;
_Static_assert(sizeof(iq1_m_block) == 56, "IQ1_M");

static void iq1_m_convert(const iq1_m_block *b, lut4_block *out) {
    int d = 0;
    for (int j = 0; j < 4; j++) d |= b->scales[j] >> 12 << 4 * j;
    out->d = f32_of_f16((uint16_t)d) / 8;
    for (int j = 0; j < 16; j++) out->scales[j] = (int8_t)(2 * (b->scales[j / 4] >> 3 * (j % 4) & 7) + 1);
    for (int l = 0; l < 32; l++) {
        int qh = nibble(b->qh, l);
        set_iq1(out, 8 * l, iq1_grid[b->qs[l] | (qh & 7) << 8], qh >> 3);
    }
}

/* -1, 0, 1 and 2 in the table of small values */
static const uint8_t TERNARY[4] = {8, 12, 9, 13};

typedef struct {
    uint8_t qs[48]; /* five digits of base 3 in a byte, as a fraction of 256: weights 0 .. 159 from 32 bytes, .. 239 from 16 */
    uint8_t qh[4];  /* four digits: the last 16 */
    uint16_t d;     /* f16 */
} __attribute__((packed)) tq1_0_block;
_Static_assert(sizeof(tq1_0_block) == 54, "TQ1_0");

static void tq1_0_convert(const tq1_0_block *b, lut4_block *out) {
    static const uint8_t power[5] = {1, 3, 9, 27, 81};
    out->d = f32_of_f16(b->d);
    memset(out->scales, 1, sizeof out->scales);
    for (int k = 0; k < 256; k++) {
        int byte = k < 160 ? b->qs[k % 32] : k < 240 ? b->qs[32 + k % 16] : b->qh[k % 4];
        int digit = k < 160 ? k / 32 : k < 240 ? (k - 160) / 16 : (k - 240) / 4;
        lut4_set(out, k, TERNARY[(byte * power[digit] & 255) * 3 >> 8]);
    }
}

typedef struct {
    uint8_t qs[64]; /* of 128 weights: l, l + 32, l + 64, l + 96 from the low bits of byte l up */
    uint16_t d;     /* f16 */
} __attribute__((packed)) tq2_0_block;
_Static_assert(sizeof(tq2_0_block) == 66, "TQ2_0");

static void tq2_0_convert(const tq2_0_block *b, lut4_block *out) {
    out->d = f32_of_f16(b->d);
    memset(out->scales, 1, sizeof out->scales);
    for (int k = 0; k < 256; k++) lut4_set(out, k, TERNARY[b->qs[k / 128 * 32 + k % 32] >> 2 * (k / 32 % 4) & 3]);
}
