#if __has_include(<avxvnniintrin.h>)
#pragma GCC target("avxvnni")
#define WOOLLY_TABLE woolly_kernels_avx_vnni
#include "table.h"
#else /* the compiler lacks AVX-VNNI: a table without formats, which no machine runs */
#include "kernels.h"
const woolly_kernels woolly_kernels_avx_vnni = {.name = "avx_vnni"};
#endif
