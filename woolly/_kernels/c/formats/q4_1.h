/* Q4_1: 32 weights, w = d q + m, q in 0 .. 15. */
typedef struct {
    uint16_t d; /* f16 */
    uint16_t m; /* f16 */
    uint8_t qs[16];
} __attribute__((packed)) q4_1_block;
_Static_assert(sizeof(q4_1_block) == 20, "Q4_1");

typedef struct {
    uint16_t d[16];
    uint16_t m[16];
    uint32_t qs[4][16];
} q4_1_group;

static const woolly_field q4_1_fields[] = {{0, 2, 2, NULL, NULL}, {2, 2, 2, NULL, NULL}, {4, 16, 4, NULL, NULL}};
enum { q4_1_BLOCK = 32, q4_1_OUTER = 1, q4_1_INNER = 1, q4_1_BIAS = 0, q4_1_HALVES = 0, q4_1_MIN = MIN_32 };

static INLINE vb q4_1_quants(const q4_1_group *b, int o, int i, int g) {
    (void)o, (void)i;
    return nibbles(b->qs, g);
}

static INLINE void q4_1_scales(const q4_1_group *b, int o, int i, vf *d, vf *m) {
    (void)o, (void)i;
    d[0] = vf_load_f16(b->d);
    m[0] = vf_load_f16(b->m);
}

static void q4_1_dequantize(const uint8_t *blocks, int64_t n_blocks, float *out) {
    const q4_1_block *b = (const q4_1_block *)blocks;
    for (; n_blocks--; b++, out += 32) {
        float d = f32_of_f16(b->d), m = f32_of_f16(b->m);
        for (int k = 0; k < 16; k++) {
            out[k] = d * (float)(b->qs[k] & 15) + m;
            out[k + 16] = d * (float)(b->qs[k] >> 4) + m;
        }
    }
}
