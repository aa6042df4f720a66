/* Loops that run a machine at its limit: multiply-adds in registers, and reads and writes of memory.
 *
 * They measure what the kernels are held against, and compute nothing of use. Each loop is compiled for its instruction
 * set by a target attribute and called only where the machine has it, so this needs no library of its own.
 */
#ifndef WOOLLY_PEAKS_H
#define WOOLLY_PEAKS_H

#include <stdint.h>
#include <string.h>

#ifdef WOOLLY_X86
#include <immintrin.h>

#include "amx_config.h"
#endif

#if __has_include(<avxvnniintrin.h>)
#define LIMITS_AVX_VNNI
#endif

#define LIMITS_UNROLL _Pragma("GCC unroll 24")
#define LIMITS_FN static __attribute__((noinline))

/* More chains than latency x units: 4 cycles x 2 units on every x86 core of the last ten years, some have 5 x 2 */
enum { PEAK_CHAINS_32 = 24, PEAK_CHAINS_16 = 12 };

/* A loop of n steps over CHAINS independent sums. The sums go through an empty asm, so that no step can be left out,
 * folded into another or moved out of the loop */
#define DEFINE_PEAK(NAME, TARGET, VEC, CHAINS, SET, STEP, X, Y)                                                        \
    TARGET LIMITS_FN void NAME(int64_t n) {                                                                            \
        VEC sum[CHAINS];                                                                                               \
        __typeof__(X) x = X, y = Y;                                                                                    \
        LIMITS_UNROLL for (int i = 0; i < CHAINS; i++) sum[i] = SET(i);                                                \
        for (int64_t k = 0; k < n; k++) {                                                                              \
            __asm__ volatile("" : LIMITS_REG(x), LIMITS_REG(y));                                                       \
            LIMITS_UNROLL for (int i = 0; i < CHAINS; i++) sum[i] = STEP(sum[i], x, y);                                \
        }                                                                                                              \
        LIMITS_UNROLL for (int i = 0; i < CHAINS; i++) __asm__ volatile("" : LIMITS_REG(sum[i]));                      \
    }

#ifdef WOOLLY_X86

#define LIMITS_REG(v) "+v"(v)
#define TARGET_AVX512 __attribute__((target("avx512f,avx512vnni")))
#define TARGET_BF16 __attribute__((target("avx512f,avx512bf16")))
#define FMA_512(s, x, y) _mm512_fmadd_ps(x, y, s)
#define DOT_512(s, x, y) _mm512_dpbusd_epi32(s, x, y)
#define WORDS_512(s, x, y) _mm512_dpwssd_epi32(s, x, y)
#define BF16_512(s, x, y) _mm512_dpbf16_ps(s, (__m512bh)(x), (__m512bh)(y))
DEFINE_PEAK(peak_fma_avx512, TARGET_AVX512, __m512, PEAK_CHAINS_32, _mm512_set1_ps, FMA_512, _mm512_set1_ps(1e-3f),
            _mm512_set1_ps(1e-3f))
DEFINE_PEAK(peak_int8_avx512, TARGET_AVX512, __m512i, PEAK_CHAINS_32, _mm512_set1_epi32, DOT_512,
            _mm512_set1_epi8(3), _mm512_set1_epi8(-5))
DEFINE_PEAK(peak_int16_avx512, TARGET_AVX512, __m512i, PEAK_CHAINS_32, _mm512_set1_epi32, WORDS_512,
            _mm512_set1_epi16(3), _mm512_set1_epi16(-5))
DEFINE_PEAK(peak_bf16_avx512, TARGET_BF16, __m512, PEAK_CHAINS_32, _mm512_set1_ps, BF16_512,
            _mm512_set1_epi16(0x3a83), _mm512_set1_epi16(0x3a83)) /* 0.001 */
#undef LIMITS_REG

/* Tiles of 16 rows of 64 bytes: four sums, and two of each factor */
#define DEFINE_TILE_PEAK(NAME, TARGET, STEP)                                                                           \
    TARGET LIMITS_FN void NAME(int64_t n) {                                                                            \
        amx_config shapes = {.palette = 1};                                                                            \
        for (int i = 0; i < 8; i++) shapes.rows[i] = 16, shapes.row_bytes[i] = 64;                                     \
        AMX_LOAD_CONFIG(shapes);                                                                                       \
        _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);                                                    \
        _tile_zero(4); _tile_zero(5); _tile_zero(6); _tile_zero(7);                                                    \
        for (int64_t k = 0; k < n; k++) { STEP(0, 4, 6); STEP(1, 5, 6); STEP(2, 4, 7); STEP(3, 5, 7); }                \
        _tile_release();                                                                                               \
    }
#define PEAK_TILE_OPS (4 * 16 * 16 * 64 * 2) /* a step, of bytes; half of it of 16-bit values */
DEFINE_TILE_PEAK(peak_int8_amx, __attribute__((target("amx-tile,amx-int8"))), _tile_dpbssd)
DEFINE_TILE_PEAK(peak_bf16_amx, __attribute__((target("amx-tile,amx-bf16"))), _tile_dpbf16ps)

#define LIMITS_REG(v) "+x"(v)
/* v, which the compiler cannot know to be v: chains that share their factors would share the product */
#define LIMITS_HIDDEN(v) ({ __typeof__(v) hidden = (v); __asm__ volatile("" : LIMITS_REG(hidden)); hidden; })
#define TARGET_AVX2 __attribute__((target("avx2,fma")))
#define FMA_256(s, x, y) _mm256_fmadd_ps(x, y, s)
/* Products by an asm of their own, as chains share their factors; hiding a factor would cost a move */
#define DOT_256(s, x, y) ({                                                                                            \
    __m256i ones = _mm256_set1_epi16(1), dot;                                                                          \
    __asm__ volatile("vpmaddubsw %2, %1, %0\n\tvpmaddwd %3, %0, %0" : "=&x"(dot) : "x"(x), "x"(y), "x"(ones));         \
    _mm256_add_epi32(s, dot); })
#define WORDS_256(s, x, y) ({                                                                                          \
    __m256i dot;                                                                                                       \
    __asm__ volatile("vpmaddwd %2, %1, %0" : "=x"(dot) : "x"(x), "x"(y));                                              \
    _mm256_add_epi32(s, dot); })
DEFINE_PEAK(peak_fma_avx2, TARGET_AVX2, __m256, PEAK_CHAINS_16, _mm256_set1_ps, FMA_256, _mm256_set1_ps(1e-3f),
            _mm256_set1_ps(1e-3f))
DEFINE_PEAK(peak_int8_avx2, TARGET_AVX2, __m256i, PEAK_CHAINS_16, _mm256_set1_epi32, DOT_256, _mm256_set1_epi8(3),
            _mm256_set1_epi8(-5))
DEFINE_PEAK(peak_int16_avx2, TARGET_AVX2, __m256i, PEAK_CHAINS_16, _mm256_set1_epi32, WORDS_256, _mm256_set1_epi16(3),
            _mm256_set1_epi16(-5))
#ifdef LIMITS_AVX_VNNI
#define TARGET_AVX_VNNI __attribute__((target("avx2,avxvnni")))
#define VNNI_256(s, x, y) _mm256_dpbusd_avx_epi32(s, x, y)
#define VNNI_WORDS_256(s, x, y) _mm256_dpwssd_avx_epi32(s, x, y)
DEFINE_PEAK(peak_int8_avx_vnni, TARGET_AVX_VNNI, __m256i, PEAK_CHAINS_16, _mm256_set1_epi32, VNNI_256, _mm256_set1_epi8(3),
            _mm256_set1_epi8(-5))
DEFINE_PEAK(peak_int16_avx_vnni, TARGET_AVX_VNNI, __m256i, PEAK_CHAINS_16, _mm256_set1_epi32, VNNI_WORDS_256,
            _mm256_set1_epi16(3), _mm256_set1_epi16(-5))
#endif

/* Baseline x86 has neither fma nor byte dot products: a product and a sum, and 16-bit pairs */
#define FMA_128(s, x, y) _mm_add_ps(s, _mm_mul_ps(LIMITS_HIDDEN(x), y))
#define DOT_128(s, x, y) _mm_add_epi32(s, _mm_madd_epi16(LIMITS_HIDDEN(x), y))
DEFINE_PEAK(peak_fma_scalar, , __m128, PEAK_CHAINS_16, _mm_set1_ps, FMA_128, _mm_set1_ps(1e-3f), _mm_set1_ps(1e-3f))
DEFINE_PEAK(peak_int8_scalar, , __m128i, PEAK_CHAINS_16, _mm_set1_epi32, DOT_128, _mm_set1_epi16(3),
            _mm_set1_epi16(-5))
#undef LIMITS_REG

#else /* vectors of four, as the compiler makes them at the platform's baseline */

typedef float limits_f32 __attribute__((vector_size(16)));
typedef int32_t limits_i32 __attribute__((vector_size(16)));
#if defined(__aarch64__)
#define LIMITS_REG(v) "+w"(v)
#elif defined(__x86_64__) /* built with WOOLLY_SCALAR */
#define LIMITS_REG(v) "+x"(v)
#else
#define LIMITS_REG(v) "+m"(v)
#endif
#define LIMITS_SET(i) {(i), (i), (i), (i)}
static inline limits_f32 limits_set_f32(int i) { limits_f32 v = LIMITS_SET((float)i); return v; }
static inline limits_i32 limits_set_i32(int i) { limits_i32 v = LIMITS_SET(i); return v; }
#define MULTIPLY_ADD(s, x, y) ((s) + (x) * (y))
DEFINE_PEAK(peak_fma_scalar, , limits_f32, PEAK_CHAINS_16, limits_set_f32, MULTIPLY_ADD, limits_set_f32(1),
            limits_set_f32(1))
DEFINE_PEAK(peak_int8_scalar, , limits_i32, PEAK_CHAINS_16, limits_set_i32, MULTIPLY_ADD, limits_set_i32(3),
            limits_set_i32(5))
#undef LIMITS_REG

#endif

/* Memory: 512 bytes a step. A vector of 64 bytes becomes one load or store, two or four, by the target */
typedef uint64_t limits_line __attribute__((vector_size(64), aligned(64)));

#define DEFINE_MEMORY(ISA, TARGET)                                                                                     \
    TARGET LIMITS_FN uint64_t limits_read_##ISA(const uint8_t *data, int64_t n_bytes) {                                \
        limits_line sum[4] = {{0}};                                                                                    \
        for (const limits_line *p = (const limits_line *)data, *end = p + n_bytes / 64; p < end; p += 8)               \
            LIMITS_UNROLL for (int i = 0; i < 8; i++) sum[i % 4] |= p[i];                                              \
        sum[0] |= sum[1] | sum[2] | sum[3];                                                                            \
        return sum[0][0] | sum[0][1] | sum[0][2] | sum[0][3] | sum[0][4] | sum[0][5] | sum[0][6] | sum[0][7];          \
    }                                                                                                                  \
    TARGET LIMITS_FN void limits_write_##ISA(uint8_t *data, int64_t n_bytes, uint64_t value) {                         \
        limits_line line = value - (limits_line){0};                                                                   \
        for (limits_line *p = (limits_line *)data, *end = p + n_bytes / 64; p < end; p += 8) {                         \
            LIMITS_UNROLL for (int i = 0; i < 8; i++) p[i] = line;                                                     \
            __asm__ volatile("" ::: "memory"); /* or it would become a call of memset */                               \
        }                                                                                                              \
    }
DEFINE_MEMORY(scalar, )
#ifdef WOOLLY_X86
DEFINE_MEMORY(avx2, TARGET_AVX2)
DEFINE_MEMORY(avx512, TARGET_AVX512)
#endif

typedef struct {
    const char *isa;
    const char *kind;
    const char *instruction;
    void (*loop)(int64_t n);
    int ops_a_step; /* multiplications and additions */
} woolly_peak;

/* Every peak that was compiled; NULL after the last */
static const woolly_peak *limits_peak(int i) {
    static const woolly_peak peaks[] = {
#ifdef WOOLLY_X86
        {"avx512_amx", "fma_f32", "vfmadd (512 bits)", peak_fma_avx512, PEAK_CHAINS_32 * 16 * 2},
        {"avx512_amx", "dot_int8", "tdpbssd (tiles)", peak_int8_amx, PEAK_TILE_OPS},
        {"avx512_amx", "dot_int16", "vpdpwssd (512 bits)", peak_int16_avx512, PEAK_CHAINS_32 * 32 * 2},
        {"avx512_amx", "dot_bf16", "tdpbf16ps (tiles)", peak_bf16_amx, PEAK_TILE_OPS / 2},
        {"avx512", "fma_f32", "vfmadd (512 bits)", peak_fma_avx512, PEAK_CHAINS_32 * 16 * 2},
        {"avx512", "dot_int8", "vpdpbusd (512 bits)", peak_int8_avx512, PEAK_CHAINS_32 * 64 * 2},
        {"avx512", "dot_int16", "vpdpwssd (512 bits)", peak_int16_avx512, PEAK_CHAINS_32 * 32 * 2},
        {"avx512", "dot_bf16", "vdpbf16ps (512 bits)", peak_bf16_avx512, PEAK_CHAINS_32 * 32 * 2},
#ifdef LIMITS_AVX_VNNI
        {"avx_vnni", "fma_f32", "vfmadd (256 bits)", peak_fma_avx2, PEAK_CHAINS_16 * 8 * 2},
        {"avx_vnni", "dot_int8", "vpdpbusd (256 bits)", peak_int8_avx_vnni, PEAK_CHAINS_16 * 32 * 2},
        {"avx_vnni", "dot_int16", "vpdpwssd (256 bits)", peak_int16_avx_vnni, PEAK_CHAINS_16 * 16 * 2},
#endif
        {"avx2", "fma_f32", "vfmadd (256 bits)", peak_fma_avx2, PEAK_CHAINS_16 * 8 * 2},
        {"avx2", "dot_int8", "vpmaddubsw + vpmaddwd + vpaddd", peak_int8_avx2, PEAK_CHAINS_16 * 32 * 2},
        {"avx2", "dot_int16", "vpmaddwd + vpaddd", peak_int16_avx2, PEAK_CHAINS_16 * 16 * 2},
        {"scalar", "fma_f32", "mulps + addps", peak_fma_scalar, PEAK_CHAINS_16 * 4 * 2},
        {"scalar", "dot_int8", "pmaddwd + paddd, 16-bit values", peak_int8_scalar, PEAK_CHAINS_16 * 8 * 2},
        {"scalar", "dot_int16", "pmaddwd + paddd", peak_int8_scalar, PEAK_CHAINS_16 * 8 * 2},
#else
        {"scalar", "fma_f32", "vectors of 4 floats", peak_fma_scalar, PEAK_CHAINS_16 * 4 * 2},
        {"scalar", "dot_int8", "vectors of 4 int32", peak_int8_scalar, PEAK_CHAINS_16 * 4 * 2},
        {"scalar", "dot_int16", "vectors of 4 int32", peak_int8_scalar, PEAK_CHAINS_16 * 4 * 2},
#endif
    };
    return i < (int)(sizeof peaks / sizeof peaks[0]) ? &peaks[i] : NULL;
}

/* Beyond what the instruction set's table asks for: whether the machine has this instruction */
static int limits_has(const woolly_peak *peak) {
#ifdef WOOLLY_X86
    if (peak->loop == peak_bf16_avx512) return __builtin_cpu_supports("avx512bf16");
    if (peak->loop == peak_bf16_amx) return __builtin_cpu_supports("amx-bf16");
#endif
    (void)peak;
    return 1;
}

static uint64_t limits_read(const char *isa, const uint8_t *data, int64_t n_bytes) {
#ifdef WOOLLY_X86
    if (strncmp(isa, "avx512", 6) == 0) return limits_read_avx512(data, n_bytes);
    if (strncmp(isa, "avx", 3) == 0) return limits_read_avx2(data, n_bytes);
#endif
    (void)isa;
    return limits_read_scalar(data, n_bytes);
}

static void limits_write(const char *isa, uint8_t *data, int64_t n_bytes, uint64_t value) {
#ifdef WOOLLY_X86
    if (strncmp(isa, "avx512", 6) == 0) { limits_write_avx512(data, n_bytes, value); return; }
    if (strncmp(isa, "avx", 3) == 0) { limits_write_avx2(data, n_bytes, value); return; }
#endif
    (void)isa;
    limits_write_scalar(data, n_bytes, value);
}

#endif
