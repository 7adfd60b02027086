/*
 * A backward pass so small that launches and round trips to memory are all it costs: one launch, no workspace. Some
 * blocks write grad_x, a thread an element; the others serve seeds, a lane a feature, reading G and x from the cache.
 */
#ifndef KASMINA_CUDA_CHUNKED_BACKWARD_SMALL_CUH
#define KASMINA_CUDA_CHUNKED_BACKWARD_SMALL_CUH

#include "cuda/chunked_backward_seeds.cuh"

namespace kasmina
{

struct small_backward_params {
    kasmina_layout layout;
    const void *grad_y;
    const void *x;
    void *grad_x;       /* or NULL */
    void *grad_weights; /* or NULL */
    seed_params seeds;
    int64_t numbers; /* elements of x */
    int seed_blocks; /* come first: their way is longer */
};

/* A feature's column of grad_weights [P, features]. */
__device__ __forceinline__ void store_column(const small_backward_params &p, const seed_blend &blend, int64_t feature,
                                             const kasmina_feature_gradients &gradients)
{
    const kasmina_seeds &seeds = p.seeds.table.seeds;
    for (int64_t row = 0; row < seeds.num_blueprints; ++row) {
        const bool here = blend.grafted && row == blend.blueprint;
        const bool next = blend.grafted && row == (int64_t)blend.blueprint + 1;
        const double value = here ? gradients.weight : next ? gradients.next : 0.0;
        store_number(seeds.weights_dtype, p.grad_weights, row * p.layout.features + feature, value);
    }
}

/* Sums in float64 throughout; the feature's gradients are written on the way, by the seed that owns it. */
template <kasmina_dtype D> struct summed_totals {
    const small_backward_params &p;

    __device__ __forceinline__ double2 of(int64_t seed, int64_t feature) const
    {
        using bits = typename element<D>::bits;
        const uint32_t inner = (uint32_t)p.layout.inner, rows = (uint32_t)p.layout.outer * inner;
        const uint32_t columns = (uint32_t)p.layout.features * inner;
        double2 sum = make_double2(0.0, 0.0);
#pragma unroll 8
        for (uint32_t row = 0; row < rows; ++row) {
            const uint32_t outer = inner == 1 ? row : row / inner;
            const uint32_t index = outer * columns + (uint32_t)feature * inner + (row - outer * inner);
            const double g = (double)element<D>::value(__ldg((const bits *)p.grad_y + index));
            sum.x = fused(g, (double)element<D>::value(__ldg((const bits *)p.x + index)), sum.x);
            sum.y += g;
        }
        if (p.grad_weights) {
            const seed_table &table = p.seeds.table;
            const owner_blend found = find_blend(table, feature);
            kasmina_feature_gradients gradients = {0.0, 0.0, 0.0};
            if (found.blend.grafted && found.blend.trains)
                gradients = gradients_of(table, found.blend, feature, p.seeds.wide, sum);
            if (found.seed == seed) store_column(p, found.blend, feature, gradients);
        }
        return sum;
    }
};

template <kasmina_dtype D> __device__ __forceinline__ void scale_element(const small_backward_params &p, int64_t index)
{
    using T = typename element<D>::wide;
    using bits = typename element<D>::bits;
    const seed_table &table = p.seeds.table;
    if (p.grad_weights && index < p.layout.features && find_seed(table, index) == UNOWNED)
        store_column(p, {}, index, {0.0, 0.0, 0.0});
    if (!p.grad_x || index >= p.numbers) return;
    const bits raw = __ldg((const bits *)p.grad_y + index);
    const uint32_t column = (uint32_t)index % (uint32_t)(p.layout.features * p.layout.inner);
    const int64_t feature = p.layout.inner == 1 ? column : column / (uint32_t)p.layout.inner;
    const seed_blend blend = find_blend(table, feature).blend;
    bits result = raw; /* copied, not computed, where idle: a NaN keeps its payload */
    if (blend.grafted) {
        T a, b;
        coefficients(blend, weights_of<T>(table, blend, feature), &a, &b);
        result = element<D>::rounded(multiply(a, element<D>::value(raw)));
    }
    ((bits *)p.grad_x)[index] = result;
}

template <kasmina_dtype D>
__global__ void __launch_bounds__(BLOCK) small_backward_kernel(const __grid_constant__ small_backward_params p)
{
    if ((int)blockIdx.x < p.seed_blocks) {
        const summed_totals<D> totals = {p};
        const seed_job<summed_totals<D>> job = {p.seeds, totals};
        for_each_seed(job, blockIdx.x, p.seeds.table.seeds.chunks.count, p.seeds.lanes);
    } else {
        scale_element<D>(p, (int64_t)((int)blockIdx.x - p.seed_blocks) * BLOCK + threadIdx.x);
    }
}

} /* namespace kasmina */

#endif
