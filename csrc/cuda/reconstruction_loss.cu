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
#include "cuda/row_ring.cuh"
#include "cuda/seeds.cuh"
#include "cuda/tiling.cuh"

namespace
{

using namespace kasmina;

/* As in the backward pass, which also reads two tensors. */
constexpr int BLOCKS_PER_SM = 3;
constexpr int ROWS = 2;
constexpr int STAGES = 2;
constexpr int MOST_ROWS = 64;

struct residual_params {
    tiling tiles;
    seed_table table;
    double2 *partials;
    const void *x;
    const void *target;
    bool derivative;
    int granules; /* see row_ring.cuh */
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

template <kasmina_dtype D> struct residual_tables {
    using T = typename element<D>::wide;
    using ring = row_ring<D, 2, ROWS, STAGES>;
    static constexpr int VEC = walker<D>::VEC;

    unsigned char *rows; /* the ring; its memory then serves u and v */
    T *u, *v;            /* [walkers][VEC][lanes] the threads' sums */
    tile_sums sums;
    coefficient_table<T> blend;

    static __host__ __device__ __forceinline__ uint32_t rows_bytes(const tiling &t, int granules)
    {
        const uint32_t sums = (uint32_t)(t.threads() * VEC * 2 * sizeof(T)), rows = ring::bytes(t, granules);
        return sums > rows ? sums : rows;
    }
    static size_t total_bytes(const tiling &t, int granules)
    {
        const size_t width = (size_t)t.width;
        return rows_bytes(t, granules) + sum_columns(t) * sizeof(double2) +
               width * (2 * sizeof(T) + sizeof(uint32_t) + sizeof(int32_t));
    }
    __device__ __forceinline__ residual_tables(const tiling &t, int granules)
    {
        shared_carver shared;
        rows = shared.take<unsigned char>((int)rows_bytes(t, granules));
        u = (T *)rows;
        v = u + t.threads() * VEC;
        sums.columns = shared.take<double2>(sum_columns(t));
        blend.a = shared.take<T>(t.width);
        blend.b = shared.take<T>(t.width);
        blend.grafted = shared.take<uint32_t>(t.width);
        sums.count = NULL;
        sums.owner = t.inner > 1 ? shared.take<int32_t>(t.width) : NULL;
    }
    /* Look a tile's features up, each by one thread. Whether this thread has seen one in training. */
    __device__ __forceinline__ bool fill(const residual_params &p, const block_place &here) const
    {
        const tiling &t = p.tiles;
        const int64_t first_feature = t.feature_of(max(here.origin, (int64_t)0));
        bool training = false;
        for (int c = (int)threadIdx.x; c < t.width; c += t.threads()) {
            const bool exists = here.exists(c);
            const int64_t feature = exists ? t.feature_of(here.origin + c) : 0;
            owner_blend found = {UNOWNED, {}};
            if (exists) found = find_blend(p.table, feature);
            blend.fill(p.table, c, found.blend, feature);
            training = training || found.blend.grafted;
            if (sums.owner) sums.owner[c] = exists ? (int32_t)(feature - first_feature) : UNOWNED;
        }
        return training;
    }
};

template <kasmina_dtype D>
__global__ void __launch_bounds__(BLOCK, BLOCKS_PER_SM) residual_kernel(const __grid_constant__ residual_params p)
{
    using T = typename element<D>::wide;
    using way = walker<D>;
    constexpr int VEC = way::VEC;

    allow_dependents();
    const tiling &t = p.tiles;
    const block_place here = block_place::here(t);
    const residual_tables<D> tables(t, p.granules);
    const bool training = tables.fill(p, here);
    clear_columns(t, tables.sums);
    if (!__syncthreads_or(training)) return;

    way walk(t, here);
    const void *const arrays[2] = {p.x, p.target};
    typename residual_tables<D>::ring ring(t, walk, tables.rows, arrays, p.granules);
    T a[VEC], b[VEC], u[VEC], v[VEC];
#pragma unroll
    for (int j = 0; j < VEC; ++j) {
        const int c = way::column(t, walk.mask ? j : 0) * (walk.mask != 0);
        a[j] = tables.blend.a[c];
        b[j] = tables.blend.b[c];
        u[j] = v[j] = (T)0;
    }
#pragma unroll 1
    while (walk.left > 0) {
        T products[VEC] = {}, residuals[VEC] = {}; /* of these rows, first: fewer roundings */
        ring.template next<false>(t);
#pragma unroll
        for (int i = 0; i < ROWS; ++i, walk.advance(t)) {
            if (walk.left <= 0) continue;
            vector_bits raw;
            T x[VEC], target[VEC];
            ring.template get<false>(t, i, 0, raw);
            element<D>::decode(raw, x);
            ring.template get<false>(t, i, 1, raw);
            element<D>::decode(raw, target);
#pragma unroll
            for (int j = 0; j < VEC; ++j) {
                const T r = add(multiply(a[j], x[j]), b[j]) - target[j];
                products[j] = fused(r, p.derivative ? x[j] : r, products[j]);
                residuals[j] += r;
            }
        }
#pragma unroll
        for (int j = 0; j < VEC; ++j) {
            u[j] += products[j];
            v[j] += residuals[j];
        }
        ring.pop(t);
    }

    __syncthreads(); /* the ring's memory is free */
#pragma unroll
    for (int j = 0; j < VEC; ++j) {
        tables.u[way::slot(t, j)] = u[j];
        tables.v[way::slot(t, j)] = v[j];
    }
    __syncthreads();
    const auto add_walker = [&](int, int w, int column, double2 &sum) {
        const int slot = ((w * VEC + column % VEC) << t.lanes_log2) + column / VEC;
        sum.x += (double)tables.u[slot];
        sum.y += (double)tables.v[slot];
    };
    reduce_tile<VEC>(t, tables.sums, add_walker, [&](int c, int32_t, double2 sum, uint32_t) {
        if (!here.exists(c)) return;
        p.partials[here.split * t.slots + t.slot_of(here.tile, t.feature_of(here.origin + c))] = sum;
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
    owner_blend found = {UNOWNED, {}};
    if (exists) found = find_blend(p.table, here.feature);
    const seed_blend &blend = found.blend;
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
        const double weight = load_number<double>(p.wide ? KASMINA_FLOAT64 : KASMINA_FLOAT32, p.grad_loss, found.seed);
        const double scale = 2.0 * weight / elements_of(p.table, found.seed, p.numbers_per_feature);
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
    for_each_seed(loss_job{p}, blockIdx.x, p.table.seeds.chunks.count, p.lanes);
}

/* ---- Launching ---- */

grid_wish wished_grid(const kasmina_cuda_device &device)
{
    return {(int64_t)device.multiprocessors * BLOCKS_PER_SM, 1, MOST_ROWS};
}

template <kasmina_dtype D> cudaError_t launch_residuals(const residual_params &params, void *stream)
{
    const tiling &t = params.tiles;
    const size_t shared = residual_tables<D>::total_bytes(t, params.granules);
    return launch(residual_kernel<D>, params, (int64_t)t.tiles * t.splits, t.threads(), shared, stream, false);
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
    if (!make_tiling(&t, args->layout, args->dtype, wished_grid(device))) return 0;
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
    if (!make_tiling(&params.tiles, args->layout, args->dtype, wished_grid(device)) || seeds > INT32_MAX)
        return cudaErrorInvalidConfiguration;
    (void)place_sums(params.tiles, args->workspace, &sums);
    params.table = make_seed_table(args->seeds, features, true);
    params.partials = sums.partials;
    params.x = args->x;
    params.target = args->target;
    params.granules = granules_of(args->x, args->target);
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
