/* Q3_K: 256 weights as 16 sub-blocks of 16, w = (d (sc - 32)) (q - 4), q in 0 .. 7, sc 6 bits.
 *
 * (sc - 32) (q - 4) is -124 .. 128, so the scales of the two halves of a block of 32 go into the quants, which are
 * (32 - sc) (q - 4) biased by 128: one exact dot product, times -d.
 */
typedef struct {
    uint8_t hmask[32];  /* bit s of byte l: the upper bit of weight l of sub-block pair s */
    uint8_t qs[64];     /* lower 2 bits; of 128 weights: l, l + 32, l + 64, l + 96 from the low bits of byte l up */
    uint8_t scales[12]; /* low nibbles of sc 0 .. 7, high ones of 8 .. 15: lower 4 bits; bytes 8 .. 11: upper 2 bits */
    uint16_t d;         /* f16 */
} __attribute__((packed)) q3_k_block;
_Static_assert(sizeof(q3_k_block) == 110, "Q3_K");

/* Levels q, byte by byte, of the 8 halves of each 4 blocks of 32: for k of 0 .. 2, half k has bits 0 to 2 of levels[k] and
 * half 3 + k bits 3 to 5; for k of 0 and 1, half 6 + k has bits 6 and 7 of levels[k] as its upper bits, and bit 7 - k of
 * levels[2] as its lowest */
typedef struct {
    uint32_t levels[2][3][4][16];
    uint32_t scales[3][16]; /* with bytes 1 and 2 exchanged: the scales of a block's halves lie in two words */
    uint16_t d[16];
} q3_k_group;

/* hmask and qs of n_words / 24 rows <-> their levels */
static void q3_k_to_levels(uint8_t *words, int n_words) {
    const int n = n_words / 24;
    uint32_t from[24][WOOLLY_GROUP] = {{0}}, to[24][WOOLLY_GROUP];
    for (int e = 0; e < 24; e++) memcpy(from[e], words + 4 * e * n, 4 * (size_t)n);
    for (int o = 0; o < 2; o++)
        for (int c = 0; c < 4; c++)
            for (int r = 0; r < WOOLLY_GROUP; r++) {
                uint32_t half[8];
                UNROLL for (int h = 0; h < 8; h++) {
                    uint32_t low = from[8 + 8 * o + 4 * (h % 2) + c][r] >> 2 * (h / 2) & 0x03030303;
                    half[h] = low | (from[4 * (h % 2) + c][r] >> (h / 2 + 4 * o) & 0x01010101) << 2;
                }
                to[12 * o + c][r] = half[0] | half[3] << 3 | (half[6] >> 1 & 0x03030303) << 6;
                to[12 * o + 4 + c][r] = half[1] | half[4] << 3 | (half[7] >> 1 & 0x03030303) << 6;
                to[12 * o + 8 + c][r] = half[2] | half[5] << 3 | (half[6] & 0x01010101) << 7 | (half[7] & 0x01010101) << 6;
            }
    for (int e = 0; e < 24; e++) memcpy(words + 4 * e * n, to[e], 4 * (size_t)n);
}
static void q3_k_from_levels(uint8_t *words, int n_words) {
    const int n = n_words / 24;
    uint32_t from[24][WOOLLY_GROUP] = {{0}}, to[24][WOOLLY_GROUP] = {{0}};
    for (int e = 0; e < 24; e++) memcpy(from[e], words + 4 * e * n, 4 * (size_t)n);
    for (int o = 0; o < 2; o++)
        for (int c = 0; c < 4; c++)
            for (int r = 0; r < WOOLLY_GROUP; r++) {
                uint32_t t0 = from[12 * o + c][r], t1 = from[12 * o + 4 + c][r], t2 = from[12 * o + 8 + c][r];
                uint32_t seven = 0x07070707, two = 0x06060606, one = 0x01010101;
                uint32_t half[8] = {t0 & seven, t1 & seven, t2 & seven, t0 >> 3 & seven, t1 >> 3 & seven, t2 >> 3 & seven,
                                    (t0 >> 5 & two) | (t2 >> 7 & one), (t1 >> 5 & two) | (t2 >> 6 & one)};
                UNROLL for (int h = 0; h < 8; h++) {
                    to[8 + 8 * o + 4 * (h % 2) + c][r] |= (half[h] & 0x03030303) << 2 * (h / 2);
                    to[4 * (h % 2) + c][r] |= (half[h] >> 2 & one) << (h / 2 + 4 * o);
                }
            }
    for (int e = 0; e < 24; e++) memcpy(words + 4 * e * n, to[e], 4 * (size_t)n);
}

static const woolly_field q3_k_fields[] = {{0, 96, 4, q3_k_to_levels, q3_k_from_levels},
                                           {96, 12, 4, exchange_middle_bytes, exchange_middle_bytes},
                                           {108, 2, 2, NULL, NULL}};
enum { q3_k_BLOCK = 256, q3_k_OUTER = 2, q3_k_INNER = 4, q3_k_BIAS = 128, q3_k_HALVES = 0, q3_k_MIN = 0 };
enum { q3_k_LEVEL_BIAS = 4 };

enum { q3_k_DOWN = 7 << 5 > DOT_LOW_MOST }; /* levels of the last two halves come down by a bit where they are too large */

static INLINE int q3_k_place(int i, int half) {
    const int h = 2 * i + half;
    return h < 3 ? 0 : h < 6 ? 3 : 5 - q3_k_DOWN;
}

static INLINE vb q3_k_levels(const q3_k_group *b, int o, int i, int g) {
    const int h = 2 * i + g / 4;
    const uint32_t(*levels)[4][16] = b->levels[o];
    if (h < 6) return vi_and(vi_load(levels[h % 3][g % 4]), vi_set1(h < 3 ? 0x07070707 : 0x38383838));
    vi upper = vi_load(levels[h - 6][g % 4]), lowest = vi_srl(vi_load(levels[2][g % 4]), 8 - h + q3_k_DOWN);
    if (q3_k_DOWN) upper = vi_srl(upper, 1);
    upper = vi_and(upper, vi_set1((int32_t)(0xc0c0c0c0u >> q3_k_DOWN)));
    return vi_or(upper, vi_and(lowest, vi_set1(0x20202020 >> q3_k_DOWN)));
}

/* 32 - sc of both halves */
static INLINE vi q3_k_factors(const q3_k_group *b, int o, int i) {
    vi low = vi_load(b->scales[i / 2]), high = vi_load(b->scales[2]);
    if (o) low = vi_srl(low, 4), high = vi_srl(high, 4);
    low = vi_and(i % 2 ? vi_srl(low, 8) : low, vi_set1(0x000f000f));
    high = i == 0 ? vi_sll(high, 4) : i == 1 ? vi_srl(high, 4) : i == 2 ? vi_sll(high, 2) : vi_srl(high, 6);
    return vi_sub16(vi_set1(0x00200020), vi_or(low, vi_and(high, vi_set1(0x00300030))));
}

static INLINE void q3_k_scales(const q3_k_group *b, int o, int i, vf *d, vf *m) {
    (void)o, (void)i, (void)m;
    d[0] = vf_neg(vf_load_f16(b->d));
}

static void q3_k_dequantize(const uint8_t *blocks, int64_t n_blocks, float *out) {
    const q3_k_block *b = (const q3_k_block *)blocks;
    for (; n_blocks--; b++) {
        float d = f32_of_f16(b->d);
        for (int k = 0; k < 256; k++) {
            int s = k / 32, l = k % 32, j = k / 16;
            int sc = (b->scales[j % 8] >> 4 * (j / 8) & 15) | (b->scales[8 + j % 4] >> 2 * (j / 4) & 3) << 4;
            int q = (b->qs[k / 128 * 32 + l] >> 2 * (s % 4) & 3) | (b->hmask[l] >> s & 1) << 2;
            *out++ = d * (float)(sc - 32) * (float)(q - 4);
        }
    }
}
