/*
 * Device side of the seeds: which seed owns a feature, and what it does to it. Whatever the offsets
 * contain, every index is clamped: memory stays safe, and the answer depends on the input alone.
 */
#ifndef KASMINA_CUDA_SEEDS_CUH
#define KASMINA_CUDA_SEEDS_CUH

#include "kernels.h"
#include "seed_math.h"
#include "cuda/elements.cuh"
#include "cuda/launch.cuh"

namespace kasmina
{

/* The seeds, and what guesses an owner without a search: the two chunk maps that the layers make. */
struct seed_table {
    kasmina_seeds seeds;
    int64_t features;
    int64_t in_longer;     /* balanced map: features in the longer chunks, which come first, */
    uint32_t longer;       /* how many such chunks there are, */
    uint32_t longer_chunk; /* and their length */
    uint32_t chunk;        /* features / seeds, the chunk of the uniform map; at least 1 */
    bool training;         /* the seeds that take part are those in TRAINING, not the grafted ones */
};

static inline seed_table make_seed_table(const kasmina_seeds &seeds, int64_t features, bool training = false)
{
    seed_table table = {seeds, features, 0, 0, 1, 1, training};
    const int64_t count = seeds.chunks.count;
    /* Beyond int32 nothing can be owned; the guess may be wrong there. */
    if (count == 0 || features > INT32_MAX) return table;
    table.chunk = (uint32_t)(features / count > 1 ? features / count : 1);
    table.longer = (uint32_t)(features % count);
    table.longer_chunk = (uint32_t)(features / count + 1);
    table.in_longer = features % count * (features / count + 1);
    return table;
}

constexpr int32_t UNOWNED = -1;

__device__ __forceinline__ bool owns(const kasmina_chunks &chunks, int64_t seed, int32_t feature)
{
    /* Both at once, not one after the other: this is the start of every block. */
    const int32_t first = __ldg(chunks.offsets + seed), last = __ldg(chunks.offsets + seed + 1);
    return (int)(first <= feature) & (int)(feature < last);
}

/* Where the balanced map would put the feature; UNOWNED where no seed can own it. */
__device__ __forceinline__ int32_t guess_seed(const seed_table &table, int64_t index)
{
    const int64_t count = table.seeds.chunks.count;
    if (count == 0 || index >= INT32_MAX) return UNOWNED;
    const uint32_t f = (uint32_t)index;
    const uint32_t balanced =
        index < table.in_longer ? f / table.longer_chunk : table.longer + (f - (uint32_t)table.in_longer) / table.chunk;
    return (int32_t)min(balanced, (uint32_t)(count - 1));
}

/* The seed that owns the feature, else UNOWNED; not where the guess was right. */
inline __device__ __noinline__ int32_t search_seed(const kasmina_chunks chunks, uint32_t chunk, int64_t features,
                                                   int32_t feature)
{
    const int32_t last = (int32_t)(chunks.count - 1);
    const int32_t uniform = (int32_t)min((uint32_t)feature / chunk, (uint32_t)last);
    if (owns(chunks, uniform, feature)) return uniform;
    /* Seed s begins at the whole part of s * features / count. */
    const int64_t even = ceil_div((int64_t)(feature + 1) * chunks.count, features) - 1;
    const int32_t spread = (int32_t)min(even, (int64_t)last);
    if (owns(chunks, spread, feature)) return spread;

    /* The last seed that starts at or before the feature. */
    int32_t low = 0, high = last;
    while (low < high) {
        const int32_t middle = low + (high - low + 1) / 2;
        if (__ldg(chunks.offsets + middle) <= feature)
            low = middle;
        else
            high = middle - 1;
    }
    return owns(chunks, low, feature) ? low : UNOWNED;
}

/* The seed that owns the feature, else UNOWNED. */
__device__ __forceinline__ int32_t find_seed(const seed_table &table, int64_t index)
{
    const int32_t guess = guess_seed(table, index);
    if (guess == UNOWNED || owns(table.seeds.chunks, guess, (int32_t)index)) return guess;
    return search_seed(table.seeds.chunks, table.chunk, table.features, (int32_t)index);
}

/* The features of a seed, clamped: [first, last). */
struct seed_range {
    int64_t first, last;
};

__device__ __forceinline__ seed_range range_of(const seed_table &table, int64_t seed)
{
    const int32_t *offsets = table.seeds.chunks.offsets + seed;
    const int64_t first = min(max((int64_t)__ldg(offsets), (int64_t)0), table.features);
    const int64_t last = min((int64_t)__ldg(offsets + 1), table.features);
    return {first, max(first, last)};
}

/* What a seed does. Not grafted (it takes no part): the other fields mean nothing. */
struct seed_blend {
    bool grafted, trains;
    int32_t strategy, blueprint;
    float alpha;
};

__device__ __forceinline__ seed_blend blend_of(const seed_table &table, int32_t seed)
{
    const kasmina_seeds &seeds = table.seeds;
    if (seed == UNOWNED || !seeds.state)
        return {false, false, 0, 0, 0.0f}; /* no state: the owner is all that is asked */
    const int64_t count = seeds.chunks.count;
    const int32_t *state = seeds.state + seed;
    const int32_t lifecycle = __ldg(state + KASMINA_LIFECYCLE_STATE * count);
    const int32_t blueprint = __ldg(state + KASMINA_BLUEPRINT_ID * count);
    const int32_t strategy = __ldg(state + KASMINA_GRAFTING_STRATEGY * count);
    const bool grafted = table.training ? kasmina_is_training(lifecycle, blueprint, strategy, seeds.num_blueprints)
                                        : kasmina_is_grafted(lifecycle, blueprint, strategy, seeds.num_blueprints);
    const float alpha = seeds.alpha ? __ldg(seeds.alpha + seed) : 1.0f;
    return {grafted, kasmina_trains_weights(lifecycle), strategy, blueprint, alpha};
}

/* A feature's seed and what it does; the two are asked for at once, in the hope that the guess is right. */
struct owner_blend {
    int32_t seed;
    seed_blend blend;
};

__device__ __forceinline__ owner_blend find_blend(const seed_table &table, int64_t index)
{
    const int32_t guess = guess_seed(table, index);
    if (guess == UNOWNED) return {UNOWNED, blend_of(table, UNOWNED)};
    const seed_blend blend = blend_of(table, guess);
    if (owns(table.seeds.chunks, guess, (int32_t)index)) return {guess, blend};
    const int32_t found = search_seed(table.seeds.chunks, table.chunk, table.features, (int32_t)index);
    return {found, blend_of(table, found)};
}

/* The blueprint's weight for a feature and, for AFFINE, that of the next row, as T. */
template <typename T> struct weight_pair {
    T w, next;
};

template <typename T>
__device__ __forceinline__ weight_pair<T> weights_of(const seed_table &table, const seed_blend &blend, int64_t feature)
{
    const kasmina_seeds &seeds = table.seeds;
    const int64_t index = blend.blueprint * table.features + feature;
    const bool pair = blend.strategy == KASMINA_AFFINE;
    return {load_number<T>(seeds.weights_dtype, seeds.weights, index),
            pair ? load_number<T>(seeds.weights_dtype, seeds.weights, index + table.features) : (T)0};
}

__device__ __forceinline__ void coefficients(const seed_blend &blend, weight_pair<float> w, float *a, float *b)
{
    kasmina_coefficients_f32(blend.strategy, blend.alpha, w.w, w.next, a, b);
}

__device__ __forceinline__ void coefficients(const seed_blend &blend, weight_pair<double> w, double *a, double *b)
{
    kasmina_coefficients_f64(blend.strategy, (double)blend.alpha, w.w, w.next, a, b);
}

/*
 * ---- The coefficients of a tile, looked up once a block, and what a thread keeps of them ----
 */

template <typename T> struct coefficient_table {
    T *a, *b;          /* [width] */
    uint32_t *grafted; /* [width] 0 or 1 */

    __device__ __forceinline__ void fill(const seed_table &table, int c, const seed_blend &blend, int64_t feature) const
    {
        T slope = (T)1, offset = (T)-0.0;
        if (blend.grafted) coefficients(blend, weights_of<T>(table, blend, feature), &slope, &offset);
        a[c] = slope;
        b[c] = offset;
        grafted[c] = blend.grafted;
    }
};

} /* namespace kasmina */

#endif
