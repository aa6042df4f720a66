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
#include "formats/q5_1.h"
#include "formats/q4_k.h"
#include "formats/q5_k.h"
#include "formats/q6_k.h"
#include "formats/q3_k.h"
#include "formats/q2_k.h"
#include "formats/iq4_nl.h"
#include "formats/iq4_xs.h"
#include "formats/mxfp4.h"
#include "formats/lut4.h"
#include "formats/iq.h"

DEFINE_INT_MATMUL(q8_0, full, INT_DIRECT)
DEFINE_INT_MATMUL(q4_0, low, INT_DIRECT)
DEFINE_INT_MATMUL(q4_1, min, INT_DIRECT)
DEFINE_INT_MATMUL(q5_0, low, INT_DIRECT)
DEFINE_INT_MATMUL(q5_1, min, INT_DIRECT_RARE)
DEFINE_INT_MATMUL(q4_k, min, INT_DIRECT_K)
DEFINE_INT_MATMUL(q5_k, min, INT_DIRECT_RARE)
DEFINE_INT_MATMUL(q6_k, halves, INT_DIRECT_K)
DEFINE_LEVEL_MATMUL(q3_k, full, INT_DIRECT_LEVELS)
DEFINE_LEVEL_MATMUL(q2_k, min16, INT_DIRECT_LEVELS)
DEFINE_INT_MATMUL(iq4_nl, full, INT_DIRECT_RARE)
DEFINE_INT_MATMUL(iq4_xs, full, INT_DIRECT_RARE)
DEFINE_INT_MATMUL(mxfp4, low, INT_DIRECT_RARE)
DEFINE_INT_MATMUL(lut4, halves, INT_DIRECT_RARE)

#if HAS_AMX
DEFINE_AMX_MATMUL(q8_0, 8, quants, NULL, 9, 64)
DEFINE_AMX_MATMUL(q4_0, 4, quants, NULL, 9, 64)
DEFINE_AMX_MATMUL(q4_1, 4, quants, NULL, 9, 48)
DEFINE_AMX_MATMUL(q5_0, 5, quants, NULL, 9, 64)
DEFINE_AMX_MATMUL(q5_1, 5, quants, NULL, 9, 64)
DEFINE_AMX_MATMUL(q4_k, 4, quants, NULL, 9, 48)
DEFINE_AMX_MATMUL(q5_k, 5, quants, NULL, 9, 48)
DEFINE_AMX_MATMUL(q6_k, 6, quants, NULL, 10, 48)
DEFINE_AMX_MATMUL(q3_k, 8, levels, NULL, 13, 48)
DEFINE_AMX_MATMUL(q2_k, 6, quants, NULL, 11, 32)
DEFINE_AMX_MATMUL(iq4_nl, 4, codes, iq4_nl_table, 9, 64)
DEFINE_AMX_MATMUL(iq4_xs, 4, codes, iq4_nl_table, 9, 64)
DEFINE_AMX_MATMUL(mxfp4, 4, codes, mxfp4_table, 9, 64)
DEFINE_AMX_MATMUL(lut4, 8, quants, NULL, 13, 64)
#endif

#if HAS_BF16
#include "matmul_bf16.h"
DEFINE_BF16_FLOAT_FILL(f32, float, vf_load)
DEFINE_BF16_FLOAT_FILL(f16, uint16_t, vf_load_f16)
DEFINE_BF16_FLOAT_FILL(bf16, uint16_t, vf_load_bf16)
#define EACH_INT(F)                                                                                                    \
    F(q8_0) F(q4_0) F(q4_1) F(q5_0) F(q5_1) F(q4_k) F(q5_k) F(q6_k) F(q3_k) F(q2_k) F(iq4_nl) F(iq4_xs) F(mxfp4) F(lut4)
EACH_INT(DEFINE_BF16_FILL)
EACH_INT(DEFINE_BF16_MATMUL)
DEFINE_BF16_MATMUL(f32)
DEFINE_BF16_MATMUL(f16)
DEFINE_BF16_MATMUL(bf16)
#endif

DEFINE_CONVERTED(f64, f32)
DEFINE_CONVERTED(iq1_s, lut4)
DEFINE_CONVERTED(iq1_m, lut4)
DEFINE_CONVERTED(iq2_xxs, lut4)
DEFINE_CONVERTED(iq2_xs, lut4)
DEFINE_CONVERTED(iq2_s, lut4)
DEFINE_CONVERTED(iq3_xxs, lut4)
DEFINE_CONVERTED(iq3_s, lut4)
DEFINE_CONVERTED(tq1_0, lut4)
DEFINE_CONVERTED(tq2_0, lut4)

#include "generate.h"

#define FORMAT(NAME, STORED, GGML_TYPE, QUANTISED, CONVERTED, MATMUL)                                                  \
    {                                                                                                                  \
        .name = #NAME,                                                                                                 \
        .ggml_type = GGML_TYPE,                                                                                        \
        .block_size = NAME##_BLOCK,                                                                                    \
        .block_bytes = sizeof(NAME##_block),                                                                           \
        .quantised = QUANTISED,                                                                                        \
        .is_converted = CONVERTED,                                                                                     \
        .stored_bytes = sizeof(STORED##_block),                                                                        \
        .pack = NAME##_pack,                                                                                           \
        .unpack = STORED##_unpack,                                                                                     \
        .dequantize = NAME##_dequantize,                                                                               \
        .dequantize_stored = STORED##_dequantize,                                                                      \
        .matmul = STORED##_##MATMUL,                                                                                   \
    },

/* name, as what it is stored when packed, id in GGUF files, whether it takes quantised activations, is converted, matmul */
#define EACH_FORMAT(F, MATMUL)                                                                                         \
    F(f32, f32, 0, 0, 0, matmul)                                                                                       \
    F(f16, f16, 1, 0, 0, matmul)                                                                                       \
    F(bf16, bf16, 30, 0, 0, matmul)                                                                                    \
    F(f64, f32, 28, 0, 1, matmul)                                                                                      \
    F(q4_0, q4_0, 2, 1, 0, MATMUL)                                                                                     \
    F(q4_1, q4_1, 3, 1, 0, MATMUL)                                                                                     \
    F(q5_0, q5_0, 6, 1, 0, MATMUL)                                                                                     \
    F(q5_1, q5_1, 7, 1, 0, MATMUL)                                                                                     \
    F(q8_0, q8_0, 8, 1, 0, MATMUL)                                                                                     \
    F(q2_k, q2_k, 10, 1, 0, MATMUL)                                                                                    \
    F(q3_k, q3_k, 11, 1, 0, MATMUL)                                                                                    \
    F(q4_k, q4_k, 12, 1, 0, MATMUL)                                                                                    \
    F(q5_k, q5_k, 13, 1, 0, MATMUL)                                                                                    \
    F(q6_k, q6_k, 14, 1, 0, MATMUL)                                                                                    \
    F(iq4_nl, iq4_nl, 20, 1, 0, MATMUL)                                                                                \
    F(iq4_xs, iq4_xs, 23, 1, 0, MATMUL)                                                                                \
    F(mxfp4, mxfp4, 39, 1, 0, MATMUL)                                                                                  \
    F(iq1_s, lut4, 19, 1, 1, MATMUL)                                                                                   \
    F(iq1_m, lut4, 29, 1, 1, MATMUL)                                                                                   \
    F(iq2_xxs, lut4, 16, 1, 1, MATMUL)                                                                                 \
    F(iq2_xs, lut4, 17, 1, 1, MATMUL)                                                                                  \
    F(iq2_s, lut4, 22, 1, 1, MATMUL)                                                                                   \
    F(iq3_xxs, lut4, 18, 1, 1, MATMUL)                                                                                 \
    F(iq3_s, lut4, 21, 1, 1, MATMUL)                                                                                   \
    F(tq1_0, lut4, 34, 1, 1, MATMUL)                                                                                   \
    F(tq2_0, lut4, 35, 1, 1, MATMUL)
#define PLUS_ONE(...) +1

/* Everything but the integer matmuls is the same where one build serves two instruction sets */
#define TABLE(NAME, MATMUL, BF16_OF_Q16, BF16_OF_Q8)                                                                   \
    {                                                                                                                  \
        .name = NAME,                                                                                                  \
        .n_formats = 0 EACH_FORMAT(PLUS_ONE, MATMUL),                                                                  \
        .formats = {EACH_FORMAT(FORMAT, MATMUL)},                                                                      \
        .quantize_q16 = quantize_q16,                                                                                  \
        .quantize_q8 = quantize_q8,                                                                                    \
        .dequantize_q16 = dequantize_q16,                                                                              \
        .bf16_of_q16 = BF16_OF_Q16,                                                                                    \
        .bf16_of_q8 = BF16_OF_Q8,                                                                                      \
        .rmsnorm = rmsnorm_f32,                                                                                        \
        .layernorm = layernorm_f32,                                                                                    \
        .act = act_f32,                                                                                                \
        .softcap = softcap_f32,                                                                                        \
        .glu = glu_f32,                                                                                                \
        .exp = exp_f32,                                                                                                \
        .softmax = softmax_f32,                                                                                        \
        .add = add_f32,                                                                                                \
        .scale = scale_f32,                                                                                            \
        .rope = rope_f32,                                                                                              \
        .store_kv = store_kv,                                                                                          \
        .attention_tiles = attention_tiles,                                                                            \
        .attention_merge = attention_merge,                                                                            \
        .generate = generate_group,                                                                                    \
    }

const woolly_kernels WOOLLY_TABLE = TABLE(ISA_NAME, matmul, NULL, NULL);
#if HAS_AMX
const woolly_kernels woolly_kernels_avx512_amx = TABLE("avx512_amx", matmul_amx, bf16_of_q16, bf16_of_q8);
#endif

#if HAS_BF16
#define BF16_AVX512(NAME, STORED, ...) STORED##_matmul_bf16_avx512,
const woolly_bf16_unit woolly_bf16_avx512 = {"avx512_bf16", round_bf16, {EACH_FORMAT(BF16_AVX512, )}};
#if HAS_AMX
#define BF16_AMX(NAME, STORED, ...) STORED##_matmul_bf16_amx,
const woolly_bf16_unit woolly_bf16_amx = {"amx_bf16", round_bf16, {EACH_FORMAT(BF16_AMX, )}};
#endif
#endif
