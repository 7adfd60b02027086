/*
 * A forward pass so small that launches and round trips to memory are all it costs: one launch, no workspace. Some
 * blocks write y, a thread a column; the others add up seeds, a group of lanes each, reading x a second time from the
 * cache.
 */
#ifndef KASMINA_CUDA_CHUNKED_FORWARD_SMALL_CUH
#define KASMINA_CUDA_CHUNKED_FORWARD_SMALL_CUH

#include "telemetry_math.h"
#include "cuda/reduce.cuh"
#include "cuda/seeds.cuh"

namespace kasmina
{

struct small_forward_params {
    kasmina_layout layout;
    seed_table table;
    const void *x;
    void *y;
    double *telemetry;
    int seed_blocks; /* come first: their way is longer */
    int lanes;       /* a seed's */
    uint32_t across; /* of the other blocks, how many are side by side */
    uint32_t rows;   /* and how many rows each has, up to SMALL_ROWS */
};

/* A seed's parts are its elements: rows of its chunk. Arithmetic is float64 throughout. */
template <kasmina_dtype D> struct small_job {
    using bits = typename element<D>::bits;
    const small_forward_params &p;

    struct seed {
        int64_t index, parts, first_column;
        uint32_t width; /* columns */
        double shift;
        double telemetry[KASMINA_TELEMETRY_COLUMNS];
    };

    __device__ __forceinline__ bits load(int64_t index) const
    {
        return __ldg((const bits *)p.x + index);
    }
    __device__ __forceinline__ seed open(int64_t index) const
    {
        seed s = {};
        s.index = index;
#pragma unroll
        for (int i = 0; i < KASMINA_TELEMETRY_COLUMNS; ++i)
            s.telemetry[i] = p.telemetry[index * KASMINA_TELEMETRY_COLUMNS + i];
        const seed_range range = range_of(p.table, index);
        if (range.first >= range.last) return s;
        s.first_column = range.first * p.layout.inner;
        s.width = (uint32_t)((range.last - range.first) * p.layout.inner);
        s.parts = s.width * p.layout.outer;
        s.shift = kasmina_origin((double)element<D>::value(load(s.first_column)));
        return s;
    }
    using part = bits;

    __device__ __forceinline__ part load(const seed &s, int64_t i) const
    {
        const uint32_t row = (uint32_t)i / s.width;
        const int64_t columns = p.layout.features * p.layout.inner;
        return load(row * columns + s.first_column + ((uint32_t)i % s.width));
    }
    __device__ __forceinline__ void add(const seed &s, part loaded, sum3 &sum) const
    {
        const double number = (double)element<D>::value(loaded);
        const double d = number - s.shift;
        const bool counts = is_finite(number);
        sum.a += counts ? d : 0.0;
        sum.b = counts ? fused(d, d, sum.b) : sum.b;
        sum.c += counts ? 0.0 : 1.0;
    }
    __device__ __forceinline__ void close(seed &s, const sum3 &sum) const
    {
        const kasmina_moments batch = kasmina_shifted_moments((double)s.parts - sum.c, s.shift, sum.a, sum.b);
        kasmina_accumulate(s.telemetry, batch, 1.0, sum.c);
#pragma unroll
        for (int i = 0; i < KASMINA_TELEMETRY_COLUMNS; ++i)
            p.telemetry[s.index * KASMINA_TELEMETRY_COLUMNS + i] = s.telemetry[i];
    }
};

constexpr int SMALL_ROWS = 4;

/* A block's columns, a thread each, in up to SMALL_ROWS rows, which are on their way while the seed is looked up. */
template <kasmina_dtype D> __device__ __forceinline__ void blend_columns(const small_forward_params &p, uint32_t block)
{
    using T = typename element<D>::wide;
    using bits = typename element<D>::bits;
    const uint32_t columns = (uint32_t)(p.layout.features * p.layout.inner);
    const uint32_t column = block % p.across * BLOCK + threadIdx.x, first = block / p.across * p.rows;
    if (column >= columns) return;
    const uint32_t index = first * columns + column, count = min(p.rows, (uint32_t)p.layout.outer - first);
    bits raw[SMALL_ROWS] = {};
#pragma unroll
    for (uint32_t i = 0; i < SMALL_ROWS; ++i)
        if (i < count) raw[i] = __ldg((const bits *)p.x + index + i * columns);
    const int64_t feature = p.layout.inner == 1 ? column : column / (uint32_t)p.layout.inner;
    const seed_blend blend = find_blend(p.table, feature).blend;
    T a = (T)1, b = (T)-0.0;
    if (blend.grafted) coefficients(blend, weights_of<T>(p.table, blend, feature), &a, &b);
#pragma unroll
    for (uint32_t i = 0; i < SMALL_ROWS; ++i) {
        const bits blended = element<D>::rounded(add(multiply(a, element<D>::value(raw[i])), b));
        /* Copied, not computed, where idle: a NaN keeps its payload. */
        if (i < count) ((bits *)p.y)[index + i * columns] = blend.grafted ? blended : raw[i];
    }
}

template <kasmina_dtype D>
__global__ void __launch_bounds__(BLOCK) small_forward_kernel(const __grid_constant__ small_forward_params p)
{
    wait_for_primary();
    allow_dependents();
    if ((int)blockIdx.x < p.seed_blocks)
        for_each_seed(small_job<D>{p}, blockIdx.x, p.table.seeds.chunks.count, p.lanes);
    else
        blend_columns<D>(p, blockIdx.x - (uint32_t)p.seed_blocks);
}

} /* namespace kasmina */

#endif
