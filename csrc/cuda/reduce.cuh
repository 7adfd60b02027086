/*
 * The two reductions, both in an order that the shape alone decides: the columns of a tile inside a
 * block, and the parts of a seed by a group of lanes.
 */
#ifndef KASMINA_CUDA_REDUCE_CUH
#define KASMINA_CUDA_REDUCE_CUH

#include "cuda/seeds.cuh"
#include "cuda/tiling.cuh"

namespace kasmina
{

constexpr unsigned FULL_WARP = 0xffffffffu;

/* ---- A tile: sum each column over the walkers, then each run of columns with one owner ---- */

/*
 * Each thread's sums of its columns. Places are turned about, so that neither the columns of a thread nor the threads of
 * a column meet in a bank.
 */
template <int VEC> struct thread_sums {
    double2 *places;

    static __host__ __device__ __forceinline__ int count(const tiling &t)
    {
        return t.threads() * VEC;
    }
    __device__ __forceinline__ double2 &of(const tiling &t, int level, int lane, int j) const
    {
        return places[((level << t.lanes_log2) + lane) * VEC + ((j + lane * VEC / 8) & (VEC - 1))];
    }
};

struct tile_sums {
    double2 *columns; /* [sum_columns] what each column has already, see clear_columns; then room for its sums */
    uint32_t *count;  /* [width], one more sum of each column, or NULL */
    int32_t *owner;   /* [width]; negative: not summed. NULL: every column is a run of its own */
};

/* Where a tile has fewer columns than threads, several threads share a column's walkers. */
__host__ __device__ __forceinline__ int sum_columns(const tiling &t)
{
    return t.width > t.threads() ? t.width : t.threads();
}

template <int VEC>
__device__ __forceinline__ void clear_sums(const tiling &t, const tile_sums &sums, const thread_sums<VEC> &parts)
{
    for (int c = (int)threadIdx.x; c < t.width; c += t.threads()) sums.columns[c] = make_double2(0.0, 0.0);
#pragma unroll
    for (int i = 0; i < VEC; ++i) parts.places[i * t.threads() + (int)threadIdx.x] = make_double2(0.0, 0.0);
}

/*
 * The thread's columns with a bit in `again`, each summed by walk(j), onto what the columns have already: one walker
 * after the other, so that the order is always the same. All threads of the block call this.
 */
template <kasmina_dtype D, typename Walk>
__device__ __forceinline__ void add_walked(const tiling &t, const tile_sums &sums, unsigned again, const Walk &walk)
{
    using way = walker<D>;
    double2 walked[way::VEC];
    for (unsigned rest = again; rest; rest &= rest - 1) {
        const int j = __ffs((int)rest) - 1;
        walked[j] = walk(j);
    }
    for (int w = 0; w < t.walkers(); ++w) {
        for (unsigned rest = w == way::level(t) ? again : 0u; rest; rest &= rest - 1) {
            const int j = __ffs((int)rest) - 1;
            double2 &column = sums.columns[way::column(t, j)];
            column.x += walked[j].x;
            column.y += walked[j].y;
        }
        __syncthreads();
    }
}

/* A column's sums over every `step`-th walker, onto `sum`. */
template <int VEC>
__device__ __forceinline__ void sum_walkers(const tiling &t, const thread_sums<VEC> &parts, int c, int first, int step,
                                            double2 &sum)
{
#pragma unroll 8
    for (int w = first; w < t.walkers(); w += step) {
        const int v = c - t.lead + shift_of<VEC>(t, w); /* the column's place in the walker */
        if (v < 0 || v >= t.lanes * VEC) continue;
        const double2 part = parts.of(t, w, v / VEC, v % VEC);
        sum.x += part.x;
        sum.y += part.y;
    }
}

/*
 * All threads of the block call this after a barrier that follows their last store to `parts`. For each run
 * emit(first column, owner, sum, count) is called by one thread.
 */
template <int VEC, typename Emit>
__device__ __forceinline__ void reduce_tile(const tiling &t, const tile_sums &sums, const thread_sums<VEC> &parts,
                                            const Emit &emit)
{
    const int threads = t.threads(), tid = (int)threadIdx.x, lane = tid % WARP;
    const int side = (1 << t.lanes_log2) * VEC + (t.lead ? VEC : 0); /* no less than width */
    const int shares = threads / side;

    if (shares > 1) {
        const int c = tid % side, share = tid / side;
        double2 sum = make_double2(0.0, 0.0);
        if (c < t.width && share < shares) {
            if (share == 0) sum = sums.columns[c];
            sum_walkers(t, parts, c, share, shares, sum);
        }
        __syncthreads();
        sums.columns[tid] = sum;
        __syncthreads();
    }
    for (int base = tid - lane; base < t.width; base += threads) {
        const int c = base + lane;
        const bool exists = c < t.width;
        double2 sum = make_double2(0.0, 0.0);
        if (exists) sum = sums.columns[c];
        if (exists && shares <= 1) sum_walkers(t, parts, c, 0, 1, sum);
        for (int share = 1; exists && share < shares; ++share) {
            const double2 part = sums.columns[share * side + c];
            sum.x += part.x;
            sum.y += part.y;
        }
        if (!sums.owner) {
            if (exists) emit(c, 0, sum, 0u);
            continue;
        }
        const int32_t owner = exists ? sums.owner[c] : UNOWNED;
        uint32_t count = exists && sums.count ? sums.count[c] : 0u;
#pragma unroll
        for (int distance = 1; distance < WARP; distance *= 2) {
            const double far1 = __shfl_down_sync(FULL_WARP, sum.x, distance);
            const double far2 = __shfl_down_sync(FULL_WARP, sum.y, distance);
            const uint32_t far_count = __shfl_down_sync(FULL_WARP, count, distance);
            const int32_t far_owner = __shfl_down_sync(FULL_WARP, owner, distance);
            if (lane + distance < WARP && far_owner == owner) sum.x += far1, sum.y += far2, count += far_count;
        }
        if (exists) {
            sums.columns[c] = sum;
            if (sums.count) sums.count[c] = count;
        }
    }
    if (!sums.owner) return;
    __syncthreads();

    /* Each column now holds the sum from itself to the end of its run or its 32 columns. */
    for (int c = tid; c < t.width; c += threads) {
        const int32_t owner = sums.owner[c];
        if (owner < 0 || (c > 0 && sums.owner[c - 1] == owner)) continue;
        double2 sum = sums.columns[c];
        uint32_t count = sums.count ? sums.count[c] : 0u;
        for (int next = (c / WARP + 1) * WARP; next < t.width; next += WARP) {
            if (sums.owner[next - 1] != owner || sums.owner[next] != owner) break;
            sum.x += sums.columns[next].x;
            sum.y += sums.columns[next].y;
            if (sums.count) count += sums.count[next];
        }
        emit(c, owner, sum, count);
    }
}

/* ---- A seed: a group of lanes adds its parts up, the whole block where there are many ---- */

/* Parts that a lane adds in series before the whole block takes the seed over. */
constexpr int PARTS_PER_LANE = 16;

struct sum3 {
    double a, b, c;
};

__device__ __forceinline__ void add_across(sum3 &sum, int lanes)
{
    for (int distance = lanes / 2; distance > 0; distance /= 2) {
        sum.a += __shfl_xor_sync(FULL_WARP, sum.a, distance);
        sum.b += __shfl_xor_sync(FULL_WARP, sum.b, distance);
        sum.c += __shfl_xor_sync(FULL_WARP, sum.c, distance);
    }
}

/* Lanes for a seed of so many parts: a power of two up to a warp, or a block. */
static inline int lanes_for(int64_t parts)
{
    if (parts > (int64_t)WARP * PARTS_PER_LANE) return BLOCK;
    int lanes = 1;
    while (lanes < WARP && lanes * 2 < parts) lanes *= 2;
    return lanes;
}

/* Parts that a lane asks for before it adds the first: a trip to memory for all. */
constexpr int PARTS_AHEAD = 4;

template <typename Job>
__device__ __forceinline__ sum3 add_parts(const Job &job, const typename Job::seed &seed, int lane, int lanes)
{
    sum3 sum = {0.0, 0.0, 0.0};
#pragma unroll 1
    for (int64_t i = lane; i < seed.parts; i += PARTS_AHEAD * lanes) {
        typename Job::part parts[PARTS_AHEAD];
#pragma unroll
        for (int k = 0; k < PARTS_AHEAD; ++k) {
            const int64_t next = i + k * lanes;
            parts[k] = job.load(seed, next < seed.parts ? next : i);
        }
#pragma unroll
        for (int k = 0; k < PARTS_AHEAD; ++k)
            if (i + k * lanes < seed.parts) job.add(seed, parts[k], sum);
    }
    return sum;
}

/*
 * Job: `open(s)` gives a Job::seed with `parts`, without reading what the kernel before wrote;
 * `load(seed, i)` asks for part i, a Job::part, which `add(seed, part, sum)` adds; `close(seed, sum)` is called by one thread. Blocks have BLOCK threads; `block`
 * counts those that share the seeds.
 */
template <typename Job>
__device__ __forceinline__ void for_each_seed(const Job &job, int64_t block, int64_t seeds, int lanes)
{
    __shared__ bool left_over[BLOCK];
    __shared__ sum3 warp_sums[BLOCK / WARP];
    const int tid = (int)threadIdx.x, group = tid / lanes, lane = tid % lanes;
    const int64_t first = block * (BLOCK / lanes), s = first + group;

    typename Job::seed seed = {};
    if (s < seeds) seed = job.open(s);
    wait_for_primary();

    const bool too_long = lanes > WARP || seed.parts > (int64_t)PARTS_PER_LANE * lanes;
    const bool mine = s < seeds && !too_long;
    sum3 sum = {0.0, 0.0, 0.0};
    if (mine) sum = add_parts(job, seed, lane, lanes);
    if (lanes <= WARP) add_across(sum, lanes);
    if (mine && lane == 0) job.close(seed, sum);

    if (lane == 0) left_over[group] = s < seeds && too_long;
    if (!__syncthreads_or(s < seeds && too_long)) return;
    for (int g = 0; g < BLOCK / lanes; ++g) {
        if (!left_over[g]) continue;
        seed = job.open(first + g);
        sum = add_parts(job, seed, tid, BLOCK);
        add_across(sum, WARP);
        if (tid % WARP == 0) warp_sums[tid / WARP] = sum;
        __syncthreads();
        if (tid == 0) {
            for (int w = 1; w < BLOCK / WARP; ++w) {
                sum.a += warp_sums[w].a;
                sum.b += warp_sums[w].b;
                sum.c += warp_sums[w].c;
            }
            job.close(seed, sum);
        }
        __syncthreads();
    }
}

} /* namespace kasmina */

#endif
