/*
 * chunked_backward: grad_x = a * grad_y, and from two sums per feature, u = sum G x and v = sum G, the
 * gradients of the bank and of alpha and the gradient telemetry.
 *
 * Up to three launches: the pass over G and x, which leaves partial sums for each row split; a pass
 * over the features, which adds them and writes grad_weights; a pass over the seeds. A launch that
 * nothing asks for is left out, and x is read for sums only.
 */
#include <float.h>

#include "kernels.h"
#include "cuda/feature_sums.cuh"
#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"
#include "cuda/seeds.cuh"
#include "cuda/tiling.cuh"

namespace
{

using namespace kasmina;

struct backward_params {
    tiling tiles;
    seed_table table;
    double2 *partials;
    const void *grad_y;
    const void *x;
    void *grad_x;
};

struct feature_params {
    tiling tiles;
    seed_table table;
    feature_sums sums;
    void *grad_weights;
    bool wide; /* accumulation is float64 */
    bool keep; /* the seeds will ask for the totals */
};

struct seed_params {
    seed_table table;
    const double2 *totals;
    float *grad_alpha;
    double *grad_telemetry;
    bool wide;
    int lanes;
};

/* ---- The pass over G and x ---- */

template <typename T> struct backward_tables {
    tile_sums sums;
    block_place *place;
    coefficient_table<T> blend;

    __device__ __forceinline__ backward_tables(const tiling &t, int vec, bool collect)
    {
        shared_carver shared;
        place = shared.take<block_place>(1);
        if (collect) {
            sums.s1 = shared.take<double>(t.threads() * vec);
            sums.s2 = shared.take<double>(t.threads() * vec);
        }
        blend.a = shared.take<T>(t.width);
        blend.b = shared.take<T>(t.width);
        blend.grafted = shared.take<uint32_t>(t.width);
        sums.count = NULL;
        sums.owner = collect && t.inner > 1 ? shared.take<int32_t>(t.width) : NULL;
    }
};

size_t backward_shared_bytes(const tiling &t, int vec, size_t wide, bool collect)
{
    const size_t width = (size_t)t.width, slots = (size_t)t.threads() * vec;
    const size_t blend = width * (2 * wide + sizeof(uint32_t));
    return sizeof(block_place) + blend + (collect ? slots * 16 + width * sizeof(int32_t) : 0);
}

/* A thread's running sums of its columns: those of the current group of rows. */
template <kasmina_dtype D, bool RAGGED> struct gradient_sums {
    using T = typename element<D>::wide;
    using bits = typename element<D>::bits;
    using way = walker<D, RAGGED>;
    using tables = backward_tables<T>;
    static constexpr int VEC = way::VEC;

    T u[VEC], v[VEC];
    int rows = 0; /* of the group so far */

    __device__ __forceinline__ void start(const tiling &t, const tables &to)
    {
#pragma unroll
        for (int j = 0; j < VEC; ++j) to.sums.s1[way::slot(t, j)] = to.sums.s2[way::slot(t, j)] = 0.0;
        clear();
    }
    __device__ __forceinline__ void clear()
    {
#pragma unroll
        for (int j = 0; j < VEC; ++j) u[j] = v[j] = (T)0;
        rows = 0;
    }
    __device__ __forceinline__ void add_row(const T (&g)[VEC], const T (&x)[VEC], int valid)
    {
#pragma unroll
        for (int j = 0; j < VEC; ++j) {
            if (RAGGED && j >= valid) continue;
            u[j] = fused(g[j], x[j], u[j]);
            v[j] += g[j];
        }
    }
    /* Move the group into the tables; `ahead` rows of the thread follow it. */
    __device__ __forceinline__ void put_away(const tiling &t, const bits *grad_y, const bits *x, int ahead)
    {
        const tables to(t, VEC, true);
        unsigned again = 0; /* columns that float32 could not hold */
#pragma unroll
        for (int j = 0; j < VEC; ++j) {
            const bool held = sizeof(T) == sizeof(double) || (is_finite(u[j]) && is_finite(v[j]));
            if (held) {
                to.sums.s1[way::slot(t, j)] += (double)u[j];
                to.sums.s2[way::slot(t, j)] += (double)v[j];
            } else {
                again |= 1u << j;
            }
        }
        for (; again; again &= again - 1) {
            const int j = __ffs((int)again) - 1;
            double sum_u = 0.0, sum_v = 0.0;
            way::revisit(t, *to.place, j, ahead, rows, [&](int64_t index) {
                const double g = (double)element<D>::value(__ldg(grad_y + index));
                sum_u = fused(g, (double)element<D>::value(__ldg(x + index)), sum_u);
                sum_v += g;
            });
            to.sums.s1[way::slot(t, j)] += sum_u;
            to.sums.s2[way::slot(t, j)] += sum_v;
        }
        clear();
    }
};

template <kasmina_dtype D, bool RAGGED, bool SUMS>
__global__ void __launch_bounds__(BLOCK, BLOCKS_PER_SM) backward_kernel(const __grid_constant__ backward_params p)
{
    using T = typename element<D>::wide;
    using bits = typename element<D>::bits;
    constexpr int VEC = VECTOR_BYTES / sizeof(bits);
    constexpr unsigned ALL = ~(~0u << VEC);
    /* Two tensors: half the rows keep as many bytes in flight. */
    constexpr int ROWS = SUMS || (RAGGED && VEC == 8) ? ROWS_IN_FLIGHT / 2 : ROWS_IN_FLIGHT;
    static_assert(GROUP_ROWS % ROWS == 0, "groups end with a batch");

    if (SUMS) allow_dependents();
    const tiling &t = p.tiles;
    const block_place here = block_place::here(t);
    walker<D, RAGGED> walk(t, here);
    fetched<D, RAGGED> rows_g[ROWS], rows_x[ROWS];
    walk.fetch(t, p.grad_y, rows_g); /* on their way while the seeds are looked up */
    if constexpr (SUMS) walk.fetch(t, p.x, rows_x);

    backward_tables<T> tables(t, VEC, SUMS);
    if (threadIdx.x == 0) *tables.place = here; /* for the rare paths: not in registers all the way */
    for (int c = (int)threadIdx.x; c < t.width; c += t.threads()) {
        const bool exists = c < here.extent;
        const int64_t feature = exists ? t.feature_of(here.origin + c) : 0;
        if (p.grad_x) {
            const int32_t seed = exists ? find_seed(p.table, feature) : UNOWNED;
            tables.blend.fill(p.table, c, seed, feature);
        }
        /* Runs of one feature, numbered within the tile. */
        if (tables.sums.owner) tables.sums.owner[c] = exists ? (int32_t)(feature - t.feature_of(here.origin)) : UNOWNED;
    }
    __syncthreads();

    T a[VEC];
    unsigned grafted = 0; /* a bit for each of the thread's columns */
    if (p.grad_x) {
#pragma unroll
        for (int j = 0; j < VEC; ++j) {
            a[j] = tables.blend.a[walk.column(t, j)];
            grafted |= tables.blend.grafted[walk.column(t, j)] << j;
        }
    }
    gradient_sums<D, RAGGED> group;
    if constexpr (SUMS) group.start(t, tables);

    while (walk.left > 0) {
        group.rows += min(walk.left, ROWS);
#pragma unroll
        for (int i = 0; i < ROWS; ++i, walk.advance(t)) {
            const int valid = walk.valid(t);
            if (valid == 0) continue;
            vector_bits raw;
            T g[VEC];
            rows_g[i].get(raw);
            element<D>::decode(raw, g);
            if constexpr (SUMS) {
                vector_bits raw_x;
                T x[VEC];
                rows_x[i].get(raw_x);
                element<D>::decode(raw_x, x);
                group.add_row(g, x, valid);
            }
            if (!p.grad_x) continue;
            if (grafted) {
                vector_bits computed;
#pragma unroll
                for (int j = 0; j < VEC; ++j) g[j] = multiply(a[j], g[j]);
                element<D>::encode(g, computed);
                /* Copied, not computed, where idle: a NaN keeps its payload. */
                if (grafted != ALL) replace_elements<VEC>(grafted, raw, computed);
                store<D, RAGGED>((bits *)p.grad_x + walk.at, computed, valid, walk.stride(t));
            } else {
                store<D, RAGGED>((bits *)p.grad_x + walk.at, raw, valid, walk.stride(t));
            }
        }
        walk.fetch(t, p.grad_y, rows_g); /* on their way while the group is put away */
        if constexpr (SUMS) {
            walk.fetch(t, p.x, rows_x);
            if (walk.left <= 0 || group.rows == GROUP_ROWS)
                group.put_away(t, (const bits *)p.grad_y, (const bits *)p.x, max(walk.left, 0));
        }
    }

    if constexpr (SUMS) {
        const backward_tables<T> tables(t, VEC, true);
        reduce_tile<VEC, RAGGED>(t, tables.sums, [&](int c, int32_t, double u, double v, uint32_t) {
            const block_place &place = *tables.place;
            const int64_t column = place.origin + c;
            if (c >= place.extent) return;
            const int64_t slot = place.tile + t.feature_of(column);
            p.partials[place.split * t.slots + slot] = make_double2(u, v);
        });
    }
}

/* ---- The pass over the features ---- */

/* A weight, or pair of weights, as the forward used it: rounded to the accumulation type. */
__device__ __forceinline__ weight_pair<double> rounded_weights(const seed_table &table, const seed_blend &blend,
                                                               int64_t feature, bool wide)
{
    if (wide) return weights_of<double>(table, blend, feature);
    const weight_pair<float> w = weights_of<float>(table, blend, feature);
    return {(double)w.w, (double)w.next};
}

__device__ __forceinline__ kasmina_feature_gradients gradients_of(const seed_table &table, const seed_blend &blend,
                                                                  int64_t feature, bool wide, double2 total)
{
    const weight_pair<double> w = rounded_weights(table, blend, feature, wide);
    return kasmina_gradients(blend.strategy, (double)blend.alpha, w.w, w.next, total.x, total.y);
}

__global__ void __launch_bounds__(BLOCK) feature_kernel(const __grid_constant__ feature_params p)
{
    const seed_table &table = p.table;
    const feature_place here = feature_place::here();
    const bool exists = here.feature < table.features;

    allow_dependents();
    seed_blend blend = {};
    if (exists && p.grad_weights) blend = blend_of(table, find_seed(table, here.feature));
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

struct seed_job {
    const seed_params &p;

    struct seed {
        int64_t index, first_feature, parts; /* parts: features */
        seed_blend blend;
    };

    __device__ __forceinline__ seed open(int64_t index) const
    {
        const seed_range range = range_of(p.table, index);
        return {index, range.first, range.last - range.first,
                p.grad_alpha ? blend_of(p.table, (int32_t)index) : seed_blend()};
    }
    /* sum: (grad_alpha, sum u^2, sum v^2) */
    __device__ __forceinline__ void add(const seed &s, int64_t i, sum3 &sum) const
    {
        const int64_t feature = s.first_feature + i;
        const double2 total = p.totals[feature];
        if (s.blend.grafted) sum.a += gradients_of(p.table, s.blend, feature, p.wide, total).alpha;
        sum.b = fused(total.x, total.x, sum.b);
        sum.c = fused(total.y, total.y, sum.c);
    }
    __device__ __forceinline__ void close(const seed &s, const sum3 &sum) const
    {
        if (p.grad_alpha) p.grad_alpha[s.index] = (float)sum.a;
        if (!p.grad_telemetry || !is_finite(sum.b) || !is_finite(sum.c)) return;
        double *row = p.grad_telemetry + s.index * KASMINA_GRAD_TELEMETRY_COLUMNS;
        row[KASMINA_SUM_U2] += sum.b;
        row[KASMINA_SUM_V2] += sum.c;
        row[KASMINA_BACKWARDS] += 1.0;
    }
};

__global__ void __launch_bounds__(BLOCK) seed_kernel(const __grid_constant__ seed_params p)
{
    for_each_seed(seed_job{p}, p.table.seeds.chunks.count, p.lanes);
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

template <kasmina_dtype D> cudaError_t launch_backward(const backward_params &params, bool sums, void *stream)
{
    constexpr int vec = VECTOR_BYTES / element_size(D);
    const tiling &t = params.tiles;
    const bool aligned = is_aligned(t, params.grad_y, vec) && is_aligned(t, params.grad_x, vec) &&
                         (!sums || is_aligned(t, params.x, vec));
    const size_t shared = backward_shared_bytes(t, vec, sizeof(typename element<D>::wide), sums);
    void (*kernel)(backward_params) = aligned
                                          ? (sums ? backward_kernel<D, false, true> : backward_kernel<D, false, false>)
                                          : (sums ? backward_kernel<D, true, true> : backward_kernel<D, true, false>);
    return launch(kernel, params, (int64_t)t.tiles * t.splits, t.threads(), shared, stream, false);
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
    if (!wants_sums(args) || kasmina_cuda_current_device(&device) != cudaSuccess) return 0;
    if (!make_tiling(&t, args->layout, args->dtype, device.multiprocessors)) return 0;
    return place_sums(t, NULL, &unused);
}

/* The arguments as in kernels.h. Returns 0 or a cudaError_t; the results are complete when `stream` is. */
int kasmina_chunked_backward_cuda(const kasmina_backward_args *args, void *stream)
{
    const bool sums = wants_sums(args), wide = args->dtype == KASMINA_FLOAT64;
    const int64_t seeds = args->seeds.chunks.count, features = args->layout.features;
    if (!args->grad_x && !sums) return 0;
    kasmina_cuda_device device;
    cudaError_t error = kasmina_cuda_current_device(&device);
    if (error != cudaSuccess) return error;

    backward_params params = {};
    if (!make_tiling(&params.tiles, args->layout, args->dtype, device.multiprocessors) || seeds > INT32_MAX)
        return cudaErrorInvalidConfiguration;
    const seed_table table = make_seed_table(args->seeds, features);
    feature_sums parts = {};
    if (sums) (void)place_sums(params.tiles, args->workspace, &parts);
    params.table = table;
    params.partials = parts.partials;
    params.grad_y = args->grad_y;
    params.x = args->x;
    params.grad_x = args->grad_x;
    error = launch_backward(args->dtype, params, sums, stream);
    if (error != cudaSuccess || !sums) return error;

    const feature_params per_feature = {params.tiles, table, parts, args->grad_weights, wide, wants_seeds(args)};
    error = launch(feature_kernel, per_feature, ceil_div(features, WARP), BLOCK, 0, stream, device.dependent_launch);
    if (error != cudaSuccess || !wants_seeds(args)) return error;

    const int lanes = lanes_for(1 + features / seeds);
    const seed_params per_seed = {table, parts.totals, args->grad_alpha, args->grad_telemetry, wide, lanes};
    return launch(seed_kernel, per_seed, ceil_div(seeds, BLOCK / lanes), BLOCK, 0, stream, device.dependent_launch);
}
