/* The matmul of compute="bf16": weights and activations rounded to bf16, products added up in f32 by the BF16 dot unit.
 *
 * A panel holds the weights of two groups of rows, scales and minima included, over a slice of k. It is made once for all
 * columns, while the unit is busy with the panel before it. Sums stay in registers over a slice and in `out` between
 * slices; slices depend on the number of k alone, so that a column's result depends on no other column.
 *
 * Rounding is to nearest, ties away from zero. The unit takes denormal numbers for zero.
 */
#ifndef WOOLLY_MATMUL_BF16_H
#define WOOLLY_MATMUL_BF16_H

#define BF16_RV 2         /* groups of rows in a panel */
#define BF16_SLICE 12     /* most blocks of 32 along k in a panel: with the activations of 32 columns 48 KB */
#define BF16_ROW_BLOCK 32 /* groups of rows that go by before the next slice: their sums and the activations fit into L2 */
#define BF16_COLS 32      /* columns that are multiplied in one step: two groups of 16 */
#define BF16_SUMS 4       /* tiles of sums: of both groups of rows and columns */

typedef uint32_t bf16_square[16][16]; /* [pair of k][row]: two bf16 */
typedef bf16_square bf16_panel[BF16_RV];

/* a quarter of a block of 32 along k of a packed group of rows: so little that the unit need not wait for it */
typedef void (*bf16_fill_fn)(const uint8_t *group, int64_t n_k, int64_t block, int quarter, uint32_t (*pairs)[16]);

static INLINE vi bf16_pair(vf even, vf odd) {
    const vi half = vi_set1(0x8000), upper = vi_set1((int32_t)0xffff0000);
    const vi low = vi_srl(vi_add(vf_bits(even), half), 16), high = vi_add(vf_bits(odd), half);
    return _mm512_ternarylogic_epi32(low, high, upper, 0xf8); /* low | (high & upper) */
}

/* 16 rows by 4 weights d q + c; a byte becomes the fraction of 256 + q, so that no conversion is needed: c has -256 d in it */
static INLINE void bf16_store_weights(uint32_t (*pair)[16], vb q, vf d, vf c) {
    const vi fraction = vi_set1(0x007f8000), one = vi_set1(0x43800000), at[4] = {vi_sll(q, 15), vi_sll(q, 7), vi_srl(q, 1), vi_srl(q, 9)};
    vf w[4];
    UNROLL for (int k = 0; k < 4; k++)
        w[k] = vf_fma(vf_of_bits(_mm512_ternarylogic_epi32(at[k], fraction, one, 0xea)), d, c); /* (at & fraction) | one */
    vi_store(pair[0], bf16_pair(w[0], w[1]));
    vi_store(pair[1], bf16_pair(w[2], w[3]));
}

/* NAME_fill_bf16 from NAME_quants and NAME_scales */
#define DEFINE_BF16_FILL(NAME)                                                                                         \
    static void NAME##_fill_bf16(const uint8_t *group, int64_t n_k, int64_t block, int quarter,                       \
                                 uint32_t (*pairs)[16]) {                                                              \
        const NAME##_group *b = (const NAME##_group *)group + block / NAME##_SUB;                                      \
        const int o = (int)(block / NAME##_INNER % NAME##_OUTER);                                                      \
        (void)n_k;                                                                                                     \
        UNROLL for (int i = 0; i < NAME##_INNER; i++) {                                                                \
            if (i != (int)(block % NAME##_INNER)) continue;                                                            \
            vf d[2] = {vf_set1(0), vf_set1(0)}, m[2] = {vf_set1(0), vf_set1(0)};                                       \
            NAME##_scales(b, o, i, d, m);                                                                              \
            UNROLL for (int g = 0; g < 8; g++) {                                                                       \
                if (g / 2 != quarter) continue;                                                                        \
                vf scale = d[NAME##_HALVES ? g / 4 : 0], bias = vf_set1(-256.0f - NAME##_BIAS);                        \
                vf c = NAME##_MIN ? vf_fma(scale, bias, m[NAME##_MIN == MIN_16 ? g / 4 : 0]) : vf_mul(scale, bias);    \
                bf16_store_weights(pairs + 2 * g, NAME##_quants(b, o, i, g), scale, c);                                \
            }                                                                                                          \
        }                                                                                                              \
    }

#define DEFINE_BF16_FLOAT_FILL(NAME, T, LOAD)                                                                          \
    static void NAME##_fill_bf16(const uint8_t *group, int64_t n_k, int64_t block, int quarter,                       \
                                 uint32_t (*pairs)[16]) {                                                              \
        const T *w = (const T *)group + block * 32 * 16;                                                               \
        const int64_t n = n_k - block * 32;                                                                            \
        for (int k = 8 * quarter; k < 8 * quarter + 8; k += 2) {                                                       \
            vf even = k < n ? LOAD(w + k * 16) : vf_set1(0), odd = k + 1 < n ? LOAD(w + k * 16 + 16) : vf_set1(0);     \
            vi_store(pairs[k / 2], bf16_pair(even, odd));                                                              \
        }                                                                                                              \
    }

/* a row of activations -> its place among groups of 16 columns: (groups, blocks of 32, 16, 32), zero beyond n_k */
static void round_bf16(const float *x, int64_t n_k, int64_t col, uint16_t *bf16) {
    uint16_t *out = bf16 + col / 16 * (woolly_rounded_k(n_k) * 16) + col % 16 * 32;
    for (int64_t k = 0; k < woolly_rounded_k(n_k); k += 16) {
        const int64_t n = n_k - k;
        vf v = n >= 16 ? vf_load(x + k) : n > 0 ? vf_load_n(x + k, n) : vf_set1(0);
        store_bf16(out + k / 32 * 512 + k % 32, vf_of_bits(vi_add(vf_bits(v), vi_set1(0x8000))));
    }
}

/* Panels yet to be made: n quarters of the blocks from block0 on of two groups, alternately */
typedef struct {
    bf16_fill_fn fill;
    const uint8_t *group[BF16_RV];
    bf16_panel *panels;
    int64_t n_k, block0, n, done;
} bf16_filling;

static INLINE void bf16_fill_next(bf16_filling *f) {
    const int64_t s = f->done / (4 * BF16_RV), v = f->done / 4 % BF16_RV;
    f->fill(f->group[v], f->n_k, f->block0 + s, f->done % 4, f->panels[s][v]);
    f->done++;
}

/* out (or zero) += panels x for all columns and the rows from `row` on, making the next panels at the same time */
typedef void (*bf16_unit_fn)(const woolly_matmul_args *a, int64_t row, int64_t block0, int64_t n, const bf16_panel *panels,
                             int adds, bf16_filling *next);

/* The sums of 32 columns by 32 rows at the edge of the matrix, as four squares: from out, or to it */
static void bf16_edge(const woolly_matmul_args *a, int64_t col, int64_t row, float (*edge)[16][16], int is_stored) {
    for (int64_t c = 0; c < BF16_COLS && col + c < a->n_cols; c++)
        for (int v = 0; v < BF16_RV; v++) {
            const int64_t rest = a->n_rows - row - 16 * v, n = rest < 16 ? rest : 16;
            if (n <= 0) continue;
            float *out = a->out + (col + c) * a->out_stride + row + 16 * v, *sums = edge[c / 16 * 2 + v][c % 16];
            if (is_stored) vf_store_n(out, vf_load(sums), n);
            else vf_store(sums, vf_load_n(out, n));
        }
}

#if HAS_AMX
static AMX void bf16_amx_panels(const woolly_matmul_args *a, int64_t row, int64_t block0, int64_t n, const bf16_panel *panels,
                                int adds, bf16_filling *next) {
    ALIGNED float edge[4][16][16];
    const int64_t group = 16 * woolly_rounded_k(a->n_k), n_steps = (a->n_cols + BF16_COLS - 1) / BF16_COLS * n;
    int64_t due = 0;
    for (int64_t col = 0; col < a->n_cols; col += BF16_COLS) {
        const uint16_t *x0 = a->bf16 + col / 16 * group + block0 * 512, *x1 = x0 + group;
        const int two = a->n_cols - col > 16, is_edge = a->n_cols - col < BF16_COLS || a->n_rows - row < 16 * BF16_RV;
        float *sums[4] = {a->out + col * a->out_stride + row, sums[0] + 16, sums[0] + 16 * a->out_stride, sums[2] + 16};
        int64_t stride = a->out_stride * 4;
        if (is_edge) {
            for (int i = 0; i < 4; i++) sums[i] = edge[i][0];
            stride = 64;
            if (adds) bf16_edge(a, col, row, edge, 0);
        }
        if (adds) {
            _tile_loadd(0, sums[0], stride);
            _tile_loadd(1, sums[1], stride);
            if (two) {
                _tile_loadd(2, sums[2], stride);
                _tile_loadd(3, sums[3], stride);
            }
        } else {
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
        }
        for (int64_t s = 0; s < n; s++) {
            _tile_loadd(4, x0 + s * 512, 64);
            _tile_loadd(6, panels[s][0], 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, panels[s][1], 64);
            _tile_dpbf16ps(1, 4, 7);
            for (due += next->n; due >= n_steps; due -= n_steps) bf16_fill_next(next);
            if (two) {
                _tile_loadd(5, x1 + s * 512, 64);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
        }
        _tile_stored(0, sums[0], stride);
        _tile_stored(1, sums[1], stride);
        if (two) {
            _tile_stored(2, sums[2], stride);
            _tile_stored(3, sums[3], stride);
        }
        if (is_edge) bf16_edge(a, col, row, edge, 1);
    }
}

#endif

/* vdpbf16ps: 8 columns by 32 rows in registers */
#define BF16_DOT __attribute__((target("avx512bf16")))
#define BF16_NC 8

static BF16_DOT void bf16_avx512_panels(const woolly_matmul_args *a, int64_t row, int64_t block0, int64_t n,
                                        const bf16_panel *panels, int adds, bf16_filling *next) {
    const int64_t n_rows[BF16_RV] = {a->n_rows - row < 16 ? a->n_rows - row : 16,
                                     a->n_rows - row < 16 ? 0 : a->n_rows - row < 32 ? a->n_rows - row - 16 : 16};
    for (int64_t col = 0; col < a->n_cols; col += BF16_NC) {
        const uint16_t *x = a->bf16 + col / 16 * (16 * woolly_rounded_k(a->n_k)) + block0 * 512 + col % 16 * 32;
        const int nc = a->n_cols - col < BF16_NC ? (int)(a->n_cols - col) : BF16_NC;
        float *out = a->out + col * a->out_stride + row;
        vf sum[BF16_NC][BF16_RV];
        UNROLL for (int c = 0; c < BF16_NC; c++) UNROLL for (int v = 0; v < BF16_RV; v++)
            sum[c][v] = adds && c < nc ? vf_load_n(out + c * a->out_stride + 16 * v, n_rows[v]) : vf_set1(0);
        for (int64_t s = 0; s < n; s++) {
            for (int pair = 0; pair < 16; pair++) {
                const vi w[BF16_RV] = {vi_load(panels[s][0][pair]), vi_load(panels[s][1][pair])};
                UNROLL for (int c = 0; c < BF16_NC; c++) {
                    int32_t two;
                    memcpy(&two, x + s * 512 + c * 32 + pair * 2, 4);
                    UNROLL for (int v = 0; v < BF16_RV; v++)
                        sum[c][v] = _mm512_dpbf16_ps(sum[c][v], (__m512bh)w[v], (__m512bh)vi_set1(two));
                }
            }
        }
        UNROLL for (int c = 0; c < BF16_NC; c++) UNROLL for (int v = 0; v < BF16_RV; v++)
            if (c < nc) vf_store_n(out + c * a->out_stride + 16 * v, sum[c][v], n_rows[v]);
    }
    while (next->done < next->n) bf16_fill_next(next);
}

/* Where matmul_bf16 stands: a panel's rows and its slice of k */
typedef struct {
    int64_t group, block;
} bf16_place;

/* Row blocks, slices of k for each, panels for each */
static INLINE bf16_place bf16_after(bf16_place at, int64_t begin, int64_t end, int64_t n_blocks, int64_t slice) {
    const int64_t first = at.group - (at.group - begin) % BF16_ROW_BLOCK;
    const int64_t last = end - first < BF16_ROW_BLOCK ? end : first + BF16_ROW_BLOCK;
    if (at.group + BF16_RV < last) return (bf16_place){at.group + BF16_RV, at.block};
    return at.block + slice < n_blocks ? (bf16_place){first, at.block + slice} : (bf16_place){last, 0};
}

/* The panels at a place are to be made in `panels` */
static INLINE void bf16_plan(bf16_filling *f, const woolly_matmul_args *a, bf16_place at, int64_t end, int64_t group_bytes,
                             int64_t slice, bf16_panel *panels) {
    const int64_t rest = woolly_rounded_k(a->n_k) / 32 - at.block, pair = at.group + 1 < end ? at.group + 1 : at.group;
    f->group[0] = a->w + at.group * group_bytes, f->group[1] = a->w + pair * group_bytes;
    f->panels = panels, f->block0 = at.block, f->done = 0;
    f->n = at.group >= end ? 0 : 4 * BF16_RV * (rest < slice ? rest : slice);
}

static void matmul_bf16(const woolly_matmul_args *args, int64_t begin, int64_t end, int64_t group_bytes, bf16_fill_fn fill,
                        bf16_unit_fn unit) {
    ALIGNED bf16_panel panels[2][BF16_SLICE];
    woolly_matmul_args a = *args;
    const int64_t n_blocks = woolly_rounded_k(a.n_k) / 32, n_slices = (n_blocks + BF16_SLICE - 1) / BF16_SLICE;
    const int64_t slice = (n_blocks + n_slices - 1) / n_slices; /* of even length */
    bf16_place at = {begin, 0};
    bf16_filling next = {.fill = fill, .n_k = a.n_k};
    if (a.n_rows > end * 16) a.n_rows = end * 16; /* an odd group at the end has none beside it */
    bf16_plan(&next, &a, at, end, group_bytes, slice, panels[0]);
    while (next.done < next.n) bf16_fill_next(&next);
    for (int turn = 0; at.group < end; turn = !turn) {
        const bf16_place after = bf16_after(at, begin, end, n_blocks, slice);
        const int64_t rest = n_blocks - at.block;
        bf16_plan(&next, &a, after, end, group_bytes, slice, panels[!turn]);
        unit(&a, at.group * 16, at.block, rest < slice ? rest : slice, (const bf16_panel *)panels[turn],
             at.block > 0 || a.accumulate, &next);
        at = after;
    }
}

/* NAME_matmul_bf16_amx and NAME_matmul_bf16_avx512 */
#define DEFINE_BF16_MATMUL(NAME)                                                                                       \
    static void NAME##_matmul_bf16_avx512(const woolly_matmul_args *a, int64_t begin, int64_t end) {                   \
        matmul_bf16(a, begin, end, a->n_k / NAME##_BLOCK * (int64_t)sizeof(NAME##_group), NAME##_fill_bf16,            \
                    bf16_avx512_panels);                                                                               \
    }                                                                                                                  \
    DEFINE_BF16_AMX_MATMUL(NAME)
#if HAS_AMX
#define DEFINE_BF16_AMX_MATMUL(NAME)                                                                                   \
    static void NAME##_matmul_bf16_amx(const woolly_matmul_args *a, int64_t begin, int64_t end) {                      \
        amx_begin(BF16_SUMS, 32);                                                                                      \
        matmul_bf16(a, begin, end, a->n_k / NAME##_BLOCK * (int64_t)sizeof(NAME##_group), NAME##_fill_bf16,            \
                    bf16_amx_panels);                                                                                  \
        amx_end();                                                                                                     \
    }
#else
#define DEFINE_BF16_AMX_MATMUL(NAME)
#endif

#endif
