/*
 * The strategies' tables in double, one element after the other: y = x + alpha (g(x, w) - x), and the derivatives of just that.
 * It shares no formula with the kernels, so what it gives is near theirs, not equal.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "problem.h"
#include "seed_math.h"

/* A seed as one feature sees it. */
typedef struct {
    bool grafted, trains;
    int32_t strategy, blueprint;
    double alpha, w, v;
} view;

static double *zeros(int64_t count)
{
    double *memory = allocate((size_t)count * sizeof(double));
    memset(memory, 0, (size_t)count * sizeof(double));
    return memory;
}

/* Half a unit in the last place of 1, and the smallest normal number. */
static double epsilon(kasmina_dtype dtype)
{
    return dtype == KASMINA_FLOAT64   ? 0x1p-53
           : dtype == KASMINA_FLOAT32 ? 0x1p-24
                                      : (dtype == KASMINA_BFLOAT16 ? 0x1p-8 : 0x1p-11);
}

static double smallest(kasmina_dtype dtype)
{
    return dtype == KASMINA_FLOAT64 ? 0x1p-1022 : dtype == KASMINA_FLOAT16 ? 0x1p-14 : 0x1p-126;
}

/* How far a result may be off that was computed with terms of this size and then rounded to `dtype`. */
static double slack(kasmina_dtype dtype, double terms)
{
    double computing = dtype == KASMINA_FLOAT64 ? 0x1p-53 : 0x1p-24;
    return terms * (2.0 * epsilon(dtype) + 8.0 * computing) + smallest(dtype);
}

static int64_t owner(const problem *p, int64_t feature)
{
    for (int64_t s = 0; s < p->num_seeds; ++s)
        if (p->offsets[s] <= feature && feature < p->offsets[s + 1]) return s;
    return -1;
}

/* The features of a seed. */
static void range(const problem *p, int64_t seed, int64_t *first, int64_t *end)
{
    *first = p->offsets[seed] < 0 ? 0 : p->offsets[seed];
    *end = p->offsets[seed + 1] > p->layout.features ? p->layout.features : p->offsets[seed + 1];
}

static view look(const problem *p, int64_t seed, int64_t feature)
{
    view out = {.grafted = false};
    if (seed < 0) return out;
    int32_t lifecycle = p->state[KASMINA_LIFECYCLE_STATE * p->num_seeds + seed];
    out.blueprint = p->state[KASMINA_BLUEPRINT_ID * p->num_seeds + seed];
    out.strategy = p->state[KASMINA_GRAFTING_STRATEGY * p->num_seeds + seed];
    out.alpha = p->alpha[seed];
    int64_t rows_left = p->num_blueprints - (int64_t)out.blueprint;
    bool known = out.strategy >= 0 && out.strategy <= 3;
    out.grafted = lifecycle >= 3 && lifecycle <= 7 && known && out.blueprint >= 0 &&
                  rows_left >= (out.strategy == KASMINA_AFFINE ? 2 : 1);
    out.trains = out.grafted && lifecycle != 7;
    if (!out.grafted) return out;
    int64_t at = out.blueprint * p->layout.features + feature;
    out.w = load(p->weights_dtype, p->weights, at);
    if (out.strategy == KASMINA_AFFINE) out.v = load(p->weights_dtype, p->weights, at + p->layout.features);
    return out;
}

/* dy/dx */
static double slope(const view *s)
{
    if (s->strategy == KASMINA_ADDITIVE) return 1.0;
    if (s->strategy == KASMINA_MIXED) return 1.0 - 0.5 * s->alpha;
    return 1.0 + s->alpha * (s->w - 1.0);
}

static double blended(const view *s, double x)
{
    double g = x;
    if (!(fabs(x) < 1e30)) return slope(s) * x; /* g - x would be inf - inf, and what is added to so much is lost */
    if (s->strategy == KASMINA_MULTIPLICATIVE) g = s->w * x;
    if (s->strategy == KASMINA_ADDITIVE) g = x + s->w;
    if (s->strategy == KASMINA_MIXED) g = (x + s->w) / 2.0;
    if (s->strategy == KASMINA_AFFINE) g = s->w * x + s->v;
    return x + s->alpha * (g - x);
}

/* ---- One feature's columns ---- */

typedef struct {
    double u, v, size_u, size_v; /* sum G x, sum G, and the same of absolute values */
    double count, sum, nonfinite;
} column;

static column solve_feature(const problem *p, answer *out, int64_t feature, const view *seed)
{
    column sums = {0};
    for (int64_t o = 0; o < p->layout.outer; ++o) {
        for (int64_t i = 0; i < p->layout.inner; ++i) {
            int64_t at = (o * p->layout.features + feature) * p->layout.inner + i;
            double x = load(p->dtype, p->x, at), g = load(p->dtype, p->grad_y, at);
            out->slack_y[at] = out->slack_dx[at] = -1.0;
            if (seed->grafted) {
                double size = fabs(x) * (1.0 + fabs(seed->w)) + fabs(seed->w) + fabs(seed->v);
                out->y[at] = blended(seed, x);
                out->slack_y[at] = slack(p->dtype, size);
                out->dx[at] = slope(seed) * g;
                out->slack_dx[at] = slack(p->dtype, fabs(g) * (1.0 + fabs(seed->w)));
            }
            sums.u += g * x, sums.size_u += fabs(g * x);
            sums.v += g, sums.size_v += fabs(g);
            if (isfinite(x)) {
                sums.count += 1.0;
                sums.sum += x;
            } else {
                sums.nonfinite += 1.0;
            }
        }
    }
    return sums;
}

static void differentiate(const problem *p, answer *out, int64_t seed, int64_t feature, const view *s, const column *c)
{
    /* float32 sums of up to 32 products join double ones. */
    double error_u = c->size_u * 40.0 * 0x1p-24, error_v = c->size_v * 40.0 * 0x1p-24;
    double dw = 0.0, next = 0.0, dalpha = 0.0, size = 1.0 + fabs(s->w) + fabs(s->v);
    switch (s->strategy) {
    case KASMINA_MULTIPLICATIVE: dw = s->alpha * c->u, dalpha = (s->w - 1.0) * c->u; break;
    case KASMINA_ADDITIVE: dw = s->alpha * c->v, dalpha = s->w * c->v; break;
    case KASMINA_MIXED: dw = 0.5 * s->alpha * c->v, dalpha = 0.5 * (s->w * c->v - c->u); break;
    default: dw = s->alpha * c->u, next = s->alpha * c->v; dalpha = (s->w - 1.0) * c->u + s->v * c->v;
    }
    out->dalpha[seed] += dalpha;
    out->slack_dalpha[seed] += (error_u + error_v + (c->size_u + c->size_v) * 0x1p-22) * size;
    if (!s->trains) return;
    int64_t at = s->blueprint * p->layout.features + feature;
    out->dw[at] = dw;
    out->slack_dw[at] = error_u + error_v + slack(p->weights_dtype, fabs(dw));
    if (s->strategy != KASMINA_AFFINE) return;
    out->dw[at + p->layout.features] = next;
    out->slack_dw[at + p->layout.features] = error_v + slack(p->weights_dtype, fabs(next));
}

/* ---- One seed's statistics ---- */

static double squared_deviations(const problem *p, int64_t seed, double mean)
{
    double m2 = 0.0;
    int64_t first, end;
    range(p, seed, &first, &end);
    for (int64_t o = 0; o < p->layout.outer; ++o) {
        for (int64_t f = first; f < end; ++f) {
            for (int64_t i = 0; i < p->layout.inner; ++i) {
                double x = load(p->dtype, p->x, (o * p->layout.features + f) * p->layout.inner + i);
                if (isfinite(x)) m2 += (x - mean) * (x - mean);
            }
        }
    }
    return m2;
}

static void join(const problem *p, answer *out, int64_t seed, double count, double sum, double nonfinite)
{
    double *row = out->telemetry + seed * KASMINA_TELEMETRY_COLUMNS;
    double *slack_of = out->slack_telemetry + seed * KASMINA_TELEMETRY_COLUMNS;
    double mean = count ? sum / count : 0.0, m2 = count ? squared_deviations(p, seed, mean) : 0.0;
    double both = row[KASMINA_COUNT] + count, delta = mean - row[KASMINA_MEAN];
    if (count) {
        m2 += row[KASMINA_M2] + delta * delta * row[KASMINA_COUNT] * count / both;
        row[KASMINA_MEAN] = (row[KASMINA_MEAN] * row[KASMINA_COUNT] + sum) / both;
        row[KASMINA_M2] = m2;
        slack_of[KASMINA_MEAN] = 1e-6 * (fabs(row[KASMINA_MEAN]) + sqrt(m2 / both));
        slack_of[KASMINA_M2] = 1e-4 * m2 + 1e-10 * both * row[KASMINA_MEAN] * row[KASMINA_MEAN];
    }
    row[KASMINA_COUNT] = both;
    row[KASMINA_BATCHES] += 1.0;
    row[KASMINA_NONFINITE] += nonfinite;
}

answer solve(const problem *p)
{
    const int64_t n = num_elements(p), bank = p->num_blueprints * p->layout.features, s = p->num_seeds;
    answer out = {.y = zeros(n), .slack_y = zeros(n), .dx = zeros(n), .slack_dx = zeros(n)};
    out.dw = zeros(bank), out.slack_dw = zeros(bank), out.dalpha = zeros(s), out.slack_dalpha = zeros(s);
    out.telemetry = zeros(s * KASMINA_TELEMETRY_COLUMNS), out.slack_telemetry = zeros(s * KASMINA_TELEMETRY_COLUMNS);
    out.grad_telemetry = zeros(s * KASMINA_GRAD_TELEMETRY_COLUMNS);
    out.slack_grad_telemetry = zeros(s * KASMINA_GRAD_TELEMETRY_COLUMNS);
    memcpy(out.telemetry, p->telemetry, (size_t)(s * KASMINA_TELEMETRY_COLUMNS) * sizeof(double));
    memcpy(out.grad_telemetry, p->grad_telemetry, (size_t)(s * KASMINA_GRAD_TELEMETRY_COLUMNS) * sizeof(double));
    column *columns = allocate((size_t)p->layout.features * sizeof(column));
    for (int64_t f = 0; f < p->layout.features; ++f) {
        int64_t seed = owner(p, f);
        view v = look(p, seed, f);
        columns[f] = solve_feature(p, &out, f, &v);
        if (v.grafted) differentiate(p, &out, seed, f, &v, &columns[f]);
    }
    for (int64_t seed = 0; seed < s; ++seed) {
        double count = 0.0, sum = 0.0, nonfinite = 0.0, u2 = 0.0, v2 = 0.0, error_u2 = 0.0, error_v2 = 0.0;
        int64_t first, end;
        range(p, seed, &first, &end);
        for (int64_t f = first; f < end; ++f) {
            const column *c = &columns[f];
            count += c->count, sum += c->sum, nonfinite += c->nonfinite;
            u2 += c->u * c->u, v2 += c->v * c->v;
            error_u2 += c->size_u * c->size_u * 1e-5, error_v2 += c->size_v * c->size_v * 1e-5;
        }
        join(p, &out, seed, count, sum, nonfinite);
        if (!isfinite(u2) || !isfinite(v2)) continue;
        double *row = out.grad_telemetry + seed * KASMINA_GRAD_TELEMETRY_COLUMNS;
        double *slack_of = out.slack_grad_telemetry + seed * KASMINA_GRAD_TELEMETRY_COLUMNS;
        row[KASMINA_SUM_U2] += u2, row[KASMINA_SUM_V2] += v2, row[KASMINA_BACKWARDS] += 1.0;
        slack_of[KASMINA_SUM_U2] = error_u2 + 1e-12 * row[KASMINA_SUM_U2];
        slack_of[KASMINA_SUM_V2] = error_v2 + 1e-12 * row[KASMINA_SUM_V2];
    }
    free(columns);
    return out;
}

void free_answer(answer *a)
{
    double *all[] = {a->y,  a->slack_y,  a->dx,     a->slack_dx,     a->telemetry,      a->slack_telemetry,
                     a->dw, a->slack_dw, a->dalpha, a->slack_dalpha, a->grad_telemetry, a->slack_grad_telemetry};
    for (size_t i = 0; i < sizeof all / sizeof *all; ++i) free(all[i]);
}
