/* Weights from a counter-based generator, straight into the packed layout.
 *
 *   weight(row, col) = scale * (i | 1),  i = the upper 25 bits, signed, of word col % 4 of
 *                                            philox(counter = (col / 4, row, tensor), key = seed)
 * An odd integer below 2^24 is exact in f32, so that each weight is one rounding, the same on every instruction set;
 * odd ones lie symmetrically around zero. Lanes are rows: 16 rows by 4 columns come from one call, in packed order.
 * Philox4x32-7, Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3": the fewest rounds that pass TestU01's
 * BigCrush. The usual ten would be slower than memory on AVX2.
 */
#ifndef WOOLLY_GENERATE_H
#define WOOLLY_GENERATE_H

#include "quantize.h"

enum { PHILOX_ROUNDS = 7, PHILOX_COLS = 4, GENERATE_COLS = 256 };

static INLINE void philox_4x16(uint32_t col, vw rows, uint64_t tensor, uint64_t seed, vi out[4]) {
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    vw a = vw_of_vi(vi_set1((int32_t)col)), b = rows;
    vw c = vw_of_vi(vi_set1((int32_t)tensor)), d = vw_of_vi(vi_set1((int32_t)(tensor >> 32)));
    UNROLL for (int round = 0; round < PHILOX_ROUNDS; round++) {
        vw p = vw_mul(a, 0xD2511F53u), q = vw_mul(c, 0xCD9E8D57u);
        a = vw_high_xor(q, b, k0);
        c = vw_high_xor(p, d, k1);
        b = q;
        d = p;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    out[0] = vi_of_vw(a);
    out[1] = vi_of_vw(b);
    out[2] = vi_of_vw(c);
    out[3] = vi_of_vw(d);
}

/* tile[n_cols][16]: columns [col, col + n_cols) of the 16 rows from row on, of which n_rows are there; col % 4 == 0 */
static void uniform_tile(const woolly_generate_args *g, int64_t row, int64_t n_rows, int64_t col, int64_t n_cols,
                         float *tile) {
    static const int32_t lane[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    vw rows = vw_of_vi(vi_add(vi_set1((int32_t)row), vi_load(lane)));
    vf scale = vf_set1(g->scale);
    for (int64_t k = 0; k < n_cols; k += PHILOX_COLS) {
        vi words[PHILOX_COLS];
        philox_4x16((uint32_t)((col + k) / PHILOX_COLS), rows, g->tensor, g->seed, words);
        for (int64_t j = 0; j < PHILOX_COLS && k + j < n_cols; j++)
            vf_store(tile + (k + j) * 16, vf_mul(vf_from_vi(vi_or(vi_sra(words[j], 7), vi_set1(1))), scale));
    }
    for (int64_t k = 0; n_rows < 16 && k < n_cols; k++) /* rows of padding are zero bits */
        memset(tile + k * 16 + n_rows, 0, (size_t)(16 - n_rows) * 4);
}

/* tile[n_cols][16], n_rows of the rows there -> packed columns */
typedef void (*store_tile_fn)(const float *tile, int64_t n_cols, int64_t n_rows, uint8_t *out);

static void f16_store_tile(const float *tile, int64_t n_cols, int64_t n_rows, uint8_t *out) {
    (void)n_rows;
    for (int64_t k = 0; k < n_cols; k++) vf_store_f16((uint16_t *)out + k * 16, vf_load(tile + k * 16));
}

static void bf16_store_tile(const float *tile, int64_t n_cols, int64_t n_rows, uint8_t *out) {
    (void)n_rows;
    for (int64_t i = 0; i < n_cols * 16; i++) {
        uint32_t bits;
        memcpy(&bits, tile + i, 4);
        ((uint16_t *)out)[i] = (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16); /* to nearest even */
    }
}

#define DEFINE_STORE_TILE(NAME)                                                                                        \
    static void NAME##_store_tile(const float *tile, int64_t n_cols, int64_t n_rows, uint8_t *out) {                   \
        NAME##_block blocks[16];                                                                                       \
        for (int64_t k = 0; k < n_cols; k += NAME##_BLOCK, out += sizeof blocks) {                                     \
            NAME##_quantize((const tile_row *)tile + k, (uint8_t *)blocks);                                            \
            NAME##_pack((const uint8_t *)blocks, sizeof *blocks, n_rows, 1, out);                                      \
        }                                                                                                              \
    }
DEFINE_STORE_TILE(q4_0)
DEFINE_STORE_TILE(q4_1)
DEFINE_STORE_TILE(q5_0)
DEFINE_STORE_TILE(q5_1)
DEFINE_STORE_TILE(q8_0)
DEFINE_STORE_TILE(q4_k)
DEFINE_STORE_TILE(q6_k)

/* by ggml type; f32 is stored as it is made */
static const store_tile_fn STORE_TILE[] = {
    [1] = f16_store_tile,  [2] = q4_0_store_tile,  [3] = q4_1_store_tile,  [6] = q5_0_store_tile,
    [7] = q5_1_store_tile, [8] = q8_0_store_tile,  [12] = q4_k_store_tile, [14] = q6_k_store_tile,
    [30] = bf16_store_tile,
};

/* one packed group of 16 rows */
static void generate_group(const woolly_generate_args *g, int64_t group) {
    const woolly_format *f = g->format;
    int64_t row = group * 16, n_rows = g->n_rows - row < 16 ? g->n_rows - row : 16;
    int64_t column_bytes = 16 * f->block_bytes; /* of block_size columns */
    uint8_t *out = g->w + group * (g->n_cols / f->block_size) * column_bytes;
    float tile[GENERATE_COLS * 16] ALIGNED;
    if (f->ggml_type == 0) {
        uniform_tile(g, row, n_rows, 0, g->n_cols, (float *)out);
        return;
    }
    for (int64_t col = 0; col < g->n_cols; col += GENERATE_COLS) {
        int64_t n_cols = g->n_cols - col < GENERATE_COLS ? g->n_cols - col : GENERATE_COLS;
        uniform_tile(g, row, n_rows, col, n_cols, tile);
        STORE_TILE[f->ggml_type](tile, n_cols, n_rows, out);
        out += n_cols / f->block_size * column_bytes;
    }
}

#endif
