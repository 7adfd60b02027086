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
constexpr int WARP = 32;

/* ---- A tile: sum each column over the walkers, then each run of columns with one owner ---- */

/* Walkers that one thread adds up; more are halved first, all threads at work. */
constexpr int WALKERS_IN_SERIES = 8;

struct tile_sums {
    double *s1, *s2; /* [walkers][VEC][lanes]: see walker::slot */
    uint32_t *count; /* [width], one more sum of each column, or NULL */
    int32_t *owner;  /* [width]; negative: not summed. NULL: every column is a run of its own */
};

/*
 * All threads of the block call this after their last store to `sums`. For each run
 * emit(first column, owner, s1, s2, count) is called by one thread.
 */
template <int VEC, bool RAGGED, typename Emit>
__device__ __forceinline__ void reduce_tile(const tiling &t, const tile_sums &sums, const Emit &emit)
{
    const int threads = t.threads(), width = t.width, tid = (int)threadIdx.x;
    const int lane = tid % WARP;
    const auto slot_of = [&](int c) { return RAGGED ? c : ((c % VEC) << t.lanes_log2) + c / VEC; };

    int walkers = t.walkers();
    __syncthreads();
    for (; walkers > WALKERS_IN_SERIES; walkers /= 2) {
        const int half = walkers / 2 * width;
        for (int i = tid; i < half; i += threads) {
            sums.s1[i] += sums.s1[i + half];
            sums.s2[i] += sums.s2[i + half];
        }
        __syncthreads();
    }

    for (int base = tid - lane; base < width; base += threads) {
        const int c = base + lane;
        const bool exists = c < width;
        double s1 = 0.0, s2 = 0.0;
        if (exists) {
            for (int i = 0; i < walkers; ++i) {
                s1 += sums.s1[i * width + slot_of(c)];
                s2 += sums.s2[i * width + slot_of(c)];
            }
        }
        if (!sums.owner) {
            if (exists) emit(c, 0, s1, s2, 0u);
            continue;
        }
        const int32_t owner = exists ? sums.owner[c] : UNOWNED;
        uint32_t count = exists && sums.count ? sums.count[c] : 0u;
#pragma unroll
        for (int distance = 1; distance < WARP; distance *= 2) {
            const double far1 = __shfl_down_sync(FULL_WARP, s1, distance);
            const double far2 = __shfl_down_sync(FULL_WARP, s2, distance);
            const uint32_t far_count = __shfl_down_sync(FULL_WARP, count, distance);
            const int32_t far_owner = __shfl_down_sync(FULL_WARP, owner, distance);
            if (lane + distance < WARP && far_owner == owner) s1 += far1, s2 += far2, count += far_count;
        }
        if (exists) {
            sums.s1[slot_of(c)] = s1;
            sums.s2[slot_of(c)] = s2;
            if (sums.count) sums.count[c] = count;
        }
    }
    if (!sums.owner) return;
    __syncthreads();

    /* Each column now holds the sum from itself to the end of its run or its 32 columns. */
    for (int c = tid; c < width; c += threads) {
        const int32_t owner = sums.owner[c];
        if (owner < 0 || (c > 0 && sums.owner[c - 1] == owner)) continue;
        double s1 = sums.s1[slot_of(c)], s2 = sums.s2[slot_of(c)];
        uint32_t count = sums.count ? sums.count[c] : 0u;
        for (int next = (c / WARP + 1) * WARP; next < width; next += WARP) {
            if (sums.owner[next - 1] != owner || sums.owner[next] != owner) break;
            s1 += sums.s1[slot_of(next)];
            s2 += sums.s2[slot_of(next)];
            if (sums.count) count += sums.count[next];
        }
        emit(c, owner, s1, s2, count);
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

template <typename Job>
__device__ __forceinline__ sum3 add_parts(const Job &job, const typename Job::seed &seed, int lane, int lanes)
{
    sum3 sum = {0.0, 0.0, 0.0};
#pragma unroll 4
    for (int64_t i = lane; i < seed.parts; i += lanes) job.add(seed, i, sum);
    return sum;
}

/*
 * Job: `open(s)` gives a Job::seed with `parts`, without reading what the kernel before wrote;
 * `add(seed, i, sum)` adds part i; `close(seed, sum)` is called by one thread. Blocks have BLOCK threads.
 */
template <typename Job> __device__ __forceinline__ void for_each_seed(const Job &job, int64_t seeds, int lanes)
{
    __shared__ bool left_over[BLOCK];
    __shared__ sum3 warp_sums[BLOCK / WARP];
    const int tid = (int)threadIdx.x, group = tid / lanes, lane = tid % lanes;
    const int64_t first = (int64_t)blockIdx.x * (BLOCK / lanes), s = first + group;

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
