/*
 * chunked_backward: grad_x = a * grad_y, and from two sums per feature, u = sum G x and v = sum G, the
 * gradients of the bank and of alpha and the gradient telemetry.
 *
 * Up to three launches: the pass over G and x, which leaves partial sums for each row split; a pass
 * over the features, which adds them and writes grad_weights; a pass over the seeds. A launch that
 * nothing asks for is left out, and x is read for sums only. For small tensors the first two are one.
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

    seed_blend blend = {};
    if (exists && p.grad_weights) blend = find_blend(table, here.feature).blend; /* the pass has not written these */
    wait_for_primary();
    allow_dependents();
    const double2 total = total_feature(p.tiles, p.sums, here, exists);
    if (exists) store_feature(table, blend, here, total, p.wide, p.grad_weights, p.keep ? p.sums.totals : NULL);
}

/* ---- The pass over the seeds ---- */

__global__ void __launch_bounds__(BLOCK) seed_kernel(const __grid_constant__ seed_params p)
{
    for_each_seed(seed_job{p}, blockIdx.x, p.table.seeds.chunks.count, p.lanes);
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

/* Up to so many elements, of so many rows, blocks with all rows of their features are faster than partial sums. */
constexpr int64_t SMALL_ELEMENTS = 1 << 17;
constexpr int64_t SMALL_ROWS = 128;

bool is_small(const kasmina_layout &layout)
{
    if (layout.features > SMALL_ELEMENTS || layout.inner > SMALL_ROWS || layout.outer > SMALL_ROWS) return false;
    const int64_t rows = layout.outer * layout.inner;
    return rows <= SMALL_ROWS && rows * layout.features <= SMALL_ELEMENTS;
}

template <kasmina_dtype D>
cudaError_t launch_small(const small_backward_params &params, int64_t blocks, bool dependent, void *stream)
{
    return launch(small_backward_kernel<D>, params, blocks, BLOCK, 0, stream, dependent);
}

cudaError_t launch_small(const kasmina_backward_args *args, bool dependent, void *stream)
{
    small_backward_params params = {};
    params.layout = args->layout;
    params.table = make_seed_table(args->seeds, args->layout.features);
    params.grad_y = args->grad_y;
    params.x = wants_sums(args) ? args->x : NULL;
    params.grad_x = args->grad_x;
    params.grad_weights = args->grad_weights;
    params.totals = wants_seeds(args) ? (double2 *)args->workspace : NULL;
    params.wide = args->dtype == KASMINA_FLOAT64;
    const int64_t blocks = ceil_div(args->layout.features, WARP);
    switch (args->dtype) {
    case KASMINA_FLOAT32: return launch_small<KASMINA_FLOAT32>(params, blocks, dependent, stream);
    case KASMINA_FLOAT64: return launch_small<KASMINA_FLOAT64>(params, blocks, dependent, stream);
    case KASMINA_BFLOAT16: return launch_small<KASMINA_BFLOAT16>(params, blocks, dependent, stream);
    case KASMINA_FLOAT16: return launch_small<KASMINA_FLOAT16>(params, blocks, dependent, stream);
    }
    return cudaErrorInvalidValue;
}

cudaError_t launch_seeds(const kasmina_backward_args *args, const double2 *totals, bool dependent, void *stream)
{
    const int64_t seeds = args->seeds.chunks.count, features = args->layout.features;
    seed_params params = {};
    params.table = make_seed_table(args->seeds, features);
    params.totals = totals;
    params.grad_alpha = args->grad_alpha;
    params.grad_telemetry = args->grad_telemetry;
    params.wide = args->dtype == KASMINA_FLOAT64;
    params.lanes = lanes_for(1 + features / seeds);
    return launch(seed_kernel, params, ceil_div(seeds, BLOCK / params.lanes), BLOCK, 0, stream, dependent);
}

grid_wish wished_grid(const kasmina_cuda_device &device)
{
    return {(int64_t)device.multiprocessors * BACKWARD_BLOCKS_PER_SM, 1, device.pass_threads};
}

template <kasmina_dtype D, bool SUMS>
cudaError_t launch_backward(const backward_params &params, bool dependent, void *stream)
{
    const tiling &t = params.tiles;
    const size_t shared = backward_tables<D, SUMS>::total_bytes(t, params.threads);
    return launch(backward_kernel<D, SUMS>, params, (int64_t)t.tiles * t.splits, t.threads(), shared, stream,
                  dependent);
}

template <kasmina_dtype D>
cudaError_t launch_backward(const backward_params &params, bool sums, bool dependent, void *stream)
{
    return sums ? launch_backward<D, true>(params, dependent, stream)
                : launch_backward<D, false>(params, dependent, stream);
}

cudaError_t launch_backward(kasmina_dtype dtype, const backward_params &params, bool sums, bool dependent, void *stream)
{
    switch (dtype) {
    case KASMINA_FLOAT32: return launch_backward<KASMINA_FLOAT32>(params, sums, dependent, stream);
    case KASMINA_FLOAT64: return launch_backward<KASMINA_FLOAT64>(params, sums, dependent, stream);
    case KASMINA_BFLOAT16: return launch_backward<KASMINA_BFLOAT16>(params, sums, dependent, stream);
    case KASMINA_FLOAT16: return launch_backward<KASMINA_FLOAT16>(params, sums, dependent, stream);
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
    if (!wants_sums(args)) return 0;
    if (is_small(args->layout)) return wants_seeds(args) ? (size_t)args->layout.features * sizeof(double2) : 0;
    if (kasmina_cuda_current_device(&device) != cudaSuccess) return 0;
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
    kasmina_cuda_device device;
    cudaError_t error = kasmina_cuda_current_device(&device);
    if (error != cudaSuccess) return error;
    if (is_small(args->layout)) {
        error = launch_small(args, device.dependent_launch, stream);
        if (error != cudaSuccess || !wants_seeds(args)) return error;
        return launch_seeds(args, (const double2 *)args->workspace, device.dependent_launch, stream);
    }

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
    params.threads = device.pass_threads;
    error = launch_backward(args->dtype, params, sums, device.dependent_launch, stream);
    if (error != cudaSuccess || !sums) return error;

    const feature_params per_feature = {params.tiles, table, parts, args->grad_weights, wide, wants_seeds(args)};
    error = launch(feature_kernel, per_feature, ceil_div(features, WARP), BLOCK, 0, stream, device.dependent_launch);
    if (error != cudaSuccess || !wants_seeds(args)) return error;

    return launch_seeds(args, parts.totals, device.dependent_launch, stream);
}
