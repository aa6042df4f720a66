/* MXFP4: 32 weights, w = 2^(e - 128) t[q], q in 0 .. 15, t the values of E2M1 doubled. e = 255 is no NaN here. */
typedef struct {
    uint8_t e;
    uint8_t qs[16]; /* low nibbles: weights 0 .. 15, high nibbles: 16 .. 31 */
} __attribute__((packed)) mxfp4_block;
_Static_assert(sizeof(mxfp4_block) == 17, "MXFP4");

typedef struct {
    uint8_t e[16];
    uint32_t qs[4][16];
} mxfp4_group;

static const woolly_field mxfp4_fields[] = {{0, 1, 1, NULL, NULL}, {1, 16, 4, NULL, NULL}};
enum { mxfp4_BLOCK = 32, mxfp4_OUTER = 1, mxfp4_INNER = 1, mxfp4_BIAS = 16, mxfp4_HALVES = 0, mxfp4_MIN = 0 };

/* t, biased by 16: 0, 1, 2, 3, 4, 6, 8, 12, and their negatives */
static const ALIGNED uint8_t mxfp4_table[16] = {16, 17, 18, 19, 20, 22, 24, 28, 16, 15, 14, 13, 12, 10, 8, 4};

static INLINE vb mxfp4_codes(const mxfp4_group *b, int o, int i, int g) {
    (void)o, (void)i;
    return nibbles(b->qs, g);
}

static INLINE vb mxfp4_quants(const mxfp4_group *b, int o, int i, int g) {
    return vb_lookup16(mxfp4_table, mxfp4_codes(b, o, i, g));
}

/* the bits of 2^(e - 128): e - 1 in the exponent, or for e = 0 and 1 one bit of a subnormal number */
static INLINE void mxfp4_scales(const mxfp4_group *b, int o, int i, vf *d, vf *m) {
    (void)o, (void)i, (void)m;
    vi e = vi_load_u8(b->e), one = vi_set1(1);
    vi subnormal = vi_sll(vi_add(vi_and(e, one), one), 21);
    d[0] = vf_of_bits(vi_max(vi_sll(vi_sub(e, one), 23), subnormal));
}

static void mxfp4_dequantize(const uint8_t *blocks, int64_t n_blocks, float *out) {
    const mxfp4_block *b = (const mxfp4_block *)blocks;
    for (; n_blocks--; b++, out += 32) {
        uint32_t bits = b->e < 2 ? (uint32_t)(b->e + 1) << 21 : (uint32_t)(b->e - 1) << 23;
        float d;
        memcpy(&d, &bits, 4);
        lookup_32(b->qs, mxfp4_table, mxfp4_BIAS, d, out);
    }
}
