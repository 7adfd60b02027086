/*
 * dx = a G, and from u = sum G x, v = sum G per feature the gradients of bank and alpha and the gradient telemetry: the
 * CPU kernel. First pass over the activations, second over features, third over seeds.
 */
#include <math.h>
#include <string.h>

#include "cpu/convert.h"
#include "cpu/feature_sums.h"
#include "cpu/lock.h"
#include "parallel.h"
#include "seed_math.h"

typedef struct {
    const kasmina_backward_args *args;
    kasmina_tiling tiling;
    bool wants_sums;
    kasmina_feature_sums sums;
} plan;

static bool wants_sums(const kasmina_backward_args *args)
{
    return args->grad_weights || args->grad_alpha || args->grad_telemetry;
}

size_t kasmina_backward_workspace_cpu(const kasmina_backward_args *args)
{
    kasmina_tiling t = kasmina_make_tiling(&args->layout, args->dtype);
    return wants_sums(args) ? kasmina_feature_sums_size(&t, args->layout.features) : 0;
}

/* ---- First pass: dx, and u and v of each patch. */

static void process_patch(const plan *p, const kasmina_patch *patch)
{
    const kasmina_tiling *t = &p->tiling;
    const kasmina_backward_args *args = p->args;
    const int64_t n = patch->columns, end = patch->first_row + patch->rows;
    const int64_t stride = t->columns * (int64_t)t->element_size, column = patch->first_column;
    kasmina_tile_storage group_u = {0}, group_v = {0}; /* of reals */
    kasmina_tile_storage u = {0}, v = {0};
    kasmina_tile_coefficients coefficients;
    kasmina_columns pass = {.streams = t->streams};
    if (args->grad_x) {
        kasmina_fill_coefficients(t, patch, &args->seeds, kasmina_is_grafted, &coefficients);
        pass.a = coefficients.a, pass.mask = coefficients.mask;
    }
    if (p->wants_sums) pass.sum1 = group_u, pass.sum2 = group_v;
    for (int64_t group = patch->first_row; group < end; group += KASMINA_GROUP_ROWS) {
        int64_t group_end = end - group < KASMINA_GROUP_ROWS ? end : group + KASMINA_GROUP_ROWS;
        for (int64_t row = group; row < group_end; row += KASMINA_ROWS_AT_ONCE) {
            int count = group_end - row < KASMINA_ROWS_AT_ONCE ? (int)(group_end - row) : KASMINA_ROWS_AT_ONCE;
            t->fused->backward(&pass, (void *)kasmina_at(t, args->grad_x, row, column),
                               kasmina_at(t, args->grad_y, row, column), kasmina_at(t, args->x, row, column), stride,
                               count, n);
        }
        if (p->wants_sums) {
            t->ops->drain(u, group_u, n);
            t->ops->drain(v, group_v, n);
        }
    }
    if (p->wants_sums) kasmina_write_feature_sums(&p->sums, patch, u, v);
    if (args->grad_x && t->streams) kasmina_end_streams();
}

static void process_patches(int64_t begin, int64_t end, void *context)
{
    const plan *p = context;
    for (int64_t index = begin; index < end; ++index) {
        kasmina_patch patch = kasmina_get_patch(&p->tiling, index);
        process_patch(p, &patch);
    }
}

/* ---- Third pass: what each seed makes of its features' sums. */

static void finish_seed(const plan *p, int64_t seed)
{
    const kasmina_backward_args *args = p->args;
    const kasmina_seeds *seeds = &args->seeds;
    const int64_t count = seeds->chunks.count, features = args->layout.features;
    const int32_t lifecycle = seeds->state[KASMINA_LIFECYCLE_STATE * count + seed];
    const int32_t strategy = seeds->state[KASMINA_GRAFTING_STRATEGY * count + seed];
    const int32_t blueprint = seeds->state[KASMINA_BLUEPRINT_ID * count + seed];
    const bool grafted = kasmina_is_grafted(lifecycle, blueprint, strategy, seeds->num_blueprints);
    double grad_alpha = 0.0, u2 = 0.0, v2 = 0.0;
    int64_t feature, end;
    kasmina_chunk_range(&seeds->chunks, features, seed, &feature, &end);
    for (; feature < end; ++feature) {
        const kasmina_uv s = p->sums.totals[feature];
        u2 += s.u * s.u, v2 += s.v * s.v;
        if (!grafted) continue;
        int64_t at = blueprint * features + feature;
        double w = kasmina_load_scalar(seeds->weights_dtype, seeds->weights, at), next = 0.0;
        if (strategy == KASMINA_AFFINE) next = kasmina_load_scalar(seeds->weights_dtype, seeds->weights, at + features);
        if (args->dtype != KASMINA_FLOAT64) w = (float)w, next = (float)next;
        kasmina_feature_gradients g = kasmina_gradients(strategy, seeds->alpha[seed], w, next, s.u, s.v);
        grad_alpha += g.alpha;
        if (!args->grad_weights || !kasmina_trains_weights(lifecycle)) continue;
        kasmina_store_scalar(seeds->weights_dtype, args->grad_weights, at, g.weight);
        if (strategy == KASMINA_AFFINE)
            kasmina_store_scalar(seeds->weights_dtype, args->grad_weights, at + features, g.next);
    }
    if (args->grad_alpha) args->grad_alpha[seed] = (float)grad_alpha;
    if (args->grad_telemetry && isfinite(u2) && isfinite(v2)) {
        double *row = args->grad_telemetry + seed * KASMINA_GRAD_TELEMETRY_COLUMNS;
        row[KASMINA_SUM_U2] += u2;
        row[KASMINA_SUM_V2] += v2;
        row[KASMINA_BACKWARDS] += 1.0;
    }
}

static void finish_seeds(int64_t begin, int64_t end, void *context)
{
    for (int64_t seed = begin; seed < end; ++seed) finish_seed(context, seed);
}

int kasmina_chunked_backward_cpu(const kasmina_backward_args *args)
{
    plan p = {.args = args, .tiling = kasmina_make_tiling(&args->layout, args->dtype)};
    const kasmina_seeds *seeds = &args->seeds;
    p.wants_sums = wants_sums(args);
    p.sums = kasmina_place_feature_sums(&p.tiling, args->layout.features, args->workspace);
    if (p.wants_sums || args->grad_x) {
        int error = kasmina_parallel_for(0, p.tiling.tiles * p.tiling.blocks, kasmina_patch_grain(&p.tiling),
                                         process_patches, &p);
        if (error) return error;
    }
    if (!p.wants_sums) return 0;
    if (args->grad_weights)
        memset(args->grad_weights, 0,
               (size_t)(seeds->num_blueprints * args->layout.features) * kasmina_element_size(seeds->weights_dtype));
    int error = kasmina_total_feature_sums(&p.sums);
    if (error) return error;
    kasmina_lock();
    error = kasmina_parallel_for(0, seeds->chunks.count, 256, finish_seeds, &p);
    kasmina_unlock();
    return error;
}
