/* Q4_0: 32 weights, w = d (q - 8), q in 0 .. 15. */
typedef struct {
    uint16_t d;     /* f16 */
    uint8_t qs[16]; /* low nibbles: weights 0 .. 15, high nibbles: 16 .. 31 */
} __attribute__((packed)) q4_0_block;
_Static_assert(sizeof(q4_0_block) == 18, "Q4_0");

typedef struct {
    uint16_t d[16];
    uint32_t qs[4][16];
} q4_0_group;

static const woolly_field q4_0_fields[] = {{0, 2, 2, NULL, NULL}, {2, 16, 4, NULL, NULL}};
enum { q4_0_BLOCK = 32, q4_0_OUTER = 1, q4_0_INNER = 1, q4_0_BIAS = 8, q4_0_HALVES = 0, q4_0_MIN = 0 };

/* the nibbles of group g of 32 weights stored as low halves first */
static INLINE vb nibbles(const uint32_t (*qs)[16], int g) {
    vb v = vi_load(qs[g & 3]);
    return vi_and(g < 4 ? v : vi_srl(v, 4), vi_set1(0x0f0f0f0f));
}

static INLINE vb q4_0_quants(const q4_0_group *b, int o, int i, int g) {
    (void)o, (void)i;
    return nibbles(b->qs, g);
}

static INLINE void q4_0_scales(const q4_0_group *b, int o, int i, vf *d, vf *m) {
    (void)o, (void)i, (void)m;
    d[0] = vf_load_f16(b->d);
}

static void q4_0_dequantize(const uint8_t *blocks, int64_t n_blocks, float *out) {
    const q4_0_block *b = (const q4_0_block *)blocks;
    for (; n_blocks--; b++, out += 32) {
        float d = f32_of_f16(b->d);
        for (int k = 0; k < 16; k++) {
            out[k] = d * (float)((b->qs[k] & 15) - 8);
            out[k + 16] = d * (float)((b->qs[k] >> 4) - 8);
        }
    }
}
