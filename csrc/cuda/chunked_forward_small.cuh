/*
 * A forward pass so small that launches and round trips to memory are all it costs: one launch, no workspace. Some
 * blocks write y, a thread an element; the others add up seeds, a group of lanes each, reading x a second time from the
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
    int64_t numbers; /* elements of x */
    int seed_blocks; /* come first: their way is longer */
    int lanes;       /* a seed's */
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
    __device__ __forceinline__ void add(const seed &s, int64_t i, sum3 &sum) const
    {
        const uint32_t row = (uint32_t)i / s.width;
        const int64_t columns = p.layout.features * p.layout.inner;
        const double number = (double)element<D>::value(load(row * columns + s.first_column + ((uint32_t)i % s.width)));
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

template <kasmina_dtype D> __device__ __forceinline__ void blend_element(const small_forward_params &p, int64_t index)
{
    using T = typename element<D>::wide;
    using bits = typename element<D>::bits;
    if (index >= p.numbers) return;
    const bits raw = __ldg((const bits *)p.x + index);
    const uint32_t column = (uint32_t)index % (uint32_t)(p.layout.features * p.layout.inner);
    const int64_t feature = p.layout.inner == 1 ? column : column / (uint32_t)p.layout.inner;
    const seed_blend blend = find_blend(p.table, feature).blend;
    bits result = raw; /* copied, not computed, where idle: a NaN keeps its payload */
    if (blend.grafted) {
        T a, b;
        coefficients(blend, weights_of<T>(p.table, blend, feature), &a, &b);
        result = element<D>::rounded(add(multiply(a, element<D>::value(raw)), b));
    }
    ((bits *)p.y)[index] = result;
}

template <kasmina_dtype D>
__global__ void __launch_bounds__(BLOCK) small_forward_kernel(const __grid_constant__ small_forward_params p)
{
    if ((int)blockIdx.x < p.seed_blocks)
        for_each_seed(small_job<D>{p}, blockIdx.x, p.table.seeds.chunks.count, p.lanes);
    else
        blend_element<D>(p, (int64_t)((int)blockIdx.x - p.seed_blocks) * BLOCK + threadIdx.x);
}

} /* namespace kasmina */

#endif
