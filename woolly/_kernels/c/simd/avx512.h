/* AVX-512 F/BW/DQ/VL + VNNI. See scalar.h for what each operation means. */
#include "x86.h"

typedef __m512 vf;  /* 16 floats */
typedef __m512i vi; /* 16 int32 */
typedef __m512i vb; /* 64 bytes: 4 for each of 16 rows */

#define ISA_NAME "avx512"
#define INT_RV 2        /* row groups and columns of the integer tile: 24 of 32 registers hold sums */
#define INT_NC 6
#define INT_SUMS_STAY 1
#define INT_TILED 9     /* columns from which a tile pays */
#define INT_KEEPS_SCALES 1
#define FLOAT_RV 2      /* row groups and columns of the float tile */
#define FLOAT_NC 12
#define DOT_FULL_BIASED 1
#define DOT_LOW_MOST 255
#if __has_include(<amxbf16intrin.h>)
#define HAS_AMX 1
#else
#define HAS_AMX 0
#endif

#if __has_include(<avx512bf16intrin.h>)
#define HAS_BF16 1
#else
#define HAS_BF16 0
#endif

static INLINE vf vf_load(const float *p) { return _mm512_loadu_ps(p); }
static INLINE void vf_store(float *p, vf a) { _mm512_storeu_ps(p, a); }
static INLINE vf vf_load_n(const float *p, int64_t n) { return _mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p); }
static INLINE void vf_store_n(float *p, vf a, int64_t n) { _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), a); }
static INLINE vf vf_set1(float a) { return _mm512_set1_ps(a); }
static INLINE vf vf_add(vf a, vf b) { return _mm512_add_ps(a, b); }
static INLINE vf vf_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
static INLINE vf vf_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
static INLINE vf vf_div(vf a, vf b) { return _mm512_div_ps(a, b); }
static INLINE vf vf_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
static INLINE vf vf_max(vf a, vf b) { return _mm512_max_ps(a, b); }
static INLINE vf vf_min(vf a, vf b) { return _mm512_min_ps(a, b); }
static INLINE vf vf_neg(vf a) { return _mm512_xor_ps(a, _mm512_set1_ps(-0.0f)); }
static INLINE vf vf_zero_below(vf a, vf x, float limit) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(limit), _CMP_NLT_UQ), a);
}
static INLINE vf vf_from_vi(vi a) { return _mm512_cvtepi32_ps(a); }
static INLINE vf vf_of_nibbles(vi a) {
    return _mm512_permutexvar_ps(a, _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
}
static INLINE vi vf_bits(vf a) { return _mm512_castps_si512(a); }
static INLINE vf vf_of_bits(vi a) { return _mm512_castsi512_ps(a); }
static INLINE vf vf_load_f16(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
static INLINE void vf_store_f16(uint16_t *p, vf a) {
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
static INLINE vf vf_load_bf16(const uint16_t *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}
static INLINE vf vf_load_i8(const int8_t *p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
}

static INLINE vi vi_load(const void *p) { return _mm512_loadu_si512(p); }
static INLINE void vi_store(void *p, vi a) { _mm512_storeu_si512(p, a); }
static INLINE vi vi_load_u8(const uint8_t *p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)); }
static INLINE vi vi_load_u16(const uint16_t *p) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)); }
static INLINE vi vi_set1(int32_t a) { return _mm512_set1_epi32(a); }
static INLINE vi vi_add(vi a, vi b) { return _mm512_add_epi32(a, b); }
static INLINE vi vi_sub(vi a, vi b) { return _mm512_sub_epi32(a, b); }
static INLINE vi vi_and(vi a, vi b) { return _mm512_and_si512(a, b); }
static INLINE vi vi_or(vi a, vi b) { return _mm512_or_si512(a, b); }
static INLINE vi vi_xor(vi a, vi b) { return _mm512_xor_si512(a, b); }
static INLINE vi vi_max(vi a, vi b) { return _mm512_max_epi32(a, b); }
#define vi_sra(a, n) _mm512_srai_epi32(a, n)
#define vi_srl(a, n) _mm512_srli_epi32(a, n)
#define vi_sll(a, n) _mm512_slli_epi32(a, n)

static INLINE vi vi_words(vi a, vi b) {
    const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
    return _mm512_permutexvar_epi64(order, _mm512_packs_epi32(a, b));
}
static INLINE vi vi_add16(vi a, vi b) { return _mm512_add_epi16(a, b); }
static INLINE vi vi_sub16(vi a, vi b) { return _mm512_sub_epi16(a, b); }
static INLINE vi vi_mul16(vi a, vi b) { return _mm512_mullo_epi16(a, b); }
static INLINE vi vi_merge16(vi low, vi high) { return _mm512_mask_blend_epi16(0xaaaaaaaa, low, high); }
static INLINE vi vi_max16(vi a, vi b) { return _mm512_max_epi16(a, b); }
#define vi_sra16(a, n) _mm512_srai_epi16(a, n)
#define vi_sll16(a, n) _mm512_slli_epi16(a, n)
static INLINE void vi_store_bytes(int8_t *p, vi words) {
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi16_epi8(words));
}

static INLINE vb vb_lookup16(const uint8_t *table, vb index) {
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)table)), index);
}
static INLINE vb vb_add_where(vb a, vb bits, vb mask, vb value) {
    return _mm512_mask_add_epi8(a, _mm512_test_epi8_mask(bits, mask), a, value);
}

static INLINE vi dot_low(vi acc, vb w, const int8_t *x) {
    int32_t four;
    memcpy(&four, x, 4);
    return _mm512_dpbusd_epi32(acc, w, _mm512_set1_epi32(four));
}
static INLINE vi dot_full(vi acc, vb w, const int8_t *x) { return dot_low(acc, w, x); }
static INLINE vi vb_low_words(vb a) { return _mm512_shuffle_epi8(a, _mm512_broadcast_i32x4(LOW_WORDS_OF_FOURS)); }
static INLINE vi vb_high_words(vb a) { return _mm512_shuffle_epi8(a, _mm512_broadcast_i32x4(HIGH_WORDS_OF_FOURS)); }
static INLINE vi dot_pairs(vi acc, vi a, vi b) { return _mm512_dpwssd_epi32(acc, a, b); }
static INLINE vi dot_words(vi acc, vi w, const int16_t *x) {
    int32_t two;
    memcpy(&two, x, 4);
    return _mm512_dpwssd_epi32(acc, w, _mm512_set1_epi32(two));
}

static INLINE float vf_sum(vf a) { return sum_x8(_mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1))); }
static INLINE float vf_hmax(vf a) { return hmax_x8(_mm256_max_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1))); }
static INLINE __m128i max_x16(vi a) {
    return max_x8(_mm256_max_epi32(_mm512_castsi512_si256(a), _mm512_extracti64x4_epi64(a, 1)));
}
static INLINE void vi_hmax4(const vi *v, int32_t *out) {
    _mm_storeu_si128((__m128i *)out, fold4_x4(max_x16(v[0]), max_x16(v[1]), max_x16(v[2]), max_x16(v[3]), 1));
}
static INLINE void vi_hsum4_words(const vi *v, int32_t *out) {
    for (int j = 0; j < 4; j += 2) {
        vi x = _mm512_madd_epi16(v[j], _mm512_set1_epi16(1)), y = _mm512_madd_epi16(v[j + 1], _mm512_set1_epi16(1));
        __m128i x0 = sum_i32_x8(_mm512_castsi512_si256(x)), x1 = sum_i32_x8(_mm512_extracti64x4_epi64(x, 1));
        __m128i y0 = sum_i32_x8(_mm512_castsi512_si256(y)), y1 = sum_i32_x8(_mm512_extracti64x4_epi64(y, 1));
        _mm_storeu_si128((__m128i *)(out + 2 * j), fold4_x4(x0, x1, y0, y1, 0));
    }
}

typedef struct { __m512i even, odd; } vw;
static INLINE vw vw_of_vi(vi x) { return (vw){x, _mm512_srli_epi64(x, 32)}; }
static INLINE vi vi_of_vw(vw x) { return _mm512_mask_blend_epi32(0xaaaa, x.even, _mm512_slli_epi64(x.odd, 32)); }
static INLINE vw vw_mul(vw x, uint32_t m) {
    __m512i all = _mm512_set1_epi32((int32_t)m);
    return (vw){_mm512_mul_epu32(x.even, all), _mm512_mul_epu32(x.odd, all)};
}
static INLINE __m512i high_xor_x8(__m512i x, __m512i y, __m512i z) {
    return _mm512_ternarylogic_epi32(_mm512_shuffle_epi32(x, _MM_PERM_DDBB), y, z, 0x96);
}
static INLINE vw vw_high_xor(vw x, vw y, uint32_t z) {
    __m512i all = _mm512_set1_epi32((int32_t)z);
    return (vw){high_xor_x8(x.even, y.even, all), high_xor_x8(x.odd, y.odd, all)};
}
