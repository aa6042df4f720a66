/* The table of micro-kernels: what every instruction set provides and the extensions call.
 *
 * Each function does one tile or row range on one thread; who calls it with which range is decided in the .pyx files.
 * Shapes are in elements, row-major; `stride` is the distance between rows, in elements unless named _bytes.
 */
#ifndef WOOLLY_KERNELS_H
#define WOOLLY_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#define WOOLLY_GROUP 16     /* rows that are interleaved in packed weights; lanes of every reduction */
#define WOOLLY_QBLOCK 32    /* activations that share a scale */
#define WOOLLY_KV_TILE 128  /* keys in one attention tile: fixed absolute positions, part of the numerical contract */
#define WOOLLY_MAX_FORMATS 40

/* Quantised activations: one record a column, `stride_bytes` apart, laid out for n_k = 32 n_blocks values as
 *   int8  hi[n_k], lo[n_k]      x ~ d * (256 hi + lo): 16 bits in two digits, each of them an int8 dot product's business
 *   int16 words[n_k]            256 hi + lo, for matmuls of many columns
 *   float d[n_blocks]           scale, a power of two
 *   float sum[n_blocks]         sum of d * (256 hi + lo) over the block (exact: the integer has 21 bits)
 *   int32 corr[n_blocks]        -128 * sum / d, what a dot product with weights biased by 128 starts from
 *   int32 corr16[2 * n_blocks]  the same over halves of a block, for formats with a scale every 16 weights
 * With compute="int8" they have 8 bits: hi is zero, words are not written, and d, which brings the largest of the block
 * to 127, is any number.
 */
static inline int64_t woolly_q16_scales(int64_t n_k) { return 4 * n_k; } /* where d begins */
static inline int64_t woolly_q16_stride(int64_t n_k) {
    int64_t bytes = woolly_q16_scales(n_k) + n_k / WOOLLY_QBLOCK * 20;
    bytes = (bytes + 63) & ~(int64_t)63;
    return bytes % 4096 ? bytes : bytes + 64; /* columns 4096 bytes apart would share one L1 set */
}

/* The same digits for tiles of bf16: (groups of 16 columns, n_blocks, 2, 16, 32), d * 256 hi and d * lo, both exact; of
 * 8 bits, (groups of 16 columns, n_blocks, 16, 32), lo */
#define WOOLLY_BF16_COLS 16
#define WOOLLY_BF16_LEAST_COLS 9  /* the least that any format takes tiles for: fewer leave too much of one empty */
_Static_assert(2 * WOOLLY_BF16_LEAST_COLS > WOOLLY_BF16_COLS, "who has tiles leaves fewer columns empty than it fills");
#define WOOLLY_BF16_ROW_STEP 4    /* groups of rows in a step of such a matmul where columns are few; twice as many else */
#define WOOLLY_ROW_STEP 2         /* and of the others */
static inline int64_t woolly_bf16_bytes(int64_t n_k, int64_t n_cols) {
    return (n_cols + WOOLLY_BF16_COLS - 1) / WOOLLY_BF16_COLS * WOOLLY_BF16_COLS * 4 * n_k;
}

typedef struct {
    const uint8_t *w;   /* packed weights, (n_groups, group_bytes) */
    int64_t n_rows;     /* rows of the matrix; the last group may be partly padding */
    int64_t n_k;        /* columns of the matrix */
    const float *x;     /* float formats: activations (n_cols, x_stride) */
    int64_t x_stride;
    const uint8_t *xq;  /* quantised formats: records of quantised activations */
    int64_t xq_stride;  /* in bytes */
    int n_digits;       /* of those: 2, or 1 where hi is zero */
    const uint16_t *bf16; /* the same as bf16, from a group of 16 columns on, or NULL; or activations rounded to it */
    float *out;         /* (n_cols, out_stride) */
    int64_t out_stride;
    int64_t n_cols;
    int accumulate;     /* out += w x instead of out = w x */
    int streams;        /* w is not found in L2: it is asked for in advance */
} woolly_matmul_args;

#define WOOLLY_NEAR_BYTES 0x100000 /* half of a 2 MB L2: so much of what is read again a thread finds there */

/* Activations rounded to bf16: (groups of 16 columns, blocks of 32, 16, 32), zero beyond n_k */
#define WOOLLY_ROUNDED_LEAST_COLS 8 /* fewer columns are faster as they are */
static inline int64_t woolly_rounded_k(int64_t n_k) { return (n_k + 31) / 32 * 32; }
static inline int64_t woolly_rounded_bytes(int64_t n_k, int64_t n_cols) {
    return (n_cols + 15) / 16 * 16 * 2 * woolly_rounded_k(n_k);
}

typedef void (*woolly_matmul_fn)(const woolly_matmul_args *args, int64_t group_begin, int64_t group_end);

typedef struct {
    const char *name;
    int ggml_type;
    int block_size;   /* weights in a block */
    int block_bytes;
    int quantised;    /* 1: the matmul takes quantised activations */
    int is_converted; /* 1: stored in other blocks than the file's when it is packed */
    int stored_bytes; /* of a stored block; block_bytes if it is not converted */
    /* 16 rows of n_blocks blocks -> one packed group; rows beyond n_rows are packed as zero bits */
    void (*pack)(const uint8_t *rows, int64_t row_bytes, int64_t n_rows, int64_t n_blocks, uint8_t *group);
    /* one row of stored blocks back */
    void (*unpack)(const uint8_t *group, int64_t row, int64_t n_blocks, uint8_t *blocks);
    void (*dequantize)(const uint8_t *blocks, int64_t n_blocks, float *out);
    void (*dequantize_stored)(const uint8_t *blocks, int64_t n_blocks, float *out);
    woolly_matmul_fn matmul;
} woolly_format;

enum { WOOLLY_KV_F16 = 0, WOOLLY_KV_F32 = 1 };
enum { WOOLLY_ACT_SILU = 0, WOOLLY_ACT_GELU_TANH = 1, WOOLLY_ACT_SWIGLU_CLAMPED = 2 };
enum { WOOLLY_ROPE_NORM = 0, WOOLLY_ROPE_NEOX = 1 };

/* The keys and values of one layer and one KV head of one sequence.
 * k: (n_ctx / 16, head_dim, 16), v: (n_ctx, head_dim); elements of kv_type; head_dim is padded to a multiple of 16 */
typedef struct {
    void *k;
    void *v;
    int64_t head_dim;
    int kv_type;
} woolly_kv_head;

/* Queries of consecutive positions of one sequence that share a KV head: query (token t, head r) is
 * q[t * q_stride + r * q_head_stride], at position pos + t */
typedef struct {
    const float *q;
    int64_t q_stride;
    int64_t q_head_stride;
    int64_t head_dim; /* without padding */
    int64_t n_rep;
    int64_t pos;
    int64_t window;   /* a query at p sees keys in (p - window, p]; 0: all of [0, p] */
    float softcap;    /* 0: none */
} woolly_queries;

/* A matrix of generated weights: see generate.h */
typedef struct {
    uint64_t seed;
    uint64_t tensor;             /* which of the seed's streams */
    float scale;                 /* weights lie within 2^24 scale of zero */
    const woolly_format *format; /* of the same table */
    int64_t n_rows;
    int64_t n_cols;
    uint8_t *w;                  /* packed, written */
} woolly_generate_args;

typedef void (*woolly_quantize_fn)(const float *x, int64_t n_k, uint8_t *record);
typedef void (*woolly_bf16_of_fn)(const uint8_t *record, int64_t n_k, int64_t col, uint16_t *bf16);

typedef struct {
    const char *name;
    int n_formats;
    woolly_format formats[WOOLLY_MAX_FORMATS];

    /* one row of activations -> one record, of 16 bits or of 8 */
    woolly_quantize_fn quantize_q16, quantize_q8;
    void (*dequantize_q16)(const uint8_t *record, int64_t n_k, float *out);
    /* a column's record -> its place among the groups of 16 columns; NULL where no matmul uses tiles of bf16 */
    woolly_bf16_of_fn bf16_of_q16, bf16_of_q8;

    /* out = x / sqrt(mean(x^2) + eps) * weight, one row; out may be x */
    void (*rmsnorm)(const float *x, const float *weight, int64_t n, float eps, float *out);

    /* out = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias, one row; out may be x */
    void (*layernorm)(const float *x, const float *weight, const float *bias, int64_t n, float eps, float *out);

    /* out = act(x) over n values; out may be x */
    void (*act)(int act, const float *x, int64_t n, float *out);
    /* out = cap tanh(x / cap) over n values; out may be x */
    void (*softcap)(const float *x, float cap, int64_t n, float *out);

    /* out = act(gate) * up over n values; out may be gate */
    void (*glu)(int act, const float *gate, const float *up, int64_t n, float *out);
    void (*exp)(const float *x, int64_t n, float *out);
    void (*softmax)(const float *x, int64_t n, float *out);
    void (*add)(const float *x, const float *y, int64_t n, float *out);
    void (*scale)(const float *x, float factor, int64_t n, float *out);

    /* rotate one head in place: cos, sin hold n_rot / 2 values of its position */
    void (*rope)(int pairing, float *x, int64_t n_rot, const float *cos, const float *sin);

    /* write one token's key and value into the cache at position pos */
    void (*store_kv)(const woolly_kv_head *kv, int64_t head_dim, int64_t pos, const float *k, const float *v);

    /* Attention tiles [tile0, tile_end), tile i being keys [128 i, 128 i + 128), seen by tokens [t0, t1) of the queries.
     * Column c = (t - t0) * n_rep + r has state m[c] (maximum), l[c] (sum), acc[c * head_dim ...]; the tiles are merged
     * into it. Tiles before ahead_end are going to be read next: memory is asked for them in advance.
     * scratch: woolly_attention_scratch floats */
    void (*attention_tiles)(const woolly_kv_head *kv, const woolly_queries *queries, int64_t t0, int64_t t1, int64_t tile0,
                            int64_t tile_end, int64_t ahead_end, float *m, float *l, float *acc, float *scratch);
    /* merge the state (m2, l2, acc2) of later tiles into (m, l, acc), for n_cols columns */
    void (*attention_merge)(int64_t n_cols, int64_t head_dim, float *m, float *l, float *acc, const float *m2,
                            const float *l2, const float *acc2);

    /* fill one packed group of 16 rows */
    void (*generate)(const woolly_generate_args *args, int64_t group);
} woolly_kernels;

/* What compute="bf16" takes in place of the exact matmuls: a dot unit of bf16 */
typedef struct {
    const char *name;
    /* a column of activations -> its place among the groups of 16 columns */
    void (*round)(const float *x, int64_t n_k, int64_t col, uint16_t *bf16);
    woolly_matmul_fn matmul[WOOLLY_MAX_FORMATS]; /* of the table's formats, from `bf16` */
} woolly_bf16_unit;

#define WOOLLY_ATTENTION_COLS 96 /* most columns of one attention_tiles call */
/* floats of scratch for attention_tiles: queries gathered, scores, the tile's own output and state, 32 rows widened */
static inline int64_t woolly_attention_scratch(int64_t head_dim) {
    int64_t n_wide = head_dim > WOOLLY_KV_TILE ? head_dim : WOOLLY_KV_TILE;
    return WOOLLY_ATTENTION_COLS * (2 * head_dim + WOOLLY_KV_TILE + 2) + 32 * n_wide;
}

#endif
