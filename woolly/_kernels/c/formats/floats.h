/* F32, F16, BF16: a block is one weight, a packed group is (n_k, 16). F16 and BF16 widen exactly to f32. F64 is rounded to
 * F32 when it is packed. */
typedef struct { float w; } f32_block;
typedef struct { uint16_t w; } f16_block;
typedef struct { uint16_t w; } bf16_block;
typedef struct { double w; } __attribute__((packed)) f64_block;
typedef struct { float w[16]; } f32_group;
typedef struct { uint16_t w[16]; } f16_group;
typedef struct { uint16_t w[16]; } bf16_group;

static const woolly_field f32_fields[] = {{0, 4, 4, NULL, NULL}};
static const woolly_field f16_fields[] = {{0, 2, 2, NULL, NULL}};
static const woolly_field bf16_fields[] = {{0, 2, 2, NULL, NULL}};
enum { f32_BLOCK = 1, f16_BLOCK = 1, bf16_BLOCK = 1 };

static void f32_dequantize(const uint8_t *blocks, int64_t n_blocks, float *out) {
    memcpy(out, blocks, (size_t)n_blocks * 4);
}

static void f16_dequantize(const uint8_t *blocks, int64_t n_blocks, float *out) {
    const uint16_t *w = (const uint16_t *)blocks;
    for (int64_t k = 0; k < n_blocks; k++) out[k] = f32_of_f16(w[k]);
}

static void bf16_dequantize(const uint8_t *blocks, int64_t n_blocks, float *out) {
    const uint16_t *w = (const uint16_t *)blocks;
    for (int64_t k = 0; k < n_blocks; k++) {
        uint32_t bits = (uint32_t)w[k] << 16;
        memcpy(out + k, &bits, 4);
    }
}

static void f64_convert(const f64_block *b, f32_block *out) { out->w = (float)b->w; }
