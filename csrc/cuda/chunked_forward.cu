/*
 * chunked_forward: y = blend(x) and the telemetry of x, in one pass over x. telemetry_update is the
 * same without y.
 *
 * Numbers of one column are summed as differences from a value k that the thread has just seen, in
 * groups of 32 rows in float32, then moved to float64 and to a shift K that the whole seed shares:
 * its first element. Sums about K simply add up, so blocks need no order among themselves; the merge,
 * a second launch, adds them in a fixed one. A group whose squares overflow, vanish or meet a number
 * that is not finite is walked again in float64.
 */
#include <float.h>

#include "kernels.h"
#include "telemetry_math.h"
#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"
#include "cuda/seeds.cuh"
#include "cuda/tiling.cuh"

namespace
{

using namespace kasmina;

/* Below, a sum of squares in float32 has lost digits to the smallest subnormal, 2^-149. */
constexpr float LEAST_SQUARES = 0x1p-120f;

/* From here on a float32 has no neighbour so near that the square of their difference is 0. */
constexpr float LEAST_CERTAIN = 0x1p-48f;

/* What the first launch leaves for the second. */
struct partials {
    double2 *sums;       /* [slots, splits] sum (x - K), sum (x - K)^2 */
    uint32_t *nonfinite; /* [slots, splits] */
    int32_t *owner;      /* [features] the seed that was found for each */
};

struct forward_params {
    tiling tiles;
    seed_table table;
    partials out;
    const void *x;
    void *y;
};

struct merge_params {
    tiling tiles;
    seed_table table;
    partials in;
    const void *x;
    kasmina_dtype dtype;
    double numbers_per_feature; /* outer * inner */
    double *telemetry;
    int lanes; /* a seed's */
};

/* ---- The tables of a block, in shared memory ---- */

template <typename T> struct forward_tables {
    tile_sums sums;
    block_place *place;
    T *shift; /* [width] */
    coefficient_table<T> blend;

    __device__ __forceinline__ forward_tables(const tiling &t, int vec, bool collect)
    {
        shared_carver shared;
        place = shared.take<block_place>(1);
        if (collect) {
            sums.s1 = shared.take<double>(t.threads() * vec);
            sums.s2 = shared.take<double>(t.threads() * vec);
            shift = shared.take<T>(t.width);
        }
        blend.a = shared.take<T>(t.width);
        blend.b = shared.take<T>(t.width);
        blend.grafted = shared.take<uint32_t>(t.width);
        if (collect) {
            sums.owner = shared.take<int32_t>(t.width);
            sums.count = shared.take<uint32_t>(t.width);
        }
    }
};

size_t forward_shared_bytes(const tiling &t, int vec, size_t wide, bool collect)
{
    const size_t width = (size_t)t.width, slots = (size_t)t.threads() * vec;
    const size_t blend = width * (2 * wide + sizeof(uint32_t));
    return sizeof(block_place) + blend + (collect ? slots * 16 + width * (wide + 2 * sizeof(uint32_t)) : 0);
}

/* ---- The pass over x ---- */

/* A thread's running sums of its columns, about k: those of the current group of rows. */
template <kasmina_dtype D, bool RAGGED> struct group_sums {
    using T = typename element<D>::wide;
    using bits = typename element<D>::bits;
    using way = walker<D, RAGGED>;
    static constexpr int VEC = way::VEC;

    T s1[VEC], s2[VEC];
    vector_bits k;
    int rows = 0;   /* of the group so far */
    int full, part; /* how many of them have all of the thread's columns, and only some */
    unsigned quiet; /* a bit for each column that has only been 0 */

    __device__ __forceinline__ void start(const tiling &t, const forward_tables<T> &tables)
    {
        T shift[VEC];
#pragma unroll
        for (int j = 0; j < VEC; ++j) {
            shift[j] = tables.shift[way::column(t, j)];
            tables.sums.s1[way::slot(t, j)] = tables.sums.s2[way::slot(t, j)] = 0.0;
        }
        element<D>::encode(shift, k);
        clear();
    }
    __device__ __forceinline__ void clear()
    {
#pragma unroll
        for (int j = 0; j < VEC; ++j) s1[j] = s2[j] = (T)0;
        rows = full = part = 0;
        quiet = 0;
    }
    /* The group begins with this row. */
    __device__ __forceinline__ void begin(const vector_bits &raw, int valid)
    {
        if (RAGGED)
            replace_elements<VEC>(~0u << valid, raw, k);
        else
            copy_vector(raw, k);
        if constexpr (VEC > 2) quiet = ~nonzero_elements<VEC>(k);
    }
    /* After a batch of rows: which columns are still quiet. One wrongly not so costs time only. */
    template <int ROWS> __device__ __forceinline__ void listen(const fetched<D, RAGGED> (&batch)[ROWS])
    {
        if (VEC == 2 || !quiet) return;
        vector_bits any = {};
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
            vector_bits raw;
            batch[i].get(raw);
#pragma unroll
            for (int w = 0; w < VECTOR_WORDS; ++w) any[w] |= raw[w];
        }
        if constexpr (VEC > 2) quiet &= ~nonzero_elements<VEC>(any);
    }
    /*
     * Whether a column's squares are too small for float32. Zeros alone are not; where all is 0 but
     * the column was not quiet, tiny numbers may have cancelled each other.
     */
    __device__ __forceinline__ bool vanished(T about, int j) const
    {
        if (sizeof(T) == sizeof(double) || s2[j] >= (T)LEAST_SQUARES) return false;
        const bool certain = quiet >> j & 1u || fabs(about) >= (T)LEAST_CERTAIN;
        return s1[j] != (T)0 || s2[j] != (T)0 || !certain;
    }
    __device__ __forceinline__ void add_row(const T (&value)[VEC], int valid)
    {
        T about[VEC];
        element<D>::decode(k, about);
#pragma unroll
        for (int j = 0; j < VEC; ++j) {
            if (RAGGED && j >= valid) continue;
            const T d = value[j] - about[j];
            s1[j] += d;
            s2[j] = fused(d, d, s2[j]);
        }
        full += valid == VEC;
        part += valid != VEC;
    }
    /* Move the group into the tables; `ahead` rows of the thread follow it. */
    __device__ __forceinline__ void put_away(const tiling &t, const bits *x, int last, int ahead)
    {
        const forward_tables<T> tables(t, VEC, true);
        unsigned again = 0; /* columns to walk again */
        T about[VEC];
        element<D>::decode(k, about);
#pragma unroll
        for (int j = 0; j < VEC; ++j) {
            if (is_finite(s2[j]) && !vanished(about[j], j)) {
                const double n = full + (RAGGED && j < last ? part : 0), d1 = (double)s1[j];
                const double up = (double)about[j] - (double)tables.shift[way::column(t, j)];
                tables.sums.s1[way::slot(t, j)] += d1 + n * up;
                tables.sums.s2[way::slot(t, j)] += (double)s2[j] + up * (2.0 * d1 + n * up);
            } else {
                again |= 1u << j;
            }
        }
        for (; again; again &= again - 1) walk_again(t, tables, x, __ffs((int)again) - 1, ahead);
        clear();
    }
    /* The j-th column's share of the group in float64, without what is not finite. */
    __device__ __forceinline__ void walk_again(const tiling &t, const forward_tables<T> &tables, const bits *x, int j,
                                               int ahead) const
    {
        const int c = way::column(t, j);
        const double shift = (double)tables.shift[c];
        double sum = 0.0, squares = 0.0;
        uint32_t nonfinite = 0;
        way::revisit(t, *tables.place, j, ahead, rows, [&](int64_t index) {
            const double number = (double)element<D>::value(__ldg(x + index)), d = number - shift;
            if (is_finite(number))
                sum += d, squares = fused(d, d, squares);
            else
                ++nonfinite;
        });
        tables.sums.s1[way::slot(t, j)] += sum;
        tables.sums.s2[way::slot(t, j)] += squares;
        /* Integers: the order of the threads does not matter. */
        if (nonfinite) atomicAdd(&tables.sums.count[c], nonfinite);
    }
};

template <kasmina_dtype D, bool RAGGED, bool COLLECT>
__global__ void __launch_bounds__(BLOCK, BLOCKS_PER_SM) forward_kernel(const __grid_constant__ forward_params p)
{
    using T = typename element<D>::wide;
    using bits = typename element<D>::bits;
    constexpr int VEC = VECTOR_BYTES / sizeof(bits);
    /* Ragged 16-bit elements take a register each, so fewer rows of them. */
    constexpr int ROWS = RAGGED && VEC == 8 ? ROWS_IN_FLIGHT / 2 : ROWS_IN_FLIGHT;
    constexpr unsigned ALL = ~(~0u << VEC);
    static_assert(GROUP_ROWS % ROWS == 0, "groups end with a batch");

    if (COLLECT) allow_dependents();
    const tiling &t = p.tiles;
    const block_place here = block_place::here(t);
    walker<D, RAGGED> walk(t, here);
    fetched<D, RAGGED> rows[ROWS];
    walk.fetch(t, p.x, rows); /* on their way while the seeds are looked up */

    forward_tables<T> tables(t, VEC, COLLECT);
    if (threadIdx.x == 0) *tables.place = here; /* for the rare paths: not in registers all the way */
    for (int c = (int)threadIdx.x; c < t.width; c += t.threads()) {
        const int64_t column = here.origin + c;
        const bool exists = c < here.extent;
        const int64_t feature = exists ? t.feature_of(column) : 0;
        const int32_t seed = exists ? find_seed(p.table, feature) : UNOWNED;
        bits first = 0; /* the seed's first element, loaded while the blend is looked up */
        if (COLLECT && seed != UNOWNED) first = __ldg((const bits *)p.x + range_of(p.table, seed).first * t.inner);
        if (p.y) tables.blend.fill(p.table, c, seed, feature);
        if constexpr (COLLECT) {
            tables.shift[c] = (T)kasmina_origin((double)element<D>::value(first));
            tables.sums.owner[c] = seed;
            tables.sums.count[c] = 0;
            if (here.split == 0 && exists && column == feature * t.inner) p.out.owner[feature] = seed;
        }
    }
    __syncthreads();

    T a[VEC], b[VEC];
    unsigned grafted = 0; /* a bit for each of the thread's columns */
    if (p.y) {
#pragma unroll
        for (int j = 0; j < VEC; ++j) {
            const int c = walk.column(t, j);
            a[j] = tables.blend.a[c];
            b[j] = tables.blend.b[c];
            grafted |= tables.blend.grafted[c] << j;
        }
    }
    group_sums<D, RAGGED> group;
    if constexpr (COLLECT) group.start(t, tables);

    while (walk.left > 0) {
        const bool fresh = group.rows == 0;
        group.rows += min(walk.left, ROWS);
#pragma unroll
        for (int i = 0; i < ROWS; ++i, walk.advance(t)) {
            const int valid = walk.valid(t);
            if (valid == 0) continue;
            vector_bits raw;
            T value[VEC];
            rows[i].get(raw);
            element<D>::decode(raw, value);
            if constexpr (COLLECT) {
                if (i == 0 && fresh) group.begin(raw, valid);
                group.add_row(value, valid);
            }
            if (!p.y) continue;
            if (grafted) {
                vector_bits computed;
#pragma unroll
                for (int j = 0; j < VEC; ++j) value[j] = add(multiply(a[j], value[j]), b[j]);
                element<D>::encode(value, computed);
                /* Copied, not computed, where idle: a NaN keeps its payload. */
                if (grafted != ALL) replace_elements<VEC>(grafted, raw, computed);
                store<D, RAGGED>((bits *)p.y + walk.at, computed, valid, walk.stride(t));
            } else {
                store<D, RAGGED>((bits *)p.y + walk.at, raw, valid, walk.stride(t));
            }
        }
        if constexpr (COLLECT) group.listen(rows);
        walk.fetch(t, p.x, rows); /* on their way while the group is put away */
        if constexpr (COLLECT) {
            if (walk.left <= 0 || group.rows == GROUP_ROWS)
                group.put_away(t, (const bits *)p.x, walk.last, max(walk.left, 0));
        }
    }

    if constexpr (COLLECT) {
        const forward_tables<T> tables(t, VEC, true);
        reduce_tile<VEC, RAGGED>(t, tables.sums, [&](int c, int32_t, double s1, double s2, uint32_t nonfinite) {
            const int64_t slot = tables.place->tile + t.feature_of(tables.place->origin + c);
            const int64_t index = slot * t.splits + tables.place->split;
            p.out.sums[index] = make_double2(s1, s2);
            p.out.nonfinite[index] = nonfinite;
        });
    }
}

/* ---- The merge: a seed's partial sums into its accumulator ---- */

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
        const seed_range range = range_of(p.table, index);
        seed s = {};
        s.index = index;
#pragma unroll
        for (int i = 0; i < KASMINA_TELEMETRY_COLUMNS; ++i)
            s.telemetry[i] = p.telemetry[index * KASMINA_TELEMETRY_COLUMNS + i];
        if (range.first >= range.last) return s;
        s.first_column = range.first * t.inner;
        s.first_tile = s.first_column / t.tile_columns;
        const int64_t last_tile = (range.last * t.inner - 1) / t.tile_columns;
        s.parts = (last_tile - s.first_tile + 1) * t.splits;
        s.numbers = (double)(range.last - range.first) * p.numbers_per_feature;
        s.shift = kasmina_origin(load_number<double>(p.dtype, p.x, s.first_column));
        return s;
    }
    __device__ __forceinline__ void add(const seed &s, int64_t i, sum3 &sum) const
    {
        const tiling &t = p.tiles;
        const int64_t ahead = (int64_t)((uint32_t)i / t.splits), tile = s.first_tile + ahead;
        const int64_t begin = tile * t.tile_columns;
        const int64_t feature = t.feature_of(begin > s.first_column ? begin : s.first_column);
        const int64_t split = (uint32_t)i % t.splits, at = (tile + feature) * t.splits + split;
        /* Only where offsets decrease: the run belongs to another seed, or was never written. */
        if (p.in.owner[feature] != s.index) return;
        const double2 part = p.in.sums[at];
        sum.a += part.x;
        sum.b += part.y;
        sum.c += p.in.nonfinite[at];
    }
    __device__ __forceinline__ void close(seed &s, const sum3 &sum) const
    {
        const kasmina_moments batch = kasmina_shifted_moments(s.numbers - sum.c, s.shift, sum.a, sum.b);
        kasmina_accumulate(s.telemetry, batch, 1.0, sum.c);
#pragma unroll
        for (int i = 0; i < KASMINA_TELEMETRY_COLUMNS; ++i)
            p.telemetry[s.index * KASMINA_TELEMETRY_COLUMNS + i] = s.telemetry[i];
    }
};

__global__ void __launch_bounds__(BLOCK) merge_kernel(const __grid_constant__ merge_params p)
{
    for_each_seed(merge_job{p}, p.table.seeds.chunks.count, p.lanes);
}

/* ---- Launching ---- */

bool collects(const kasmina_forward_args *args)
{
    return args->telemetry != NULL && args->seeds.chunks.count > 0;
}

/* Where the partial sums lie in the workspace; returns how long it must be. */
size_t place_partials(const tiling &t, void *workspace, partials *parts)
{
    const int64_t count = t.slots * t.splits;
    const size_t sums = padded(count * (int64_t)sizeof(double2));
    const size_t nonfinite = padded(count * (int64_t)sizeof(uint32_t));
    unsigned char *base = (unsigned char *)workspace;
    parts->sums = (double2 *)base;
    parts->nonfinite = (uint32_t *)(base + sums);
    parts->owner = (int32_t *)(base + sums + nonfinite);
    return sums + nonfinite + padded(t.features * (int64_t)sizeof(int32_t));
}

template <kasmina_dtype D> cudaError_t launch_forward(const forward_params &params, bool collect, void *stream)
{
    constexpr int vec = VECTOR_BYTES / element_size(D);
    const tiling &t = params.tiles;
    const bool aligned = is_aligned(t, params.x, vec) && is_aligned(t, params.y, vec);
    const size_t shared = forward_shared_bytes(t, vec, sizeof(typename element<D>::wide), collect);
    void (*kernel)(forward_params) = aligned
                                         ? (collect ? forward_kernel<D, false, true> : forward_kernel<D, false, false>)
                                         : (collect ? forward_kernel<D, true, true> : forward_kernel<D, true, false>);
    return launch(kernel, params, (int64_t)t.tiles * t.splits, t.threads(), shared, stream, false);
}

cudaError_t launch_forward(kasmina_dtype dtype, const forward_params &params, bool collect, void *stream)
{
    switch (dtype) {
    case KASMINA_FLOAT32: return launch_forward<KASMINA_FLOAT32>(params, collect, stream);
    case KASMINA_FLOAT64: return launch_forward<KASMINA_FLOAT64>(params, collect, stream);
    case KASMINA_BFLOAT16: return launch_forward<KASMINA_BFLOAT16>(params, collect, stream);
    case KASMINA_FLOAT16: return launch_forward<KASMINA_FLOAT16>(params, collect, stream);
    }
    return cudaErrorInvalidValue;
}

cudaError_t launch_merge(const kasmina_forward_args *args, const forward_params &forward, bool dependent, void *stream)
{
    const tiling &t = forward.tiles;
    const int64_t seeds = args->seeds.chunks.count;
    merge_params params = {t, forward.table, forward.out, args->x, args->dtype, 0.0, args->telemetry, 1};
    params.numbers_per_feature = (double)args->layout.outer * (double)args->layout.inner;
    /* Tiles that a seed of the average size meets, each with its splits. */
    params.lanes = lanes_for((1 + t.columns / seeds / t.tile_columns) * t.splits);
    return launch(merge_kernel, params, ceil_div(seeds, BLOCK / params.lanes), BLOCK, 0, stream, dependent);
}

} /* namespace */

/* 0 where no statistics are asked for, and where CUDA fails (the launch then says why). */
size_t kasmina_forward_workspace_cuda(const kasmina_forward_args *args)
{
    kasmina_cuda_device device;
    tiling t;
    partials unused;
    if (!collects(args) || kasmina_cuda_current_device(&device) != cudaSuccess) return 0;
    if (!make_tiling(&t, args->layout, args->dtype, device.multiprocessors)) return 0;
    return place_partials(t, NULL, &unused);
}

/* The arguments as in kernels.h. Returns 0 or a cudaError_t; telemetry is complete when `stream` is. */
int kasmina_chunked_forward_cuda(const kasmina_forward_args *args, void *stream)
{
    const bool collect = collects(args);
    if (!args->y && !collect) return 0;
    kasmina_cuda_device device;
    cudaError_t error = kasmina_cuda_current_device(&device);
    if (error != cudaSuccess) return error;

    forward_params params = {};
    if (!make_tiling(&params.tiles, args->layout, args->dtype, device.multiprocessors) ||
        args->seeds.chunks.count > INT32_MAX)
        return cudaErrorInvalidConfiguration;
    params.table = make_seed_table(args->seeds, args->layout.features);
    params.x = args->x;
    params.y = args->y;
    if (collect) (void)place_partials(params.tiles, args->workspace, &params.out);
    error = launch_forward(args->dtype, params, collect, stream);
    if (error != cudaSuccess || !collect) return error;
    return launch_merge(args, params, device.dependent_launch, stream);
}
