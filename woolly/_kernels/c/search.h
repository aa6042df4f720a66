/* Searching for the scales, minima and levels of a block that leave the least weighted squared error.
 *
 * A weight of the model is x, its importance w, a level l the integer that is stored for it. Four sub-blocks are the four
 * lanes of a vector: tile[k] holds weight k of each. No sum is ever split over lanes, nothing is fused, and this is compiled
 * once, so the result depends on the block alone. The search goes in three steps:
 *   1. Each sub-block for itself: levels from a fan of trial scales; for each of them the least-squares scale (and minimum)
 *      in closed form, with the error that it leaves. The best is polished by rounding with it and fitting again.
 *   2. The units, f16, that turn the sub-blocks' small integers into scales: from the largest scale of the block.
 *   3. The integers: those next to the nearest are tried too, each with the levels that it gives, for rounding a scale to its
 *      nearest integer is not what leaves the least error.
 * A second round, with the units fitted to the levels, gained nothing on the outputs of a real model's matrices.
 */
#ifndef WOOLLY_SEARCH_H
#define WOOLLY_SEARCH_H

#include "quantize.h"

typedef float f4 __attribute__((vector_size(16)));
typedef int32_t i4 __attribute__((vector_size(16)));

enum { MOST_K = 32, MOST_FOURS = 4 }; /* weights of a sub-block, fours of sub-blocks of a block */
typedef f4 tiles[MOST_FOURS][MOST_K];

static INLINE f4 f4_set1(float x) { return x - (f4){0}; }
static INLINE f4 f4_select(i4 mask, f4 x, f4 y) { return (f4)(((i4)x & mask) | ((i4)y & ~mask)); }
/* y where either is NaN */
#ifdef __SSE2__
static INLINE f4 f4_min(f4 x, f4 y) { return __builtin_ia32_minps(x, y); }
static INLINE f4 f4_max(f4 x, f4 y) { return __builtin_ia32_maxps(x, y); }
#else
static INLINE f4 f4_min(f4 x, f4 y) { return f4_select(x < y, x, y); }
static INLINE f4 f4_max(f4 x, f4 y) { return f4_select(x > y, x, y); }
#endif
static INLINE f4 f4_clamp(f4 x, float least, float most) { return f4_min(f4_max(x, f4_set1(least)), f4_set1(most)); }
static INLINE f4 f4_abs(f4 x) { return (f4)((i4)x & 0x7fffffff); }
/* to the nearest integer, halves to even, for |x| < 2^22 */
static INLINE f4 f4_round(f4 x) { return x + 0x1.8p23f - 0x1.8p23f; }
/* x / y, but 0 where that is not finite */
static INLINE f4 f4_ratio(f4 x, f4 y) {
    f4 ratio = x / y;
    return f4_select(f4_abs(ratio) <= 0x1.fffffep127f, ratio, f4_set1(0));
}

static INLINE float rounded_to_f16(float x) { return f32_of_f16(f16_of_f32(x)); }

static INLINE void load_four(const float *x, int n, f4 *tile) {
    for (int k = 0; k < n; k++) tile[k] = (f4){x[k], x[n + k], x[2 * n + k], x[3 * n + k]};
}

/* How much an error in x counts: rms + |x|. Large weights count more, as what they multiply is larger more often than not,
 * but not in proportion. Of x^2, |x|, 1 and mixtures, this one leaves about as little error as ggml's quantisers or less in
 * both measures, plain and weighted by x^2, of every format but Q2_K, which is behind in the second: see docs/quality.md. */
static INLINE void importance(const f4 *x, int n, f4 *w) {
    f4 sum = {0}, rms = {0};
    for (int k = 0; k < n; k++) sum += x[k] * x[k];
    for (int r = 0; r < 4; r++) rms[r] = sqrtf(sum[r] / (float)n);
    for (int k = 0; k < n; k++) w[k] = rms + f4_abs(x[k]);
}

/* --- x ~ d l - m, l in 0 .. most, d and m at least 0; d = unit sc, m = unit_m mn, sc and mn in 0 .. top --- */

typedef struct {
    int n, fours;      /* weights of a sub-block, fours of sub-blocks of a block */
    float most, top;
    int n_trials;
    float first, step; /* trial i spreads most + first + i step levels over the range of x */
    int any_m;         /* m may be below 0, as in Q5_1: it is then no integer of units */
} affine_kind;

typedef struct {
    float unit, unit_m;
    f4 sc[MOST_FOURS], mn[MOST_FOURS];
    tiles l;
} affine_block;

typedef struct {
    f4 w, x, xx;        /* weighted sums of 1, x and x^2 */
    f4 error, d, m;     /* the best so far */
} affine_fit;

static INLINE void affine_levels(affine_kind kind, const f4 *x, f4 d, f4 m, f4 *l) {
    f4 inverse = f4_ratio(f4_set1(1), d);
    for (int k = 0; k < kind.n; k++) l[k] = f4_round(f4_clamp((x[k] + m) * inverse, 0, kind.most));
}

/* the levels of (x + m) inverse, and the d and m that fit them best */
static INLINE void try_affine(affine_kind kind, const f4 *x, const f4 *w, f4 inverse, f4 m, affine_fit *best) {
    f4 sl = {0}, sll = {0}, sxl = {0};
    for (int k = 0; k < kind.n; k++) {
        f4 l = f4_round(f4_clamp((x[k] + m) * inverse, 0, kind.most)), wl = w[k] * l;
        sl += wl;
        sll += wl * l;
        sxl += wl * x[k];
    }
    f4 det = best->w * sll - sl * sl, low = (sll * best->x - sl * sxl) / det;
    i4 has_low = det > 1e-5f * best->w * sll; /* none where all levels are the same */
    if (!kind.any_m) has_low &= low < 0;
    low = f4_select(has_low, low, f4_set1(0));
    f4 d = f4_select(has_low, (best->w * sxl - best->x * sl) / det, sxl / sll);
    f4 error = best->xx - d * sxl - low * best->x;
    i4 better = (error < best->error) & (d > 0);
    best->error = f4_select(better, error, best->error);
    best->d = f4_select(better, d, best->d);
    best->m = f4_select(better, -low, best->m);
}

static INLINE affine_fit search_affine(affine_kind kind, const f4 *x, const f4 *w) {
    affine_fit best = {.error = f4_set1(INFINITY)};
    f4 least = {0}, largest = {0};
    for (int k = 0; k < kind.n; k++) {
        f4 wx = w[k] * x[k];
        best.w += w[k];
        best.x += wx;
        best.xx += wx * x[k];
        least = kind.any_m && !k ? x[k] : f4_min(x[k], least);
        largest = k ? f4_max(x[k], largest) : x[k];
    }
    f4 per_range = f4_ratio(f4_set1(1), largest - least);
    best.m = -least; /* all that is left where the weights are one negative number */
    for (int i = 0; i < kind.n_trials; i++)
        try_affine(kind, x, w, per_range * (kind.most + kind.first + kind.step * (float)i), -least, &best);
    try_affine(kind, x, w, f4_ratio(f4_set1(1), best.d), best.m, &best);
    return best;
}

static INLINE f4 affine_error(affine_kind kind, const f4 *x, const f4 *w, f4 d, f4 m) {
    f4 inverse = f4_ratio(f4_set1(1), d), error = {0};
    for (int k = 0; k < kind.n; k++) {
        f4 e = d * f4_round(f4_clamp((x[k] + m) * inverse, 0, kind.most)) - m - x[k];
        error += w[k] * (e * e);
    }
    return error;
}

/* step 3 for one four of sub-blocks */
static INLINE void choose_affine(affine_kind kind, const f4 *x, const f4 *w, const affine_fit *fit, int g, affine_block *q) {
    f4 sc = f4_round(f4_clamp(f4_ratio(fit->d, f4_set1(q->unit)), 0, kind.top));
    f4 mn = f4_round(f4_clamp(f4_ratio(fit->m, f4_set1(q->unit_m)), 0, kind.top)), least = f4_set1(INFINITY);
    q->sc[g] = q->mn[g] = f4_set1(0);
    for (int i = -1; i <= 1; i++)
        for (int j = -1; j <= 1; j++) {
            f4 a = f4_clamp(sc + (float)i, 0, kind.top), b = f4_clamp(mn + (float)j, 0, kind.top);
            f4 error = affine_error(kind, x, w, q->unit * a, q->unit_m * b);
            i4 better = error < least;
            least = f4_select(better, error, least);
            q->sc[g] = f4_select(better, a, q->sc[g]);
            q->mn[g] = f4_select(better, b, q->mn[g]);
        }
    affine_levels(kind, x, q->unit * q->sc[g], q->unit_m * q->mn[g], q->l[g]);
}

static INLINE void quantize_affine(affine_kind kind, const float *values, affine_block *q) {
    tiles x, w;
    affine_fit fit[MOST_FOURS];
    float most_d = 0, most_m = 0;
    for (int g = 0; g < kind.fours; g++) {
        load_four(values + 4 * kind.n * g, kind.n, x[g]);
        importance(x[g], kind.n, w[g]);
        fit[g] = search_affine(kind, x[g], w[g]);
        for (int r = 0; r < 4; r++) {
            most_d = fit[g].d[r] > most_d ? fit[g].d[r] : most_d;
            most_m = fit[g].m[r] > most_m ? fit[g].m[r] : most_m;
        }
    }
    q->unit = rounded_to_f16(most_d / kind.top);
    q->unit_m = rounded_to_f16(most_m / kind.top);
    for (int g = 0; g < kind.fours; g++) choose_affine(kind, x[g], w[g], &fit[g], g, q);
}

/* --- x ~ d l, l in -below .. above or of a table; d = unit sc, sc in bottom .. -bottom - 1 --- */

static const float IQ4_VALUES[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

typedef struct {
    int n, fours;
    int is_iq4;        /* levels are IQ4_VALUES, not all integers */
    float below, above, bottom;
    int n_trials;
    float first, step; /* trial i makes the largest |x| the level -below - first - i step, then above + first + i step */
} scale_kind;

typedef struct {
    float unit;
    f4 sc[MOST_FOURS];
    tiles l;
} scale_block;

static INLINE f4 signed_level(scale_kind kind, f4 v) {
    if (!kind.is_iq4) return f4_round(f4_clamp(v, -kind.below, kind.above));
    f4 l = f4_set1(IQ4_VALUES[0]);
    for (int i = 1; i < 16; i++)
        l += f4_select(v > (IQ4_VALUES[i - 1] + IQ4_VALUES[i]) / 2, f4_set1(IQ4_VALUES[i] - IQ4_VALUES[i - 1]), f4_set1(0));
    return l;
}

/* the levels of x inverse; d = sum w x l / sum w l^2 fits them best, and takes d sum w x l off the error */
static INLINE void try_scale(scale_kind kind, const f4 *x, const f4 *w, f4 inverse, f4 *gain, f4 *best) {
    f4 sll = {0}, sxl = {0};
    for (int k = 0; k < kind.n; k++) {
        f4 l = signed_level(kind, x[k] * inverse), wl = w[k] * l;
        sll += wl * l;
        sxl += wl * x[k];
    }
    f4 d = sxl / sll;
    i4 better = d * sxl > *gain;
    *gain = f4_select(better, d * sxl, *gain);
    *best = f4_select(better, d, *best);
}

static INLINE f4 search_scale(scale_kind kind, const f4 *x, const f4 *w) {
    f4 d = {0}, gain = {0}, magnitude = {0}, value = {0};
    for (int k = 0; k < kind.n; k++) {
        i4 larger = f4_abs(x[k]) > magnitude;
        magnitude = f4_select(larger, f4_abs(x[k]), magnitude);
        value = f4_select(larger, x[k], value);
    }
    f4 inverse = f4_ratio(f4_set1(1), value);
    for (int i = 0; i < kind.n_trials; i++) {
        float more = kind.first + kind.step * (float)i;
        try_scale(kind, x, w, inverse * -(kind.below + more), &gain, &d);
        try_scale(kind, x, w, inverse * (kind.above + more), &gain, &d);
    }
    try_scale(kind, x, w, f4_ratio(f4_set1(1), d), &gain, &d);
    return d;
}

static INLINE f4 scale_error(scale_kind kind, const f4 *x, const f4 *w, f4 d) {
    f4 inverse = f4_ratio(f4_set1(1), d), error = {0};
    for (int k = 0; k < kind.n; k++) {
        f4 e = d * signed_level(kind, x[k] * inverse) - x[k];
        error += w[k] * (e * e);
    }
    return error;
}

static INLINE void choose_scale(scale_kind kind, const f4 *x, const f4 *w, f4 d, int g, scale_block *q) {
    float top = -kind.bottom - 1;
    f4 sc = f4_round(f4_clamp(f4_ratio(d, f4_set1(q->unit)), kind.bottom, top)), least = f4_set1(INFINITY);
    q->sc[g] = f4_set1(0);
    for (int i = -1; i <= 1; i++) {
        f4 a = f4_clamp(sc + (float)i, kind.bottom, top), error = scale_error(kind, x, w, q->unit * a);
        i4 better = error < least;
        least = f4_select(better, error, least);
        q->sc[g] = f4_select(better, a, q->sc[g]);
    }
    f4 inverse = f4_ratio(f4_set1(1), q->unit * q->sc[g]);
    for (int k = 0; k < kind.n; k++) q->l[g][k] = signed_level(kind, x[k] * inverse);
}

static INLINE void quantize_scaled(scale_kind kind, const float *values, scale_block *q) {
    tiles x, w;
    f4 d[MOST_FOURS];
    float largest = 0; /* in magnitude: it becomes bottom, which reaches one further than the top */
    for (int g = 0; g < kind.fours; g++) {
        load_four(values + 4 * kind.n * g, kind.n, x[g]);
        importance(x[g], kind.n, w[g]);
        d[g] = search_scale(kind, x[g], w[g]);
        for (int r = 0; r < 4; r++) largest = fabsf(d[g][r]) > fabsf(largest) ? d[g][r] : largest;
    }
    q->unit = rounded_to_f16(largest / kind.bottom);
    for (int g = 0; g < kind.fours; g++) choose_scale(kind, x[g], w[g], d[g], g, q);
}

#endif
