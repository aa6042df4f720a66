/* LUT4: what the formats of 1 to 3 bits are unpacked to when they are packed. No file holds it.
 *
 * 256 weights, w = (d sc) t[q], q in 0 .. 15, sc int8 for 16 weights, t one of three tables of int8: 4.66 bits a weight. It
 * holds each of those formats exactly, so none of them needs a kernel of its own.
 */
typedef struct {
    float d;
    int8_t scales[16];
    uint8_t table;   /* the same in all rows of a matrix */
    uint8_t qs[128]; /* 16 bytes for 32 weights: low nibbles 0 .. 15, high nibbles 16 .. 31 */
} __attribute__((packed)) lut4_block;
_Static_assert(sizeof(lut4_block) == 149, "LUT4");

typedef struct {
    float d[16];
    int8_t scales[16][16];
    uint8_t table[16];
    uint32_t qs[32][16];
} lut4_group;

static const woolly_field lut4_fields[] = {
    {0, 4, 4, NULL, NULL}, {4, 16, 1, NULL, NULL}, {20, 1, 1, NULL, NULL}, {21, 128, 4, NULL, NULL}};
enum { lut4_BLOCK = 256, lut4_OUTER = 2, lut4_INNER = 4, lut4_BIAS = 64, lut4_HALVES = 1, lut4_MIN = 0 };

/* t, biased by 64 */
enum { LUT4_SMALL = 0, LUT4_IQ3_XXS = 1, LUT4_IQ3_S = 2 };
static const ALIGNED uint8_t lut4_tables[3][16] = {
    {21, 39, 56, 72, 89, 107, 55, 57, 63, 65, 71, 73, 64, 66}, /* +-8, 25, 43 of IQ2; +-1, 7, 9 of IQ1; 0, 2 of TQ */
    {2, 12, 20, 28, 36, 44, 52, 60, 68, 76, 84, 92, 100, 108, 116, 126}, /* +-4, 12, 20, 28, 36, 44, 52, 62 */
    {49, 51, 53, 55, 57, 59, 61, 63, 65, 67, 69, 71, 73, 75, 77, 79},    /* +-1, 3, 5 .. 15 */
};

static INLINE vb lut4_quants(const lut4_group *b, int o, int i, int g) {
    return vb_lookup16(lut4_tables[b->table[0]], nibbles(b->qs + 16 * o + 4 * i, g));
}

static INLINE void lut4_scales(const lut4_group *b, int o, int i, vf *d, vf *m) {
    (void)m;
    vf all = vf_load(b->d);
    d[0] = vf_mul(all, vf_load_i8(b->scales[o * 8 + i * 2])); /* exact: 11 bits by 5 */
    d[1] = vf_mul(all, vf_load_i8(b->scales[o * 8 + i * 2 + 1]));
}

static void lut4_dequantize(const uint8_t *blocks, int64_t n_blocks, float *out) {
    const lut4_block *b = (const lut4_block *)blocks;
    for (; n_blocks--; b++)
        for (int k = 0; k < 256; k++) {
            int q = b->qs[k / 32 * 16 + k % 16] >> (k & 16) / 4 & 15;
            *out++ = b->d * (float)b->scales[k / 16] * (float)(lut4_tables[b->table][q] - lut4_BIAS);
        }
}

static INLINE void lut4_set(lut4_block *b, int k, int q) {
    uint8_t *byte = &b->qs[k / 32 * 16 + k % 16];
    *byte = (uint8_t)(k & 16 ? (*byte & 15) | q << 4 : (*byte & 0xf0) | q);
}
