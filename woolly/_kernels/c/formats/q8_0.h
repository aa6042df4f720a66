/* Q8_0: 32 weights, w = d q, q int8. Packed biased by 128, as vpdpbusd wants its weights unsigned. */
typedef struct {
    uint16_t d; /* f16 */
    int8_t qs[32];
} __attribute__((packed)) q8_0_block;
_Static_assert(sizeof(q8_0_block) == 34, "Q8_0");

typedef struct {
    uint16_t d[16];
    uint32_t qs[8][16]; /* qs[g][row]: weights 4 g .. 4 g + 3 */
} q8_0_group;

static const woolly_field q8_0_fields[] = {{0, 2, 2, NULL, NULL}, {2, 32, 4, flip_signs, flip_signs}};
enum { q8_0_BLOCK = 32, q8_0_OUTER = 1, q8_0_INNER = 1, q8_0_BIAS = 128, q8_0_HALVES = 0, q8_0_MIN = 0 };

static INLINE vb q8_0_quants(const q8_0_group *b, int o, int i, int g) {
    (void)o, (void)i;
    return vi_load(b->qs[g]);
}

static INLINE void q8_0_scales(const q8_0_group *b, int o, int i, vf *d, vf *m) {
    (void)o, (void)i, (void)m;
    d[0] = vf_load_f16(b->d);
}

static void q8_0_dequantize(const uint8_t *blocks, int64_t n_blocks, float *out) {
    const q8_0_block *b = (const q8_0_block *)blocks;
    for (; n_blocks--; b++) {
        float d = f32_of_f16(b->d);
        for (int k = 0; k < 32; k++) *out++ = d * (float)b->qs[k];
    }
}
