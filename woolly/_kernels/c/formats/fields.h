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
    int offset;                  /* of the field in a GGUF block */
    int bytes;                   /* its length */
    int elem;                    /* bytes that stay together */
    void (*to_packed)(void *);   /* changes one element in place, or NULL */
    void (*from_packed)(void *);
} woolly_field;

static INLINE void copy_elem(uint8_t *dst, const uint8_t *src, int elem) {
    if (elem == 4) memcpy(dst, src, 4);
    else if (elem == 2) memcpy(dst, src, 2);
    else *dst = *src;
}

static void pack_group(const woolly_field *fields, int n_fields, int block_bytes, const uint8_t *rows, int64_t row_bytes,
                       int64_t n_rows, int64_t n_blocks, uint8_t *group) {
    for (int64_t b = 0; b < n_blocks; b++) {
        uint8_t *dst = group + b * block_bytes * WOOLLY_GROUP;
        for (int f = 0; f < n_fields; f++) {
            woolly_field field = fields[f];
            for (int e = 0; e < field.bytes; e += field.elem) {
                for (int r = 0; r < WOOLLY_GROUP; r++, dst += field.elem) {
                    if (r < n_rows) copy_elem(dst, rows + r * row_bytes + b * block_bytes + field.offset + e, field.elem);
                    else memset(dst, 0, (size_t)field.elem);
                    if (field.to_packed) field.to_packed(dst);
                }
            }
        }
    }
}

static void unpack_group(const woolly_field *fields, int n_fields, int block_bytes, const uint8_t *group, int64_t row,
                         int64_t n_blocks, uint8_t *blocks) {
    for (int64_t b = 0; b < n_blocks; b++) {
        const uint8_t *src = group + b * block_bytes * WOOLLY_GROUP;
        for (int f = 0; f < n_fields; f++) {
            woolly_field field = fields[f];
            for (int e = 0; e < field.bytes; e += field.elem, src += field.elem * WOOLLY_GROUP) {
                uint8_t *dst = blocks + b * block_bytes + field.offset + e;
                copy_elem(dst, src + row * field.elem, field.elem);
                if (field.from_packed) field.from_packed(dst);
            }
        }
    }
}

/* signed bytes <-> bytes biased by 128 */
static void flip_signs(void *four) {
    uint32_t v;
    memcpy(&v, four, 4);
    v ^= 0x80808080u;
    memcpy(four, &v, 4);
}

/* 32 bits as 8 groups of 4: bit 4 g + i <-> bit g of byte i, so that one shift serves the same group of 16 rows */
static void bits_to_planes(void *four) {
    uint32_t v, out = 0;
    memcpy(&v, four, 4);
    for (int g = 0; g < 8; g++)
        for (int i = 0; i < 4; i++) out |= (v >> (4 * g + i) & 1) << (8 * i + g);
    memcpy(four, &out, 4);
}
static void planes_to_bits(void *four) {
    uint32_t v, out = 0;
    memcpy(&v, four, 4);
    for (int g = 0; g < 8; g++)
        for (int i = 0; i < 4; i++) out |= (v >> (8 * i + g) & 1) << (4 * g + i);
    memcpy(four, &out, 4);
}

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
