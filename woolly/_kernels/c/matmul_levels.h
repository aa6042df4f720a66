/* The integer matmul of formats whose halves of a block have an integer scale each.
 *
 * w = d (factor (level - LEVEL_BIAS)), less a minimum: quants are factor times level, biased by BIAS, so that a block has one
 * dot product, which is exact in int32. A format gives
 *   NAME_levels(b, o, i, g)   four levels a row, as they lie in its block: times 2^NAME_place(i, half)
 *   NAME_factors(b, o, i)     the factors of the block's halves, as two words a row
 * of which tiles, and more than two columns, get NAME_quants. For fewer, multiplying each level by its factor takes longer than
 * multiplying sums: digits by levels add up to 15 bits over a half, so that the sums of both halves are words, too, and one
 * product of words gives each its factor.
 */
#ifndef WOOLLY_MATMUL_LEVELS_H
#define WOOLLY_MATMUL_LEVELS_H

#ifndef INT_DIRECT_LEVELS
#define INT_DIRECT_LEVELS INT_DIRECT /* columns of such formats that are computed at once without a tile */
#endif

static INLINE vi same_words(vi pair, int half) {
    return half ? vi_merge16(vi_srl(pair, 16), pair) : vi_merge16(pair, vi_sll(pair, 16));
}

/* The sums over both halves, less their places, as words */
static INLINE vi words_of_sums(const vi *sums, int place0, int place1) {
    return vi_merge16(place0 ? vi_srl(sums[0], place0) : sums[0], vi_sll(sums[1], 16 - place1));
}

/* -bias times the sum of each half's activations, as words: of two digits, what goes with the high ones, or the low ones */
static INLINE vi words_of_bias(int bias, const int32_t *corr16, int digits, int digit) {
    int32_t half[2];
    UNROLL for (int h = 0; h < 2; h++) {
        half[h] = corr16[h] >> __builtin_ctz(128 / bias); /* a power of two */
        if (digits == 2) half[h] = digit == 0 ? half[h] >> 8 : half[h] & 255;
    }
    return vi_set1((half[0] & 0xffff) | (int32_t)((uint32_t)half[1] << 16));
}

#define DEFINE_LEVEL_DOTS(NAME)                                                                                        \
    static INLINE vb NAME##_quants(const NAME##_group *b, int o, int i, int g) {                                       \
        const int place = NAME##_place(i, g / 4);                                                                      \
        vi level = NAME##_levels(b, o, i, g), factor = same_words(NAME##_factors(b, o, i), g / 4);                     \
        vi quants = vi_mul16(place ? vi_srl(level, place) : level, factor);                                            \
        if (NAME##_LEVEL_BIAS == 0) return quants;                                                                     \
        vi less = vi_mul16(factor, vi_set1(NAME##_LEVEL_BIAS * 0x01010101));                                           \
        return vi_add16(quants, vi_sub16(vi_set1((int32_t)(NAME##_BIAS * 0x01010101u)), less));                        \
    }                                                                                                                  \
                                                                                                                       \
    static INLINE void NAME##_dots_of_levels(INT_DOTS_ARGS(NAME)) {                                                    \
        const int place0 = NAME##_place(i, 0), place1 = NAME##_place(i, 1);                                            \
        vi part[INT_DIRECT][INT_RV][2][2]; /* [digit][half] */                                                         \
        INT_PARTS(NAME##_levels, 0, 8, dot_low, g / 4)                                                                 \
        vi factors[INT_RV];                                                                                            \
        UNROLL for (int v = 0; v < INT_RV; v++) factors[v] = NAME##_factors(w[v], o, i);                               \
        UNROLL for (int c = 0; c < nc; c++) UNROLL for (int v = 0; v < INT_RV; v++) {                                  \
            vi sum = vi_set1(0);                                                                                       \
            UNROLL for (int digit = 2 - digits; digit < 2; digit++) {                                                  \
                if (digits == 2 && digit == 1) sum = vi_sll(sum, 8);                                                   \
                if (NAME##_LEVEL_BIAS) {                                                                               \
                    vi bias = words_of_bias(NAME##_LEVEL_BIAS, x[c].corr16 + 2 * s, digits, digit);                    \
                    sum = dot_pairs(sum, bias, factors[v]);                                                            \
                }                                                                                                      \
                sum = dot_pairs(sum, words_of_sums(part[c][v][digit], place0, place1), factors[v]);                    \
            }                                                                                                          \
            dot[c][v][0] = sum;                                                                                        \
        }                                                                                                              \
    }

#define DEFINE_LEVEL_MATMUL(NAME, KIND, DIRECT)                                                                        \
    DEFINE_LEVEL_DOTS(NAME)                                                                                            \
    DEFINE_INT_DOTS(NAME)                                                                                              \
    DEFINE_INT_LOOPS(NAME, KIND, DIRECT, DIRECT + 1, NAME##_dots_of_levels)

#endif
