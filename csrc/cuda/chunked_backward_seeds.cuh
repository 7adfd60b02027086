/* From the sums of each feature to the gradients: those of the bank, of alpha, and the gradient telemetry. */
#ifndef KASMINA_CUDA_CHUNKED_BACKWARD_SEEDS_CUH
#define KASMINA_CUDA_CHUNKED_BACKWARD_SEEDS_CUH

#include "cuda/reduce.cuh"
#include "cuda/seeds.cuh"

namespace kasmina
{

/* A weight, or pair of weights, as the forward used it: rounded to the accumulation type. */
__device__ __forceinline__ weight_pair<double> rounded_weights(const seed_table &table, const seed_blend &blend,
                                                               int64_t feature, bool wide)
{
    if (wide) return weights_of<double>(table, blend, feature);
    const weight_pair<float> w = weights_of<float>(table, blend, feature);
    return {(double)w.w, (double)w.next};
}

__device__ __forceinline__ kasmina_feature_gradients gradients_of(const seed_table &table, const seed_blend &blend,
                                                                  int64_t feature, bool wide, double2 total)
{
    const weight_pair<double> w = rounded_weights(table, blend, feature, wide);
    return kasmina_gradients(blend.strategy, (double)blend.alpha, w.w, w.next, total.x, total.y);
}

/* What a pass over the seeds writes; NULL is not wanted. */
struct seed_params {
    seed_table table;
    float *grad_alpha;
    double *grad_telemetry;
    bool wide;
    int lanes;
};

/* A seed's parts are its features. Totals: of(seed, feature) gives (sum G x, sum G). */
template <typename Totals> struct seed_job {
    const seed_params &p;
    const Totals &totals;

    struct seed {
        int64_t index, first_feature, parts; /* parts: features */
        seed_blend blend;
    };

    __device__ __forceinline__ seed open(int64_t index) const
    {
        const seed_range range = range_of(p.table, index);
        return {index, range.first, range.last - range.first,
                p.grad_alpha ? blend_of(p.table, (int32_t)index) : seed_blend()};
    }
    /* sum: (grad_alpha, sum u^2, sum v^2) */
    __device__ __forceinline__ void add(const seed &s, int64_t i, sum3 &sum) const
    {
        const int64_t feature = s.first_feature + i;
        const double2 total = totals.of(s.index, feature);
        if (s.blend.grafted) sum.a += gradients_of(p.table, s.blend, feature, p.wide, total).alpha;
        sum.b = fused(total.x, total.x, sum.b);
        sum.c = fused(total.y, total.y, sum.c);
    }
    __device__ __forceinline__ void close(const seed &s, const sum3 &sum) const
    {
        if (p.grad_alpha) p.grad_alpha[s.index] = (float)sum.a;
        if (!p.grad_telemetry || !is_finite(sum.b) || !is_finite(sum.c)) return;
        double *row = p.grad_telemetry + s.index * KASMINA_GRAD_TELEMETRY_COLUMNS;
        row[KASMINA_SUM_U2] += sum.b;
        row[KASMINA_SUM_V2] += sum.c;
        row[KASMINA_BACKWARDS] += 1.0;
    }
};

} /* namespace kasmina */

#endif
