/* What avx2.h and avx512.h share: the last steps of reductions, from 8 lanes down, and operations on single numbers. */
#include <immintrin.h>

static INLINE float sum_x8(__m256 v) {
    __m128 c = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    c = _mm_add_ps(c, _mm_movehl_ps(c, c));
    return _mm_cvtss_f32(_mm_add_ss(c, _mm_shuffle_ps(c, c, 1)));
}
static INLINE float hmax_x8(__m256 v) {
    __m128 c = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    c = _mm_max_ps(c, _mm_movehl_ps(c, c));
    return _mm_cvtss_f32(_mm_max_ss(c, _mm_shuffle_ps(c, c, 1)));
}
/* maxima and totals of the upper and lower lanes */
static INLINE __m128i max_x8(__m256i v) { return _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1)); }
static INLINE __m128i sum_i32_x8(__m256i v) { return _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1)); }
/* totals (or maxima) of four vectors at once: transposed in 128-bit lanes, so that half the shuffles are shared */
static INLINE __m128i fold4_x4(__m128i a, __m128i b, __m128i c, __m128i d, int maximum) {
    __m128i ab_lo = _mm_unpacklo_epi32(a, b), ab_hi = _mm_unpackhi_epi32(a, b);
    __m128i cd_lo = _mm_unpacklo_epi32(c, d), cd_hi = _mm_unpackhi_epi32(c, d);
    __m128i ab = maximum ? _mm_max_epi32(ab_lo, ab_hi) : _mm_add_epi32(ab_lo, ab_hi);
    __m128i cd = maximum ? _mm_max_epi32(cd_lo, cd_hi) : _mm_add_epi32(cd_lo, cd_hi);
    __m128i lo = _mm_unpacklo_epi64(ab, cd), hi = _mm_unpackhi_epi64(ab, cd);
    return maximum ? _mm_max_epi32(lo, hi) : _mm_add_epi32(lo, hi);
}
/* where vb_low_words and vb_high_words find their bytes; -1 is zero */
#define LOW_WORDS_OF_FOURS _mm_setr_epi8(0, -1, 1, -1, 4, -1, 5, -1, 8, -1, 9, -1, 12, -1, 13, -1)
#define HIGH_WORDS_OF_FOURS _mm_setr_epi8(2, -1, 3, -1, 6, -1, 7, -1, 10, -1, 11, -1, 14, -1, 15, -1)
static INLINE float f32_fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
static INLINE float f32_of_f16(uint16_t h) { return _cvtsh_ss(h); }
static INLINE uint16_t f16_of_f32(float x) { return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
