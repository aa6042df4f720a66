/* AVX2 with FMA and F16C, and AVX-VNNI where the compiler is told so: each 16-lane vector is two registers. See scalar.h for
 * what each operation means. */
#include "x86.h"

typedef struct { __m256 a, b; } vf;
typedef struct { __m256i a, b; } vi;
typedef vi vb;

#ifdef __AVXVNNI__
#define ISA_NAME "avx_vnni"
#define DOT_FULL_BIASED 1
#define DOT_LOW_MOST 255
#else
#define ISA_NAME "avx2"
#define DOT_FULL_BIASED 0
#define DOT_LOW_MOST 127
#endif
#define INT_RV 1
#define INT_NC 6
#define INT_SUMS_STAY 0 /* 12 of 16 registers hold dot products, the sums lie in memory */
#define INT_DIRECT_K 2
#define INT_DIRECT_LEVELS 2
#define INT_DIRECT_RARE 1
#define INT_KEEPS_SCALES 0
#define FLOAT_RV 1
#define FLOAT_NC 6
#define HAS_AMX 0
#define HAS_BF16 0

#define VF2(expr_a, expr_b) ((vf){expr_a, expr_b})
#define VI2(expr_a, expr_b) ((vi){expr_a, expr_b})

static INLINE __m256i lanes_below(int64_t n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
static INLINE vf vf_load(const float *p) { return VF2(_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)); }
static INLINE void vf_store(float *p, vf v) {
    _mm256_storeu_ps(p, v.a);
    _mm256_storeu_ps(p + 8, v.b);
}
static INLINE vf vf_load_n(const float *p, int64_t n) {
    return VF2(_mm256_maskload_ps(p, lanes_below(n)), _mm256_maskload_ps(p + 8, lanes_below(n - 8)));
}
static INLINE void vf_store_n(float *p, vf v, int64_t n) {
    _mm256_maskstore_ps(p, lanes_below(n), v.a);
    _mm256_maskstore_ps(p + 8, lanes_below(n - 8), v.b);
}
static INLINE vf vf_set1(float x) { return VF2(_mm256_set1_ps(x), _mm256_set1_ps(x)); }
static INLINE vf vf_add(vf x, vf y) { return VF2(_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)); }
static INLINE vf vf_sub(vf x, vf y) { return VF2(_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)); }
static INLINE vf vf_mul(vf x, vf y) { return VF2(_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)); }
static INLINE vf vf_div(vf x, vf y) { return VF2(_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)); }
static INLINE vf vf_fma(vf x, vf y, vf z) { return VF2(_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)); }
static INLINE vf vf_max(vf x, vf y) { return VF2(_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)); }
static INLINE vf vf_min(vf x, vf y) { return VF2(_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)); }
static INLINE vf vf_neg(vf x) {
    __m256 sign = _mm256_set1_ps(-0.0f);
    return VF2(_mm256_xor_ps(x.a, sign), _mm256_xor_ps(x.b, sign));
}
static INLINE vf vf_zero_below(vf v, vf x, float limit) {
    __m256 bound = _mm256_set1_ps(limit);
    return VF2(_mm256_and_ps(v.a, _mm256_cmp_ps(x.a, bound, _CMP_NLT_UQ)),
               _mm256_and_ps(v.b, _mm256_cmp_ps(x.b, bound, _CMP_NLT_UQ)));
}
static INLINE vf vf_from_vi(vi x) { return VF2(_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)); }
static INLINE vi vf_bits(vf x) { return VI2(_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)); }
static INLINE vf vf_of_bits(vi x) { return VF2(_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)); }
static INLINE vf vf_load_f16(const uint16_t *p) {
    return VF2(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)),
               _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p + 8))));
}
static INLINE void vf_store_f16(uint16_t *p, vf v) {
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(v.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    _mm_storeu_si128((__m128i *)(p + 8), _mm256_cvtps_ph(v.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
static INLINE __m256 f32_of_bf16_x8(const uint16_t *p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16));
}
static INLINE vf vf_load_bf16(const uint16_t *p) { return VF2(f32_of_bf16_x8(p), f32_of_bf16_x8(p + 8)); }
static INLINE vf vf_load_i8(const int8_t *p) {
    return VF2(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p))),
               _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(p + 8)))));
}

static INLINE vi vi_load(const void *p) {
    return VI2(_mm256_loadu_si256((const __m256i *)p), _mm256_loadu_si256((const __m256i *)p + 1));
}
static INLINE void vi_store(void *p, vi x) {
    _mm256_storeu_si256((__m256i *)p, x.a);
    _mm256_storeu_si256((__m256i *)p + 1, x.b);
}
static INLINE vi vi_load_u8(const uint8_t *p) {
    return VI2(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p)),
               _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(p + 8))));
}
static INLINE vi vi_load_u16(const uint16_t *p) {
    return VI2(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)),
               _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(p + 8))));
}
static INLINE vi vi_set1(int32_t x) { return VI2(_mm256_set1_epi32(x), _mm256_set1_epi32(x)); }
static INLINE vi vi_add(vi x, vi y) { return VI2(_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)); }
static INLINE vi vi_sub(vi x, vi y) { return VI2(_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)); }
static INLINE vi vi_and(vi x, vi y) { return VI2(_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)); }
static INLINE vi vi_or(vi x, vi y) { return VI2(_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)); }
static INLINE vi vi_xor(vi x, vi y) { return VI2(_mm256_xor_si256(x.a, y.a), _mm256_xor_si256(x.b, y.b)); }
static INLINE vi vi_max(vi x, vi y) { return VI2(_mm256_max_epi32(x.a, y.a), _mm256_max_epi32(x.b, y.b)); }
static INLINE vf vf_of_nibbles(vi x) { return vf_from_vi(vi_and(x, vi_set1(15))); }
#define vi_sra(x, n) VI2(_mm256_srai_epi32((x).a, n), _mm256_srai_epi32((x).b, n))
#define vi_srl(x, n) VI2(_mm256_srli_epi32((x).a, n), _mm256_srli_epi32((x).b, n))
#define vi_sll(x, n) VI2(_mm256_slli_epi32((x).a, n), _mm256_slli_epi32((x).b, n))

static INLINE __m256i words_x16(__m256i x, __m256i y) { return _mm256_permute4x64_epi64(_mm256_packs_epi32(x, y), 0xd8); }
static INLINE vi vi_words(vi x, vi y) { return VI2(words_x16(x.a, x.b), words_x16(y.a, y.b)); }
static INLINE vi vi_add16(vi x, vi y) { return VI2(_mm256_add_epi16(x.a, y.a), _mm256_add_epi16(x.b, y.b)); }
static INLINE vi vi_sub16(vi x, vi y) { return VI2(_mm256_sub_epi16(x.a, y.a), _mm256_sub_epi16(x.b, y.b)); }
static INLINE vi vi_mul16(vi x, vi y) { return VI2(_mm256_mullo_epi16(x.a, y.a), _mm256_mullo_epi16(x.b, y.b)); }
static INLINE vi vi_merge16(vi low, vi high) {
    return VI2(_mm256_blend_epi16(low.a, high.a, 0xaa), _mm256_blend_epi16(low.b, high.b, 0xaa));
}
static INLINE vi vi_max16(vi x, vi y) { return VI2(_mm256_max_epi16(x.a, y.a), _mm256_max_epi16(x.b, y.b)); }
#define vi_sra16(x, n) VI2(_mm256_srai_epi16((x).a, n), _mm256_srai_epi16((x).b, n))
#define vi_sll16(x, n) VI2(_mm256_slli_epi16((x).a, n), _mm256_slli_epi16((x).b, n))
static INLINE void vi_store_bytes(int8_t *p, vi words) {
    _mm256_storeu_si256((__m256i *)p, _mm256_permute4x64_epi64(_mm256_packs_epi16(words.a, words.b), 0xd8));
}

static INLINE vb vb_lookup16(const uint8_t *table, vb index) {
    __m256i t = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)table));
    return VI2(_mm256_shuffle_epi8(t, index.a), _mm256_shuffle_epi8(t, index.b));
}
static INLINE __m256i add_where_x8(__m256i x, __m256i bits, __m256i mask, __m256i value) {
    return _mm256_add_epi8(x, _mm256_and_si256(_mm256_cmpeq_epi8(_mm256_and_si256(bits, mask), mask), value));
}
static INLINE vb vb_add_where(vb x, vb bits, vb mask, vb value) {
    return VI2(add_where_x8(x.a, bits.a, mask.a, value.a), add_where_x8(x.b, bits.b, mask.b, value.b));
}

#ifdef __AVXVNNI__
static INLINE __m256i dot_low_x8(__m256i acc, __m256i w, __m256i x) { return _mm256_dpbusd_avx_epi32(acc, w, x); }
static INLINE __m256i dot_full_x8(__m256i acc, __m256i w, __m256i x) { return dot_low_x8(acc, w, x); }
static INLINE __m256i dot_words_x8(__m256i acc, __m256i w, __m256i x) { return _mm256_dpwssd_avx_epi32(acc, w, x); }
#else
static INLINE __m256i dot_low_x8(__m256i acc, __m256i w, __m256i x) {
    return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1)));
}
/* |w| <= 127 would saturate nothing; a full byte times a pair does, so move the sign of w - 128 over to x */
static INLINE __m256i dot_full_x8(__m256i acc, __m256i w, __m256i x) {
    w = _mm256_xor_si256(w, _mm256_set1_epi8((char)0x80));
    return dot_low_x8(acc, _mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
}
static INLINE __m256i dot_words_x8(__m256i acc, __m256i w, __m256i x) {
    return _mm256_add_epi32(acc, _mm256_madd_epi16(w, x));
}
#endif
static INLINE __m256i four_bytes(const int8_t *x) {
    int32_t four;
    memcpy(&four, x, 4);
    return _mm256_set1_epi32(four);
}
static INLINE vi dot_low(vi acc, vb w, const int8_t *x) {
    __m256i four = four_bytes(x);
    return VI2(dot_low_x8(acc.a, w.a, four), dot_low_x8(acc.b, w.b, four));
}
static INLINE vi dot_full(vi acc, vb w, const int8_t *x) {
    __m256i four = four_bytes(x);
    return VI2(dot_full_x8(acc.a, w.a, four), dot_full_x8(acc.b, w.b, four));
}
static INLINE vi vb_low_words(vb x) {
    __m256i from = _mm256_broadcastsi128_si256(LOW_WORDS_OF_FOURS);
    return VI2(_mm256_shuffle_epi8(x.a, from), _mm256_shuffle_epi8(x.b, from));
}
static INLINE vi vb_high_words(vb x) {
    __m256i from = _mm256_broadcastsi128_si256(HIGH_WORDS_OF_FOURS);
    return VI2(_mm256_shuffle_epi8(x.a, from), _mm256_shuffle_epi8(x.b, from));
}
static INLINE vi dot_pairs(vi acc, vi x, vi y) {
    return VI2(dot_words_x8(acc.a, x.a, y.a), dot_words_x8(acc.b, x.b, y.b));
}
static INLINE vi dot_words(vi acc, vi w, const int16_t *x) {
    int32_t two;
    memcpy(&two, x, 4);
    __m256i both = _mm256_set1_epi32(two);
    return VI2(dot_words_x8(acc.a, w.a, both), dot_words_x8(acc.b, w.b, both));
}

static INLINE float vf_sum(vf v) { return sum_x8(_mm256_add_ps(v.a, v.b)); }
static INLINE float vf_hmax(vf v) { return hmax_x8(_mm256_max_ps(v.a, v.b)); }
static INLINE __m128i max_x16(vi v) { return max_x8(_mm256_max_epi32(v.a, v.b)); }
static INLINE void vi_hmax4(const vi *v, int32_t *out) {
    _mm_storeu_si128((__m128i *)out, fold4_x4(max_x16(v[0]), max_x16(v[1]), max_x16(v[2]), max_x16(v[3]), 1));
}
static INLINE __m128i sum_words_x16(__m256i v) { return sum_i32_x8(_mm256_madd_epi16(v, _mm256_set1_epi16(1))); }
static INLINE void vi_hsum4_words(const vi *v, int32_t *out) {
    for (int j = 0; j < 4; j += 2)
        _mm_storeu_si128((__m128i *)(out + 2 * j), fold4_x4(sum_words_x16(v[j].a), sum_words_x16(v[j].b),
                                                            sum_words_x16(v[j + 1].a), sum_words_x16(v[j + 1].b), 0));
}

typedef struct { __m256i a_even, a_odd, b_even, b_odd; } vw;
static INLINE vw vw_of_vi(vi x) { return (vw){x.a, _mm256_srli_epi64(x.a, 32), x.b, _mm256_srli_epi64(x.b, 32)}; }
static INLINE vi vi_of_vw(vw x) {
    return VI2(_mm256_blend_epi32(x.a_even, _mm256_slli_epi64(x.a_odd, 32), 0xaa),
               _mm256_blend_epi32(x.b_even, _mm256_slli_epi64(x.b_odd, 32), 0xaa));
}
static INLINE vw vw_mul(vw x, uint32_t m) {
    __m256i all = _mm256_set1_epi32((int32_t)m);
    return (vw){_mm256_mul_epu32(x.a_even, all), _mm256_mul_epu32(x.a_odd, all), _mm256_mul_epu32(x.b_even, all),
                _mm256_mul_epu32(x.b_odd, all)};
}
static INLINE __m256i high_xor_x4(__m256i x, __m256i y, __m256i z) {
    return _mm256_xor_si256(_mm256_xor_si256(_mm256_shuffle_epi32(x, 0xf5), z), y);
}
static INLINE vw vw_high_xor(vw x, vw y, uint32_t z) {
    __m256i all = _mm256_set1_epi32((int32_t)z);
    return (vw){high_xor_x4(x.a_even, y.a_even, all), high_xor_x4(x.a_odd, y.a_odd, all),
                high_xor_x4(x.b_even, y.b_even, all), high_xor_x4(x.b_odd, y.b_odd, all)};
}
