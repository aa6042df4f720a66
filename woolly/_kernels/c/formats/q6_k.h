/* Q6_K: 256 weights as 16 sub-blocks of 16, w = (d sc) (q - 32), q in 0 .. 63, sc int8. */
typedef struct {
    uint8_t ql[128];    /* low 4 bits; of 128 weights: l and l + 32 are the low nibbles of 64 bytes, l + 64, l + 96 the high */
    uint8_t qh[64];     /* high 2 bits; of 128 weights: l, l + 32, l + 64, l + 96 from the low bits of byte l up */
    int8_t scales[16];
    uint16_t d; /* f16 */
} __attribute__((packed)) q6_k_block;
_Static_assert(sizeof(q6_k_block) == 210, "Q6_K");

typedef struct {
    uint16_t d[16];
    struct {
        int8_t scales[8][16];
        uint32_t ql[16][16];
        uint32_t qh[8][16];
    } half[2]; /* in the order in which they are used: lines are asked for one after the other */
} q6_k_group;

static const woolly_field q6_k_fields[] = {{208, 2, 2, NULL, NULL},
                                           {192, 8, 1, NULL, NULL},
                                           {0, 64, 4, NULL, NULL},
                                           {128, 32, 4, NULL, NULL},
                                           {200, 8, 1, NULL, NULL},
                                           {64, 64, 4, NULL, NULL},
                                           {160, 32, 4, NULL, NULL}};
enum { q6_k_BLOCK = 256, q6_k_OUTER = 2, q6_k_INNER = 4, q6_k_BIAS = 32, q6_k_HALVES = 1, q6_k_MIN = 0 };

static INLINE vb q6_k_quants(const q6_k_group *b, int o, int i, int g) {
    vb low = vi_load(b->half[o].ql[(i & 1) * 8 + g]), high = vi_load(b->half[o].qh[g]);
    low = vi_and(i & 2 ? vi_srl(low, 4) : low, vi_set1(0x0f0f0f0f));
    high = i < 2 ? vi_sll(high, 4 - 2 * (i & 1)) : vi_srl(high, 2 * (i & 1));
    return vi_or(low, vi_and(high, vi_set1(0x30303030)));
}

static INLINE void q6_k_scales(const q6_k_group *b, int o, int i, vf *d, vf *m) {
    (void)m;
    vf all = vf_load_f16(b->d);
    d[0] = vf_mul(all, vf_load_i8(b->half[o].scales[i * 2])); /* exact: 11 bits by 7 */
    d[1] = vf_mul(all, vf_load_i8(b->half[o].scales[i * 2 + 1]));
}

static void q6_k_dequantize(const uint8_t *blocks, int64_t n_blocks, float *out) {
    const q6_k_block *b = (const q6_k_block *)blocks;
    for (; n_blocks--; b++) {
        float d = f32_of_f16(b->d);
        for (int k = 0; k < 256; k++) {
            int h = k / 128, j = k / 32 % 4, l = k % 32;
            int q = (b->ql[h * 64 + (j & 1) * 32 + l] >> 4 * (j >> 1) & 15) | (b->qh[h * 32 + l] >> 2 * j & 3) << 4;
            *out++ = d * (float)b->scales[k / 16] * (float)(q - 32);
        }
    }
}
