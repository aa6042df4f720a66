/* Q5_0: 32 weights, w = d (q - 16), q in 0 .. 31: four low bits as in Q4_0, the fifth of all weights in qh. */
typedef struct {
    uint16_t d; /* f16 */
    uint32_t qh;
    uint8_t qs[16];
} __attribute__((packed)) q5_0_block;
_Static_assert(sizeof(q5_0_block) == 22, "Q5_0");

typedef struct {
    uint16_t d[16];
    uint32_t qh[16]; /* bit g of byte i: the fifth bit of weight 4 g + i */
    uint32_t qs[4][16];
} q5_0_group;

static const woolly_field q5_0_fields[] = {
    {0, 2, 2, NULL, NULL}, {2, 4, 4, bits_to_planes, planes_to_bits}, {6, 16, 4, NULL, NULL}};
enum { q5_0_BLOCK = 32, q5_0_OUTER = 1, q5_0_INNER = 1, q5_0_BIAS = 16, q5_0_HALVES = 0, q5_0_MIN = 0 };

/* the fifth bits of group g, in place above a nibble */
static INLINE vb fifth_bits(const uint32_t *qh, int g) {
    vb v = vi_load(qh);
    v = g < 4 ? vi_sll(v, 4 - (g & 3)) : vi_srl(v, g & 3);
    return vi_and(v, vi_set1(0x10101010));
}

static INLINE vb q5_0_quants(const q5_0_group *b, int o, int i, int g) {
    (void)o, (void)i;
    return vi_or(nibbles(b->qs, g), fifth_bits(b->qh, g));
}

static INLINE void q5_0_scales(const q5_0_group *b, int o, int i, vf *d, vf *m) {
    (void)o, (void)i, (void)m;
    d[0] = vf_load_f16(b->d);
}

static void q5_0_dequantize(const uint8_t *blocks, int64_t n_blocks, float *out) {
    const q5_0_block *b = (const q5_0_block *)blocks;
    for (; n_blocks--; b++, out += 32) {
        float d = f32_of_f16(b->d);
        for (int k = 0; k < 16; k++) {
            out[k] = d * (float)((int)((b->qs[k] & 15) | (b->qh >> k & 1) << 4) - 16);
            out[k + 16] = d * (float)((int)(b->qs[k] >> 4 | (b->qh >> (k + 16) & 1) << 4) - 16);
        }
    }
}
