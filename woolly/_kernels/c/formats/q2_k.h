/* Q2_K: 256 weights as 16 sub-blocks of 16, w = (d sc) q - (dmin mn), q in 0 .. 3, sc and mn 4 bits each.
 *
 * sc q is at most 45, so the scales of the two halves of a block of 32 go into the quants: one exact dot product, times d.
 */
typedef struct {
    uint8_t scales[16]; /* sc in the low nibble, mn in the high */
    uint8_t qs[64];     /* of 128 weights: l, l + 32, l + 64, l + 96 from the low bits of byte l up */
    uint16_t d;         /* f16 */
    uint16_t dmin;      /* f16 */
} __attribute__((packed)) q2_k_block;
_Static_assert(sizeof(q2_k_block) == 84, "Q2_K");

typedef struct {
    uint32_t scales[4][16]; /* with bytes 1 and 2 exchanged: the scales of a block's halves lie in two words */
    uint32_t qs[16][16];
    uint16_t d[16];
    uint16_t dmin[16];
} q2_k_group;

static const woolly_field q2_k_fields[] = {{0, 16, 4, exchange_middle_bytes, exchange_middle_bytes},
                                           {16, 64, 4, NULL, NULL},
                                           {80, 2, 2, NULL, NULL},
                                           {82, 2, 2, NULL, NULL}};
enum { q2_k_BLOCK = 256, q2_k_OUTER = 2, q2_k_INNER = 4, q2_k_BIAS = 0, q2_k_HALVES = 0, q2_k_MIN = MIN_16 };
enum { q2_k_LEVEL_BIAS = 0 };

static INLINE int q2_k_place(int i, int half) {
    (void)half;
    return 3 << 2 * i > DOT_LOW_MOST ? 2 * i - 2 : 2 * i;
}

static INLINE vb q2_k_levels(const q2_k_group *b, int o, int i, int g) {
    const int place = q2_k_place(i, g / 4);
    vb four = vi_load(b->qs[o * 8 + g]);
    return vi_and(place < 2 * i ? vi_srl(four, 2) : four, vi_set1(0x03030303 << place));
}

static INLINE vi q2_k_factors(const q2_k_group *b, int o, int i) {
    vi v = vi_load(b->scales[2 * o + i / 2]);
    return vi_and(i % 2 ? vi_srl(v, 8) : v, vi_set1(0x000f000f));
}

static INLINE void q2_k_scales(const q2_k_group *b, int o, int i, vf *d, vf *m) {
    vf dmin = vf_neg(vf_load_f16(b->dmin));
    vi v = vi_load(b->scales[2 * o + i / 2]);
    d[0] = vf_load_f16(b->d);
    m[0] = vf_mul(dmin, vf_of_nibbles(vi_srl(v, 8 * (i % 2) + 4))); /* exact: 11 bits by 4 */
    m[1] = vf_mul(dmin, vf_of_nibbles(vi_srl(v, 8 * (i % 2) + 20)));
}

static void q2_k_dequantize(const uint8_t *blocks, int64_t n_blocks, float *out) {
    const q2_k_block *b = (const q2_k_block *)blocks;
    for (; n_blocks--; b++) {
        float d = f32_of_f16(b->d), dmin = f32_of_f16(b->dmin);
        for (int k = 0; k < 256; k++) {
            int scales = b->scales[k / 16], q = b->qs[k / 128 * 32 + k % 32] >> 2 * (k / 32 % 4) & 3;
            *out++ = d * (float)(scales & 15) * (float)q - dmin * (float)(scales >> 4);
        }
    }
}
