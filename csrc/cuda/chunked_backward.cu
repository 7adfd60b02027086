/*
 * chunked_backward: grad_x = a * grad_y, and from two sums per feature, u = sum G x and v = sum G, the
 * gradients of the bank and of alpha and the gradient telemetry.
 *
 * Up to three launches: the pass over G and x, which leaves partial sums for each row split; a pass
 * over the features, which adds them and writes grad_weights; a pass over the seeds. A launch that
 * nothing asks for is left out, and x is read for sums only. Small tensors take one launch for all.
 */
#include <float.h>

#include "kernels.h"
#include "cuda/chunked_backward_pass.cuh"
#include "cuda/chunked_backward_seeds.cuh"
#include "cuda/chunked_backward_small.cuh"
#include "cuda/feature_sums.cuh"
#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"
#include "cuda/seeds.cuh"
#include "cuda/tiling.cuh"

namespace
{

using namespace kasmina;

struct feature_params {
    tiling tiles;
    seed_table table;
    feature_sums sums;
    void *grad_weights;
    bool wide; /* accumulation is float64 */
    bool keep; /* the seeds will ask for the totals */
};

/* ---- The pass over the features ---- */

__global__ void __launch_bounds__(BLOCK) feature_kernel(const __grid_constant__ feature_params p)
{
    const seed_table &table = p.table;
    const feature_place here = feature_place::here();
    const bool exists = here.feature < table.features;

    allow_dependents();
    seed_blend blend = {};
    if (exists && p.grad_weights) blend = find_blend(table, here.feature).blend;
    wait_for_primary();
    const double2 total = total_feature(p.tiles, p.sums, here, exists);
    if (!exists) return;
    if (p.keep && here.share == 0) p.sums.totals[here.feature] = total;
    if (!p.grad_weights) return;

    kasmina_feature_gradients gradients = {0.0, 0.0, 0.0};
    if (blend.grafted && blend.trains) gradients = gradients_of(table, blend, here.feature, p.wide, total);
    store_gradients(table, blend, here, gradients, p.grad_weights);
}

/* ---- The pass over the seeds ---- */

struct kept_totals {
    const double2 *totals; /* [features] */

    __device__ __forceinline__ double2 of(int64_t, int64_t feature) const
    {
        return totals[feature];
    }
};

struct seed_pass_params {
    seed_params seeds;
    kept_totals totals;
};

__global__ void __launch_bounds__(BLOCK) seed_kernel(const __grid_constant__ seed_pass_params p)
{
    const seed_job<kept_totals> job = {p.seeds, p.totals};
    for_each_seed(job, blockIdx.x, p.seeds.table.seeds.chunks.count, p.seeds.lanes);
}

/* ---- Launching ---- */

bool wants_seeds(const kasmina_backward_args *args)
{
    return args->seeds.chunks.count > 0 && (args->grad_alpha || args->grad_telemetry);
}

bool wants_sums(const kasmina_backward_args *args)
{
    return args->grad_weights || wants_seeds(args);
}

/* Up to so many elements, of so many rows, one launch is faster than three. */
constexpr int64_t SMALL_ELEMENTS = 1 << 17;
constexpr int64_t SMALL_ROWS = 128;

bool is_small(const kasmina_layout &layout)
{
    if (layout.features > SMALL_ELEMENTS || layout.inner > SMALL_ROWS || layout.outer > SMALL_ROWS) return false;
    const int64_t rows = layout.outer * layout.inner;
    return rows <= SMALL_ROWS && rows * layout.features <= SMALL_ELEMENTS;
}

template <kasmina_dtype D> cudaError_t launch_small(const small_backward_params &params, int64_t blocks, void *stream)
{
    return launch(small_backward_kernel<D>, params, blocks, BLOCK, 0, stream, false);
}

cudaError_t launch_small(const kasmina_backward_args *args, void *stream)
{
    const int64_t seeds = args->seeds.chunks.count, features = args->layout.features;
    const bool wide = args->dtype == KASMINA_FLOAT64;
    small_backward_params params = {};
    params.layout = args->layout;
    params.grad_y = args->grad_y;
    params.x = args->x;
    params.grad_x = args->grad_x;
    params.grad_weights = args->grad_weights;
    params.seeds = {make_seed_table(args->seeds, features), args->grad_alpha, args->grad_telemetry, wide, 1};
    /* A feature's rows are many elements: more lanes than for parts that are one. */
    if (seeds) params.seeds.lanes = lanes_for(2 * features / seeds);
    params.seed_blocks = seeds && wants_sums(args) ? (int)ceil_div(seeds, BLOCK / params.seeds.lanes) : 0;
    params.numbers = args->layout.outer * features * args->layout.inner;
    const int64_t elements = args->grad_x ? params.numbers : args->grad_weights ? features : 0;
    const int64_t blocks = params.seed_blocks + ceil_div(elements, BLOCK);
    switch (args->dtype) {
    case KASMINA_FLOAT32: return launch_small<KASMINA_FLOAT32>(params, blocks, stream);
    case KASMINA_FLOAT64: return launch_small<KASMINA_FLOAT64>(params, blocks, stream);
    case KASMINA_BFLOAT16: return launch_small<KASMINA_BFLOAT16>(params, blocks, stream);
    case KASMINA_FLOAT16: return launch_small<KASMINA_FLOAT16>(params, blocks, stream);
    }
    return cudaErrorInvalidValue;
}

grid_wish wished_grid(const kasmina_cuda_device &device)
{
    return {(int64_t)device.multiprocessors * BACKWARD_BLOCKS_PER_SM, 1, BACKWARD_MOST_ROWS};
}

template <kasmina_dtype D, bool SUMS> cudaError_t launch_backward(const backward_params &params, void *stream)
{
    const tiling &t = params.tiles;
    const size_t shared = backward_tables<D, SUMS>::total_bytes(t, params.granules);
    return launch(backward_kernel<D, SUMS>, params, (int64_t)t.tiles * t.splits, t.threads(), shared, stream, false);
}

template <kasmina_dtype D> cudaError_t launch_backward(const backward_params &params, bool sums, void *stream)
{
    return sums ? launch_backward<D, true>(params, stream) : launch_backward<D, false>(params, stream);
}

cudaError_t launch_backward(kasmina_dtype dtype, const backward_params &params, bool sums, void *stream)
{
    switch (dtype) {
    case KASMINA_FLOAT32: return launch_backward<KASMINA_FLOAT32>(params, sums, stream);
    case KASMINA_FLOAT64: return launch_backward<KASMINA_FLOAT64>(params, sums, stream);
    case KASMINA_BFLOAT16: return launch_backward<KASMINA_BFLOAT16>(params, sums, stream);
    case KASMINA_FLOAT16: return launch_backward<KASMINA_FLOAT16>(params, sums, stream);
    }
    return cudaErrorInvalidValue;
}

} /* namespace */

/* 0 where no sums are asked for, and where CUDA fails (the launch then says why). */
size_t kasmina_backward_workspace_cuda(const kasmina_backward_args *args)
{
    kasmina_cuda_device device;
    tiling t;
    feature_sums unused;
    if (!wants_sums(args) || is_small(args->layout) || kasmina_cuda_current_device(&device) != cudaSuccess) return 0;
    if (!make_tiling(&t, args->layout, args->dtype, wished_grid(device))) return 0;
    return place_sums(t, NULL, &unused);
}

/* The arguments as in kernels.h. Returns 0 or a cudaError_t; the results are complete when `stream` is. */
int kasmina_chunked_backward_cuda(const kasmina_backward_args *args, void *stream)
{
    const bool sums = wants_sums(args), wide = args->dtype == KASMINA_FLOAT64;
    const int64_t seeds = args->seeds.chunks.count, features = args->layout.features;
    if (!args->grad_x && !sums) return 0;
    if (seeds > INT32_MAX) return cudaErrorInvalidConfiguration;
    if (is_small(args->layout)) return launch_small(args, stream);
    kasmina_cuda_device device;
    cudaError_t error = kasmina_cuda_current_device(&device);
    if (error != cudaSuccess) return error;

    backward_params params = {};
    if (!make_tiling(&params.tiles, args->layout, args->dtype, wished_grid(device)))
        return cudaErrorInvalidConfiguration;
    const seed_table table = make_seed_table(args->seeds, features);
    feature_sums parts = {};
    if (sums) (void)place_sums(params.tiles, args->workspace, &parts);
    params.table = table;
    params.partials = parts.partials;
    params.grad_y = args->grad_y;
    params.x = args->x;
    params.grad_x = args->grad_x;
    params.granules = granules_of(args->grad_y, sums ? args->x : NULL);
    error = launch_backward(args->dtype, params, sums, stream);
    if (error != cudaSuccess || !sums) return error;

    const feature_params per_feature = {params.tiles, table, parts, args->grad_weights, wide, wants_seeds(args)};
    error = launch(feature_kernel, per_feature, ceil_div(features, WARP), BLOCK, 0, stream, device.dependent_launch);
    if (error != cudaSuccess || !wants_seeds(args)) return error;

    const int lanes = lanes_for(1 + features / seeds);
    const seed_pass_params per_seed = {{table, args->grad_alpha, args->grad_telemetry, wide, lanes}, {parts.totals}};
    return launch(seed_kernel, per_seed, ceil_div(seeds, BLOCK / lanes), BLOCK, 0, stream, device.dependent_launch);
}
