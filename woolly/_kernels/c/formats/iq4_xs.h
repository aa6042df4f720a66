/* IQ4_XS: 256 weights as 8 sub-blocks of 32, w = (d (sc - 32)) t[q], t the table of IQ4_NL, sc 6 bits. */
typedef struct {
    uint16_t d;          /* f16 */
    uint16_t scales_h;   /* the upper 2 bits of sc, sub-block 0 lowest */
    uint8_t scales_l[4]; /* the lower 4 */
    uint8_t qs[128];     /* 16 bytes a sub-block, as in IQ4_NL */
} __attribute__((packed)) iq4_xs_block;
_Static_assert(sizeof(iq4_xs_block) == 136, "IQ4_XS");

typedef struct {
    uint16_t d[16];
    uint16_t scales_h[16];
    uint32_t scales_l[16];
    uint32_t qs[32][16];
} iq4_xs_group;

static const woolly_field iq4_xs_fields[] = {
    {0, 2, 2, NULL, NULL}, {2, 2, 2, NULL, NULL}, {4, 4, 4, NULL, NULL}, {8, 128, 4, NULL, NULL}};
enum { iq4_xs_BLOCK = 256, iq4_xs_OUTER = 2, iq4_xs_INNER = 4, iq4_xs_BIAS = 128, iq4_xs_HALVES = 0, iq4_xs_MIN = 0 };

static INLINE vb iq4_xs_codes(const iq4_xs_group *b, int o, int i, int g) {
    return nibbles(b->qs + 16 * o + 4 * i, g);
}

static INLINE vb iq4_xs_quants(const iq4_xs_group *b, int o, int i, int g) {
    return vb_lookup16(iq4_nl_table, iq4_xs_codes(b, o, i, g));
}

static INLINE void iq4_xs_scales(const iq4_xs_group *b, int o, int i, vf *d, vf *m) {
    (void)m;
    vi low = vi_load(b->scales_l), high = vi_load_u16(b->scales_h);
    if (o) low = vi_srl(low, 16), high = vi_srl(high, 8);
    low = vi_and(vi_srl(low, 4 * i), vi_set1(15));
    high = vi_and(vi_srl(high, 2 * i), vi_set1(3));
    vi sc = vi_sub(vi_or(low, vi_sll(high, 4)), vi_set1(32));
    d[0] = vf_mul(vf_load_f16(b->d), vf_from_vi(sc)); /* exact: 11 bits by 6 */
}

static void iq4_xs_dequantize(const uint8_t *blocks, int64_t n_blocks, float *out) {
    const iq4_xs_block *b = (const iq4_xs_block *)blocks;
    for (; n_blocks--; b++) {
        for (int s = 0; s < 8; s++, out += 32) {
            int sc = (b->scales_l[s / 2] >> 4 * (s & 1) & 15) | (b->scales_h >> 2 * s & 3) << 4;
            lookup_32(b->qs + 16 * s, iq4_nl_table, iq4_nl_BIAS, f32_of_f16(b->d) * (float)(sc - 32), out);
        }
    }
}
