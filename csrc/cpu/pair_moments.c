/* Moments of pairs (x, t) per feature, merged into an accumulator: the CPU kernel. One pass over x and t. */
#include "pair_math.h"

#include "cpu/convert.h"
#include "cpu/lock.h"
#include "cpu/tiles.h"
#include "parallel.h"
#include "telemetry_math.h"

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

/* What the sums of a feature are taken about: its first number, so that a large mean costs no digits. */
static double shift_of(const kasmina_pair_moments_args *args, const void *array, int64_t feature)
{
    return kasmina_origin(kasmina_load_scalar(args->dtype, array, feature * args->layout.inner));
}

/* ---- First pass: sums of each column of a patch, then of each feature. */

typedef struct {
    double shift_x[KASMINA_TILE_COLUMNS], shift_t[KASMINA_TILE_COLUMNS];
    double count[KASMINA_TILE_COLUMNS], x[KASMINA_TILE_COLUMNS], t[KASMINA_TILE_COLUMNS];
    double xx[KASMINA_TILE_COLUMNS], tt[KASMINA_TILE_COLUMNS], xt[KASMINA_TILE_COLUMNS];
} columns;

/* Pairs that are not finite are left out. */
#define DEFINE_ADD_ROW(NAME, REAL)                                                                                  \
    KASMINA_CLONES static void NAME(columns *restrict c, const REAL *restrict x, const REAL *restrict t, int64_t n) \
    {                                                                                                               \
        for (int64_t i = 0; i < n; ++i) {                                                                           \
            double dx = (double)x[i] - c->shift_x[i], dt = (double)t[i] - c->shift_t[i];                            \
            const bool finite = (dx - dx) + (dt - dt) == 0.0;                                                       \
            dx = finite ? dx : 0.0, dt = finite ? dt : 0.0;                                                         \
            c->count[i] += finite ? 1.0 : 0.0;                                                                      \
            c->x[i] += dx, c->t[i] += dt;                                                                           \
            c->xx[i] += dx * dx, c->tt[i] += dt * dt, c->xt[i] += dx * dt;                                          \
        }                                                                                                           \
    }

DEFINE_ADD_ROW(add_row_f32, float)
DEFINE_ADD_ROW(add_row_f64, double)

static void process_patch(const plan *p, const kasmina_patch *patch)
{
    const kasmina_tiling *tiling = &p->tiling;
    double wide_x[KASMINA_TILE_COLUMNS], wide_t[KASMINA_TILE_COLUMNS]; /* storage for reals */
    columns c = {.count = {0.0}};
    int64_t feature = patch->first_column / tiling->inner;
    for (int64_t i = 0, f = feature; i < patch->columns; ++f) {
        const double shift_x = shift_of(p->args, p->args->x, f), shift_t = shift_of(p->args, p->args->target, f);
        for (; i < patch->columns && patch->first_column + i < (f + 1) * tiling->inner; ++i)
            c.shift_x[i] = shift_x, c.shift_t[i] = shift_t;
    }
    for (int64_t row = patch->first_row; row < patch->first_row + patch->rows; ++row) {
        const void *x, *t;
        kasmina_load_rows(tiling, p->args->x, patch, row, 1, wide_x, &x);
        kasmina_load_rows(tiling, p->args->target, patch, row, 1, wide_t, &t);
        if (tiling->ops->size == sizeof(double))
            add_row_f64(&c, x, t, patch->columns);
        else
            add_row_f32(&c, x, t, patch->columns);
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
        kasmina_pair_join(p->args->moments + feature * KASMINA_PAIR_COLUMNS, total,
                          shift_of(p->args, p->args->x, feature), shift_of(p->args, p->args->target, feature));
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
