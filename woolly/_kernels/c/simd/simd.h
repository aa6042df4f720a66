/* Chooses the vector operations of the instruction set that this translation unit is compiled for. */
#ifndef WOOLLY_SIMD_H
#define WOOLLY_SIMD_H

#include <stdint.h>
#include <string.h>

#define INLINE inline __attribute__((always_inline))

#define ALIGNED __attribute__((aligned(64)))

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
