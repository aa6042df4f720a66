/* Chooses the vector operations of the instruction set that this translation unit is compiled for. */
#ifndef WOOLLY_SIMD_H
#define WOOLLY_SIMD_H

#include <stdint.h>
#include <string.h>

#define INLINE inline __attribute__((always_inline))

#define ALIGNED __attribute__((aligned(64)))

/* Ask for memory that is read soon, into L2. The processor's own prefetching ends at each page of 4 KB */
#define PREFETCH_L2(address) __builtin_prefetch(address, 0, 2)
static INLINE void prefetch_bytes(const void *from, int64_t n_bytes) {
    for (int64_t i = 0; i < n_bytes; i += 64) PREFETCH_L2((const char *)from + i);
}

/* The same for part i of n of it, each of whole lines */
static INLINE void prefetch_part(const char *from, int n_bytes, int i, int n) {
    const int n_lines = (n_bytes + 63) / 64;
    for (int line = n_lines * i / n; line < n_lines * (i + 1) / n; line++) PREFETCH_L2(from + 64 * line);
}

/* Bytes: weights of each row group that stream by are asked for so long before they are used. It is less than a page: the
 * processor's own prefetching follows such requests, and not those that are pages ahead */
#define STREAM_AHEAD 3072

/* What was read before is read again after: the compiler would keep it for later in registers that are needed now */
#define READ_AGAIN __asm__ volatile("" ::: "memory")
/* The same for what is read by this copy of a pointer */
#define NOT_KEPT(pointer)                                                                                              \
    ({                                                                                                                 \
        __typeof__(pointer) copy = (pointer);                                                                          \
        __asm__("" : "+r"(copy));                                                                                      \
        copy;                                                                                                          \
    })

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
