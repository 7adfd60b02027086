/*
 * How far the blueprints of seeds in TRAINING are from a target, and the derivative of that in the bank: the CPU kernel.
 * With r = g(x, w) - target per element, the loss needs u = sum r r and the derivative u = sum r x, v = sum r per
 * feature; one pass over x and target either way, the residual never leaves the cache.
 */
#include <string.h>

#include "cpu/convert.h"
#include "cpu/feature_sums.h"
#include "parallel.h"
#include "seed_math.h"

typedef struct {
    const kasmina_reconstruction_args *args;
    kasmina_tiling tiling;
    kasmina_feature_sums sums;
} plan;

size_t kasmina_reconstruction_workspace_cpu(const kasmina_reconstruction_args *args)
{
    kasmina_tiling t = kasmina_make_tiling(&args->layout, args->dtype);
    return kasmina_feature_sums_size(&t, args->layout.features);
}

/* ---- First pass: sums of residuals. */

static void process_patch(const plan *p, const kasmina_patch *patch)
{
    const kasmina_tiling *t = &p->tiling;
    const kasmina_reconstruction_args *args = p->args;
    const int64_t n = patch->columns;
    kasmina_tile_storage wide_x, wide_target, blended, residual, group_u = {0}, group_v = {0}; /* of reals */
    kasmina_tile_storage u = {0}, v = {0};
    kasmina_tile_coefficients coefficients;
    kasmina_fill_coefficients(t, patch, &args->seeds, kasmina_is_training, &coefficients);
    if (!coefficients.any) return; /* nobody will ask for these sums */
    for (int64_t i = 0; i < patch->rows; ++i) {
        const void *x, *target, *r = residual;
        kasmina_load_rows(t, args->x, patch, patch->first_row + i, 1, &wide_x, &x);
        kasmina_load_rows(t, args->target, patch, patch->first_row + i, 1, &wide_target, &target);
        t->ops->blend(blended, x, coefficients.a, coefficients.b, n);
        t->ops->subtract(residual, blended, target, n);
        t->ops->products(group_u, group_v, &r, args->grad_loss ? &x : &r, 1, n);
        if ((i + 1) % KASMINA_GROUP_ROWS && i + 1 < patch->rows) continue;
        t->ops->drain(u, group_u, n);
        t->ops->drain(v, group_v, n);
    }
    kasmina_write_feature_sums(&p->sums, patch, u, v);
}

static void process_patches(int64_t begin, int64_t end, void *context)
{
    const plan *p = context;
    for (int64_t index = begin; index < end; ++index) {
        kasmina_patch patch = kasmina_get_patch(&p->tiling, index);
        process_patch(p, &patch);
    }
}

/* ---- Second pass: what each seed makes of its features' sums. */

static double load_real(const plan *p, const void *array, int64_t index)
{
    return kasmina_load_scalar(p->args->dtype == KASMINA_FLOAT64 ? KASMINA_FLOAT64 : KASMINA_FLOAT32, array, index);
}

static void finish_seed(const plan *p, int64_t seed)
{
    const kasmina_reconstruction_args *args = p->args;
    const kasmina_seeds *seeds = &args->seeds;
    const int64_t count = seeds->chunks.count, features = args->layout.features;
    const int32_t strategy = seeds->state[KASMINA_GRAFTING_STRATEGY * count + seed];
    const int32_t blueprint = seeds->state[KASMINA_BLUEPRINT_ID * count + seed];
    const bool training = kasmina_is_training(seeds->state[KASMINA_LIFECYCLE_STATE * count + seed], blueprint, strategy,
                                              seeds->num_blueprints);
    int64_t first, end;
    double loss = 0.0;
    kasmina_chunk_range(&seeds->chunks, features, seed, &first, &end);
    const double elements = (double)(end - first) * (double)args->layout.outer * (double)args->layout.inner;
    for (int64_t feature = first; training && feature < end; ++feature) {
        const kasmina_uv s = p->sums.totals[feature];
        loss += s.u;
        if (!args->grad_loss) continue;
        /* The blend's own derivatives at alpha 1, with the residual in the place of the output's gradient. */
        const double scale = 2.0 * load_real(p, args->grad_loss, seed) / elements;
        const kasmina_feature_gradients g = kasmina_gradients(strategy, 1.0, 0.0, 0.0, s.u, s.v);
        const int64_t at = blueprint * features + feature;
        kasmina_store_scalar(seeds->weights_dtype, args->grad_weights, at, scale * g.weight);
        if (strategy == KASMINA_AFFINE)
            kasmina_store_scalar(seeds->weights_dtype, args->grad_weights, at + features, scale * g.next);
    }
    if (!args->grad_loss)
        kasmina_store_scalar(args->dtype == KASMINA_FLOAT64 ? KASMINA_FLOAT64 : KASMINA_FLOAT32, args->loss, seed,
                             first < end ? loss / elements : 0.0);
}

static void finish_seeds(int64_t begin, int64_t end, void *context)
{
    for (int64_t seed = begin; seed < end; ++seed) finish_seed(context, seed);
}

int kasmina_reconstruction_cpu(const kasmina_reconstruction_args *args)
{
    plan p = {.args = args, .tiling = kasmina_make_tiling(&args->layout, args->dtype)};
    const kasmina_seeds *seeds = &args->seeds;
    p.sums = kasmina_place_feature_sums(&p.tiling, args->layout.features, args->workspace);
    if (args->grad_loss)
        memset(args->grad_weights, 0,
               (size_t)(seeds->num_blueprints * args->layout.features) * kasmina_element_size(seeds->weights_dtype));
    int error =
        kasmina_parallel_for(0, p.tiling.tiles * p.tiling.blocks, kasmina_patch_grain(&p.tiling), process_patches, &p);
    if (!error) error = kasmina_total_feature_sums(&p.sums);
    if (!error) error = kasmina_parallel_for(0, seeds->chunks.count, 256, finish_seeds, &p);
    return error;
}
