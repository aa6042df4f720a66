/* Packing: 16 rows of GGUF blocks <-> one group with the rows side by side.
 *
 * A format names its block's fields in packed order; element e of a field becomes 16 consecutive elements, one a row.
 * Packing is a permutation of bits, so it is undone exactly.
 */
#ifndef WOOLLY_FIELDS_H
#define WOOLLY_FIELDS_H

#include "../kernels.h"
#include "../simd/simd.h"

/* what a format's MIN may be, besides 0 */
#define MIN_32 1 /* a minimum for each block of 32 weights */
#define MIN_16 2 /* one for each half of it */

typedef struct {
    int offset;                                     /* of the field in a GGUF block */
    int bytes;                                      /* its length */
    int elem;                                       /* bytes that stay together: 1, 2 or 4 */
    void (*to_packed)(uint8_t *words, int n_words); /* changes n_words elements of 4 bytes in place, or NULL */
    void (*from_packed)(uint8_t *words, int n_words);
} woolly_field;

enum { PACK_LINE = 64 }; /* bytes of a row that formats without blocks pack at a time: a line is read once */

#if defined(__clang__) || __GNUC__ >= 12
#define PICK(VECTOR, A, B, ...) __builtin_shufflevector(A, B, __VA_ARGS__)
#else
#define PICK(VECTOR, A, B, ...) __builtin_shuffle(A, B, (VECTOR){__VA_ARGS__})
#endif
#define LOW_WORDS 0, 4, 1, 5
#define HIGH_WORDS 2, 6, 3, 7
#define LOW_HALVES 0, 8, 1, 9, 2, 10, 3, 11
#define HIGH_HALVES 4, 12, 5, 13, 6, 14, 7, 15

/* 16 bytes, N elements, of each of 16 rows: an N x N transposition is to interleave the first half of the vectors with the
 * second, log2 N times */
#define DEFINE_INTERLEAVE(NAME, ELEM, N, LOG2_N, LOW, HIGH)                                                            \
    typedef ELEM NAME##_vector __attribute__((vector_size(16)));                                                       \
    static INLINE void NAME(const uint8_t *src, int64_t row_bytes, uint8_t *dst) {                                     \
        for (int r = 0; r < WOOLLY_GROUP; r += N) {                                                                    \
            NAME##_vector v[N], next[N];                                                                               \
            for (int i = 0; i < N; i++) memcpy(v + i, src + (r + i) * row_bytes, 16);                                  \
            for (int round = 0; round < LOG2_N; round++) {                                                             \
                for (int i = 0; i < N / 2; i++) {                                                                      \
                    next[2 * i] = PICK(NAME##_vector, v[i], v[i + N / 2], LOW);                                        \
                    next[2 * i + 1] = PICK(NAME##_vector, v[i], v[i + N / 2], HIGH);                                   \
                }                                                                                                      \
                for (int i = 0; i < N; i++) v[i] = next[i];                                                            \
            }                                                                                                          \
            for (int e = 0; e < N; e++) memcpy(dst + (e * WOOLLY_GROUP + r) * (int)sizeof(ELEM), v + e, 16);           \
        }                                                                                                              \
    }
DEFINE_INTERLEAVE(interleave_words, uint32_t, 4, 2, LOW_WORDS, HIGH_WORDS)
DEFINE_INTERLEAVE(interleave_halves, uint16_t, 8, 3, LOW_HALVES, HIGH_HALVES)
#undef PICK

/* n elements of each of n_rows rows, the rows of one element side by side. A loop for each size: memcpy is a move then */
#define EACH_ELEM(SIZE)                                                                                                \
    for (int r = 0; r < n_rows; r++, src += row_bytes)                                                                 \
        for (int e = 0; e < n; e++) memcpy(dst + (e * WOOLLY_GROUP + r) * SIZE, src + e * SIZE, SIZE)

static void interleave(const uint8_t *src, int64_t row_bytes, int n_rows, int n, int elem, uint8_t *dst) {
    if (n_rows == WOOLLY_GROUP && elem > 1)
        for (; n >= 16 / elem; n -= 16 / elem, src += 16, dst += 16 * WOOLLY_GROUP) {
            if (elem == 4) interleave_words(src, row_bytes, dst);
            else interleave_halves(src, row_bytes, dst);
        }
    if (elem == 4) EACH_ELEM(4);
    else if (elem == 2) EACH_ELEM(2);
    else EACH_ELEM(1);
}
#undef EACH_ELEM

static void pack_group(const woolly_field *fields, int n_fields, int block_bytes, const uint8_t *rows, int64_t row_bytes,
                       int64_t n_rows, int64_t n_blocks, uint8_t *group) {
    if (n_rows < WOOLLY_GROUP) memset(group, 0, (size_t)(n_blocks * block_bytes * WOOLLY_GROUP));
    if (block_bytes == fields->elem) { /* no blocks */
        for (int64_t at = 0; at < n_blocks * block_bytes; at += PACK_LINE) {
            int64_t n = n_blocks - at / block_bytes, most = PACK_LINE / block_bytes;
            interleave(rows + at, row_bytes, (int)n_rows, (int)(n < most ? n : most), block_bytes, group + at * WOOLLY_GROUP);
        }
        return;
    }
    for (int64_t b = 0; b < n_blocks; b++, rows += block_bytes) {
        for (int f = 0; f < n_fields; f++) {
            woolly_field field = fields[f];
            int n = field.bytes / field.elem;
            interleave(rows + field.offset, row_bytes, (int)n_rows, n, field.elem, group);
            if (field.to_packed) field.to_packed(group, n * WOOLLY_GROUP);
            group += field.bytes * WOOLLY_GROUP;
        }
    }
}

static INLINE void copy_elem(uint8_t *dst, const uint8_t *src, int elem) {
    if (elem == 4) memcpy(dst, src, 4);
    else if (elem == 2) memcpy(dst, src, 2);
    else *dst = *src;
}

static void unpack_group(const woolly_field *fields, int n_fields, int block_bytes, const uint8_t *group, int64_t row,
                         int64_t n_blocks, uint8_t *blocks) {
    for (int64_t b = 0; b < n_blocks; b++) {
        const uint8_t *src = group + b * block_bytes * WOOLLY_GROUP;
        for (int f = 0; f < n_fields; f++) {
            woolly_field field = fields[f];
            uint8_t *dst = blocks + b * block_bytes + field.offset;
            for (int e = 0; e < field.bytes; e += field.elem, src += field.elem * WOOLLY_GROUP)
                copy_elem(dst + e, src + row * field.elem, field.elem);
            if (field.from_packed) field.from_packed(dst, field.bytes / field.elem);
        }
    }
}

/* CHANGE v for each of n_words words */
#define EACH_WORD(CHANGE)                                                                                              \
    for (int i = 0; i < n_words; i++) {                                                                                \
        uint32_t v;                                                                                                    \
        memcpy(&v, words + 4 * i, 4);                                                                                  \
        CHANGE;                                                                                                        \
        memcpy(words + 4 * i, &v, 4);                                                                                  \
    }

/* signed bytes <-> bytes biased by 128 */
static void flip_signs(uint8_t *words, int n_words) { EACH_WORD(v ^= 0x80808080u) }

static void exchange_middle_bytes(uint8_t *words, int n_words) {
    EACH_WORD(v = (v & 0xff0000ffu) | (v & 0xff00u) << 8 | (v >> 8 & 0xff00u))
}

/* the bits of v under mask change places with those n above them */
static INLINE uint32_t swap_bits(uint32_t v, uint32_t mask, int n) {
    uint32_t t = (v ^ v >> n) & mask;
    return v ^ t ^ t << n;
}

/* all bits of even places before those of odd ones: an index of five bits turns by one */
static INLINE uint32_t unzip_bits(uint32_t v) {
    v = swap_bits(v, 0x22222222u, 1);
    v = swap_bits(v, 0x0c0c0c0cu, 2);
    v = swap_bits(v, 0x00f000f0u, 4);
    return swap_bits(v, 0x0000ff00u, 8);
}
static INLINE uint32_t zip_bits(uint32_t v) {
    v = swap_bits(v, 0x0000ff00u, 8);
    v = swap_bits(v, 0x00f000f0u, 4);
    v = swap_bits(v, 0x0c0c0c0cu, 2);
    return swap_bits(v, 0x22222222u, 1);
}

/* 32 bits as 8 groups of 4: bit 4 g + i <-> bit g of byte i, so that one shift serves the same group of 16 rows */
static void bits_to_planes(uint8_t *words, int n_words) { EACH_WORD(v = unzip_bits(unzip_bits(v))) }
static void planes_to_bits(uint8_t *words, int n_words) { EACH_WORD(v = zip_bits(zip_bits(v))) }
#undef EACH_WORD

/* pack, unpack for the format NAME from NAME_fields */
#define DEFINE_PACKING(NAME)                                                                                           \
    _Static_assert(sizeof(NAME##_group) == 16 * sizeof(NAME##_block), "packing keeps every byte");                      \
    static void NAME##_pack(const uint8_t *rows, int64_t row_bytes, int64_t n_rows, int64_t n_blocks, uint8_t *group) { \
        pack_group(NAME##_fields, sizeof NAME##_fields / sizeof *NAME##_fields, sizeof(NAME##_block), rows, row_bytes,  \
                   n_rows, n_blocks, group);                                                                            \
    }                                                                                                                   \
    static void NAME##_unpack(const uint8_t *group, int64_t row, int64_t n_blocks, uint8_t *blocks) {                   \
        unpack_group(NAME##_fields, sizeof NAME##_fields / sizeof *NAME##_fields, sizeof(NAME##_block), group, row,     \
                     n_blocks, blocks);                                                                                 \
    }

/* pack, dequantize for a format that is packed as another one, STORED, from NAME_convert: one of its blocks, to a STORED
 * block that was zero */
#define DEFINE_CONVERTED(NAME, STORED)                                                                                 \
    enum { NAME##_BLOCK = STORED##_BLOCK };                                                                            \
    static void NAME##_pack(const uint8_t *rows, int64_t row_bytes, int64_t n_rows, int64_t n_blocks, uint8_t *group) { \
        for (int64_t b = 0; b < n_blocks; b++, group += sizeof(STORED##_group)) {                                      \
            STORED##_block blocks[WOOLLY_GROUP] = {0};                                                                 \
            for (int64_t r = 0; r < n_rows; r++) NAME##_convert((const NAME##_block *)(rows + r * row_bytes) + b, blocks + r); \
            STORED##_pack((const uint8_t *)blocks, sizeof *blocks, n_rows, 1, group);                                  \
        }                                                                                                              \
    }                                                                                                                  \
    static void NAME##_dequantize(const uint8_t *blocks, int64_t n_blocks, float *out) {                               \
        for (int64_t b = 0; b < n_blocks; b++, out += STORED##_BLOCK) {                                                \
            STORED##_block block = {0};                                                                                \
            NAME##_convert((const NAME##_block *)blocks + b, &block);                                                  \
            STORED##_dequantize((const uint8_t *)&block, 1, out);                                                      \
        }                                                                                                              \
    }

#endif
