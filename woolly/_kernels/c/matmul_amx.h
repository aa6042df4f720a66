/* The integer matmul on AMX: exact integer arithmetic in tiles of bf16.
 *
 * Weights are q - bias, of up to 8 bits; activations of 16 bits are two digits of 8. Products of a weight and a digit, and
 * their sums over a block, stay below 2^24, so tdpbf16ps adds these up without rounding. To what a tile holds it adds
 * that sum with one rounding (its description says so, woolly_amx_rounds_once tries it). A tile takes the high digits first,
 * whose sum is a multiple of 256 and exact, then the low ones: it ends with the whole sum, rounded once, bit for bit what the
 * other kernels convert from int32. The activations' scale, a power of two, is in the digits; one fma with the weights' scale
 * adds the tile to the chain. A format with HALVES has a tile for each half of a block.
 *
 * Of activations of 8 bits there is one digit, and their scale, which is any number, multiplies sums.
 *
 * Many columns take weights by panels, which all of them share; where columns are few, filling panels would take as long as
 * multiplying, so there the next block's weights are brought while one is multiplied. A few columns that are left over go to
 * the vector unit. docs/kernels.md has what takes how long; int8 tiles, whose int32 sums the vector unit would convert, shift
 * and scale, took longer.
 */
#ifndef WOOLLY_MATMUL_AMX_H
#define WOOLLY_MATMUL_AMX_H

#include "amx_config.h"

#define AMX __attribute__((target("amx-tile,amx-bf16")))
#define AMX_COLS WOOLLY_BF16_COLS
#define AMX_RV 8     /* many columns: most row groups that go by while a step's activations are in tiles */
#define AMX_BLOCKS 4 /* blocks of their weights: 32 KB */
#define AMX_UNITS 2  /* many columns: tiles that are made in one step, of as many blocks or of the halves of one */
#define AMX_SUMS 4   /* few columns: tiles that are made in one step, of 4 row groups, or 2 of each of 2 row groups */
#define AMX_SLOTS 8  /* parts of a step, each with some of the tile unit's work and an eighth of the vector unit's */
#define AMX_LAG 2    /* steps from a tile to its chain: it is stored one step later, and read another one later */
#define AMX_COL_BLOCK 256
#define AMX_MOST_REST 7 /* columns left over that go to the vector unit; more have a tile, though it is not full */
#define AMX_FEW_COLS 64 /* as many as are few for any format */
#define AMX_LEAST_BYTE_COLS 48 /* both weights and activations of 8 bits: converting takes longer, multiplying half as long */
#define AMX_SCALES 4 /* few columns: blocks whose scales are there, of weights that come, are multiplied, stored, and added */

_Static_assert(AMX_FEW_COLS % AMX_COLS == 0, "chains are stored 16 columns at a time");

typedef struct {
    ALIGNED uint32_t q[AMX_BLOCKS][AMX_RV][16][16]; /* [pair of k][row]: two bf16 */
    ALIGNED float d[AMX_BLOCKS][AMX_RV][2][16];
    ALIGNED float m[AMX_BLOCKS][AMX_RV][2][16];
} amx_weights;

/* From tmm0 on n_sums tiles of sums (16 columns, 16) f32; up to tmm5 of activations (16 columns, k) bf16; 6, 7: weights
 * (k / 2, 16 rows of 2) bf16 */
static AMX __attribute__((noinline)) void amx_begin(int n_sums, int k) {
    amx_config config = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        config.rows[i] = (uint8_t)(i < 6 ? AMX_COLS : k / 2);
        config.row_bytes[i] = (uint16_t)(i < n_sums || i > 5 ? 64 : 2 * k);
    }
    AMX_LOAD_CONFIG(config);
}

static AMX __attribute__((noinline)) void amx_end(void) { _tile_release(); }

/* To 2^28 floats add 32, but no 16: whether products are all added up before the tile's sum is rounded, once */
AMX int woolly_amx_rounds_once(void) {
    ALIGNED uint32_t ones[16 * 16]; /* pairs of bf16 */
    ALIGNED float sums[16 * 16];
    for (int i = 0; i < 16 * 16; i++) ones[i] = 0x3f803f80, sums[i] = 0x1p28f;
    amx_begin(1, 32);
    __asm__ volatile("" : : : "memory"); /* the compiler does not see that tiles read them */
    _tile_loadd(0, sums, 64);
    _tile_loadd(4, ones, 64);
    _tile_loadd(6, ones, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_stored(0, sums, 64);
    amx_end();
    return sums[0] == 0x1p28f + 32;
}

/* What weights of up to 6 bits can be, as bf16: themselves, or what a table of 16 says, less the bias */
typedef struct {
    vi q[2]; /* of 0 .. 31 and 32 .. 63 */
} amx_levels;

static amx_levels amx_levels_of(const uint8_t *table, int bias) {
    ALIGNED uint16_t level[64];
    for (int q = 0; q < 64; q += 16) {
        ALIGNED int32_t w[16];
        for (int i = 0; i < 16; i++) w[i] = (table ? table[i] : q + i) - bias;
        store_bf16(level + q, vf_from_vi(vi_load(w)));
    }
    return (amx_levels){{vi_load(level), vi_load(level + 32)}};
}

/* 16 rows by 4 weights, which bf16 holds exactly */
static INLINE void amx_store_floats(uint32_t (*pair)[16], const vf *w) {
    UNROLL for (int k = 0; k < 2; k++)
        vi_store(pair[k], vi_merge16(vi_srl(vf_bits(w[k]), 16), vf_bits(w[k + 2])));
}

/* 16 rows by 4 weights, in bytes, as two rows of a tile: weights 0 and 2, and 1 and 3, in which order bf16_of_q16 has the
 * activations. Those of up to 6 bits are looked up by the low bits of every other byte, those of 8 are biased by `bias`. */
static INLINE void amx_store_weights(uint32_t (*pair)[16], vb q, int n_bits, int bias, const amx_levels *levels) {
    if (n_bits <= 5) {
        vi_store(pair[0], _mm512_permutexvar_epi16(q, levels->q[0]));
        vi_store(pair[1], _mm512_permutexvar_epi16(vi_srl(q, 8), levels->q[0]));
    } else if (n_bits == 6) {
        vi_store(pair[0], _mm512_permutex2var_epi16(levels->q[0], q, levels->q[1]));
        vi_store(pair[1], _mm512_permutex2var_epi16(levels->q[0], vi_srl(q, 8), levels->q[1]));
    } else {
        const vi byte = vi_set1(255), exponent = vi_set1(0x4b000000);
        vf w[4]; /* 2^23 + q, less that */
        UNROLL for (int k = 0; k < 4; k++)
            w[k] = vf_sub(vf_of_bits(vi_or(vi_and(vi_srl(q, 8 * k), byte), exponent)), vf_set1(0x1p23f + (float)bias));
        amx_store_floats(pair, w);
    }
}

/* The same of levels less `bias`, times each row's factor */
static INLINE void amx_store_levels(uint32_t (*pair)[16], vb levels, int place, int bias, vf factor) {
    const vf less = vf_mul(factor, vf_set1(-(float)bias));
    levels = vi_srl(levels, place);
    vf w[4];
    UNROLL for (int k = 0; k < 4; k++)
        w[k] = vf_fma(vf_of_nibbles(k ? vi_srl(levels, 8 * k) : levels), factor, less);
    amx_store_floats(pair, w);
}

/* What activations of 16 columns have for a block beside their tiles: found when its first rows come, kept for all */
typedef struct {
    float d[AMX_COLS];
    float sums[AMX_COLS][2];
} amx_scalars;

static INLINE void amx_collect(int digits, int min, int c0, int nc, int64_t n, const q16_column x, int64_t xq_stride,
                               amx_scalars *of) {
    UNROLL for (int c = c0; c < c0 + nc; c++) {
        const int64_t col = (c < n ? c : 0) * xq_stride; /* what stands in for columns that are not there is not used */
        if (digits == 1) of->d[c] = *AT(x.d, col);
        minima_sums(min, *AT(x.sum, col), AT(x.corr16, col), *AT(x.d, col), of->sums[c]);
    }
}

static INLINE q16_column amx_column(q16_column record, int64_t col_bytes, int64_t block) {
    return (q16_column){.d = AT(record.d + block, col_bytes),
                        .sum = AT(record.sum + block, col_bytes),
                        .corr16 = AT(record.corr16 + 2 * block, col_bytes)};
}

/* A chain takes up a tile's row */
static INLINE vf amx_add(int digits, int min, vf chain, vf d, const vf *m, const float *sums, float dx, const float *x_sums) {
    vf dot = vf_load(sums);
    chain = add_minima(min, chain, m, x_sums);
    if (digits == 1) dot = vf_mul(dot, vf_set1(dx));
    return vf_fma(dot, d, chain);
}

/* Many columns. A step is a row group by two units, which are blocks or, where scales cover these, halves of a block. The
 * tiles of both units' activations stay for all row groups of a panel, and a chain is in a register for both. Tiles of a step
 * are stored in the next one and read in the one after that, so that tile and vector unit both have something to do. */
typedef struct {
    int n_made, n_stored, n_added; /* units whose tiles are made, of the step before, stored, and of the one before, added */
    int loads_x;                   /* activations are not in tiles yet */
    int collects;                  /* scalars of the columns that are added are not there yet */
    const uint32_t (*q[AMX_UNITS])[16]; /* of each unit: weights, */
    const float *d[AMX_UNITS];          /* scales, */
    const float (*m[AMX_UNITS])[16];    /* minima */
    q16_column column[AMX_UNITS];       /* and what the first column that is added has beside its digits */
    int64_t xq_stride, n_cols;          /* from this one on */
    const uint16_t *x, *x_ahead;        /* activations; those of a later step, which are asked for */
    float (*stored)[AMX_COLS][16], (*ready)[AMX_COLS][16];
    float *chains;
} amx_step;

/* Slot s of the tile unit's work for unit U of amx_do's step, x being its activations. Tile U holds its sums; HI, LO and W
 * hold activations and weights */
#define AMX_UNIT(U, HI, LO, W)                                                                                         \
    do {                                                                                                               \
        const int is_made = step->n_made > U, takes_x = is_made && step->loads_x;                                      \
        if (s == 0) {                                                                                                  \
            if (is_made) _tile_loadd(W, step->q[U], 64);                                                               \
        } else if (s == 1) {                                                                                           \
            if (takes_x) _tile_loadd(HI, x, 64);                                                                       \
            if (step->n_stored > U) _tile_stored(U, step->stored[U], 64);                                              \
        } else if (s == 2) {                                                                                           \
            if (is_made) _tile_zero(U);                                                                                \
            if (is_made) _tile_dpbf16ps(U, HI, W);                                                                     \
        } else if (digits == 2) {                                                                                      \
            if (takes_x) _tile_loadd(LO, x + 512, 64);                                                                 \
            if (is_made) _tile_dpbf16ps(U, LO, W);                                                                     \
        }                                                                                                              \
    } while (0)

static INLINE AMX void amx_do(int digits, int is_half, int min, const amx_step *step, amx_scalars *of) {
    const int n_slots = AMX_SLOTS / AMX_UNITS, nc = AMX_COLS / n_slots;
    const int n_lines = (is_half ? 1 : AMX_UNITS) * digits * AMX_COLS / AMX_RV; /* of activations that a step asks for */
    vf chain[AMX_COLS] = {vf_set1(0)};
    UNROLL for (int u = 0; u < AMX_UNITS; u++) {
        const uint16_t *x = step->x + u * (is_half ? 16 : 512 * digits);
        vf d = vf_set1(0), m[2] = {vf_set1(0), vf_set1(0)};
        if (u < step->n_added) {
            d = vf_load(step->d[u]);
            UNROLL for (int half = 0; half < min; half++) m[half] = vf_load(step->m[u][half]);
        }
        UNROLL for (int s = 0; s < n_slots; s++) {
            const int slot = u * n_slots + s;
            UNROLL for (int line = slot * n_lines / AMX_SLOTS; line < (slot + 1) * n_lines / AMX_SLOTS; line++)
                __builtin_prefetch(step->x_ahead + 32 * line);
            if (u == 0)
                AMX_UNIT(0, 2, 3, 6);
            else
                AMX_UNIT(1, 4, 5, 7);
            if (!step->n_added) continue;
            if ((digits == 1 || min) && step->collects && u < step->n_added)
                amx_collect(digits, min, s * nc, nc, step->n_cols, step->column[u], step->xq_stride, &of[u]);
            UNROLL for (int c = s * nc; c < (s + 1) * nc; c++) {
                if (u == 0) chain[c] = vf_load(step->chains + c * AMX_RV * 16);
                if (u < step->n_added)
                    chain[c] = amx_add(digits, min, chain[c], d, m, step->ready[u][c], of[u].d[c], of[u].sums[c]);
                if (u == AMX_UNITS - 1) vf_store(step->chains + c * AMX_RV * 16, chain[c]);
            }
        }
    }
}

/* Where one side of the pipeline stands within a panel: at 16 columns, a step's blocks and a row group */
typedef struct {
    int64_t col;
    int block, v;
} amx_place;

/* After all row groups come the next columns, and after these the next two blocks; or, where a step has but one block and
 * chains would come from L2 too often, first the next block */
static INLINE void amx_next(int is_half, amx_place *p, int n_rv, int64_t n_cols, int n_blocks) {
    if (++p->v < n_rv) return;
    p->v = 0;
    if (is_half) {
        if (++p->block < n_blocks) return;
        p->block = 0, p->col += AMX_COLS;
    } else {
        if ((p->col += AMX_COLS) < n_cols) return;
        p->col = 0, p->block += AMX_UNITS;
    }
}

/* acc (columns, 16 AMX_RV) += the n_blocks blocks from block0 on of n_rv row groups */
static INLINE AMX void amx_cols(int digits, int is_half, int min, const woolly_matmul_args *a, const amx_weights *w,
                                int n_rv, int64_t block0, int n_blocks, float *acc) {
    ALIGNED float sums[2][AMX_UNITS][AMX_COLS][16];
    amx_scalars of[AMX_UNITS] = {{{0}, {{0}}}};
    const int64_t n_cols = a->n_cols, column = a->n_k * digits; /* of activations in bf16 */
    const q16_column record = q16_at(a->xq, a->n_k, block0);
    const uint16_t *bf16 = a->bf16 + block0 * 512 * digits;
    const int step_blocks = is_half ? 1 : AMX_UNITS;
    const int64_t n_steps = (n_cols + AMX_COLS - 1) / AMX_COLS * ((n_blocks + step_blocks - 1) / step_blocks) * n_rv;
    amx_place made = {0, 0, 0}, added = {0, 0, 0}, ahead = {0, 0, n_rv - 1};
    int n_made = 0, n_stored = 0, n_added = 0;
    amx_next(is_half, &ahead, n_rv, n_cols, n_blocks);
    for (int64_t i = 0; i < n_steps + AMX_LAG; i++) {
        n_added = n_stored, n_stored = n_made;
        n_made = i >= n_steps ? 0 : is_half || made.block + 1 < n_blocks ? AMX_UNITS : 1;
        amx_step step = {
            .n_made = n_made, .n_stored = n_stored, .n_added = n_added,
            .loads_x = made.v == 0, .collects = added.v == 0,
            .xq_stride = a->xq_stride, .n_cols = n_cols - added.col,
            .x = bf16 + made.col * column + made.block * 512 * digits,
            .x_ahead = bf16 + ahead.col * column + (ahead.block * 512 + made.v * step_blocks * 64) * digits,
            .stored = sums[(i + 1) % 2], .ready = sums[i % 2],
            .chains = acc + (added.col * AMX_RV + added.v) * 16,
        };
        UNROLL for (int u = 0; u < AMX_UNITS; u++) {
            const int of_made = !is_half && u < n_made ? u : 0, of_added = !is_half && u < n_added ? u : 0; /* blocks */
            step.q[u] = w->q[n_made ? made.block + of_made : 0][made.v] + (is_half ? 8 * u : 0);
            step.d[u] = w->d[added.block + of_added][added.v][is_half ? u : 0];
            step.m[u] = w->m[added.block + of_added][added.v];
            step.column[u] = amx_column(record, added.col * a->xq_stride, added.block + of_added);
        }
        amx_do(digits, is_half, min, &step, of);
        if (n_added) amx_next(is_half, &added, n_rv, n_cols, n_blocks);
        if (!n_made) continue;
        amx_next(is_half, &made, n_rv, n_cols, n_blocks);
        if (made.v) continue;
        ahead.v = n_rv - 1;
        amx_next(is_half, &ahead, n_rv, n_cols, n_blocks);
    }
}

#define AMX_TILE_ARGS                                                                                                  \
    const woolly_matmul_args *a, const amx_weights *w, int n_rv, int64_t block0, int n_blocks, float *acc

#define DEFINE_AMX_TILE(NAME, DIGITS, IS_HALF, MIN)                                                                    \
    static AMX __attribute__((noinline)) void amx_tile_##NAME(AMX_TILE_ARGS) {                                         \
        amx_cols(DIGITS, IS_HALF, MIN, a, w, n_rv, block0, n_blocks, acc);                                             \
    }
DEFINE_AMX_TILE(q8, 1, 0, 0)
DEFINE_AMX_TILE(q16, 2, 0, 0)
DEFINE_AMX_TILE(min_q8, 1, 0, MIN_32)
DEFINE_AMX_TILE(min_q16, 2, 0, MIN_32)
DEFINE_AMX_TILE(min16_q8, 1, 0, MIN_16)
DEFINE_AMX_TILE(min16_q16, 2, 0, MIN_16)
DEFINE_AMX_TILE(halves_q8, 1, 1, 0)
DEFINE_AMX_TILE(halves_q16, 2, 1, 0)

/* By whether scales cover halves of a block, the kind of minima, and the digits of activations less one */
static void (*const amx_tiles[2][3][2])(AMX_TILE_ARGS) = {
    {[0] = {amx_tile_q8, amx_tile_q16},
     [MIN_32] = {amx_tile_min_q8, amx_tile_min_q16},
     [MIN_16] = {amx_tile_min16_q8, amx_tile_min16_q16}},
    {[0] = {amx_tile_halves_q8, amx_tile_halves_q16}},
};

/* Few columns: weights of 4 groups of rows come, block after block, while the block before is multiplied. A step is one block
 * of these row groups, which share the tiles of activations, or of two of them where each half of it has a tile of sums. */
#define AMX_FEW_LOAD(T, P)                                                                                             \
    do {                                                                                                               \
        if (is_made) _tile_loadd(T, P, 64);                                                                            \
    } while (0)

/* Tile T, of the step before, is stored, and has the first dot product of this one, or a further one */
#define AMX_FEW_FIRST(T, X, W)                                                                                         \
    do {                                                                                                               \
        if (is_stored) _tile_stored(T, stored[T], 64);                                                                 \
        if (is_made) _tile_zero(T);                                                                                    \
        AMX_FEW_THEN(T, X, W);                                                                                         \
    } while (0)
#define AMX_FEW_THEN(T, X, W)                                                                                          \
    do {                                                                                                               \
        if (is_made) _tile_dpbf16ps(T, X, W);                                                                          \
    } while (0)

typedef struct {
    int is_made, is_stored, is_added;
    int loads_x, collects;
    const uint32_t (*q)[16][16]; /* weights, by groups of rows */
    const uint16_t *x, *x_ahead; /* activations; those that are asked for in advance, or NULL */
    float (*stored)[AMX_COLS][16];
    const float (*ready)[AMX_COLS][16];
    const float (*d)[2][16], (*m)[2][16];
    q16_column column; /* the first of those that are added, at their block */
    int64_t xq_stride, n_cols;
    float *chains;
} amx_few_job;

/* Weights of the next block, which come meanwhile: from the part of each row group's that holds it, to its place */
typedef struct {
    const void *from[AMX_SUMS];
    int comes, o, i; /* whether it does; which part, which of its blocks */
    uint32_t (*q)[16][16];
    float (*d)[2][16], (*m)[2][16];
    amx_levels levels;
} amx_coming;
typedef void (*amx_fill)(const amx_coming *next, int v, int g);

static INLINE int amx_groups_a_step(int is_half) { return is_half ? AMX_SUMS / 2 : AMX_SUMS; }

static INLINE AMX void amx_few_do(int is_half, int min, const amx_few_job *job, amx_scalars *of, const amx_coming *next,
                                  amx_fill fill) {
    const int is_made = job->is_made, is_stored = job->is_stored;
    const int loads_x = is_half || job->loads_x, n_v = amx_groups_a_step(is_half);
    const uint16_t *hi = job->x, *lo = hi + 512;
    const uint32_t (*q)[16][16] = job->q;
    const uint32_t *third = q[is_half ? 0 : 2][is_half ? 8 : 0], *fourth = third + 256;
    float (*stored)[AMX_COLS][16] = job->stored;
    UNROLL for (int s = 0; s < AMX_SLOTS; s++) {
        UNROLL for (int line = 4 * s; line < 4 * s + 4; line++)
            if (job->x_ahead) __builtin_prefetch(job->x_ahead + 32 * line);
        if (s == 0) {
            if (loads_x) AMX_FEW_LOAD(4, hi);
            AMX_FEW_LOAD(6, q[0]);
            AMX_FEW_FIRST(0, 4, 6);
        } else if (s == 1) {
            AMX_FEW_LOAD(7, q[1]);
            AMX_FEW_FIRST(1, 4, 7);
        } else if (s == 2) {
            if (loads_x) AMX_FEW_LOAD(5, lo);
            AMX_FEW_THEN(0, 5, 6);
        } else if (s == 3) {
            AMX_FEW_THEN(1, 5, 7);
        } else if (s == 4) {
            if (is_half) AMX_FEW_LOAD(4, hi + 16);
            AMX_FEW_LOAD(6, third);
            AMX_FEW_FIRST(2, 4, 6);
        } else if (s == 5) {
            AMX_FEW_LOAD(7, fourth);
            AMX_FEW_FIRST(3, 4, 7);
        } else if (s == 6) {
            if (is_half) AMX_FEW_LOAD(5, lo + 16);
            AMX_FEW_THEN(2, 5, 6);
        } else if (s == 7) {
            AMX_FEW_THEN(3, 5, 7);
        }
        if (next->comes) UNROLL for (int v = 0; v < n_v; v++) fill(next, v, s);
        if (!job->is_added) continue;
        const int nc = AMX_COLS * n_v / AMX_SLOTS, c0 = s * nc % AMX_COLS, v = s * nc / AMX_COLS;
        if (min && v == 0 && job->collects)
            amx_collect(2, min, c0, nc, job->n_cols, job->column, job->xq_stride, of);
        vf d[2] = {vf_load(job->d[v][0]), vf_set1(0)}, m[2];
        if (is_half) d[1] = vf_load(job->d[v][1]);
        UNROLL for (int half = 0; half < min; half++) m[half] = vf_load(job->m[v][half]);
        UNROLL for (int c = c0; c < c0 + nc; c++) {
            float *out = job->chains + (c * AMX_SUMS + v) * 16;
            vf chain = amx_add(2, min, vf_load(out), d[0], m, job->ready[v][c], 0, of->sums[c]);
            if (is_half) chain = amx_add(2, 0, chain, d[1], m, job->ready[v + 2][c], 0, NULL);
            vf_store(out, chain);
        }
    }
}

typedef struct {
    int64_t group, block, col;
    int64_t nth; /* of all blocks that go by, which says where in a ring it is; in the -1st only the first one's weights come */
    int v;
} amx_few_place;
_Static_assert(AMX_SCALES >= AMX_LAG + 2, "scales of blocks that come, are multiplied, stored and added");

typedef struct {
    ALIGNED uint32_t q[2][AMX_SUMS][16][16];
    ALIGNED float d[AMX_SCALES][AMX_SUMS][2][16];
    ALIGNED float m[AMX_SCALES][AMX_SUMS][2][16];
    ALIGNED float sums[2][AMX_SUMS + 1][AMX_COLS][16]; /* one more, so that stores and loads are not a page apart */
    ALIGNED float chains[AMX_FEW_COLS][AMX_SUMS][16];
    amx_scalars of;
    amx_levels levels;
    const woolly_matmul_args *a;
    int64_t group_end, n_blocks, n_steps, step; /* of making tiles; below 0 the first weights come */
    amx_few_place made, added;
    const void *part[AMX_SUMS]; /* of each row group, with the block whose weights come */
    int comes, o, i;            /* whether one does, which part that is, which of its blocks */
} amx_few;

static INLINE void amx_few_next(const amx_few *few, amx_few_place *at, int n_v) {
    if ((at->v += n_v) < AMX_SUMS) return;
    at->v = 0;
    if (at->nth >= 0 && (at->col += AMX_COLS) < few->a->n_cols) return;
    at->col = 0;
    if (at->nth++ < 0 || ++at->block < few->n_blocks) return;
    at->block = 0;
    at->group += AMX_SUMS;
}

/* The chains of 16 columns are complete: they are stored, and begin anew */
static __attribute__((noinline)) void amx_few_store(amx_few *few) {
    const int64_t group = few->added.group, n_rv = few->group_end - group, end = few->added.col + AMX_COLS;
    for (int64_t c = few->added.col; c < end; c++)
        for (int v = 0; v < AMX_SUMS; v++) {
            if (v < n_rv && c < few->a->n_cols) store_rows(few->a, c, (group + v) * 16, vf_load(few->chains[c][v]));
            vf_store(few->chains[c][v], vf_set1(0));
        }
}

static INLINE AMX void amx_few_step(int is_half, int min, amx_few *few, amx_fill fill) {
    const woolly_matmul_args *a = few->a;
    const amx_few_place made = few->made, added = few->added;
    const int n_v = amx_groups_a_step(is_half), is_made = few->step >= 0 && few->step < few->n_steps;
    const int64_t nth = made.nth + 1, record = 2 * a->n_k; /* of activations in bf16 */
    const uint16_t *x = a->bf16 + made.col * record + made.block * 1024;
    const amx_few_job job = {
        .is_made = is_made, .is_stored = few->step > 0 && few->step <= few->n_steps, .is_added = few->step >= AMX_LAG,
        .loads_x = made.v == 0, .collects = added.v == 0,
        .q = (const uint32_t (*)[16][16])few->q[made.nth & 1] + made.v,
        .x = x,
        .x_ahead = made.v ? NULL : made.col + AMX_COLS < a->n_cols ? x + AMX_COLS * record : x - made.col * record + 1024,
        .stored = few->sums[(few->step + 1) & 1],
        .ready = (const float (*)[AMX_COLS][16])few->sums[few->step & 1],
        .d = (const float (*)[2][16])few->d[added.nth % AMX_SCALES] + added.v,
        .m = (const float (*)[2][16])few->m[added.nth % AMX_SCALES] + added.v,
        .column = amx_column(q16_at(a->xq, a->n_k, 0), added.col * a->xq_stride, added.block),
        .xq_stride = a->xq_stride, .n_cols = a->n_cols - added.col,
        .chains = few->chains[added.col][added.v],
    };
    amx_coming next = {.comes = few->comes && made.col == 0, .o = few->o, .i = few->i, .levels = few->levels,
                       .q = few->q[nth & 1] + made.v, .d = few->d[nth % AMX_SCALES] + made.v,
                       .m = few->m[nth % AMX_SCALES] + made.v};
    UNROLL for (int v = 0; v < n_v; v++) next.from[v] = few->part[made.v + v];
    amx_few_do(is_half, min, &job, &few->of, &next, fill);
    if (job.is_added) {
        if (added.block == few->n_blocks - 1 && added.v == AMX_SUMS - n_v) amx_few_store(few);
        amx_few_next(few, &few->added, n_v);
    }
    amx_few_next(few, &few->made, n_v);
    few->step++;
}

/* What a format is for these loops */
typedef struct {
    woolly_matmul_fn vector; /* its kernel of the vector unit */
    void (*few_step)(amx_few *few);
    void (*fill)(amx_weights *w, const uint8_t *row, int v, int64_t part, int n, const amx_levels *levels);
    void (*const *multiply)(AMX_TILE_ARGS); /* of one digit, of two */
    int64_t group_bytes;                    /* a block of a row group */
    const uint8_t *table;                   /* of weights by their codes, or NULL */
    int outer, inner, bias, n_bits, has_halves;
    int least, few; /* columns from which on tiles were faster than the vector unit, and up to which as few */
} amx_format;

static AMX void amx_few_cols(const amx_format *f, const woolly_matmul_args *a, int64_t group_begin, int64_t group_end) {
    const int64_t n_blocks = a->n_k / WOOLLY_QBLOCK, row_bytes = n_blocks / (f->inner * f->outer) * f->group_bytes;
    const int64_t part_bytes = f->group_bytes / f->outer, n_tiles = (a->n_cols + AMX_COLS - 1) / AMX_COLS;
    const int64_t n_nth = (group_end - group_begin + AMX_SUMS - 1) / AMX_SUMS * n_blocks;
    const int64_t steps_a_tile = AMX_SUMS / amx_groups_a_step(f->has_halves);
    amx_few few;
    memset(few.chains, 0, (size_t)n_tiles * AMX_COLS * sizeof(*few.chains));
    few.a = a, few.group_end = group_end, few.n_blocks = n_blocks, few.levels = amx_levels_of(f->table, f->bias);
    few.n_steps = n_nth * n_tiles * steps_a_tile, few.step = -steps_a_tile;
    few.of = (amx_scalars){{0}, {{0}}};
    few.made = few.added = (amx_few_place){.group = group_begin};
    few.made.nth = -1;
    int64_t group = group_begin, block = 0; /* that come */
    for (int64_t nth = -1; nth < n_nth; nth++) {
        few.comes = nth + 1 < n_nth, few.i = (int)(block % f->inner);
        if (few.comes && few.i == 0) {
            const int64_t part = block / f->inner;
            few.o = (int)(part % f->outer);
            for (int v = 0; v < AMX_SUMS; v++) {
                const uint8_t *row = a->w + (group + v < group_end ? group + v : group) * row_bytes;
                few.part[v] = row + part / f->outer * f->group_bytes;
                if (!a->streams) continue;
                const int is_last = block + f->inner == n_blocks; /* then come the next 4 groups */
                prefetch_bytes(is_last ? row + AMX_SUMS * row_bytes : row + (part + 1) * part_bytes, part_bytes);
            }
        }
        for (int64_t i = (nth < 0 ? 1 : n_tiles) * steps_a_tile; i > 0; i--) f->few_step(&few);
        if (++block == n_blocks) block = 0, group += AMX_SUMS;
    }
    for (int i = 0; i < AMX_LAG; i++) f->few_step(&few);
}

static AMX void amx_many_cols(const amx_format *f, const woolly_matmul_args *a, int64_t group_begin, int64_t group_end) {
    const int64_t n_parts = a->n_k / WOOLLY_QBLOCK / f->inner, part_bytes = f->group_bytes / f->outer;
    const int64_t step = AMX_BLOCKS / f->inner;
    const amx_levels levels = amx_levels_of(f->table, f->bias);
    amx_weights w;
    ALIGNED float acc[AMX_COL_BLOCK * AMX_RV * 16];
    for (int64_t group = group_begin; group < group_end; group += AMX_RV) {
        const int64_t n_rv = group_end - group < AMX_RV ? group_end - group : AMX_RV;
        for (int64_t col = 0; col < a->n_cols; col += AMX_COL_BLOCK) {
            woolly_matmul_args cols = *a;
            cols.n_cols = a->n_cols - col < AMX_COL_BLOCK ? a->n_cols - col : AMX_COL_BLOCK;
            cols.bf16 += col * a->n_digits * a->n_k, cols.xq += col * a->xq_stride, cols.out += col * a->out_stride;
            memset(acc, 0, sizeof(acc) / AMX_COL_BLOCK * (size_t)((cols.n_cols + AMX_COLS - 1) / AMX_COLS * AMX_COLS));
            for (int64_t part = 0; part < n_parts; part += step) {
                const int n = (int)(n_parts - part < step ? n_parts - part : step);
                for (int v = 0; v < n_rv; v++) {
                    const uint8_t *row = a->w + (group + v) * n_parts * part_bytes;
                    f->fill(&w, row, v, part, n, &levels);
                    if (a->streams && col == 0) prefetch_bytes(row + (part + n) * part_bytes, n * part_bytes);
                }
                f->multiply[a->n_digits - 1](&cols, &w, (int)n_rv, part * f->inner, n * f->inner, acc);
            }
            for (int64_t c = 0; c < cols.n_cols; c++)
                for (int64_t v = 0; v < n_rv; v++)
                    store_rows(&cols, c, (group + v) * 16, vf_load(acc + (c * AMX_RV + v) * 16));
        }
    }
}

static AMX void amx_matmul(const amx_format *f, const woolly_matmul_args *a, int64_t group_begin, int64_t group_end) {
    const int least = a->n_digits == 2 ? f->least : f->n_bits == 8 ? AMX_LEAST_BYTE_COLS : AMX_COLS;
    const int64_t n_left = a->n_cols % AMX_COLS, n_tiled = n_left > AMX_MOST_REST ? a->n_cols : a->n_cols - n_left;
    woolly_matmul_args tiled = *a, rest = *a;
    if (a->n_cols < least || !a->bf16) {
        f->vector(a, group_begin, group_end);
        return;
    }
    tiled.n_cols = n_tiled;
    rest.xq += n_tiled * a->xq_stride, rest.out += n_tiled * a->out_stride, rest.n_cols -= n_tiled;
    const int is_few = a->n_digits == 2 && n_tiled <= f->few;
    amx_begin(is_few ? AMX_SUMS : AMX_UNITS, f->has_halves ? 16 : 32);
    (is_few ? amx_few_cols : amx_many_cols)(f, &tiled, group_begin, group_end);
    amx_end();
    if (rest.n_cols) f->vector(&rest, group_begin, group_end);
}

/* Of row group v, group g of 4 weights, from what CODES names */
#define AMX_STORE_quants(NAME, N_BITS)                                                                                 \
    amx_store_weights(next->q[v] + 2 * g, NAME##_quants(b, next->o, next->i, g), N_BITS, NAME##_BIAS, &next->levels)
#define AMX_STORE_codes(NAME, N_BITS)                                                                                  \
    amx_store_weights(next->q[v] + 2 * g, NAME##_codes(b, next->o, next->i, g), N_BITS, 0, &next->levels)
#define AMX_STORE_levels(NAME, N_BITS)                                                                                 \
    do {                                                                                                               \
        if (g == 0) { /* factors lie where others have minima */                                                       \
            vi factors = NAME##_factors(b, next->o, next->i);                                                          \
            vf_store(next->m[v][0], vf_from_vi(vi_sra(vi_sll(factors, 16), 16)));                                      \
            vf_store(next->m[v][1], vf_from_vi(vi_sra(factors, 16)));                                                  \
        }                                                                                                              \
        amx_store_levels(next->q[v] + 2 * g, NAME##_levels(b, next->o, next->i, g), NAME##_place(next->i, g / 4),      \
                         NAME##_LEVEL_BIAS, vf_load(next->m[v][g / 4]));                                               \
    } while (0)

/* NAME_matmul_amx, for a format that DEFINE_INT_MATMUL has defined; N_BITS are those of what NAME_CODES gives, TABLE says
 * which weights these are, where they are not the weights; LEAST and FEW: see amx_format, medians of turns in docs/kernels.md */
#define DEFINE_AMX_MATMUL(NAME, N_BITS, CODES, TABLE, LEAST, FEW)                                                      \
    _Static_assert(AMX_BLOCKS % NAME##_INNER == 0, "a tile holds whole parts of " #NAME);                              \
    _Static_assert(!(NAME##_HALVES && NAME##_MIN), "no tiles have both");                                              \
    _Static_assert(LEAST >= WOOLLY_BF16_LEAST_COLS, "there are tiles of activations");                                 \
    _Static_assert(FEW <= AMX_FEW_COLS, "few columns have chains");                                                    \
                                                                                                                       \
    static INLINE void NAME##_come_amx(const amx_coming *next, int v, int g) {                                         \
        const NAME##_group *b = next->from[v];                                                                         \
        AMX_STORE_##CODES(NAME, N_BITS);                                                                               \
        if (g != 2 * v) return; /* a row group's scales come with one of its quants, each with another one */          \
        vf d[2], m[2];                                                                                                 \
        NAME##_scales(b, next->o, next->i, d, m);                                                                      \
        UNROLL for (int half = 0; half <= NAME##_HALVES; half++) vf_store(next->d[v][half], d[half]);                  \
        UNROLL for (int half = 0; half < NAME##_MIN; half++) vf_store(next->m[v][half], m[half]);                      \
    }                                                                                                                  \
                                                                                                                       \
    /* n parts, of INNER blocks of 32 each, from the part-th on of a row group */                                      \
    static void NAME##_fill_amx(amx_weights *w, const uint8_t *row, int v, int64_t part, int n,                        \
                                const amx_levels *levels) {                                                            \
        _Pragma("GCC unroll 1") for (int p = 0; p < n; p++)                                                            \
            UNROLL for (int i = 0; i < NAME##_INNER; i++) {                                                            \
                int s = p * NAME##_INNER + i;                                                                          \
                const amx_coming block = {.from = {(const NAME##_group *)row + (part + p) / NAME##_OUTER},             \
                                          .o = (int)((part + p) % NAME##_OUTER),                                       \
                                          .i = i,                                                                      \
                                          .q = &w->q[s][v],                                                            \
                                          .d = &w->d[s][v],                                                            \
                                          .m = &w->m[s][v],                                                            \
                                          .levels = *levels};                                                          \
                UNROLL for (int g = 0; g < 8; g++) NAME##_come_amx(&block, 0, g);                                      \
            }                                                                                                          \
    }                                                                                                                  \
                                                                                                                       \
    static AMX void NAME##_few_step_amx(amx_few *few) {                                                                \
        amx_few_step(NAME##_HALVES, NAME##_MIN, few, NAME##_come_amx);                                                 \
    }                                                                                                                  \
                                                                                                                       \
    static void NAME##_matmul_amx(const woolly_matmul_args *a, int64_t group_begin, int64_t group_end) {               \
        static const amx_format format = {                                                                             \
            .vector = NAME##_matmul,                                                                                   \
            .few_step = NAME##_few_step_amx,                                                                           \
            .fill = NAME##_fill_amx,                                                                                   \
            .multiply = amx_tiles[NAME##_HALVES][NAME##_MIN],                                                          \
            .group_bytes = sizeof(NAME##_group),                                                                       \
            .table = TABLE,                                                                                            \
            .outer = NAME##_OUTER,                                                                                     \
            .inner = NAME##_INNER,                                                                                     \
            .bias = NAME##_BIAS,                                                                                       \
            .n_bits = N_BITS,                                                                                          \
            .has_halves = NAME##_HALVES,                                                                               \
            .least = LEAST,                                                                                            \
            .few = FEW,                                                                                                \
        };                                                                                                             \
        amx_matmul(&format, a, group_begin, group_end);                                                                \
    }

#endif
