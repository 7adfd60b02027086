/*
 * reconstruction_loss: how far the blueprints of seeds in TRAINING are from a target, and the derivative of that in
 * the bank. With r = g(x, w) - target per element, the loss needs sum r r per seed, the derivative u = sum r x and v =
 * sum r per feature: one pass over x and target either way, and a second launch that adds what its blocks leave.
 *
 * Columns without a seed in training are left out, so a sleeping layer costs a look at its seeds.
 */
#include "kernels.h"
#include "cuda/feature_sums.cuh"
#include "cuda/launch.cuh"
#include "cuda/pair_stream.cuh"
#include "cuda/reduce.cuh"
#include "cuda/seeds.cuh"

namespace
{

using namespace kasmina;

/* As many blocks as their registers let a multiprocessor hold. */
constexpr int BLOCKS_PER_SM = 4;
/*
 * Of a thread's loads, see pair_rows. H200, loss of 8192 x 4096 and of 16384 x 8192, bfloat16, in us (copies: 32.7,
 * 127): four blocks and two batches of 32 bytes 37.2, 127.6; one batch of 64 38.2, 128.1; three blocks and one of 128
 * 39.1, 134; two blocks and two of 128 36.9, 130.5.
 */
constexpr int BYTES = 32;
/* A thread's: so many roundings at most, as sums are in float32 only inside a thread. */
constexpr int MOST_ROWS = 256;

struct residual_params {
    pair_plan cut;
    seed_table table;
    const void *x, *target;
    /* Derivative: double2 (u, v) [splits, parts]. Loss: double [splits, parts], only where a seed's run begins. */
    void *partials;
    bool derivative;
    bool whole; /* see pair_plan::vectors_of */
};

struct gradient_params {
    pair_plan cut;
    seed_table table;
    const double2 *partials;
    const void *grad_loss; /* [S] */
    void *grad_weights;
    double numbers_per_feature; /* outer * inner */
    bool wide;
};

struct loss_params {
    pair_plan cut;
    seed_table table;
    const double *partials;
    void *loss; /* [S] */
    double numbers_per_feature;
    bool wide;
    int lanes;
};

/* ---- The pass over x and target ---- */

/* What a block knows of its columns; where it works on planes, of the one feature. */
template <kasmina_dtype D> struct column_table {
    using T = typename element<D>::wide;
    static constexpr int COLUMNS = pair_columns(D) * WARP;

    T a[COLUMNS], b[COLUMNS];
    int32_t owner[COLUMNS]; /* UNOWNED where there is none, or no such column */

    /* Look the columns up, each by one thread. Whether this thread has seen one in training. */
    __device__ __forceinline__ bool fill(const residual_params &p, const pair_place &here)
    {
        const int c = (int)threadIdx.x;
        if (c >= (p.cut.planes ? 1 : p.cut.tile)) return false;
        owner_blend found = {UNOWNED, {}};
        const int64_t feature = here.feature(p.cut, c);
        if (here.exists(p.cut, c)) found = find_blend(p.table, feature);
        T slope = (T)1, offset = (T)-0.0;
        if (found.blend.grafted)
            coefficients(found.blend, weights_of<T>(p.table, found.blend, feature), &slope, &offset);
        a[c] = slope;
        b[c] = offset;
        owner[c] = found.seed;
        return found.blend.grafted;
    }
};

/* The sums of a thread's columns: u = sum r x, or sum r r for the loss, and v = sum r. */
template <kasmina_dtype D, bool WHOLE, int VEC, typename T>
__device__ __forceinline__ void sum_residuals(const residual_params &p, const pair_place &here, const T (&a)[VEC],
                                              const T (&b)[VEC], T (&u)[VEC], T (&v)[VEC])
{
    using way = pair_rows<D, WHOLE, BYTES>;
    way rows(p.cut, here, p.x, p.target);
    rows.for_each(p.cut, [&](const auto &batch, auto full) {
        T products[VEC] = {}, residuals[VEC] = {}; /* of these rows, first: fewer roundings */
        batch.template each<full.value>([&](int k, const auto &has) {
#pragma unroll
            for (int j = 0; j < VEC; ++j) {
                if (!has(j)) continue;
                const T x = batch.x_of(k, j), r = fused(a[j], x, b[j]) - batch.t_of(k, j);
                products[j] = fused(r, p.derivative ? x : r, products[j]);
                residuals[j] += r;
            }
        });
#pragma unroll
        for (int j = 0; j < VEC; ++j) {
            u[j] += products[j];
            v[j] += residuals[j];
        }
    });
}

/* Sums of the block's columns, one a thread, become sums of runs of columns with one owner, at the first of each. */
template <typename Emit>
__device__ __forceinline__ void sum_runs(int columns, const int32_t *owner, double *room, double sum, const Emit &emit)
{
    const int c = (int)threadIdx.x, lane = c % WARP;
    const int32_t mine = c < columns ? owner[c] : UNOWNED;
#pragma unroll
    for (int distance = 1; distance < WARP; distance *= 2) {
        const double far = __shfl_down_sync(FULL_WARP, sum, distance);
        const int32_t far_owner = __shfl_down_sync(FULL_WARP, mine, distance);
        if (lane + distance < WARP && far_owner == mine) sum += far;
    }
    /* Each column now has the sum from itself to the end of its run or of its warp. */
    __syncthreads();
    if (c < columns) room[c] = sum;
    __syncthreads();
    if (mine == UNOWNED || (c > 0 && owner[c - 1] == mine)) return;
    for (int next = (c / WARP + 1) * WARP; next < columns; next += WARP) {
        if (owner[next - 1] != mine || owner[next] != mine) break;
        sum += room[next];
    }
    emit(sum);
}

template <kasmina_dtype D>
__global__ void __launch_bounds__(BLOCK, BLOCKS_PER_SM) residual_kernel(const __grid_constant__ residual_params p)
{
    using T = typename element<D>::wide;
    constexpr int VEC = pair_columns(D);
    __shared__ column_table<D> table;
    __shared__ double room[2 * BLOCK * VEC * sizeof(T) / sizeof(double)];

    allow_dependents();
    const pair_plan &cut = p.cut;
    const pair_place here(cut);
    if (!__syncthreads_or(table.fill(p, here))) return;

    T a[VEC], b[VEC], sums[2][VEC] = {};
#pragma unroll
    for (int j = 0; j < VEC; ++j) {
        const int c = cut.planes ? 0 : here.column + j;
        a[j] = table.a[c];
        b[j] = table.b[c];
    }
    if (p.whole)
        sum_residuals<D, true>(p, here, a, b, sums[0], sums[1]);
    else
        sum_residuals<D, false>(p, here, a, b, sums[0], sums[1]);

    const int c = (int)threadIdx.x;
    const int64_t at = here.split * cut.parts + (cut.planes ? (int64_t)here.tile : here.first + c);
    double uv[2];
    add_walkers(cut, (T *)room, sums, uv);
    if (cut.planes) add_block(uv);
    const bool mine = cut.planes ? c == 0 : c < here.rest;
    if (p.derivative) {
        if (mine) ((double2 *)p.partials)[at] = make_double2(uv[0], uv[1]);
    } else if (cut.planes) {
        if (mine) ((double *)p.partials)[at] = uv[0];
    } else {
        sum_runs(cut.tile, table.owner, room, uv[0], [&](double run) { ((double *)p.partials)[at] = run; });
    }
}

/* ---- The derivative: the pass over the features, a warp of them to a block ---- */

__device__ __forceinline__ double elements_of(const seed_table &table, int64_t seed, double per_feature)
{
    const seed_range range = range_of(table, seed);
    return (double)(range.last - range.first) * per_feature;
}

/* All threads of the block call this; those with `wanted` get their feature's sums, the others zeros. */
__device__ __forceinline__ double2 add_parts(const gradient_params &p, const feature_place &here, bool wanted)
{
    __shared__ double2 shares[FEATURE_SHARES][WARP];
    const int64_t wide = p.cut.planes ? 1 : p.cut.layout.inner;
    double2 sum = make_double2(0.0, 0.0);
    const uint32_t parts = wanted ? (uint32_t)wide * p.cut.splits : 0;
#pragma unroll 4
    for (uint32_t i = here.share; i < parts; i += FEATURE_SHARES) {
        const uint32_t split = wide == 1 ? i : i / (uint32_t)wide;
        const double2 part = p.partials[split * p.cut.parts + here.feature * wide + (i - split * wide)];
        sum.x += part.x;
        sum.y += part.y;
    }
    shares[here.share][here.lane] = sum;
    __syncthreads();
    double2 total = make_double2(0.0, 0.0);
#pragma unroll
    for (int i = 0; i < FEATURE_SHARES; ++i) {
        total.x += shares[i][here.lane].x;
        total.y += shares[i][here.lane].y;
    }
    return total;
}

__global__ void __launch_bounds__(BLOCK) gradient_kernel(const __grid_constant__ gradient_params p)
{
    const feature_place here = feature_place::here();
    const bool exists = here.feature < p.table.features;
    owner_blend found = {UNOWNED, {}};
    if (exists) found = find_blend(p.table, here.feature);
    const seed_blend &blend = found.blend;
    wait_for_primary();
    /* Where nobody trains, a block may have left no sums. */
    const double2 total = add_parts(p, here, blend.grafted);
    if (!exists) return;
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

/* ---- The loss: the pass over the seeds ---- */

struct loss_job {
    const loss_params &p;

    struct seed {
        int64_t index, first, tile, parts; /* parts: (block side by side, split), splits adjacent */
        bool training;
    };

    __device__ __forceinline__ seed open(int64_t index) const
    {
        const pair_plan &cut = p.cut;
        const seed_range range = range_of(p.table, index);
        seed s = {index, range.first, 0, 0, blend_of(p.table, (int32_t)index).grafted};
        if (!s.training || range.first >= range.last) return s;
        int64_t blocks = range.last - range.first;
        if (!cut.planes) {
            s.first *= cut.layout.inner;
            s.tile = s.first / cut.tile;
            blocks = (range.last * cut.layout.inner - 1) / cut.tile - s.tile + 1;
        }
        s.parts = blocks * cut.splits;
        return s;
    }
    using part = double;

    __device__ __forceinline__ part load(const seed &s, int64_t i) const
    {
        const pair_plan &cut = p.cut;
        const uint32_t block = (uint32_t)i / cut.splits, split = (uint32_t)i % cut.splits;
        const int64_t at = cut.planes ? s.first + block : max((s.tile + block) * cut.tile, s.first);
        const int64_t feature = cut.planes || cut.layout.inner == 1 ? at : at / cut.layout.inner;
        /* Only where offsets decrease: the run belongs to another seed, or was never written. */
        if (find_seed(p.table, feature) != s.index) return 0.0;
        return p.partials[split * cut.parts + at];
    }
    __device__ __forceinline__ void add(const seed &, part loaded, sum3 &sum) const
    {
        sum.a += loaded;
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

bool make_plan(pair_plan *cut, const kasmina_reconstruction_args *args, const kasmina_cuda_device &device)
{
    return make_pair_plan(cut, args->layout, args->dtype, (int64_t)device.multiprocessors * BLOCKS_PER_SM, MOST_ROWS);
}

cudaError_t launch_residuals(kasmina_dtype dtype, const residual_params &params, void *stream)
{
    const int64_t blocks = (int64_t)params.cut.tiles * params.cut.splits;
    switch (dtype) {
    case KASMINA_FLOAT32: return launch(residual_kernel<KASMINA_FLOAT32>, params, blocks, BLOCK, 0, stream, false);
    case KASMINA_FLOAT64: return launch(residual_kernel<KASMINA_FLOAT64>, params, blocks, BLOCK, 0, stream, false);
    case KASMINA_BFLOAT16: return launch(residual_kernel<KASMINA_BFLOAT16>, params, blocks, BLOCK, 0, stream, false);
    case KASMINA_FLOAT16: return launch(residual_kernel<KASMINA_FLOAT16>, params, blocks, BLOCK, 0, stream, false);
    }
    return cudaErrorInvalidValue;
}

} /* namespace */

/* 0 where CUDA fails (the launch then says why). */
size_t kasmina_reconstruction_workspace_cuda(const kasmina_reconstruction_args *args)
{
    kasmina_cuda_device device;
    pair_plan cut;
    if (kasmina_cuda_current_device(&device) != cudaSuccess || !make_plan(&cut, args, device)) return 0;
    return (size_t)(cut.splits * cut.parts) * (args->grad_loss ? sizeof(double2) : sizeof(double));
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
    if (!make_plan(&params.cut, args, device) || seeds > INT32_MAX) return cudaErrorInvalidConfiguration;
    params.table = make_seed_table(args->seeds, features, true);
    params.x = args->x;
    params.target = args->target;
    params.partials = args->workspace;
    params.derivative = args->grad_loss != NULL;
    params.whole = params.cut.vectors_of(args->dtype, args->x, args->target);
    error = launch_residuals(args->dtype, params, stream);
    if (error != cudaSuccess) return error;

    if (args->grad_loss) {
        const gradient_params per_feature_of = {
            params.cut,  params.table, (const double2 *)args->workspace, args->grad_loss, args->grad_weights,
            per_feature, wide};
        return launch(gradient_kernel, per_feature_of, ceil_div(features, WARP), BLOCK, 0, stream,
                      device.dependent_launch);
    }
    if (seeds == 0) return error;
    const int64_t blocks = (params.cut.planes ? features : params.cut.tiles) / seeds + 1;
    const int lanes = lanes_for(blocks * params.cut.splits);
    const loss_params per_seed = {params.cut, params.table, (const double *)args->workspace, args->loss, per_feature,
                                  wide,       lanes};
    return launch(loss_kernel, per_seed, ceil_div(seeds, BLOCK / lanes), BLOCK, 0, stream, device.dependent_launch);
}
