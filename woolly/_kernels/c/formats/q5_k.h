/* Q5_K: 256 weights as 8 sub-blocks of 32, w = (d sc) q - (dmin mn), q in 0 .. 31; as Q4_K, with a fifth bit. */
typedef struct {
    uint16_t d;         /* f16 */
    uint16_t dmin;      /* f16 */
    uint8_t scales[12]; /* as in Q4_K */
    uint8_t qh[32];     /* bit s of byte l: the fifth bit of weight l of sub-block s */
    uint8_t qs[128];    /* as in Q4_K */
} __attribute__((packed)) q5_k_block;
_Static_assert(sizeof(q5_k_block) == 176, "Q5_K");

typedef struct {
    uint16_t d[16];
    uint16_t dmin[16];
    uint32_t scales[3][16];
    uint32_t qh[8][16];
    uint32_t qs[32][16];
} q5_k_group;

static const woolly_field q5_k_fields[] = {{0, 2, 2, NULL, NULL},
                                           {2, 2, 2, NULL, NULL},
                                           {4, 12, 4, NULL, NULL},
                                           {16, 32, 4, NULL, NULL},
                                           {48, 128, 4, NULL, NULL}};
enum { q5_k_BLOCK = 256, q5_k_OUTER = 2, q5_k_INNER = 4, q5_k_BIAS = 0, q5_k_HALVES = 0, q5_k_MIN = MIN_32 };

static INLINE vb q5_k_quants(const q5_k_group *b, int o, int i, int g) {
    vb v = vi_load(b->qs[o * 16 + (i >> 1) * 8 + g]), bit = vi_set1((int32_t)(0x01010101u << i << 4 * o));
    v = vi_and(i & 1 ? vi_srl(v, 4) : v, vi_set1(0x0f0f0f0f));
    return vb_add_where(v, vi_load(b->qh[g]), bit, vi_set1(0x10101010));
}

static INLINE void q5_k_scales(const q5_k_group *b, int o, int i, vf *d, vf *m) {
    vf sc, mn;
    k_scales(b->scales, o, i, &sc, &mn);
    d[0] = vf_mul(vf_load_f16(b->d), sc); /* exact: 11 bits by 6 */
    m[0] = vf_neg(vf_mul(vf_load_f16(b->dmin), mn));
}

static void q5_k_dequantize(const uint8_t *blocks, int64_t n_blocks, float *out) {
    const q5_k_block *b = (const q5_k_block *)blocks;
    for (; n_blocks--; b++) {
        float d = f32_of_f16(b->d), dmin = f32_of_f16(b->dmin);
        for (int s = 0; s < 8; s++) {
            float sc, mn;
            k_scale(b->scales, s, &sc, &mn);
            for (int k = 0; k < 32; k++) {
                int q = (b->qs[s / 2 * 32 + k] >> 4 * (s & 1) & 15) | (b->qh[k] >> s & 1) << 4;
                *out++ = d * sc * (float)q - dmin * mn;
            }
        }
    }
}
