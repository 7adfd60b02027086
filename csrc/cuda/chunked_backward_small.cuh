/*
 * A backward pass so small that launches and round trips to memory are all it costs: no partial sums, a block has all
 * rows of a warp of features and writes their grad_x and grad_weights. The pass over the seeds comes after it as ever.
 */
#ifndef KASMINA_CUDA_CHUNKED_BACKWARD_SMALL_CUH
#define KASMINA_CUDA_CHUNKED_BACKWARD_SMALL_CUH

#include "cuda/chunked_backward_seeds.cuh"
#include "cuda/feature_sums.cuh"

namespace kasmina
{

struct small_backward_params {
    kasmina_layout layout;
    seed_table table;
    const void *grad_y;
    const void *x;      /* NULL: no sums are asked for */
    void *grad_x;       /* or NULL */
    void *grad_weights; /* or NULL */
    double2 *totals;    /* [features], or NULL: no seed asks for them */
    bool wide;
};

/* A share of a feature's rows: grad_x is written, the sums in float64 throughout are returned. */
template <kasmina_dtype D>
__device__ __forceinline__ double2 walk_share(const small_backward_params &p, const feature_place &here,
                                              const seed_blend &blend)
{
    using T = typename element<D>::wide;
    using bits = typename element<D>::bits;
    const uint32_t inner = (uint32_t)p.layout.inner, rows = (uint32_t)p.layout.outer * inner;
    const uint32_t columns = (uint32_t)p.layout.features * inner, first = (uint32_t)here.feature * inner;
    T a = (T)1, b = (T)0;
    if (blend.grafted && p.grad_x) coefficients(blend, weights_of<T>(p.table, blend, here.feature), &a, &b);
    double2 sum = make_double2(0.0, 0.0);
#pragma unroll 4
    for (uint32_t row = (uint32_t)here.share; row < rows; row += FEATURE_SHARES) {
        const uint32_t outer = inner == 1 ? row : row / inner;
        const uint32_t index = outer * columns + first + (row - outer * inner);
        const bits raw = __ldg((const bits *)p.grad_y + index);
        if (p.x) {
            const double g = (double)element<D>::value(raw);
            sum.x = fused(g, (double)element<D>::value(__ldg((const bits *)p.x + index)), sum.x);
            sum.y += g;
        }
        /* Copied, not computed, where idle: a NaN keeps its payload. */
        const bits scaled = element<D>::rounded(multiply(a, element<D>::value(raw)));
        if (p.grad_x) ((bits *)p.grad_x)[index] = blend.grafted ? scaled : raw;
    }
    return sum;
}

template <kasmina_dtype D>
__global__ void __launch_bounds__(BLOCK) small_backward_kernel(const __grid_constant__ small_backward_params p)
{
    const feature_place here = feature_place::here();
    const bool exists = here.feature < p.layout.features;
    wait_for_primary();
    allow_dependents();

    seed_blend blend = {};
    if (exists && (p.grad_x || p.grad_weights)) blend = find_blend(p.table, here.feature).blend;
    double2 sum = make_double2(0.0, 0.0);
    if (exists) sum = walk_share<D>(p, here, blend);
    if (!p.x) return;
    const double2 total = add_shares(here, sum);
    if (exists) store_feature(p.table, blend, here, total, p.wide, p.grad_weights, p.totals);
}

} /* namespace kasmina */

#endif
