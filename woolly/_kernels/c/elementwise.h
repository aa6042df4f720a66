/* Row kernels: exp, softmax, RMSNorm, gated activations, RoPE, activation quantisation.
 *
 * Reductions run over 16 lanes and a fixed tree on every instruction set; exp is one polynomial, written here once.
 */
#ifndef WOOLLY_ELEMENTWISE_H
#define WOOLLY_ELEMENTWISE_H

#include "kernels.h"
#include "simd/simd.h"

/* exp(x) = 2^n p(r), n = round(x / ln 2), |r| <= ln 2 / 2: degree 6, within 3 ulp. Below -87.3 the result is 0 (it would
 * be subnormal), above 88.3 it stays at 2.2e38; NaN stays NaN */
static INLINE vf vf_exp(vf x) {
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it leaves round(x) in the low bits */
    vf y = vf_max(vf_set1(-88.0f), vf_min(vf_set1(88.3f), x));
    vf t = vf_fma(y, vf_set1(1.44269504f), vf_set1(magic));
    vf n = vf_sub(t, vf_set1(magic));
    vf r = vf_fma(n, vf_set1(-0.693145752f), y); /* ln 2 in two parts: the product with the first is exact */
    r = vf_fma(n, vf_set1(-1.42860677e-6f), r);
    vf p = vf_set1(1.0f / 720);
    p = vf_fma(p, r, vf_set1(1.0f / 120));
    p = vf_fma(p, r, vf_set1(1.0f / 24));
    p = vf_fma(p, r, vf_set1(1.0f / 6));
    p = vf_fma(p, r, vf_set1(0.5f));
    p = vf_fma(p, r, vf_set1(1.0f));
    p = vf_fma(p, r, vf_set1(1.0f));
    vf out = vf_of_bits(vi_add(vf_bits(p), vi_sll(vf_bits(t), 23)));
    return vf_zero_below(out, x, -87.3f);
}

/* x / (1 + exp(-z)) */
static INLINE vf x_sigmoid(vf x, vf z) { return vf_div(x, vf_add(vf_set1(1.0f), vf_exp(vf_neg(z)))); }

static INLINE vf vf_act(int act, vf x) {
    if (act == WOOLLY_ACT_SILU) return x_sigmoid(x, x);
    /* gelu by tanh: 0.5 x (1 + tanh(u)) = x / (1 + exp(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x^3) */
    vf cubic = vf_fma(vf_mul(vf_mul(x, x), x), vf_set1(0.044715f), x);
    return x_sigmoid(x, vf_mul(cubic, vf_set1(1.59576912f)));
}

/* gpt-oss: gate sigmoid(1.702 gate) (up + 1), with gate <= 7 and |up| <= 7; NaN stays NaN */
static INLINE vf vf_swiglu_clamped(vf gate, vf up) {
    gate = vf_min(vf_set1(7.0f), gate);
    up = vf_max(vf_set1(-7.0f), vf_min(vf_set1(7.0f), up));
    return vf_mul(x_sigmoid(gate, vf_mul(gate, vf_set1(1.702f))), vf_add(up, vf_set1(1.0f)));
}

/* statement over all of n in vectors of 16; the last one is shorter: LOAD and STORE know */
#define EACH_VECTOR(n, STATEMENT)                                                                                      \
    do {                                                                                                               \
        int64_t i = 0;                                                                                                 \
        for (; i + 16 <= (n); i += 16) STATEMENT(i, vf_load, vf_store, )                                               \
        if (i < (n)) STATEMENT(i, vf_load_n, vf_store_n, , (n) - i)                                                    \
    } while (0)

static void exp_f32(const float *x, int64_t n, float *out) {
#define STEP(i, LOAD, STORE, ...) STORE(out + i, vf_exp(LOAD(x + i __VA_ARGS__)) __VA_ARGS__);
    EACH_VECTOR(n, STEP);
#undef STEP
}

static void add_f32(const float *x, const float *y, int64_t n, float *out) {
#define STEP(i, LOAD, STORE, ...) STORE(out + i, vf_add(LOAD(x + i __VA_ARGS__), LOAD(y + i __VA_ARGS__)) __VA_ARGS__);
    EACH_VECTOR(n, STEP);
#undef STEP
}

static void scale_f32(const float *x, float factor, int64_t n, float *out) {
#define STEP(i, LOAD, STORE, ...) STORE(out + i, vf_mul(LOAD(x + i __VA_ARGS__), vf_set1(factor)) __VA_ARGS__);
    EACH_VECTOR(n, STEP);
#undef STEP
}

static void glu_f32(int act, const float *gate, const float *up, int64_t n, float *out) {
#define SILU(i, LOAD, STORE, ...)                                                                                      \
    STORE(out + i, vf_mul(vf_act(WOOLLY_ACT_SILU, LOAD(gate + i __VA_ARGS__)), LOAD(up + i __VA_ARGS__)) __VA_ARGS__);
#define GELU(i, LOAD, STORE, ...)                                                                                      \
    STORE(out + i, vf_mul(vf_act(WOOLLY_ACT_GELU_TANH, LOAD(gate + i __VA_ARGS__)), LOAD(up + i __VA_ARGS__)) __VA_ARGS__);
#define CLAMPED(i, LOAD, STORE, ...)                                                                                   \
    STORE(out + i, vf_swiglu_clamped(LOAD(gate + i __VA_ARGS__), LOAD(up + i __VA_ARGS__)) __VA_ARGS__);
    if (act == WOOLLY_ACT_SILU) EACH_VECTOR(n, SILU);
    else if (act == WOOLLY_ACT_SWIGLU_CLAMPED) EACH_VECTOR(n, CLAMPED);
    else EACH_VECTOR(n, GELU);
#undef SILU
#undef GELU
#undef CLAMPED
}

static void act_f32(int act, const float *x, int64_t n, float *out) {
#define SILU(i, LOAD, STORE, ...)                                                                                      \
    STORE(out + i, vf_act(WOOLLY_ACT_SILU, LOAD(x + i __VA_ARGS__)) __VA_ARGS__);
#define GELU(i, LOAD, STORE, ...)                                                                                      \
    STORE(out + i, vf_act(WOOLLY_ACT_GELU_TANH, LOAD(x + i __VA_ARGS__)) __VA_ARGS__);
    if (act == WOOLLY_ACT_SILU) EACH_VECTOR(n, SILU);
    else EACH_VECTOR(n, GELU);
#undef SILU
#undef GELU
}

/* cap tanh(x / cap), tanh(u) = 2 / (1 + exp(-2 u)) - 1 */
static INLINE vf vf_softcap(vf x, float cap) {
    return vf_sub(x_sigmoid(vf_set1(2 * cap), vf_mul(x, vf_set1(2 / cap))), vf_set1(cap));
}

static void softcap_f32(const float *x, float cap, int64_t n, float *out) {
#define STEP(i, LOAD, STORE, ...) STORE(out + i, vf_softcap(LOAD(x + i __VA_ARGS__), cap) __VA_ARGS__);
    EACH_VECTOR(n, STEP);
#undef STEP
}

static void rmsnorm_f32(const float *x, const float *weight, int64_t n, float eps, float *out) {
    vf squares = vf_set1(0);
#define SQUARE(i, LOAD, STORE, ...) { vf v = LOAD(x + i __VA_ARGS__); squares = vf_fma(v, v, squares); }
    EACH_VECTOR(n, SQUARE);
#undef SQUARE
    vf inverse = vf_set1(1.0f / __builtin_sqrtf(vf_sum(squares) / (float)n + eps));
#define STEP(i, LOAD, STORE, ...)                                                                                      \
    STORE(out + i, vf_mul(vf_mul(LOAD(x + i __VA_ARGS__), inverse), LOAD(weight + i __VA_ARGS__)) __VA_ARGS__);
    EACH_VECTOR(n, STEP);
#undef STEP
}

/* the centred values wait in out: its tail loads as zeros, which x minus the mean would not */
static void layernorm_f32(const float *x, const float *weight, const float *bias, int64_t n, float eps, float *out) {
    vf total = vf_set1(0), squares = vf_set1(0);
#define SUM(i, LOAD, STORE, ...) total = vf_add(total, LOAD(x + i __VA_ARGS__));
    EACH_VECTOR(n, SUM);
#undef SUM
    vf mean = vf_set1(vf_sum(total) / (float)n);
#define CENTRE(i, LOAD, STORE, ...) STORE(out + i, vf_sub(LOAD(x + i __VA_ARGS__), mean) __VA_ARGS__);
    EACH_VECTOR(n, CENTRE);
#undef CENTRE
#define SQUARE(i, LOAD, STORE, ...) { vf v = LOAD(out + i __VA_ARGS__); squares = vf_fma(v, v, squares); }
    EACH_VECTOR(n, SQUARE);
#undef SQUARE
    vf inverse = vf_set1(1.0f / __builtin_sqrtf(vf_sum(squares) / (float)n + eps));
#define STEP(i, LOAD, STORE, ...)                                                                                      \
    STORE(out + i, vf_fma(vf_mul(LOAD(out + i __VA_ARGS__), inverse), LOAD(weight + i __VA_ARGS__),                    \
                          LOAD(bias + i __VA_ARGS__)) __VA_ARGS__);
    EACH_VECTOR(n, STEP);
#undef STEP
}

static void softmax_f32(const float *x, int64_t n, float *out) {
    if (n <= 0) return;
    float most = x[0];
    for (int64_t i = 1; i < n; i++) most = most > x[i] ? most : x[i];
    vf total = vf_set1(0);
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        vf e = vf_exp(vf_sub(vf_load(x + i), vf_set1(most)));
        total = vf_add(total, e);
        vf_store(out + i, e);
    }
    if (i < n) {
        vf_store_n(out + i, vf_exp(vf_sub(vf_load_n(x + i, n - i), vf_set1(most))), n - i);
        total = vf_add(total, vf_load_n(out + i, n - i)); /* the lanes beyond n read as zero */
    }
    scale_f32(out, 1.0f / vf_sum(total), n, out);
}

/* q = 256 hi + lo = round(x / d), half to even, where d is the least power of two that keeps |q| <= 32639; -128 is no digit,
 * as AVX2 cannot negate it: such a q is one more. NaN, infinite and absurdly large activations make the scale NaN, so that
 * they cannot go unnoticed. */
enum { Q16_MOST = 127 * 256 + 127 };
static const int32_t Q16_LEAST_BITS = 0x0a4fb11f; /* of 1e-32: the scale of smaller activations would be near the denormals */
static const int32_t Q16_MOST_BITS = 0x71800000;  /* of 2^100: dot products of larger ones might overflow on their way */

/* The scale of a block whose largest magnitude has these bits, and its inverse */
static INLINE void q16_scale(int32_t bits, float *d, float *inverse) {
    /* max|x| = m 2^e: 2^(e - 14) serves if m <= 32639 / 2^14, twice that otherwise */
    int32_t exponent = ((bits + (0x7fffff - (Q16_MOST << 9 & 0x7fffff))) >> 23) - 14;
    int32_t d_bits = exponent << 23, inverse_bits = (254 - exponent) << 23;
    if (bits < Q16_LEAST_BITS) d_bits = inverse_bits = 0;
    if (bits >= Q16_MOST_BITS) d_bits = 0x7fc00000, inverse_bits = 0;
    memcpy(d, &d_bits, 4);
    memcpy(inverse, &inverse_bits, 4);
}

/* The same for 8 bits: d brings the largest magnitude to 127 */
static INLINE void q8_scale(int32_t bits, float *d, float *inverse) {
    const int32_t nan_bits = 0x7fc00000;
    float most;
    memcpy(&most, &bits, 4);
    *d = most / 127;
    *inverse = 127 / most;
    if (bits < Q16_LEAST_BITS) *d = *inverse = 0;
    if (bits < Q16_MOST_BITS) return;
    memcpy(d, &nan_bits, 4);
    *inverse = 0;
}

static INLINE vi rounded(vf x) {
    const vf magic = vf_set1(12582912.0f); /* 1.5 * 2^23: adding it leaves round(x) in the low bits */
    return vi_add(vf_bits(vf_add(x, magic)), vi_set1(-0x4b400000));
}

/* 32 values -> their digits, and the words that are both together, which it returns */
static INLINE vi quantize_digits(int digits, const float *x, float inverse, int8_t *hi, int8_t *lo, int16_t *words) {
    const vf all = vf_set1(inverse);
    vi q = vi_words(rounded(vf_mul(vf_load(x), all)), rounded(vf_mul(vf_load(x + 16), all)));
    vi high = vi_sra16(vi_add16(q, vi_set1(128 * 0x10001)), 8), upper = vi_sll16(high, 8);
    vi low = vi_max16(vi_sub16(q, upper), vi_set1((int32_t)0xff81ff81)); /* -127 */
    vi_store_bytes(hi, high);
    vi_store_bytes(lo, low);
    q = vi_add16(upper, low);
    if (digits == 2) vi_store(words, q);
    return q;
}

/* n <= 4 blocks from x on: their maxima and sums are reduced together */
static INLINE void quantize_blocks(int digits, const float *x, int n, int8_t *hi, int8_t *lo, int16_t *words, float *d,
                                   float *sum, int32_t *corr, int32_t *corr16) {
    vi magnitude[4], q[4];
    int32_t bits[4], sums[8];
    const vi no_sign = vi_set1(0x7fffffff), zero = vi_set1(0);
    /* as integers: a NaN's bits are above infinity's, which are above all finite ones */
    UNROLL for (int b = 0; b < 4; b++)
        magnitude[b] = b < n ? vi_max(vi_and(vf_bits(vf_load(x + 32 * b)), no_sign),
                                      vi_and(vf_bits(vf_load(x + 32 * b + 16)), no_sign)) : zero;
    vi_hmax4(magnitude, bits);
    UNROLL for (int b = 0; b < 4; b++) {
        if (b >= n) {
            q[b] = zero;
            continue;
        }
        float inverse;
        if (digits == 2) q16_scale(bits[b], &d[b], &inverse);
        else q8_scale(bits[b], &d[b], &inverse);
        q[b] = quantize_digits(digits, x + 32 * b, inverse, hi + 32 * b, lo + 32 * b, words + 32 * b);
    }
    vi_hsum4_words(q, sums);
    for (int b = 0; b < n; b++) {
        sum[b] = (float)(sums[2 * b] + sums[2 * b + 1]) * d[b];
        corr[b] = -128 * (sums[2 * b] + sums[2 * b + 1]);
        corr16[2 * b] = -128 * sums[2 * b];
        corr16[2 * b + 1] = -128 * sums[2 * b + 1];
    }
}

static INLINE void quantize_record(int digits, const float *x, int64_t n_k, uint8_t *record) {
    int64_t n_blocks = n_k / WOOLLY_QBLOCK, b = 0;
    int8_t *hi = (int8_t *)record, *lo = hi + n_k;
    int16_t *words = (int16_t *)(lo + n_k);
    float *d = (float *)(record + woolly_q16_scales(n_k)), *sum = d + n_blocks;
    int32_t *corr = (int32_t *)(sum + n_blocks), *corr16 = corr + n_blocks;
    for (; b + 4 <= n_blocks; b += 4)
        quantize_blocks(digits, x + 32 * b, 4, hi + 32 * b, lo + 32 * b, words + 32 * b, d + b, sum + b, corr + b,
                        corr16 + 2 * b);
    for (; b < n_blocks; b++)
        quantize_blocks(digits, x + 32 * b, 1, hi + 32 * b, lo + 32 * b, words + 32 * b, d + b, sum + b, corr + b,
                        corr16 + 2 * b);
}

static void quantize_q16(const float *x, int64_t n_k, uint8_t *record) { quantize_record(2, x, n_k, record); }
static void quantize_q8(const float *x, int64_t n_k, uint8_t *record) { quantize_record(1, x, n_k, record); }

#if HAS_AMX || HAS_BF16
/* 16 small integers times a power of two, as bf16: cut off, not rounded, as they fit */
static INLINE void store_bf16(uint16_t *out, vf x) {
    _mm256_storeu_si256((__m256i *)out, _mm512_cvtepi32_epi16(vi_srl(vf_bits(x), 16)));
}

/* 0, 2, 1, 3 of each four: the order in which weights are made */
static INLINE void store_digits(uint16_t *out, vf x) {
    store_bf16(out, vf_of_bits(_mm512_shuffle_epi32(vf_bits(x), _MM_PERM_DBCA)));
}

static void bf16_of_q16(const uint8_t *record, int64_t n_k, int64_t col, uint16_t *bf16) {
    const int8_t *hi = (const int8_t *)record, *lo = hi + n_k;
    const float *d = (const float *)(record + woolly_q16_scales(n_k));
    uint16_t *out = bf16 + col / 16 * (32 * n_k) + col % 16 * 32;
    for (int64_t k = 0; k < n_k; k += 16) {
        vf scale = vf_set1(d[k / 32]);
        uint16_t *at = out + k / 32 * 1024 + k % 32;
        store_digits(at, vf_mul(vf_mul(vf_load_i8(hi + k), vf_set1(256)), scale));
        store_digits(at + 512, vf_mul(vf_load_i8(lo + k), scale));
    }
}

static void bf16_of_q8(const uint8_t *record, int64_t n_k, int64_t col, uint16_t *bf16) {
    const int8_t *lo = (const int8_t *)record + n_k;
    uint16_t *out = bf16 + col / 16 * (16 * n_k) + col % 16 * 32;
    for (int64_t k = 0; k < n_k; k += 16) store_digits(out + k / 32 * 512 + k % 32, vf_load_i8(lo + k));
}
#endif

static void dequantize_q16(const uint8_t *record, int64_t n_k, float *out) {
    const int8_t *hi = (const int8_t *)record, *lo = hi + n_k;
    const float *d = (const float *)(record + woolly_q16_scales(n_k));
    for (int64_t k = 0; k < n_k; k++) out[k] = d[k / WOOLLY_QBLOCK] * (float)(256 * hi[k] + lo[k]);
}

/* (a, b) -> (a cos - b sin, b cos + a sin) for `half` pairs, whose members are `step` apart in x and in y */
static INLINE void rope_pairs(float *restrict x, float *restrict y, int64_t step, int64_t half, const float *restrict cos,
                              const float *restrict sin) {
    for (int64_t i = 0; i < half; i++) {
        float a = x[step * i], b = y[step * i];
        x[step * i] = a * cos[i] - b * sin[i];
        y[step * i] = b * cos[i] + a * sin[i];
    }
}

/* Pairs are (i, i + n_rot / 2) or (2 i, 2 i + 1) */
static void rope_f32(int pairing, float *x, int64_t n_rot, const float *cos, const float *sin) {
    if (pairing == WOOLLY_ROPE_NEOX)
        rope_pairs(x, x + n_rot / 2, 1, n_rot / 2, cos, sin);
    else
        rope_pairs(x, x + 1, 2, n_rot / 2, cos, sin);
}

#endif
