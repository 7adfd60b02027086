/* From the sums of each feature to the gradients: those of the bank, of alpha, and the gradient telemetry. */
#ifndef KASMINA_CUDA_CHUNKED_BACKWARD_SEEDS_CUH
#define KASMINA_CUDA_CHUNKED_BACKWARD_SEEDS_CUH

#include "cuda/feature_sums.cuh"
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

/* A feature's sums are known: its gradients, and the sums where the seeds will ask for them. NULL is not wanted. */
__device__ __forceinline__ void store_feature(const seed_table &table, const seed_blend &blend,
                                              const feature_place &here, double2 total, bool wide, void *grad_weights,
                                              double2 *totals)
{
    if (totals && here.share == 0) totals[here.feature] = total;
    if (!grad_weights) return;
    kasmina_feature_gradients gradients = {0.0, 0.0, 0.0};
    if (blend.grafted && blend.trains) gradients = gradients_of(table, blend, here.feature, wide, total);
    store_gradients(table, blend, here, gradients, grad_weights);
}

/* What a pass over the seeds writes; NULL is not wanted. */
struct seed_params {
    seed_table table;
    const double2 *totals; /* [features] (u, v), which the kernel before wrote */
    float *grad_alpha;
    double *grad_telemetry;
    bool wide;
    int lanes;
};

/* A seed's parts are its features. */
struct seed_job {
    const seed_params &p;

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
    struct part {
        double2 total;
        double alpha; /* the feature's share of its gradient */
    };

    __device__ __forceinline__ part load(const seed &s, int64_t i) const
    {
        const int64_t feature = s.first_feature + i;
        const double2 total = p.totals[feature];
        return {total, s.blend.grafted ? gradients_of(p.table, s.blend, feature, p.wide, total).alpha : 0.0};
    }
    __device__ __forceinline__ void add(const seed &s, const part &loaded, sum3 &sum) const
    {
        const double2 total = loaded.total;
        if (s.blend.grafted) sum.a += loaded.alpha;
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
