/*
 * Two sums per feature, u and v, from the blocks of a tiling: a first launch leaves partial sums, a second adds those of
 * each feature, a warp of features to a block, in an order that the shape decides.
 */
#ifndef KASMINA_CUDA_FEATURE_SUMS_CUH
#define KASMINA_CUDA_FEATURE_SUMS_CUH

#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"
#include "cuda/seeds.cuh"
#include "cuda/tiling.cuh"

namespace kasmina
{

/* Threads of a block that share the splits of each feature. */
constexpr int FEATURE_SHARES = BLOCK / WARP;

/*
 * What one launch leaves for the next. Float64 throughout: a partial sum then loses nothing beyond its groups, it
 * overflows only where a group in float32 did, and it is small beside the tensors.
 */
struct feature_sums {
    double2 *partials; /* [splits, slots] (u, v) of a feature in one tile and split */
    double2 *totals;   /* [features] */
};

/* Where the sums lie in the workspace; returns how long it must be. */
static inline size_t place_sums(const tiling &t, void *workspace, feature_sums *sums)
{
    const size_t partials = padded(t.slots * t.splits * (int64_t)sizeof(double2));
    sums->partials = (double2 *)workspace;
    sums->totals = (double2 *)((unsigned char *)workspace + partials);
    return partials + padded(t.features * (int64_t)sizeof(double2));
}

/* What a thread of the second launch works on. */
struct feature_place {
    int64_t feature;
    int lane, share;

    __device__ __forceinline__ static feature_place here()
    {
        const int lane = (int)threadIdx.x % WARP;
        return {(int64_t)blockIdx.x * WARP + lane, lane, (int)threadIdx.x / WARP};
    }
};

/* One share of a feature's partial sums: of its splits, and tiles where it spans several. */
__device__ __forceinline__ double2 add_splits(const tiling &t, const feature_sums &sums, const feature_place &place)
{
    const int64_t first = place.feature * t.inner;
    const int64_t first_tile = t.first_tile(first), last_tile = t.last_tile(first + t.inner - 1);
    double2 sum = make_double2(0.0, 0.0);
    for (int64_t tile = first_tile; tile <= last_tile; ++tile) {
#pragma unroll 4
        for (uint32_t split = place.share; split < t.splits; split += FEATURE_SHARES) {
            const double2 part = sums.partials[split * t.slots + t.slot_of(tile, place.feature)];
            sum.x += part.x;
            sum.y += part.y;
        }
    }
    return sum;
}

/* The sums of a feature from those of its shares. All threads of the block call this. */
__device__ __forceinline__ double2 add_shares(const feature_place &place, double2 sum)
{
    __shared__ double2 shares[FEATURE_SHARES][WARP];
    shares[place.share][place.lane] = sum;
    __syncthreads();
    double2 total = make_double2(0.0, 0.0);
    for (int i = 0; i < FEATURE_SHARES; ++i) {
        total.x += shares[i][place.lane].x;
        total.y += shares[i][place.lane].y;
    }
    return total;
}

/* All threads of the block call this; those with `wanted` get their feature's sums, the others zeros. */
__device__ __forceinline__ double2 total_feature(const tiling &t, const feature_sums &sums, const feature_place &place,
                                                 bool wanted)
{
    return add_shares(place, wanted ? add_splits(t, sums, place) : make_double2(0.0, 0.0));
}

/* Write a feature's column of grad_weights [P, features], zero in the rows that its seed does not train. */
__device__ __forceinline__ void store_gradients(const seed_table &table, const seed_blend &blend,
                                                const feature_place &place, const kasmina_feature_gradients &gradients,
                                                void *grad_weights)
{
    const kasmina_seeds &seeds = table.seeds;
    for (int64_t row = place.share; row < seeds.num_blueprints; row += FEATURE_SHARES) {
        const bool here = blend.grafted && row == blend.blueprint;
        const bool next = blend.grafted && row == (int64_t)blend.blueprint + 1;
        const double value = here ? gradients.weight : next ? gradients.next : 0.0;
        store_number(seeds.weights_dtype, grad_weights, row * table.features + place.feature, value);
    }
}

} /* namespace kasmina */

#endif
