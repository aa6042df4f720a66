/* Chooses the vector operations of the instruction set that this translation unit is compiled for. */
#ifndef WOOLLY_SIMD_H
#define WOOLLY_SIMD_H

#include <stdint.h>
#include <string.h>

#define INLINE inline __attribute__((always_inline))

#define ALIGNED __attribute__((aligned(64)))

/* Ask for memory that is read soon, into L2. The processor's own prefetching ends at each page of 4 KB */
static INLINE void prefetch_bytes(const void *from, int64_t n_bytes) {
    for (int64_t i = 0; i < n_bytes; i += 64) __builtin_prefetch((const char *)from + i, 0, 2);
}

#if defined(__AVX512VNNI__)
#define UNROLL _Pragma("GCC unroll 16")
#include "avx512.h"
#elif defined(__AVX2__)
#define UNROLL _Pragma("GCC unroll 16")
#include "avx2.h"
#else
#define UNROLL
#include "scalar.h"
#endif

#endif
