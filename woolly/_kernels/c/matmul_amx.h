/* The integer tile on AMX: 16 columns by 32 rows a step, both digits of the activations in tile registers.
 *
 * A block's int32 sums are stored, brought together as 256 hi + lo and added to the chains by the same int_block that
 * the other kernels use, so that the bits are the same. The tile's bytes are signed here: q - bias.
 */
#ifndef WOOLLY_MATMUL_AMX_H
#define WOOLLY_MATMUL_AMX_H

#define AMX __attribute__((target("amx-tile,amx-int8")))
#define AMX_COLS 16
#define AMX_LAG 2   /* blocks between a tile's store and its use: sooner, the loads wait for the stores */
#define AMX_SUMS 4  /* blocks whose sums are kept, a power of two above AMX_LAG */

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} amx_config;

/* tmm0 .. 3: sums (n_cols, 16) int32; 4, 5: activations (n_cols, k bytes); 6, 7: weights (k / 4, 16 rows of 4 bytes) */
static INLINE amx_config amx_shapes(int n_cols, int k) {
    amx_config config = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        config.rows[i] = (uint8_t)(i < 6 ? n_cols : k / 4);
        config.row_bytes[i] = (uint16_t)(i < 4 || i > 5 ? 64 : k);
    }
    return config;
}

typedef int32_t amx_sums[4][AMX_COLS][16];

static INLINE vi both_digits(int32_t (*sums)[AMX_COLS][16], int col) {
    return vi_add(vi_sll(vi_load(sums[0][col]), 8), vi_load(sums[1][col]));
}

/* What is added to the chains of one block: for both groups of rows, or (halves) for group v alone */
typedef struct {
    int32_t (*sums)[AMX_COLS][16]; /* [2 * group + digit], halves: [2 * half + digit] */
    vf d[2];
    vf m[2][2];
    const float *dx;
    const float *sum;
    const int32_t *corr16;
    float *acc;
} amx_post;

static INLINE void amx_add(int halves, int min, const amx_post *p, int64_t xq_stride, int begin, int end) {
    for (int c = begin; c < end; c++) {
        float dx = *AT(p->dx, c * xq_stride);
        const float *sum = AT(p->sum, c * xq_stride);
        const int32_t *corr16 = AT(p->corr16, c * xq_stride);
        vi dot[2] = {both_digits(p->sums, c), both_digits(p->sums + 2, c)};
        float *acc = p->acc + c * INT_ROWS;
        vf_store(acc, int_block(halves, min, vf_load(acc), dot, p->d, min_term(min, p->m[0], sum, corr16), dx));
        if (halves) continue;
        vf least = min_term(min, p->m[1], sum, corr16);
        vf_store(acc + 16, int_block(0, min, vf_load(acc + 16), dot + 1, p->d + 1, least, dx));
    }
}

/* acc (n_cols, INT_ROWS) += the tile's n_blocks blocks, for up to 16 columns. Tile instructions of a step stand between
 * the vector work of an earlier one, so that both units have something to do */
static INLINE AMX void amx_tile_cols(int halves, int min, int n_cols, const int_tile *tile, int n_blocks,
                                     const uint8_t *xq, int64_t xq_stride, int64_t n_k, int64_t block0, float *acc) {
    ALIGNED amx_sums sums[AMX_SUMS];
    q16_column x = q16_at(xq, n_k, block0);
    int n_steps = halves ? 2 * n_blocks : n_blocks, q1 = n_cols / 4, q2 = n_cols / 2, q3 = n_cols - q1;
    for (int step = 0; step < n_steps + AMX_LAG; step++) {
        int is_tile = step < n_steps, is_post = step >= AMX_LAG, done = is_post ? step - AMX_LAG : 0;
        int b = halves ? step / 2 : step, v = halves ? step % 2 : 0;
        int done_b = halves ? done / 2 : done, done_v = halves ? done % 2 : 0;
        const int8_t *hi = x.digits[0] + 32 * b, *lo = x.digits[1] + 32 * b;
        int32_t (*next)[AMX_COLS][16] = sums[step % AMX_SUMS];
        amx_post post = {.sums = sums[done % AMX_SUMS], .dx = x.d + done_b, .sum = x.sum + done_b};
        post.corr16 = x.corr16 + 2 * done_b;
        post.acc = acc + done_v * 16;
        post.d[0] = vf_load(tile->d[done_b][done_v][0]);
        post.d[1] = halves ? vf_load(tile->d[done_b][done_v][1]) : vf_load(tile->d[done_b][1][0]);
        for (int v2 = 0; v2 < 2; v2++)
            for (int half = 0; half < 2; half++) /* as many minima as min says: 0, 1 or 2 */
                post.m[v2][half] = min > half ? vf_load(tile->m[done_b][v2][half]) : post.d[0];
        if (is_tile) {
            _tile_zero(0);
            _tile_zero(1);
            _tile_loadd(6, tile->q[b][0][v], INT_RV * 64);
            _tile_loadd(4, hi, xq_stride);
            _tile_loadd(5, lo, xq_stride);
            _tile_dpbssd(0, 4, 6);
            _tile_dpbssd(1, 5, 6);
        }
        if (is_post) amx_add(halves, min, &post, xq_stride, 0, q1);
        if (is_tile) {
            _tile_zero(2);
            _tile_zero(3);
            _tile_loadd(7, tile->q[b][halves ? 4 : 0][halves ? v : 1], INT_RV * 64);
            if (halves) {
                _tile_loadd(4, hi + 16, xq_stride);
                _tile_loadd(5, lo + 16, xq_stride);
            }
            _tile_dpbssd(2, 4, 7);
            _tile_dpbssd(3, 5, 7);
            _tile_stored(0, next[0], 64);
        }
        if (is_post) amx_add(halves, min, &post, xq_stride, q1, q2);
        if (is_tile) _tile_stored(1, next[1], 64);
        if (is_post) amx_add(halves, min, &post, xq_stride, q2, q3);
        if (is_tile) _tile_stored(2, next[2], 64);
        if (is_post) amx_add(halves, min, &post, xq_stride, q3, n_cols);
        if (is_tile) _tile_stored(3, next[3], 64);
    }
}

#define DEFINE_AMX_TILE(KIND, HALVES, MIN)                                                                             \
    static AMX __attribute__((noinline)) void amx_tile_##KIND(INT_TILE_ARGS) {                                        \
        int shaped = 0;                                                                                                \
        for (int64_t c = 0; c < n_cols; c += AMX_COLS) {                                                               \
            int n = (int)(n_cols - c < AMX_COLS ? n_cols - c : AMX_COLS);                                              \
            if (n != shaped) {                                                                                         \
                amx_config config = amx_shapes(n, HALVES ? 16 : 32);                                                   \
                __asm__ volatile("" : : "m"(config)); /* GCC 12 believes that only 8 of its 64 bytes are read */       \
                _tile_loadconfig(&config);                                                                             \
                shaped = n;                                                                                            \
            }                                                                                                          \
            amx_tile_cols(HALVES, MIN, n, tile, n_blocks, xq + c * xq_stride, xq_stride, n_k, block0,                  \
                          acc + c * INT_ROWS);                                                                         \
        }                                                                                                              \
        _tile_release();                                                                                               \
    }
DEFINE_AMX_TILE(full, 0, 0)
DEFINE_AMX_TILE(halves, 1, 0)
DEFINE_AMX_TILE(min, 0, MIN_32)
DEFINE_AMX_TILE(min16, 0, MIN_16)

#endif
