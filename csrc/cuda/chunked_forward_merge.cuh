/*
 * The merge after the pass over x: a seed's partial sums, in a fixed order, into its accumulator. A group of lanes
 * serves a seed; where there are more seeds than features, it serves a feature at which a seed begins, and a thread each
 * the others.
 */
#ifndef KASMINA_CUDA_CHUNKED_FORWARD_MERGE_CUH
#define KASMINA_CUDA_CHUNKED_FORWARD_MERGE_CUH

#include "cuda/chunked_forward_pass.cuh"

namespace kasmina
{

struct merge_params {
    tiling tiles;
    seed_table table;
    forward_partials in;
    const void *x;
    kasmina_dtype dtype;
    double numbers_per_feature; /* outer * inner */
    double *telemetry;
    int lanes;       /* a seed's */
    bool by_feature; /* groups are the features at which seeds begin, not the seeds */
    int64_t groups;
    int64_t idle_blocks; /* come first: for the seeds that no group serves */
};

/* The seed whose first feature this is, or UNOWNED. */
__device__ __forceinline__ int32_t seed_beginning_at(const seed_table &table, int64_t feature)
{
    const int32_t seed = find_seed(table, feature);
    return seed != UNOWNED && range_of(table, seed).first == feature ? seed : UNOWNED;
}

struct merge_job {
    const merge_params &p;

    struct seed {
        int64_t index, first_column, first_tile, parts; /* parts: (tile, split), splits adjacent */
        double numbers, shift;
        double telemetry[KASMINA_TELEMETRY_COLUMNS];
    };

    __device__ __forceinline__ seed open(int64_t index) const
    {
        const tiling &t = p.tiles;
        seed s = {};
        s.index = p.by_feature ? seed_beginning_at(p.table, index) : index;
        if (s.index == UNOWNED) return s;
        const seed_range range = range_of(p.table, s.index);
#pragma unroll
        for (int i = 0; i < KASMINA_TELEMETRY_COLUMNS; ++i)
            s.telemetry[i] = p.telemetry[s.index * KASMINA_TELEMETRY_COLUMNS + i];
        if (range.first >= range.last) return s;
        s.first_column = range.first * t.inner;
        s.first_tile = t.first_tile(s.first_column);
        s.parts = (t.last_tile(range.last * t.inner - 1) - s.first_tile + 1) * t.splits;
        s.numbers = (double)(range.last - range.first) * p.numbers_per_feature;
        s.shift = kasmina_origin(load_number<double>(p.dtype, p.x, s.first_column));
        return s;
    }
    struct part {
        double2 sums;
        uint32_t nonfinite;
        int32_t owner;
    };

    __device__ __forceinline__ part load(const seed &s, int64_t i) const
    {
        const tiling &t = p.tiles;
        const int64_t tile = s.first_tile + (uint32_t)i / t.splits;
        const int64_t feature = t.feature_of(t.first_column(tile, s.first_column));
        const int64_t at = t.slot_of(tile, feature) * t.splits + (uint32_t)i % t.splits;
        return {p.in.sums[at], p.in.nonfinite[at], p.in.owner[feature]};
    }
    __device__ __forceinline__ void add(const seed &s, const part &loaded, sum3 &sum) const
    {
        /* Only where offsets decrease: the run belongs to another seed, or was never written. */
        const bool mine = loaded.owner == s.index;
        sum.a += mine ? loaded.sums.x : 0.0;
        sum.b += mine ? loaded.sums.y : 0.0;
        sum.c += mine ? loaded.nonfinite : 0.0;
    }
    __device__ __forceinline__ void close(seed &s, const sum3 &sum) const
    {
        if (s.index == UNOWNED) return;
        const kasmina_moments batch = kasmina_shifted_moments(s.numbers - sum.c, s.shift, sum.a, sum.b);
        kasmina_accumulate(s.telemetry, batch, 1.0, sum.c);
#pragma unroll
        for (int i = 0; i < KASMINA_TELEMETRY_COLUMNS; ++i)
            p.telemetry[s.index * KASMINA_TELEMETRY_COLUMNS + i] = s.telemetry[i];
    }
};

/* A seed that no feature serves has seen nothing but the batch. */
__device__ __forceinline__ void count_batch(const merge_params &p, int64_t seed)
{
    wait_for_primary();
    if (seed >= p.table.seeds.chunks.count) return;
    const seed_range range = range_of(p.table, seed);
    if (range.first < range.last && seed_beginning_at(p.table, range.first) == seed) return;
    p.telemetry[seed * KASMINA_TELEMETRY_COLUMNS + KASMINA_BATCHES] += 1.0;
}

__global__ void __launch_bounds__(BLOCK) merge_kernel(const __grid_constant__ merge_params p)
{
    if (blockIdx.x < p.idle_blocks)
        count_batch(p, (int64_t)blockIdx.x * BLOCK + threadIdx.x);
    else
        for_each_seed(merge_job{p}, blockIdx.x - p.idle_blocks, p.groups, p.lanes);
}

} /* namespace kasmina */

#endif
