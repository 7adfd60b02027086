/*
 * pair_moments: count, means, squares and products of deviations of pairs (x, t) per feature, in one pass over both.
 *
 * Sums are float64 from the start: they are taken about the feature's first pair, and two loads for six of them keep the
 * pass bound by memory on data-centre GPUs. Where features are planes of memory a block works on one of them; otherwise a
 * warp reads 32 columns side by side. A second launch adds each feature's parts, in an order that the shape decides.
 */
#include "pair_math.h"

#include "cuda/elements.cuh"
#include "cuda/launch.cuh"

namespace
{

using namespace kasmina;

constexpr int WARP = 32;
constexpr int WARPS = 8; /* of a block: rows one below the other */
constexpr int BLOCK = WARP * WARPS;
/* Pairs that a thread loads before it uses the first. */
constexpr int IN_FLIGHT = 8;
/* Planes from here on are read by a block each; shorter ones would leave lanes of a warp idle. */
constexpr int64_t PLANE = 64;
/* Blocks a multiprocessor: enough warps to cover the latency of memory. */
constexpr int64_t BLOCKS_PER_SM = 8;
constexpr unsigned ALL_LANES = 0xffffffffu;

struct plan {
    kasmina_layout layout;
    bool planes;    /* a block a feature; else WARP columns a block */
    int64_t parts;  /* columns, or features: what a split leaves sums for */
    int64_t tiles;  /* blocks side by side */
    int64_t length; /* pairs below each other: rows, or a plane's pairs in all rows */
    int64_t splits, per_split;
};

struct pair_params {
    plan cut;
    const void *x, *t;
    kasmina_pair_sums *partials; /* [splits, parts] */
    kasmina_dtype dtype;
    double *moments; /* [features, 6] */
};

plan make_plan(kasmina_layout layout, int multiprocessors)
{
    plan p = {layout, layout.inner >= PLANE, 0, 0, 0, 0, 0};
    const int64_t columns = layout.features * layout.inner;
    p.parts = p.planes ? layout.features : columns;
    p.tiles = p.planes ? layout.features : ceil_div(columns, WARP);
    p.length = p.planes ? layout.outer * layout.inner : layout.outer;
    const int64_t least = (int64_t)IN_FLIGHT * (p.planes ? BLOCK : WARPS); /* pairs that are worth a block */
    const int64_t wanted = ceil_div(multiprocessors * BLOCKS_PER_SM, p.tiles), most = ceil_div(p.length, least);
    p.per_split = ceil_div(p.length, wanted < most ? wanted : most);
    p.splits = ceil_div(p.length, p.per_split);
    return p;
}

__device__ __forceinline__ kasmina_pair_shift shift_of(const pair_params &p, int64_t feature)
{
    const int64_t first = feature * p.cut.layout.inner;
    return kasmina_pair_origin(load_number<double>(p.dtype, p.x, first), load_number<double>(p.dtype, p.t, first));
}

/* Pairs that are not finite are left out. */
template <typename T> __device__ __forceinline__ void add_pair(kasmina_pair_sums &s, kasmina_pair_shift about, T x, T t)
{
    if (!is_finite(x) || !is_finite(t)) return;
    const double dx = (double)x - about.x, dt = (double)t - about.t;
    s.count += 1.0;
    s.x += dx;
    s.t += dt;
    s.xx = fused(dx, dx, s.xx);
    s.tt = fused(dt, dt, s.tt);
    s.xt = fused(dx, dt, s.xt);
}

/* The sums of every `step`-th of the pairs [begin, end); address(i) is where pair i lies. */
template <kasmina_dtype D, typename Address>
__device__ __forceinline__ kasmina_pair_sums sum_pairs(const pair_params &p, kasmina_pair_shift about, int64_t begin,
                                                       int64_t end, int step, const Address &address)
{
    using bits = typename element<D>::bits;
    kasmina_pair_sums sums = {0.0, 0.0, 0.0, 0.0, 0.0, 0.0};
    for (int64_t i = begin; i < end; i += (int64_t)IN_FLIGHT * step) {
        bits x[IN_FLIGHT], t[IN_FLIGHT];
#pragma unroll
        for (int k = 0; k < IN_FLIGHT; ++k) {
            if (i + (int64_t)k * step >= end) continue;
            const int64_t at = address(i + (int64_t)k * step);
            x[k] = __ldg((const bits *)p.x + at);
            t[k] = __ldg((const bits *)p.t + at);
        }
#pragma unroll
        for (int k = 0; k < IN_FLIGHT; ++k) {
            if (i + (int64_t)k * step >= end) continue;
            add_pair(sums, about, element<D>::value(x[k]), element<D>::value(t[k]));
        }
    }
    return sums;
}

__device__ __forceinline__ kasmina_pair_sums across(kasmina_pair_sums s)
{
    for (int distance = WARP / 2; distance > 0; distance /= 2) {
        const kasmina_pair_sums far = {
            __shfl_xor_sync(ALL_LANES, s.count, distance), __shfl_xor_sync(ALL_LANES, s.x, distance),
            __shfl_xor_sync(ALL_LANES, s.t, distance),     __shfl_xor_sync(ALL_LANES, s.xx, distance),
            __shfl_xor_sync(ALL_LANES, s.tt, distance),    __shfl_xor_sync(ALL_LANES, s.xt, distance),
        };
        s = kasmina_pair_union(s, far);
    }
    return s;
}

/* A warp's lanes on 32 columns side by side, a block's warps on rows one below the other. */
template <kasmina_dtype D> __global__ void __launch_bounds__(BLOCK) column_kernel(const __grid_constant__ pair_params p)
{
    __shared__ kasmina_pair_sums rows[WARPS][WARP];
    const int lane = (int)threadIdx.x % WARP, warp = (int)threadIdx.x / WARP;
    const int64_t tile = blockIdx.x % p.cut.tiles, split = blockIdx.x / p.cut.tiles;
    const int64_t columns = p.cut.parts, column = tile * WARP + lane;
    allow_dependents();
    kasmina_pair_sums sums = {0.0, 0.0, 0.0, 0.0, 0.0, 0.0};
    if (column < columns) {
        const int64_t begin = split * p.cut.per_split, end = min(begin + p.cut.per_split, p.cut.length);
        sums = sum_pairs<D>(p, shift_of(p, column / p.cut.layout.inner), begin + warp, end, WARPS,
                            [&](int64_t row) { return row * columns + column; });
    }
    rows[warp][lane] = sums;
    __syncthreads();
    if (warp != 0 || column >= columns) return;
    for (int w = 1; w < WARPS; ++w) sums = kasmina_pair_union(sums, rows[w][lane]);
    p.partials[split * columns + column] = sums;
}

/* A block on one feature, whose pairs are runs of `inner`. */
template <kasmina_dtype D> __global__ void __launch_bounds__(BLOCK) plane_kernel(const __grid_constant__ pair_params p)
{
    __shared__ kasmina_pair_sums warps[WARPS];
    const int64_t feature = blockIdx.x % p.cut.tiles, split = blockIdx.x / p.cut.tiles;
    const int64_t inner = p.cut.layout.inner, features = p.cut.parts;
    allow_dependents();
    const int64_t begin = split * p.cut.per_split, end = min(begin + p.cut.per_split, p.cut.length);
    kasmina_pair_sums sums = sum_pairs<D>(p, shift_of(p, feature), begin + threadIdx.x, end, BLOCK, [&](int64_t i) {
        const int64_t outer = i / inner;
        return (outer * features + feature) * inner + (i - outer * inner);
    });
    sums = across(sums);
    if (threadIdx.x % WARP == 0) warps[threadIdx.x / WARP] = sums;
    __syncthreads();
    if (threadIdx.x != 0) return;
    for (int w = 1; w < WARPS; ++w) sums = kasmina_pair_union(sums, warps[w]);
    p.partials[split * features + feature] = sums;
}

/* A warp a feature. */
__global__ void __launch_bounds__(BLOCK) join_kernel(const __grid_constant__ pair_params p)
{
    const int lane = (int)threadIdx.x % WARP;
    const int64_t feature = (int64_t)blockIdx.x * WARPS + threadIdx.x / WARP;
    if (feature >= p.cut.layout.features) return;
    const kasmina_pair_shift about = shift_of(p, feature);
    const int64_t wide = p.cut.planes ? 1 : p.cut.layout.inner, parts = wide * p.cut.splits;
    wait_for_primary();
    kasmina_pair_sums sums = {0.0, 0.0, 0.0, 0.0, 0.0, 0.0};
    for (int64_t i = lane; i < parts; i += WARP)
        sums = kasmina_pair_union(sums, p.partials[i / wide * p.cut.parts + feature * wide + i % wide]);
    sums = across(sums);
    if (lane == 0) kasmina_pair_join(p.moments + feature * KASMINA_PAIR_COLUMNS, sums, about);
}

template <kasmina_dtype D> cudaError_t launch_sums(const pair_params &params, void *stream)
{
    void (*kernel)(pair_params) = params.cut.planes ? plane_kernel<D> : column_kernel<D>;
    return launch(kernel, params, params.cut.tiles * params.cut.splits, BLOCK, 0, stream, false);
}

cudaError_t launch_sums(const pair_params &params, void *stream)
{
    switch (params.dtype) {
    case KASMINA_FLOAT32: return launch_sums<KASMINA_FLOAT32>(params, stream);
    case KASMINA_FLOAT64: return launch_sums<KASMINA_FLOAT64>(params, stream);
    case KASMINA_BFLOAT16: return launch_sums<KASMINA_BFLOAT16>(params, stream);
    case KASMINA_FLOAT16: return launch_sums<KASMINA_FLOAT16>(params, stream);
    }
    return cudaErrorInvalidValue;
}

} /* namespace */

/* 0 where CUDA fails (the launch then says why). */
size_t kasmina_pair_moments_workspace_cuda(const kasmina_pair_moments_args *args)
{
    kasmina_cuda_device device;
    if (kasmina_cuda_current_device(&device) != cudaSuccess) return 0;
    const plan cut = make_plan(args->layout, device.multiprocessors);
    return (size_t)(cut.splits * cut.parts) * sizeof(kasmina_pair_sums);
}

int kasmina_pair_moments_cuda(const kasmina_pair_moments_args *args, void *stream)
{
    kasmina_cuda_device device;
    cudaError_t error = kasmina_cuda_current_device(&device);
    if (error != cudaSuccess) return error;
    pair_params params = {make_plan(args->layout, device.multiprocessors),
                          args->x,
                          args->target,
                          (kasmina_pair_sums *)args->workspace,
                          args->dtype,
                          args->moments};
    error = launch_sums(params, stream);
    if (error != cudaSuccess) return error;
    return launch(join_kernel, params, ceil_div(args->layout.features, WARPS), BLOCK, 0, stream,
                  device.dependent_launch);
}
