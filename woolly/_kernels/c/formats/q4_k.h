/* Q4_K: 256 weights as 8 sub-blocks of 32, w = (d sc) q - (dmin mn), q in 0 .. 15, sc and mn 6 bits each. */
typedef struct {
    uint16_t d;         /* f16 */
    uint16_t dmin;      /* f16 */
    uint8_t scales[12]; /* sc and mn of sub-blocks 0 .. 3 in the low 6 bits of bytes 0 .. 7; 4 .. 7 spread over the rest */
    uint8_t qs[128];    /* 32 bytes hold sub-block 2 c (low nibbles) and 2 c + 1 (high) */
} __attribute__((packed)) q4_k_block;
_Static_assert(sizeof(q4_k_block) == 144, "Q4_K");

typedef struct {
    uint16_t d[16];
    uint16_t dmin[16];
    uint32_t scales[3][16];
    uint32_t qs[32][16];
} q4_k_group;

static const woolly_field q4_k_fields[] = {
    {0, 2, 2, NULL, NULL}, {2, 2, 2, NULL, NULL}, {4, 12, 4, NULL, NULL}, {16, 128, 4, NULL, NULL}};
enum { q4_k_BLOCK = 256, q4_k_OUTER = 2, q4_k_INNER = 4, q4_k_BIAS = 0, q4_k_HALVES = 0, q4_k_MIN = MIN_32 };

static INLINE vb q4_k_quants(const q4_k_group *b, int o, int i, int g) {
    vb v = vi_load(b->qs[o * 16 + (i >> 1) * 8 + g]);
    return vi_and(i & 1 ? vi_srl(v, 4) : v, vi_set1(0x0f0f0f0f));
}

/* sc and mn of sub-block 4 o + i, as K-quants with minima hold them */
static INLINE void k_scales(const uint32_t (*scales)[16], int o, int i, vf *sc, vf *mn) {
    vi s = vi_load(scales[0]), m = vi_load(scales[1]), six = vi_set1(63);
    if (o == 0) {
        s = vi_and(vi_srl(s, 8 * i), six);
        m = vi_and(vi_srl(m, 8 * i), six);
    } else {
        vi low = vi_load(scales[2]), high = vi_set1(0x30), four = vi_set1(15);
        s = vi_or(vi_and(vi_srl(low, 8 * i), four), vi_and(vi_srl(s, 8 * i + 2), high));
        m = vi_or(vi_and(vi_srl(low, 8 * i + 4), four), vi_and(vi_srl(m, 8 * i + 2), high));
    }
    *sc = vf_from_vi(s);
    *mn = vf_from_vi(m);
}

static INLINE void q4_k_scales(const q4_k_group *b, int o, int i, vf *d, vf *m) {
    vf sc, mn;
    k_scales(b->scales, o, i, &sc, &mn);
    d[0] = vf_mul(vf_load_f16(b->d), sc); /* exact: 11 bits by 6 */
    m[0] = vf_neg(vf_mul(vf_load_f16(b->dmin), mn));
}

static INLINE void k_scale(const uint8_t *scales, int s, float *sc, float *mn) {
    if (s < 4) {
        *sc = (float)(scales[s] & 63);
        *mn = (float)(scales[s + 4] & 63);
    } else {
        *sc = (float)((scales[s + 4] & 15) | scales[s - 4] >> 6 << 4);
        *mn = (float)(scales[s + 4] >> 4 | scales[s] >> 6 << 4);
    }
}

static void q4_k_dequantize(const uint8_t *blocks, int64_t n_blocks, float *out) {
    const q4_k_block *b = (const q4_k_block *)blocks;
    for (; n_blocks--; b++) {
        float d = f32_of_f16(b->d), dmin = f32_of_f16(b->dmin);
        for (int s = 0; s < 8; s++) {
            float sc, mn;
            k_scale(b->scales, s, &sc, &mn);
            for (int k = 0; k < 32; k++)
                *out++ = d * sc * (float)(b->qs[s / 2 * 32 + k] >> 4 * (s & 1) & 15) - dmin * mn;
        }
    }
}
