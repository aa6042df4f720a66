/* Everything for one instruction set: the kernels, compiled for it, and the table that exports them.
 * An isa_NAME.c defines WOOLLY_TABLE and includes this file. */
#include "attention.h"
#include "elementwise.h"
#include "kernels.h"
#include "matmul_float.h"
#include "matmul_int.h"

#include "formats/q8_0.h"
#include "formats/q4_0.h"
#include "formats/q4_1.h"
#include "formats/q5_0.h"
#include "formats/q4_k.h"
#include "formats/q6_k.h"

DEFINE_INT_MATMUL(q8_0, full)
DEFINE_INT_MATMUL(q4_0, low8)
DEFINE_INT_MATMUL(q4_1, min)
DEFINE_INT_MATMUL(q5_0, low16)
DEFINE_INT_MATMUL(q4_k, min)
DEFINE_INT_MATMUL(q6_k, low32_halves)

#include "generate.h"

#define FORMAT(NAME, GGML_TYPE, QUANTISED, MATMUL)                                                                     \
    {#NAME,       GGML_TYPE,     NAME##_BLOCK,      sizeof(NAME##_block), QUANTISED,                                   \
     NAME##_pack, NAME##_unpack, NAME##_dequantize, NAME##_##MATMUL}

/* Everything but the integer matmuls is the same where one build serves two instruction sets */
#define TABLE(NAME, MATMUL)                                                                                            \
    {                                                                                                                  \
        .name = NAME,                                                                                                  \
        .n_formats = 9,                                                                                                \
        .formats =                                                                                                     \
            {                                                                                                          \
                FORMAT(f32, 0, 0, matmul),                                                                             \
                FORMAT(f16, 1, 0, matmul),                                                                             \
                FORMAT(bf16, 30, 0, matmul),                                                                           \
                FORMAT(q4_0, 2, 1, MATMUL),                                                                            \
                FORMAT(q4_1, 3, 1, MATMUL),                                                                            \
                FORMAT(q5_0, 6, 1, MATMUL),                                                                            \
                FORMAT(q8_0, 8, 1, MATMUL),                                                                            \
                FORMAT(q4_k, 12, 1, MATMUL),                                                                           \
                FORMAT(q6_k, 14, 1, MATMUL),                                                                           \
            },                                                                                                         \
        .quantize_q16 = quantize_q16,                                                                                  \
        .dequantize_q16 = dequantize_q16,                                                                              \
        .rmsnorm = rmsnorm_f32,                                                                                        \
        .glu = glu_f32,                                                                                                \
        .exp = exp_f32,                                                                                                \
        .softmax = softmax_f32,                                                                                        \
        .add = add_f32,                                                                                                \
        .scale = scale_f32,                                                                                            \
        .rope = rope_f32,                                                                                              \
        .store_kv = store_kv,                                                                                          \
        .attention_tile = attention_tile,                                                                              \
        .attention_merge = attention_merge,                                                                            \
        .generate = generate_group,                                                                                    \
    }

const woolly_kernels WOOLLY_TABLE = TABLE(ISA_NAME, matmul);
#if HAS_AMX
const woolly_kernels woolly_kernels_avx512_amx = TABLE("avx512_amx", matmul_amx);
#endif
