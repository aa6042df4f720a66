/* IQ4_NL: 32 weights, w = d t[q], q in 0 .. 15, t a table of int8 whose steps grow away from zero. */
typedef struct {
    uint16_t d; /* f16 */
    uint8_t qs[16];
} __attribute__((packed)) iq4_nl_block;
_Static_assert(sizeof(iq4_nl_block) == 18, "IQ4_NL");

typedef struct {
    uint16_t d[16];
    uint32_t qs[4][16];
} iq4_nl_group;

static const woolly_field iq4_nl_fields[] = {{0, 2, 2, NULL, NULL}, {2, 16, 4, NULL, NULL}};
enum { iq4_nl_BLOCK = 32, iq4_nl_OUTER = 1, iq4_nl_INNER = 1, iq4_nl_BIAS = 128, iq4_nl_HALVES = 0, iq4_nl_MIN = 0 };

/* t, biased by 128: -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113 */
static const ALIGNED uint8_t iq4_nl_table[16] = {1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241};

static INLINE vb iq4_nl_codes(const iq4_nl_group *b, int o, int i, int g) {
    (void)o, (void)i;
    return nibbles(b->qs, g);
}

static INLINE vb iq4_nl_quants(const iq4_nl_group *b, int o, int i, int g) {
    return vb_lookup16(iq4_nl_table, iq4_nl_codes(b, o, i, g));
}

static INLINE void iq4_nl_scales(const iq4_nl_group *b, int o, int i, vf *d, vf *m) {
    (void)o, (void)i, (void)m;
    d[0] = vf_load_f16(b->d);
}

/* 32 weights in 16 bytes, low nibbles first, through a table biased by `bias` */
static INLINE void lookup_32(const uint8_t *qs, const uint8_t *table, int bias, float d, float *out) {
    for (int k = 0; k < 16; k++) {
        out[k] = d * (float)(table[qs[k] & 15] - bias);
        out[k + 16] = d * (float)(table[qs[k] >> 4] - bias);
    }
}

static void iq4_nl_dequantize(const uint8_t *blocks, int64_t n_blocks, float *out) {
    const iq4_nl_block *b = (const iq4_nl_block *)blocks;
    for (; n_blocks--; b++, out += 32) lookup_32(b->qs, iq4_nl_table, iq4_nl_BIAS, f32_of_f16(b->d), out);
}
