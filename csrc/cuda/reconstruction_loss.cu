/*
 * reconstruction_loss: how far the blueprints of seeds in TRAINING are from a target, and the derivative of that in the
 * bank. With r = g(x, w) - target per element, the loss needs u = sum r r, the derivative u = sum r x and v = sum r per
 * feature: one pass over x and target either way.
 *
 * Tiles without a seed in training are left out, so a sleeping layer costs a look at its seeds.
 */
#include "kernels.h"
#include "cuda/feature_sums.cuh"
#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"
#include "cuda/seeds.cuh"
#include "cuda/tiling.cuh"

namespace
{

using namespace kasmina;

/* Two tensors: half the rows keep as many bytes in flight. */
constexpr int ROWS = ROWS_IN_FLIGHT / 2;

struct residual_params {
    tiling tiles;
    seed_table table;
    double2 *partials;
    const void *x;
    const void *target;
    bool derivative;
};

struct gradient_params {
    tiling tiles;
    seed_table table;
    feature_sums sums;
    const void *grad_loss; /* [S], or NULL: the totals are kept for the seeds */
    void *grad_weights;
    double numbers_per_feature; /* outer * inner */
    bool wide;
};

struct loss_params {
    seed_table table;
    const double2 *totals;
    void *loss; /* [S] */
    double numbers_per_feature;
    bool wide;
    int lanes;
};

/* ---- The pass over x and target ---- */

template <typename T> struct residual_tables {
    tile_sums sums;
    coefficient_table<T> blend;

    __device__ __forceinline__ residual_tables(const tiling &t, int vec)
    {
        shared_carver shared;
        sums.s1 = shared.take<double>(t.threads() * vec);
        sums.s2 = shared.take<double>(t.threads() * vec);
        blend.a = shared.take<T>(t.width);
        blend.b = shared.take<T>(t.width);
        blend.grafted = shared.take<uint32_t>(t.width);
        sums.count = NULL;
        sums.owner = t.inner > 1 ? shared.take<int32_t>(t.width) : NULL;
    }
};

size_t residual_shared_bytes(const tiling &t, int vec, size_t wide)
{
    const size_t width = (size_t)t.width, slots = (size_t)t.threads() * vec;
    return slots * 16 + width * (2 * wide + sizeof(uint32_t) + sizeof(int32_t));
}

template <kasmina_dtype D, bool RAGGED>
__global__ void __launch_bounds__(BLOCK, BLOCKS_PER_SM) residual_kernel(const __grid_constant__ residual_params p)
{
    using T = typename element<D>::wide;
    using way = walker<D, RAGGED>;
    constexpr int VEC = way::VEC;
    static_assert(GROUP_ROWS % ROWS == 0, "groups end with a batch");

    allow_dependents();
    const tiling &t = p.tiles;
    const block_place here = block_place::here(t);
    residual_tables<T> tables(t, VEC);
    bool training = false;
    for (int c = (int)threadIdx.x; c < t.width; c += t.threads()) {
        const bool exists = c < here.extent;
        const int64_t feature = exists ? t.feature_of(here.origin + c) : 0;
        tables.blend.fill(p.table, c, exists ? find_seed(p.table, feature) : UNOWNED, feature);
        training = training || tables.blend.grafted[c];
        if (tables.sums.owner) tables.sums.owner[c] = exists ? (int32_t)(feature - t.feature_of(here.origin)) : UNOWNED;
    }
    if (!__syncthreads_or(training)) return;

    way walk(t, here);
    T a[VEC], b[VEC], u[VEC], v[VEC];
#pragma unroll
    for (int j = 0; j < VEC; ++j) {
        a[j] = tables.blend.a[way::column(t, j)];
        b[j] = tables.blend.b[way::column(t, j)];
        u[j] = v[j] = (T)0;
        tables.sums.s1[way::slot(t, j)] = tables.sums.s2[way::slot(t, j)] = 0.0;
    }
    int group_rows = 0;
    while (walk.left > 0) {
        fetched<D, RAGGED> rows_x[ROWS], rows_target[ROWS];
        walk.fetch(t, p.x, rows_x);
        walk.fetch(t, p.target, rows_target);
#pragma unroll
        for (int i = 0; i < ROWS; ++i, walk.advance(t)) {
            const int valid = walk.valid(t);
            if (valid == 0) continue;
            vector_bits raw;
            T x[VEC], target[VEC];
            rows_x[i].get(raw);
            element<D>::decode(raw, x);
            rows_target[i].get(raw);
            element<D>::decode(raw, target);
#pragma unroll
            for (int j = 0; j < VEC; ++j) {
                if (RAGGED && j >= valid) continue;
                const T r = add(multiply(a[j], x[j]), b[j]) - target[j];
                u[j] = fused(r, p.derivative ? x[j] : r, u[j]);
                v[j] += r;
            }
        }
        group_rows += ROWS;
        if (walk.left > 0 && group_rows < GROUP_ROWS) continue;
        group_rows = 0;
#pragma unroll
        for (int j = 0; j < VEC; ++j) {
            tables.sums.s1[way::slot(t, j)] += (double)u[j];
            tables.sums.s2[way::slot(t, j)] += (double)v[j];
            u[j] = v[j] = (T)0;
        }
    }

    reduce_tile<VEC, RAGGED>(t, tables.sums, [&](int c, int32_t, double sum_u, double sum_v, uint32_t) {
        if (c >= here.extent) return;
        const int64_t slot = here.tile + t.feature_of(here.origin + c);
        p.partials[here.split * t.slots + slot] = make_double2(sum_u, sum_v);
    });
}

/* ---- The pass over the features ---- */

__device__ __forceinline__ double elements_of(const seed_table &table, int64_t seed, double per_feature)
{
    const seed_range range = range_of(table, seed);
    return (double)(range.last - range.first) * per_feature;
}

__global__ void __launch_bounds__(BLOCK) gradient_kernel(const __grid_constant__ gradient_params p)
{
    const feature_place here = feature_place::here();
    const bool exists = here.feature < p.table.features;
    allow_dependents();
    const int32_t seed = exists ? find_seed(p.table, here.feature) : UNOWNED;
    const seed_blend blend = blend_of(p.table, seed);
    wait_for_primary();
    /* Where nobody trains, a tile may have left no sums. */
    const double2 total = total_feature(p.tiles, p.sums, here, blend.grafted);
    if (!exists) return;
    if (!p.grad_loss) {
        if (here.share == 0) p.sums.totals[here.feature] = total;
        return;
    }
    kasmina_feature_gradients gradients = {0.0, 0.0, 0.0};
    if (blend.grafted) {
        const double weight = load_number<double>(p.wide ? KASMINA_FLOAT64 : KASMINA_FLOAT32, p.grad_loss, seed);
        const double scale = 2.0 * weight / elements_of(p.table, seed, p.numbers_per_feature);
        /* The blend's derivatives at alpha 1, with the residual in the place of the output's gradient. */
        gradients = kasmina_gradients(blend.strategy, 1.0, 0.0, 0.0, total.x, total.y);
        gradients.weight *= scale;
        gradients.next *= scale;
    }
    store_gradients(p.table, blend, here, gradients, p.grad_weights);
}

/* ---- The pass over the seeds ---- */

struct loss_job {
    const loss_params &p;

    struct seed {
        int64_t index, first_feature, parts; /* parts: features */
        bool training;
    };

    __device__ __forceinline__ seed open(int64_t index) const
    {
        const seed_range range = range_of(p.table, index);
        const bool training = blend_of(p.table, (int32_t)index).grafted;
        return {index, range.first, training ? range.last - range.first : 0, training};
    }
    __device__ __forceinline__ void add(const seed &s, int64_t i, sum3 &sum) const
    {
        sum.a += p.totals[s.first_feature + i].x;
    }
    __device__ __forceinline__ void close(const seed &s, const sum3 &sum) const
    {
        const double elements = elements_of(p.table, s.index, p.numbers_per_feature);
        const double loss = s.training && elements > 0.0 ? sum.a / elements : 0.0;
        store_number(p.wide ? KASMINA_FLOAT64 : KASMINA_FLOAT32, p.loss, s.index, loss);
    }
};

__global__ void __launch_bounds__(BLOCK) loss_kernel(const __grid_constant__ loss_params p)
{
    for_each_seed(loss_job{p}, p.table.seeds.chunks.count, p.lanes);
}

/* ---- Launching ---- */

template <kasmina_dtype D> cudaError_t launch_residuals(const residual_params &params, void *stream)
{
    constexpr int vec = VECTOR_BYTES / element_size(D);
    const tiling &t = params.tiles;
    const bool aligned = is_aligned(t, params.x, vec) && is_aligned(t, params.target, vec);
    const size_t shared = residual_shared_bytes(t, vec, sizeof(typename element<D>::wide));
    void (*kernel)(residual_params) = aligned ? residual_kernel<D, false> : residual_kernel<D, true>;
    return launch(kernel, params, (int64_t)t.tiles * t.splits, t.threads(), shared, stream, false);
}

cudaError_t launch_residuals(kasmina_dtype dtype, const residual_params &params, void *stream)
{
    switch (dtype) {
    case KASMINA_FLOAT32: return launch_residuals<KASMINA_FLOAT32>(params, stream);
    case KASMINA_FLOAT64: return launch_residuals<KASMINA_FLOAT64>(params, stream);
    case KASMINA_BFLOAT16: return launch_residuals<KASMINA_BFLOAT16>(params, stream);
    case KASMINA_FLOAT16: return launch_residuals<KASMINA_FLOAT16>(params, stream);
    }
    return cudaErrorInvalidValue;
}

} /* namespace */

/* 0 where CUDA fails (the launch then says why). */
size_t kasmina_reconstruction_workspace_cuda(const kasmina_reconstruction_args *args)
{
    kasmina_cuda_device device;
    tiling t;
    feature_sums unused;
    if (kasmina_cuda_current_device(&device) != cudaSuccess) return 0;
    if (!make_tiling(&t, args->layout, args->dtype, device.multiprocessors)) return 0;
    return place_sums(t, NULL, &unused);
}

/* The arguments as in kernels.h. Returns 0 or a cudaError_t; the result is complete when `stream` is. */
int kasmina_reconstruction_cuda(const kasmina_reconstruction_args *args, void *stream)
{
    const int64_t seeds = args->seeds.chunks.count, features = args->layout.features;
    const double per_feature = (double)args->layout.outer * (double)args->layout.inner;
    const bool wide = args->dtype == KASMINA_FLOAT64;
    kasmina_cuda_device device;
    cudaError_t error = kasmina_cuda_current_device(&device);
    if (error != cudaSuccess) return error;

    residual_params params = {};
    feature_sums sums = {};
    if (!make_tiling(&params.tiles, args->layout, args->dtype, device.multiprocessors) || seeds > INT32_MAX)
        return cudaErrorInvalidConfiguration;
    (void)place_sums(params.tiles, args->workspace, &sums);
    params.table = make_seed_table(args->seeds, features, true);
    params.partials = sums.partials;
    params.x = args->x;
    params.target = args->target;
    params.derivative = args->grad_loss != NULL;
    error = launch_residuals(args->dtype, params, stream);
    if (error != cudaSuccess) return error;

    const gradient_params per_column = {params.tiles,       params.table, sums, args->grad_loss,
                                        args->grad_weights, per_feature,  wide};
    error = launch(gradient_kernel, per_column, ceil_div(features, WARP), BLOCK, 0, stream, device.dependent_launch);
    if (error != cudaSuccess || args->grad_loss || seeds == 0) return error;

    const int lanes = lanes_for(1 + features / seeds);
    const loss_params per_seed = {params.table, sums.totals, args->loss, per_feature, wide, lanes};
    return launch(loss_kernel, per_seed, ceil_div(seeds, BLOCK / lanes), BLOCK, 0, stream, device.dependent_launch);
}
