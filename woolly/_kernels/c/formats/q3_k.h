/* Q3_K: 256 weights as 16 sub-blocks of 16, w = (d (sc - 32)) (q - 4), q in 0 .. 7, sc 6 bits. */
typedef struct {
    uint8_t hmask[32];  /* bit s of byte l: the upper bit of weight l of sub-block pair s */
    uint8_t qs[64];     /* lower 2 bits; of 128 weights: l, l + 32, l + 64, l + 96 from the low bits of byte l up */
    uint8_t scales[12]; /* low nibbles of sc 0 .. 7, high ones of 8 .. 15: lower 4 bits; bytes 8 .. 11: upper 2 bits */
    uint16_t d;         /* f16 */
} __attribute__((packed)) q3_k_block;
_Static_assert(sizeof(q3_k_block) == 110, "Q3_K");

typedef struct {
    uint32_t hmask[8][16];
    uint32_t qs[16][16];
    uint32_t scales[3][16];
    uint16_t d[16];
} q3_k_group;

static const woolly_field q3_k_fields[] = {
    {0, 32, 4, NULL, NULL}, {32, 64, 4, NULL, NULL}, {96, 12, 4, NULL, NULL}, {108, 2, 2, NULL, NULL}};
enum { q3_k_BLOCK = 256, q3_k_OUTER = 2, q3_k_INNER = 4, q3_k_BIAS = 4, q3_k_HALVES = 1, q3_k_MIN = 0 };

static INLINE vb q3_k_quants(const q3_k_group *b, int o, int i, int g) {
    vb v = vi_load(b->qs[o * 8 + g]), bit = vi_set1((int32_t)(0x01010101u << i << 4 * o));
    v = vi_and(vi_srl(v, 2 * i), vi_set1(0x03030303));
    return vb_add_where(v, vi_load(b->hmask[g]), bit, vi_set1(0x04040404));
}

/* sc - 32 of sub-block 8 o + j */
static INLINE vf q3_k_scale(const q3_k_group *b, int o, int j) {
    vi low = vi_load(b->scales[j / 4]), high = vi_load(b->scales[2]);
    if (o) low = vi_srl(low, 4), high = vi_srl(high, 4);
    low = vi_and(vi_srl(low, 8 * (j % 4)), vi_set1(15));
    high = vi_and(vi_srl(high, 8 * (j % 4) + 2 * (j / 4)), vi_set1(3));
    return vf_from_vi(vi_sub(vi_or(low, vi_sll(high, 4)), vi_set1(32)));
}

static INLINE void q3_k_scales(const q3_k_group *b, int o, int i, vf *d, vf *m) {
    (void)m;
    vf all = vf_load_f16(b->d);
    d[0] = vf_mul(all, q3_k_scale(b, o, 2 * i)); /* exact: 11 bits by 6 */
    d[1] = vf_mul(all, q3_k_scale(b, o, 2 * i + 1));
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
