/* The portable instruction set, and the definition of every operation: a vector is 16 lanes in an array.
 *
 * GCC's and Clang's vector types are used for plain arithmetic, so that a baseline compiler still makes SIMD of it. An
 * fma is fmaf: one rounding, in software where the machine has none. min and max return their second argument when
 * either is NaN, as x86 does. Shifts take constants.
 */
#include <math.h>

typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef vi vb;
typedef uint32_t vu __attribute__((vector_size(64)));
typedef int16_t vi16 __attribute__((vector_size(64)));
typedef uint16_t vu16 __attribute__((vector_size(64)));
typedef uint8_t vu8 __attribute__((vector_size(64)));

#define ISA_NAME "scalar"
#define INT_RV 1
#define INT_NC 2
#define INT_SUMS_STAY 1 /* in registers, from block to block */
#define INT_DIRECT_LEVELS 1
#define INT_DIRECT_RARE 1
#define INT_KEEPS_SCALES 0
#define FLOAT_RV 1
#define FLOAT_NC 2
#define HAS_AMX 0
#define HAS_BF16 0
#define DOT_LOW_MOST 255  /* dot_low takes bytes up to it */
#define DOT_FULL_BIASED 1 /* dot_full takes bytes biased by 128 and leaves the correction to its caller */

#define LANES(i) for (int i = 0; i < 16; i++)

static INLINE float f32_fma(float a, float b, float c) { return fmaf(a, b, c); }

static INLINE float f32_of_f16(uint16_t h) {
    int32_t rest = h & 0x7fff; /* no branches: vf_load_f16 makes SIMD of this */
    float out, small = (float)rest * 0x1p-24f; /* of subnormals */
    uint32_t bits;
    memcpy(&bits, &small, 4);
    bits = rest < 0x400 ? bits : ((uint32_t)rest << 13) + 0x38000000;
    bits |= (rest >= 0x7c00 ? 0x7f800000 : 0) | (rest > 0x7c00 ? 0x400000 : 0); /* infinity, or a quiet NaN */
    bits |= (uint32_t)(h & 0x8000) << 16;
    memcpy(&out, &bits, 4);
    return out;
}

/* rounds to nearest even, as VCVTPS2PH does */
static INLINE uint16_t f16_of_f32(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return (uint16_t)(sign | 0x7e00 | (bits >> 13 & 0x3ff));
    if (bits >= 0x477ff000) return sign | 0x7c00;
    if (bits >= 0x38800000) return (uint16_t)(sign | ((bits + 0xfff + (bits >> 13 & 1) - 0x38000000) >> 13));
    float small; /* subnormal half: let float addition do the rounding at 2^-24 */
    memcpy(&small, &bits, 4);
    small += 0.5f;
    memcpy(&bits, &small, 4);
    return (uint16_t)(sign | (bits - 0x3f000000));
}

static INLINE vf vf_load(const float *p) { vf v; memcpy(&v, p, 64); return v; }
static INLINE void vf_store(float *p, vf v) { memcpy(p, &v, 64); }
static INLINE vf vf_load_n(const float *p, int64_t n) { vf v = {0}; memcpy(&v, p, (size_t)(4 * n)); return v; }
static INLINE void vf_store_n(float *p, vf v, int64_t n) { memcpy(p, &v, (size_t)(4 * n)); }
static INLINE vf vf_set1(float x) { return x - (vf){0}; }
static INLINE vf vf_add(vf x, vf y) { return x + y; }
static INLINE vf vf_sub(vf x, vf y) { return x - y; }
static INLINE vf vf_mul(vf x, vf y) { return x * y; }
static INLINE vf vf_div(vf x, vf y) { return x / y; }
static INLINE vf vf_fma(vf x, vf y, vf z) {
    vf v;
    LANES(i) v[i] = fmaf(x[i], y[i], z[i]);
    return v;
}
static INLINE vi vi_select(vi mask, vi x, vi y) { return (x & mask) | (y & ~mask); }
static INLINE vf vf_max(vf x, vf y) { return (vf)vi_select(x > y, (vi)x, (vi)y); }
static INLINE vf vf_min(vf x, vf y) { return (vf)vi_select(x < y, (vi)x, (vi)y); }
static INLINE vf vf_neg(vf x) { return -x; }
/* v, but zero in the lanes where x < limit */
static INLINE vf vf_zero_below(vf v, vf x, float limit) { return (vf)((vi)v & ~(x < vf_set1(limit))); }
static INLINE vf vf_from_vi(vi x) { return __builtin_convertvector(x, vf); }
static INLINE vi vf_bits(vf x) { return (vi)x; }
static INLINE vf vf_of_bits(vi x) { return (vf)x; }
static INLINE vf vf_load_f16(const uint16_t *p) {
    vf v;
    LANES(i) v[i] = f32_of_f16(p[i]);
    return v;
}
static INLINE void vf_store_f16(uint16_t *p, vf v) { LANES(i) p[i] = f16_of_f32(v[i]); }
static INLINE vf vf_load_bf16(const uint16_t *p) {
    vi v;
    LANES(i) v[i] = (int32_t)((uint32_t)p[i] << 16);
    return (vf)v;
}
static INLINE vf vf_load_i8(const int8_t *p) {
    vf v;
    LANES(i) v[i] = p[i];
    return v;
}

static INLINE vi vi_load(const void *p) { vi v; memcpy(&v, p, 64); return v; }
static INLINE void vi_store(void *p, vi v) { memcpy(p, &v, 64); }
static INLINE vi vi_load_u8(const uint8_t *p) {
    vi v;
    LANES(i) v[i] = p[i];
    return v;
}
static INLINE vi vi_load_u16(const uint16_t *p) {
    vi v;
    LANES(i) v[i] = p[i];
    return v;
}
static INLINE vi vi_set1(int32_t x) { return x - (vi){0}; }
static INLINE vi vi_add(vi x, vi y) { return (vi)((vu)x + (vu)y); }
static INLINE vi vi_sub(vi x, vi y) { return (vi)((vu)x - (vu)y); }
static INLINE vi vi_and(vi x, vi y) { return x & y; }
static INLINE vi vi_or(vi x, vi y) { return x | y; }
static INLINE vi vi_xor(vi x, vi y) { return x ^ y; }
static INLINE vi vi_max(vi x, vi y) { return vi_select(x > y, x, y); }
#define vi_sra(x, n) ((vi)(x) >> (n))
#define vi_srl(x, n) ((vi)((vu)(x) >> (n)))
#define vi_sll(x, n) ((vi)((vu)(x) << (n)))
/* the lowest 4 bits of each lane as a number */
static INLINE vf vf_of_nibbles(vi x) { return vf_from_vi(x & 15); }
/* a vector as 32 words of 16 bits: from 16 values each, saturating; arithmetic, without a carry from word to word; their low
 * bytes, where a signed byte holds them */
static INLINE vi vi_words(vi x, vi y) {
    vi16 v;
    LANES(i) v[i] = (int16_t)(x[i] < -32768 ? -32768 : x[i] > 32767 ? 32767 : x[i]);
    LANES(i) v[16 + i] = (int16_t)(y[i] < -32768 ? -32768 : y[i] > 32767 ? 32767 : y[i]);
    return (vi)v;
}
static INLINE vi vi_add16(vi x, vi y) { return (vi)((vu16)x + (vu16)y); }
static INLINE vi vi_sub16(vi x, vi y) { return (vi)((vu16)x - (vu16)y); }
static INLINE vi vi_mul16(vi x, vi y) { return (vi)((vu16)x * (vu16)y); }
/* words 0, 2, 4 .. of one vector, 1, 3, 5 .. of another */
static INLINE vi vi_merge16(vi low, vi high) { return (low & 0xffff) | (high & (int32_t)0xffff0000); }
static INLINE vi vi_max16(vi x, vi y) { return vi_select((vi)((vi16)x > (vi16)y), x, y); }
#define vi_sra16(x, n) ((vi)((vi16)(x) >> (n)))
#define vi_sll16(x, n) ((vi)((vu16)(x) << (n)))
static INLINE void vi_store_bytes(int8_t *p, vi words) {
    for (int i = 0; i < 32; i++) p[i] = (int8_t)((vi16)words)[i];
}

/* each byte of index, of 0 .. 15, through a table of 16 */
static INLINE vb vb_lookup16(const uint8_t *table, vb index) {
    uint8_t bytes[64];
    vi_store(bytes, index);
    for (int i = 0; i < 64; i++) bytes[i] = table[bytes[i]];
    return vi_load(bytes);
}
/* x, plus value in the bytes whose bit of mask is set in bits; mask has one bit a byte */
static INLINE vb vb_add_where(vb x, vb bits, vb mask, vb value) {
    return (vb)((vu8)x + ((vu8)value & (vu8)(((vu8)bits & (vu8)mask) != 0)));
}

/* acc[r] += sum over i of w[4 r + i] x[i]: unsigned weights of at most DOT_LOW_MOST, signed activations */
static INLINE vi dot_low(vi acc, vb w, const int8_t *x) {
    LANES(r) {
        uint32_t four = (uint32_t)w[r];
        acc[r] += (int32_t)(four & 255) * x[0] + (int32_t)(four >> 8 & 255) * x[1] +
                  (int32_t)(four >> 16 & 255) * x[2] + (int32_t)(four >> 24) * x[3];
    }
    return acc;
}
/* the same for weights of any byte value */
static INLINE vi dot_full(vi acc, vb w, const int8_t *x) { return dot_low(acc, w, x); }

/* bytes 0 and 1 of each row's four, or 2 and 3, widened to 16 bits */
static INLINE vi vb_low_words(vb x) { return vi_or(vi_and(x, vi_set1(0xff)), vi_sll(vi_and(x, vi_set1(0xff00)), 8)); }
static INLINE vi vb_high_words(vb x) { return vb_low_words(vi_srl(x, 16)); }
/* acc[r] += w[2 r] x[0] + w[2 r + 1] x[1]: signed words */
static INLINE vi dot_words(vi acc, vi w, const int16_t *x) {
    LANES(r) acc[r] += (int16_t)w[r] * x[0] + (w[r] >> 16) * x[1];
    return acc;
}
/* the same for two vectors of words */
static INLINE vi dot_pairs(vi acc, vi x, vi y) {
    LANES(r) acc[r] += (int16_t)x[r] * (int16_t)y[r] + (x[r] >> 16) * (y[r] >> 16);
    return acc;
}

/* the fixed tree: halves folded onto each other, 8, 4, 2, 1 */
static INLINE float vf_sum(vf v) {
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; i++) v[i] += v[i + half];
    return v[0];
}
static INLINE float vf_hmax(vf v) {
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; i++) v[i] = v[i] > v[i + half] ? v[i] : v[i + half];
    return v[0];
}
/* maxima of four vectors each */
static INLINE void vi_hmax4(const vi *v, int32_t *out) {
    for (int j = 0; j < 4; j++) {
        out[j] = v[j][0];
        LANES(i) out[j] = v[j][i] > out[j] ? v[j][i] : out[j];
    }
}
/* totals of the lower and upper 16 words of each of four vectors */
static INLINE void vi_hsum4_words(const vi *v, int32_t *out) {
    for (int j = 0; j < 4; j++) {
        out[2 * j] = out[2 * j + 1] = 0;
        LANES(i) out[2 * j] += ((vi16)v[j])[i], out[2 * j + 1] += ((vi16)v[j])[16 + i];
    }
}

/* 16 unsigned numbers of 32 bits in lanes of 64; what the upper halves hold does not matter, except after vw_mul */
typedef struct { uint64_t lane[16]; } vw;
static INLINE vw vw_of_vi(vi x) {
    vw v;
    LANES(i) v.lane[i] = (uint32_t)x[i];
    return v;
}
static INLINE vi vi_of_vw(vw x) {
    vi v;
    LANES(i) v[i] = (int32_t)x.lane[i];
    return v;
}
/* all 64 bits of x m */
static INLINE vw vw_mul(vw x, uint32_t m) {
    LANES(i) x.lane[i] = (uint64_t)(uint32_t)x.lane[i] * m;
    return x;
}
/* (upper half of x) ^ y ^ z */
static INLINE vw vw_high_xor(vw x, vw y, uint32_t z) {
    LANES(i) x.lane[i] = x.lane[i] >> 32 ^ y.lane[i] ^ z;
    return x;
}
