/* Moments of pairs (x, t) per feature, merged into an accumulator: the CPU kernel. One pass over x and t. */
#include "pair_math.h"

#include "cpu/clones.h"
#include "cpu/convert.h"
#include "cpu/lock.h"
#include "cpu/tiles.h"
#include "parallel.h"

typedef struct {
    const kasmina_pair_moments_args *args;
    kasmina_tiling tiling;
    int64_t slots;               /* tiles + features: a feature's overlap with a tile has slot tile + feature */
    kasmina_pair_sums *partials; /* [blocks, slots] */
} plan;

static plan make_plan(const kasmina_pair_moments_args *args)
{
    plan p = {.args = args, .tiling = kasmina_make_tiling(&args->layout, args->dtype), .partials = args->workspace};
    p.slots = p.tiling.tiles + args->layout.features;
    return p;
}

size_t kasmina_pair_moments_workspace_cpu(const kasmina_pair_moments_args *args)
{
    const plan p = make_plan(args);
    return (size_t)(p.tiling.blocks * p.slots) * sizeof(kasmina_pair_sums);
}

static kasmina_pair_shift shift_of(const kasmina_pair_moments_args *args, int64_t feature)
{
    const int64_t first = feature * args->layout.inner;
    return kasmina_pair_origin(kasmina_load_scalar(args->dtype, args->x, first),
                               kasmina_load_scalar(args->dtype, args->target, first));
}

/* ---- First pass: sums of each column of a patch, then of each feature. */

typedef struct {
    kasmina_tile_storage shift_x, shift_t;
    kasmina_tile_storage count, x, t, xx, tt, xt;
} columns;

/* ROWS rows of n columns, so many at once that sums stay in registers meanwhile. Pairs that are not finite are left out. */
#define DEFINE_ADD_ROWS(NAME, REAL, ROWS)                                                                       \
    KASMINA_CLONES static void NAME(columns *restrict c, const void *const *x, const void *const *t, int64_t n) \
    {                                                                                                           \
        for (int64_t i = 0; i < n; ++i) {                                                                       \
            kasmina_pair_sums s = {c->count[i], c->x[i], c->t[i], c->xx[i], c->tt[i], c->xt[i]};                \
            for (int r = 0; r < ROWS; ++r) {                                                                    \
                const double vx = ((const REAL *)x[r])[i], vt = ((const REAL *)t[r])[i];                        \
                const bool counts = (vx - vx) + (vt - vt) == 0.0;                                               \
                const double dx = counts ? vx - c->shift_x[i] : 0.0, dt = counts ? vt - c->shift_t[i] : 0.0;    \
                s.count += counts ? 1.0 : 0.0;                                                                  \
                s.x += dx, s.t += dt;                                                                           \
                s.xx += dx * dx, s.tt += dt * dt, s.xt += dx * dt;                                              \
            }                                                                                                   \
            c->count[i] = s.count, c->x[i] = s.x, c->t[i] = s.t;                                                \
            c->xx[i] = s.xx, c->tt[i] = s.tt, c->xt[i] = s.xt;                                                  \
        }                                                                                                       \
    }

DEFINE_ADD_ROWS(add_rows_f32, float, KASMINA_ROWS_AT_ONCE)
DEFINE_ADD_ROWS(add_row_f32, float, 1)
DEFINE_ADD_ROWS(add_rows_f64, double, KASMINA_ROWS_AT_ONCE)
DEFINE_ADD_ROWS(add_row_f64, double, 1)

static void process_patch(const plan *p, const kasmina_patch *patch)
{
    const kasmina_tiling *tiling = &p->tiling;
    kasmina_tile_storage wide_x[KASMINA_ROWS_AT_ONCE], wide_t[KASMINA_ROWS_AT_ONCE]; /* of reals */
    columns c = {.count = {0.0}};
    int64_t feature = patch->first_column / tiling->inner;
    for (int64_t i = 0, f = feature; i < patch->columns; ++f) {
        const kasmina_pair_shift shift = shift_of(p->args, f);
        for (; i < patch->columns && patch->first_column + i < (f + 1) * tiling->inner; ++i)
            c.shift_x[i] = shift.x, c.shift_t[i] = shift.t;
    }
    const int64_t end = patch->first_row + patch->rows;
    const bool wide = tiling->dtype == KASMINA_FLOAT64;
    for (int64_t row = patch->first_row; row < end; row += KASMINA_ROWS_AT_ONCE) {
        const int count = end - row < KASMINA_ROWS_AT_ONCE ? (int)(end - row) : KASMINA_ROWS_AT_ONCE;
        const void *x[KASMINA_ROWS_AT_ONCE], *t[KASMINA_ROWS_AT_ONCE];
        kasmina_load_rows(tiling, p->args->x, patch, row, count, wide_x, x);
        kasmina_load_rows(tiling, p->args->target, patch, row, count, wide_t, t);
        if (count == KASMINA_ROWS_AT_ONCE)
            (wide ? add_rows_f64 : add_rows_f32)(&c, x, t, patch->columns);
        else
            for (int r = 0; r < count; ++r) (wide ? add_row_f64 : add_row_f32)(&c, x + r, t + r, patch->columns);
    }
    kasmina_pair_sums *slots = p->partials + patch->block * p->slots + patch->tile;
    for (int64_t i = 0; i < patch->columns; ++feature) {
        kasmina_pair_sums total = {0.0, 0.0, 0.0, 0.0, 0.0, 0.0};
        for (; i < patch->columns && patch->first_column + i < (feature + 1) * tiling->inner; ++i) {
            const kasmina_pair_sums column = {c.count[i], c.x[i], c.t[i], c.xx[i], c.tt[i], c.xt[i]};
            total = kasmina_pair_union(total, column);
        }
        slots[feature] = total;
    }
}

static void process_patches(int64_t begin, int64_t end, void *context)
{
    const plan *p = context;
    for (int64_t index = begin; index < end; ++index) {
        const kasmina_patch patch = kasmina_get_patch(&p->tiling, index);
        process_patch(p, &patch);
    }
}

/* ---- Second pass: the parts of each feature in order, into its moments. */

static void join_features(int64_t begin, int64_t end, void *context)
{
    const plan *p = context;
    const int64_t inner = p->tiling.inner;
    for (int64_t feature = begin; feature < end; ++feature) {
        const int64_t first = feature * inner / KASMINA_TILE_COLUMNS;
        const int64_t last = ((feature + 1) * inner - 1) / KASMINA_TILE_COLUMNS;
        kasmina_pair_sums total = {0.0, 0.0, 0.0, 0.0, 0.0, 0.0};
        for (int64_t block = 0; block < p->tiling.blocks; ++block)
            for (int64_t tile = first; tile <= last; ++tile)
                total = kasmina_pair_union(total, p->partials[block * p->slots + tile + feature]);
        kasmina_pair_join(p->args->moments + feature * KASMINA_PAIR_COLUMNS, total, shift_of(p->args, feature));
    }
}

int kasmina_pair_moments_cpu(const kasmina_pair_moments_args *args)
{
    plan p = make_plan(args);
    int error =
        kasmina_parallel_for(0, p.tiling.tiles * p.tiling.blocks, kasmina_patch_grain(&p.tiling), process_patches, &p);
    if (error) return error;
    kasmina_lock();
    error = kasmina_parallel_for(0, args->layout.features, 1024, join_features, &p);
    kasmina_unlock();
    return error;
}
