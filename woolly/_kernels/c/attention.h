/* Attention over a KV cache, in tiles of 128 keys at absolute positions.
 *
 * For each query and tile: scores s = q k, m = max s, p = exp(s - m), l = sum p, acc = p v, and the tiles are merged in
 * ascending order. What a query gets depends on its position and the keys alone: not on the queries computed beside it,
 * nor on how tiles were shared out among threads.
 */
#ifndef WOOLLY_ATTENTION_H
#define WOOLLY_ATTENTION_H

#include "elementwise.h"
#include "matmul_float.h"

static void store_kv(const woolly_kv_head *kv, int64_t head_dim, int64_t pos, const float *k, const float *v) {
    int64_t k_at = pos / 16 * 16 * kv->head_dim + pos % 16, v_at = pos * kv->head_dim;
    if (kv->kv_type == WOOLLY_KV_F16) {
        uint16_t *keys = (uint16_t *)kv->k + k_at, *values = (uint16_t *)kv->v + v_at;
        for (int64_t i = 0; i < head_dim; i++) keys[16 * i] = f16_of_f32(k[i]), values[i] = f16_of_f32(v[i]);
    } else {
        float *keys = (float *)kv->k + k_at, *values = (float *)kv->v + v_at;
        for (int64_t i = 0; i < head_dim; i++) keys[16 * i] = k[i], values[i] = v[i];
    }
}

/* widening keys or values to f32 once costs less than in each column's multiply-add from so many columns on */
#define CACHE_DIRECT 9

/* float_stream_NAME, and float_cols_NAME for more columns than it takes */
#define DEFINE_CACHE_COLS(NAME, T)                                                                                     \
    static void cache_cols_##NAME(int64_t n_cols, FLOAT_COLS_ARGS(T), int64_t ahead) {                                 \
        const int64_t n = !ahead ? 0 : n_cols < FLOAT_STREAM_MOST ? n_cols : FLOAT_STREAM_MOST;                        \
        if (n) float_stream_##NAME(n, w, w_k, w_rv, x, x_cols, n_k, acc, acc_cols, acc_rv, ahead);                     \
        if (n == n_cols) return;                                                                                       \
        float_cols_##NAME(n_cols - n, w, w_k, w_rv, x + n * x_cols, x_cols, n_k, acc + n * acc_cols, acc_cols, acc_rv); \
    }
DEFINE_CACHE_COLS(f32, float)
DEFINE_CACHE_COLS(f16, uint16_t)

/* out (n_cols, n_rows at out_cols apart) += rows of a cache tile by x: FLOAT_RV groups of 16 rows at a time. ahead: bytes
 * from what is read to what is asked for meanwhile, as it is read next; 0 for nothing.
 * wide: FLOAT_ROWS * n_k floats of scratch */
static void cache_rows(const woolly_kv_head *kv, const void *base, int64_t at, int64_t w_k, int64_t w_group,
                       int64_t n_groups, const float *x, int64_t x_cols, int64_t n_k, int64_t n_cols, float *out,
                       int64_t out_cols, float *wide, int64_t ahead) {
    for (int64_t g = 0; g < n_groups; g += FLOAT_RV) {
        int whole = g + FLOAT_RV <= n_groups;
        int64_t w_rv = whole ? w_group : 0, acc_rv = whole ? 16 : 0;
        if (kv->kv_type == WOOLLY_KV_F32) {
            cache_cols_f32(n_cols, (const float *)base + at + g * w_group, w_k, w_rv, x, x_cols, n_k, out + g * 16,
                           out_cols, acc_rv, ahead);
            continue;
        }
        const uint16_t *w = (const uint16_t *)base + at + g * w_group;
        if (n_cols < CACHE_DIRECT) {
            cache_cols_f16(n_cols, w, w_k, w_rv, x, x_cols, n_k, out + g * 16, out_cols, acc_rv, ahead);
            continue;
        }
        for (int64_t k = 0; k < n_k; k++) {
            if (ahead) PREFETCH_L2((const char *)(w + k * w_k + k % FLOAT_RV * w_rv) + ahead);
            for (int v = 0; v < FLOAT_RV; v++)
                vf_store(wide + (k * FLOAT_RV + v) * 16, vf_load_f16(w + k * w_k + v * w_rv));
        }
        float_cols_f32(n_cols, wide, FLOAT_ROWS, 16, x, x_cols, n_k, out + g * 16, out_cols, acc_rv);
    }
}

static INLINE void mask_scores(float *s, int64_t n, int64_t lo, int64_t hi) {
    for (int64_t i = 0; i < lo && i < n; i++) s[i] = -__builtin_inff();
    for (int64_t i = hi > 0 ? hi : 0; i < n; i++) s[i] = -__builtin_inff();
}

/* scores -> p = exp(s - max) with keys outside [lo, hi) at zero; returns the maximum, -inf if there is no key */
static float tile_softmax(float *s, int64_t n_groups, int64_t lo, int64_t hi, float softcap, float *l) {
    if (softcap > 0)
        for (int64_t i = 0; i < n_groups * 16; i += 16) vf_store(s + i, vf_softcap(vf_load(s + i), softcap));
    mask_scores(s, n_groups * 16, lo, hi);
    vf most = vf_set1(-__builtin_inff());
    for (int64_t i = 0; i < n_groups * 16; i += 16) most = vf_max(most, vf_load(s + i));
    float m = vf_hmax(most);
    vf total = vf_set1(0);
    vf shift = vf_set1(m == -__builtin_inff() ? 0 : m); /* where no key counts, exp(-inf) = 0 is right as it is */
    for (int64_t i = 0; i < n_groups * 16; i += 16) {
        vf p = vf_exp(vf_sub(vf_load(s + i), shift));
        total = vf_add(total, p);
        vf_store(s + i, p);
    }
    *l = vf_sum(total);
    return *l == *l ? m : *l; /* a NaN among the scores is the tile's: the merge may not pass over it */
}

/* Weights of both sides for up to 8 columns at once, as one exp costs no more for them */
static void merge_columns(int64_t n_cols, int64_t head_dim, float *m, float *l, float *acc, const float *m2,
                          const float *l2, const float *acc2) {
    float weights[16] = {0};
    for (int64_t c = 0; c < n_cols; c++) {
        float most = m[c] > m2[c] ? m[c] : m2[c];
        weights[c] = m[c] - most, weights[8 + c] = m2[c] - most;
    }
    vf_store(weights, vf_exp(vf_load(weights)));
    for (int64_t c = 0; c < n_cols; c++) {
        if (m2[c] == -__builtin_inff()) continue;
        l[c] = f32_fma(l[c], weights[c], l2[c] * weights[8 + c]);
        m[c] = m[c] > m2[c] ? m[c] : m2[c];
        float *a = acc + c * head_dim;
        const float *a2 = acc2 + c * head_dim;
        vf w = vf_set1(weights[c]), w2 = vf_set1(weights[8 + c]);
        for (int64_t i = 0; i < head_dim; i += 16)
            vf_store(a + i, vf_fma(vf_load(a + i), w, vf_mul(vf_load(a2 + i), w2)));
    }
}

static void attention_merge(int64_t n_cols, int64_t head_dim, float *m, float *l, float *acc, const float *m2,
                            const float *l2, const float *acc2) {
    for (int64_t c = 0; c < n_cols; c += 8) {
        int64_t n = n_cols - c < 8 ? n_cols - c : 8;
        merge_columns(n, head_dim, m + c, l + c, acc + c * head_dim, m2 + c, l2 + c, acc2 + c * head_dim);
    }
}

/* A key that a query does not see has the weight 0, but 0 times an infinite or NaN value is NaN. Only columns that are
 * not finite are computed again, from the keys [lo, hi) that they do see: finite ones keep their bits, and what a query
 * gets still does not depend on the tokens computed beside it */
static void mend_column(const woolly_kv_head *kv, int64_t key0, int64_t lo, int64_t hi, const float *p, float *acc) {
    vf zero = vf_set1(0);
    for (int64_t i = 0; i < kv->head_dim; i += 16) zero = vf_fma(vf_load(acc + i), vf_set1(0), zero);
    if (vf_sum(zero) == 0) return;
    memset(acc, 0, sizeof(float) * (size_t)kv->head_dim);
    cache_rows(kv, kv->v, (key0 + lo) * kv->head_dim, kv->head_dim, 16, kv->head_dim / 16, p + lo, WOOLLY_KV_TILE, hi - lo, 1,
               acc, kv->head_dim, NULL, 0);
}

/* What attention_tile needs beside the cache, all of it in the caller's scratch */
typedef struct {
    float *q;    /* (n_cols, head_dim): gathered, padded with zeros */
    float *s;    /* (n_cols, WOOLLY_KV_TILE): scores, then weights */
    float *acc;  /* (n_cols, head_dim) */
    float *m, *l; /* (n_cols,) */
    float *wide; /* FLOAT_RV * 16 * max(head_dim, WOOLLY_KV_TILE) */
} tile_scratch;

static void gather_queries(const woolly_queries *queries, int64_t t0, int64_t n_cols, int64_t head_dim, float *q) {
    for (int64_t c = 0; c < n_cols; c++) {
        const float *from = queries->q + (t0 + c / queries->n_rep) * queries->q_stride + c % queries->n_rep * queries->q_head_stride;
        memcpy(q + c * head_dim, from, sizeof(float) * (size_t)queries->head_dim);
        for (int64_t i = queries->head_dim; i < head_dim; i++) q[c * head_dim + i] = 0;
    }
}

static void attention_tile(const woolly_kv_head *kv, const woolly_queries *queries, int64_t t0, int64_t t1, int64_t tile,
                           int is_more, float *m, float *l, float *acc, const tile_scratch *own) {
    int64_t head_dim = kv->head_dim, n_rep = queries->n_rep, n_cols = (t1 - t0) * n_rep;
    int64_t key0 = tile * WOOLLY_KV_TILE, n_keys = queries->pos + t1 - key0;
    if (n_keys > WOOLLY_KV_TILE) n_keys = WOOLLY_KV_TILE;
    int64_t first = queries->window ? queries->pos + t0 - queries->window + 1 - key0 : 0;
    if (first >= n_keys || n_keys <= 0) return;
    int64_t group0 = first > 0 ? first / 16 : 0, n_groups = (n_keys + 15) / 16 - group0, n_seen = n_keys - group0 * 16;
    int64_t at = (key0 + group0 * 16) * head_dim, size = kv->kv_type == WOOLLY_KV_F16 ? 2 : 4;
    int64_t values = (const char *)kv->v - (const char *)kv->k; /* from a tile's keys, and from these to the next keys */
    int64_t next_keys = is_more ? WOOLLY_KV_TILE * head_dim * size - values : 0;

    memset(own->s, 0, sizeof(float) * (size_t)(n_cols * WOOLLY_KV_TILE));
    cache_rows(kv, kv->k, at, 16, 16 * head_dim, n_groups, own->q, head_dim, head_dim, n_cols, own->s, WOOLLY_KV_TILE,
               own->wide, values);
    for (int64_t c = 0; c < n_cols; c++) {
        int64_t pos = queries->pos + t0 + c / n_rep - key0, lo = queries->window ? pos - queries->window + 1 : 0;
        own->m[c] = tile_softmax(own->s + c * WOOLLY_KV_TILE, n_groups, lo - group0 * 16, pos + 1 - group0 * 16,
                                 queries->softcap, own->l + c);
    }
    memset(own->acc, 0, sizeof(float) * (size_t)(n_cols * head_dim));
    cache_rows(kv, kv->v, at, head_dim, 16, head_dim / 16, own->s, WOOLLY_KV_TILE, n_seen, n_cols, own->acc, head_dim,
               own->wide, next_keys);
    for (int64_t c = 0; c < n_cols; c++) {
        int64_t pos = queries->pos + t0 + c / n_rep - key0, lo = queries->window ? pos - queries->window + 1 : 0;
        int64_t first_key = group0 * 16, hi = pos + 1 < n_keys ? pos + 1 : n_keys;
        if (lo < first_key) lo = first_key;
        if ((lo > first_key || hi < n_keys) && lo < hi)
            mend_column(kv, key0 + first_key, lo - first_key, hi - first_key, own->s + c * WOOLLY_KV_TILE,
                        own->acc + c * head_dim);
    }
    attention_merge(n_cols, head_dim, m, l, acc, own->m, own->l, own->acc);
}

static void attention_tiles(const woolly_kv_head *kv, const woolly_queries *queries, int64_t t0, int64_t t1, int64_t tile0,
                            int64_t tile_end, int64_t ahead_end, float *m, float *l, float *acc, float *scratch) {
    int64_t n_cols = (t1 - t0) * queries->n_rep;
    tile_scratch own;
    own.q = scratch;
    own.acc = own.q + WOOLLY_ATTENTION_COLS * kv->head_dim;
    own.s = own.acc + WOOLLY_ATTENTION_COLS * kv->head_dim;
    own.m = own.s + WOOLLY_ATTENTION_COLS * WOOLLY_KV_TILE;
    own.l = own.m + WOOLLY_ATTENTION_COLS;
    own.wide = own.l + WOOLLY_ATTENTION_COLS;
    gather_queries(queries, t0, n_cols, kv->head_dim, own.q);
    for (int64_t tile = tile0; tile < tile_end; tile++)
        attention_tile(kv, queries, t0, t1, tile, tile + 1 < ahead_end, m, l, acc, &own);
}

#endif
