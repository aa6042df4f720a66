/* Q5_1: 32 weights, w = d q + m, q in 0 .. 31, its bits as in Q5_0. */
typedef struct {
    uint16_t d; /* f16 */
    uint16_t m; /* f16 */
    uint32_t qh;
    uint8_t qs[16];
} __attribute__((packed)) q5_1_block;
_Static_assert(sizeof(q5_1_block) == 24, "Q5_1");

typedef struct {
    uint16_t d[16];
    uint16_t m[16];
    uint32_t qh[16];
    uint32_t qs[4][16];
} q5_1_group;

static const woolly_field q5_1_fields[] = {
    {0, 2, 2, NULL, NULL}, {2, 2, 2, NULL, NULL}, {4, 4, 4, bits_to_planes, planes_to_bits}, {8, 16, 4, NULL, NULL}};
enum { q5_1_BLOCK = 32, q5_1_OUTER = 1, q5_1_INNER = 1, q5_1_BIAS = 0, q5_1_HALVES = 0, q5_1_MIN = MIN_32 };

static INLINE vb q5_1_quants(const q5_1_group *b, int o, int i, int g) {
    (void)o, (void)i;
    return vi_or(nibbles(b->qs, g), fifth_bits(b->qh, g));
}

static INLINE void q5_1_scales(const q5_1_group *b, int o, int i, vf *d, vf *m) {
    (void)o, (void)i;
    d[0] = vf_load_f16(b->d);
    m[0] = vf_load_f16(b->m);
}

static void q5_1_dequantize(const uint8_t *blocks, int64_t n_blocks, float *out) {
    const q5_1_block *b = (const q5_1_block *)blocks;
    for (; n_blocks--; b++, out += 32) {
        float d = f32_of_f16(b->d), m = f32_of_f16(b->m);
        for (int k = 0; k < 16; k++) {
            out[k] = d * (float)((b->qs[k] & 15) | (b->qh >> k & 1) << 4) + m;
            out[k + 16] = d * (float)(b->qs[k] >> 4 | (b->qh >> (k + 16) & 1) << 4) + m;
        }
    }
}
