/*
 * pair_moments: count, means, squares and products of deviations of pairs (x, t) per feature, in one pass over both.
 *
 * Sums are float64 from the start, about the feature's first pair: seven operations and two conversions a pair, which
 * leaves the pass bound by memory on data-centre GPUs. Whether a number was not finite is told by the sums, and only
 * then looked for. A second launch adds each feature's parts, in an order that the shape decides.
 */
#include "pair_math.h"

#include "cuda/launch.cuh"
#include "cuda/pair_stream.cuh"

namespace
{

using namespace kasmina;

/* As many blocks as their registers let a multiprocessor hold. */
constexpr int BLOCKS_PER_SM = 2;
/*
 * Of a thread's loads, see pair_rows; and where numbers are not finite. H200, 8192 x 4096 bfloat16, in us (a copy:
 * 32.7): two batches of 64 bytes 41.4, one of 128 42.8, one of 64 with three blocks, which spill, 98; two waves of
 * blocks 46.2.
 */
constexpr int BYTES = 64;
constexpr int RARE_BYTES = 16;

/* Threads of the second launch that share a feature's parts. */
constexpr int SHARES = BLOCK / WARP;

/* Doubles of a part's sums, each an array over the parts of a split: lanes read and write side by side. */
enum { COUNT, X, T, XX, TT, XT, FIELDS };

struct pair_params {
    pair_plan cut;
    const void *x, *t;
    double *partials; /* [splits, FIELDS, parts] */
    double *moments;  /* [features, 6] */
    kasmina_dtype dtype;
    bool whole; /* see pair_plan::vectors_of */
};

__device__ __forceinline__ kasmina_pair_shift shift_of(const pair_params &p, int64_t feature)
{
    const int64_t first = feature * p.cut.layout.inner;
    return kasmina_pair_origin(load_number<double>(p.dtype, p.x, first), load_number<double>(p.dtype, p.t, first));
}

/* One more pair. */
__device__ __forceinline__ void add_pair(kasmina_pair_sums &s, kasmina_pair_shift about, double x, double t)
{
    const double dx = x - about.x, dt = t - about.t;
    s.x += dx;
    s.t += dt;
    s.xx = fused(dx, dx, s.xx);
    s.tt = fused(dt, dt, s.tt);
    s.xt = fused(dx, dt, s.xt);
}

/* The sums of a thread's j-th column without the pairs that are not finite. For rare cases: all is read once more. */
template <kasmina_dtype D>
__device__ __noinline__ kasmina_pair_sums sum_finite(const pair_params &p, int j, kasmina_pair_shift about)
{
    using way = pair_rows<D, false, RARE_BYTES, 1>;
    kasmina_pair_sums sums = {0.0, 0.0, 0.0, 0.0, 0.0, 0.0};
    pair_place here(p.cut);
    here.column += j;
    way rows(p.cut, here, p.x, p.t);
    rows.for_each(p.cut, [&](const auto &batch, auto) {
        batch.template each<false>([&](int k, const auto &) {
            const auto x = batch.x_of(k, 0), t = batch.t_of(k, 0);
            if (!is_finite(x) || !is_finite(t)) return;
            add_pair(sums, about, (double)x, (double)t);
            sums.count += 1.0;
        });
    });
    return sums;
}

/* The sums of a thread's columns, of all pairs. */
template <kasmina_dtype D, bool WHOLE, int VEC>
__device__ __forceinline__ void sum_pairs(const pair_params &p, const pair_place &here,
                                          const kasmina_pair_shift (&about)[VEC], kasmina_pair_sums (&sums)[VEC])
{
    using way = pair_rows<D, WHOLE, BYTES>;
    int count[VEC] = {};
    way rows(p.cut, here, p.x, p.t);
    rows.for_each(p.cut, [&](const auto &batch, auto full) {
        batch.template each<full.value>([&](int k, const auto &has) {
            ++count[0];
#pragma unroll
            for (int j = 0; j < VEC; ++j) {
                if (!has(j)) continue;
                if (!WHOLE && j > 0) ++count[j];
                add_pair(sums[j], about[j], (double)batch.x_of(k, j), (double)batch.t_of(k, j));
            }
        });
    });
#pragma unroll
    for (int j = 0; j < VEC; ++j) sums[j].count = (double)count[WHOLE ? 0 : j];
}

/* Put N of the sums away, the first of them in array `first` of the split's. */
template <int N, int VEC>
__device__ __forceinline__ void put(const pair_params &p, const pair_place &here, double *room, int first,
                                    const double (&values)[N][VEC])
{
    const pair_plan &cut = p.cut;
    const int c = (int)threadIdx.x;
    double sums[N];
    add_walkers(cut, room, values, sums);
    if (cut.planes) add_block(sums);
    if (c >= (cut.planes ? 1 : here.rest)) return;
    const int64_t at = cut.planes ? here.tile : here.first + c;
#pragma unroll
    for (int n = 0; n < N; ++n) p.partials[((int64_t)here.split * FIELDS + first + n) * cut.parts + at] = sums[n];
}

template <kasmina_dtype D>
__global__ void __launch_bounds__(BLOCK, BLOCKS_PER_SM) sum_kernel(const __grid_constant__ pair_params p)
{
    constexpr int VEC = pair_columns(D);
    __shared__ double room[3 * BLOCK * VEC];
    const pair_place here(p.cut);
    allow_dependents();
    kasmina_pair_shift about[VEC];
    kasmina_pair_sums sums[VEC];
#pragma unroll
    for (int j = 0; j < VEC; ++j) {
        about[j] = {0.0, 0.0};
        if (here.exists(p.cut, here.column + j)) about[j] = shift_of(p, here.feature(p.cut, here.column + j));
        sums[j] = {0.0, 0.0, 0.0, 0.0, 0.0, 0.0};
    }
    if (p.whole)
        sum_pairs<D, true>(p, here, about, sums);
    else
        sum_pairs<D, false>(p, here, about, sums);
    double first[3][VEC], second[3][VEC];
#pragma unroll
    for (int j = 0; j < VEC; ++j) {
        /* What is not finite stays in a sum of squares. Float64 may have overflowed, too: no harm done. */
        if (!is_finite(sums[j].xx + sums[j].tt)) sums[j] = sum_finite<D>(p, j, about[j]);
        first[0][j] = sums[j].count, first[1][j] = sums[j].x, first[2][j] = sums[j].t;
        second[0][j] = sums[j].xx, second[1][j] = sums[j].tt, second[2][j] = sums[j].xt;
    }
    put(p, here, room, COUNT, first);
    put(p, here, room, XX, second);
}

/* A warp of features to a block; its warps share their parts. */
__global__ void __launch_bounds__(BLOCK) join_kernel(const __grid_constant__ pair_params p)
{
    __shared__ double shares[FIELDS][SHARES][WARP];
    const pair_plan &cut = p.cut;
    const int lane = (int)threadIdx.x % WARP, share = (int)threadIdx.x / WARP;
    const int64_t feature = (int64_t)blockIdx.x * WARP + lane, wide = cut.planes ? 1 : cut.layout.inner;
    const bool exists = feature < cut.layout.features;
    kasmina_pair_shift about = {0.0, 0.0};
    if (exists && share == 0) about = shift_of(p, feature);
    wait_for_primary();
    double sums[FIELDS] = {};
    const uint32_t parts = exists ? (uint32_t)wide * cut.splits : 0;
#pragma unroll 4
    for (uint32_t i = share; i < parts; i += SHARES) {
        const uint32_t split = wide == 1 ? i : i / (uint32_t)wide;
        const double *part = p.partials + (int64_t)split * FIELDS * cut.parts + feature * wide + (i - split * wide);
#pragma unroll
        for (int f = 0; f < FIELDS; ++f) sums[f] += part[f * cut.parts];
    }
#pragma unroll
    for (int f = 0; f < FIELDS; ++f) shares[f][share][lane] = sums[f];
    __syncthreads();
    if (!exists || share > 0) return;
    for (int s = 1; s < SHARES; ++s) {
#pragma unroll
        for (int f = 0; f < FIELDS; ++f) sums[f] += shares[f][s][lane];
    }
    const kasmina_pair_sums total = {sums[COUNT], sums[X], sums[T], sums[XX], sums[TT], sums[XT]};
    kasmina_pair_join(p.moments + feature * KASMINA_PAIR_COLUMNS, total, about);
}

bool make_plan(pair_plan *cut, const kasmina_pair_moments_args *args, const kasmina_cuda_device &device)
{
    return make_pair_plan(cut, args->layout, args->dtype, (int64_t)device.multiprocessors * BLOCKS_PER_SM,
                          INT32_MAX / 2);
}

cudaError_t launch_sums(const pair_params &params, void *stream)
{
    const int64_t blocks = (int64_t)params.cut.tiles * params.cut.splits;
    switch (params.dtype) {
    case KASMINA_FLOAT32: return launch(sum_kernel<KASMINA_FLOAT32>, params, blocks, BLOCK, 0, stream, false);
    case KASMINA_FLOAT64: return launch(sum_kernel<KASMINA_FLOAT64>, params, blocks, BLOCK, 0, stream, false);
    case KASMINA_BFLOAT16: return launch(sum_kernel<KASMINA_BFLOAT16>, params, blocks, BLOCK, 0, stream, false);
    case KASMINA_FLOAT16: return launch(sum_kernel<KASMINA_FLOAT16>, params, blocks, BLOCK, 0, stream, false);
    }
    return cudaErrorInvalidValue;
}

} /* namespace */

/* 0 where CUDA fails (the launch then says why). */
size_t kasmina_pair_moments_workspace_cuda(const kasmina_pair_moments_args *args)
{
    kasmina_cuda_device device;
    pair_plan cut;
    if (kasmina_cuda_current_device(&device) != cudaSuccess || !make_plan(&cut, args, device)) return 0;
    return (size_t)(cut.splits * cut.parts) * FIELDS * sizeof(double);
}

int kasmina_pair_moments_cuda(const kasmina_pair_moments_args *args, void *stream)
{
    kasmina_cuda_device device;
    cudaError_t error = kasmina_cuda_current_device(&device);
    if (error != cudaSuccess) return error;
    pair_params params = {};
    if (!make_plan(&params.cut, args, device)) return cudaErrorInvalidConfiguration;
    params.x = args->x;
    params.t = args->target;
    params.partials = (double *)args->workspace;
    params.moments = args->moments;
    params.dtype = args->dtype;
    params.whole = params.cut.vectors_of(args->dtype, args->x, args->target);
    error = launch_sums(params, stream);
    if (error != cudaSuccess) return error;
    return launch(join_kernel, params, ceil_div(args->layout.features, WARP), BLOCK, 0, stream,
                  device.dependent_launch);
}
