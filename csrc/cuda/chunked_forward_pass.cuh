/*
 * The pass over x: y = blend(x), and the sums of x for each seed.
 *
 * Numbers of one column are summed in float32 as differences from a value k that the thread has just seen, pairs of
 * rows first, over no more rows than keep the error at ~1e-6; then in float64 about a shift K that the whole seed
 * shares: its first element. Sums about K simply add up, so blocks need no order among themselves. A column whose
 * squares overflow, vanish or meet a number that is not finite is walked again in float64.
 */
#ifndef KASMINA_CUDA_CHUNKED_FORWARD_PASS_CUH
#define KASMINA_CUDA_CHUNKED_FORWARD_PASS_CUH

#include "telemetry_math.h"
#include "cuda/reduce.cuh"
#include "cuda/row_ring.cuh"
#include "cuda/seeds.cuh"
#include "cuda/tiling.cuh"

namespace kasmina
{

/*
 * Time over that of a device copy, on an H200, by blocks a multiprocessor x stages, and waves of blocks:
 *
 *                                        3 x 4, 1   3 x 4, 3   3 x 6, 3   3 x 4, 6   4 x 3, 2 (spills)
 *    8192 x 4096 bfloat16, 512 seeds         1.57       1.73       1.78       2.43       2.06
 *   16384 x 8192 bfloat16, 1024 seeds        1.25       1.25       1.24       1.32       1.47
 *   16384 x 4096 float32, 1024 seeds         1.21       1.21       1.21       1.28       1.22
 *   65536 x 4096 bfloat16, 128 seeds         0.78       0.77       0.78       0.78       0.91
 *
 * More blocks end more evenly, but each puts its sums away. Four stages of two rows, and the tables, are no more shared
 * memory than need not be asked for.
 */
constexpr int FORWARD_BLOCKS_PER_SM = 3;
constexpr int FORWARD_ROWS = 2;
constexpr int FORWARD_STAGES = 4;
constexpr int FORWARD_WAVES_WITH_SUMS = 1;
/* Without sums a block costs little: 1.19, 1.08, 1.07 and 0.70 in four waves for the four sizes. */
constexpr int FORWARD_WAVES = 4;
/* Two rows are added first: the error of 32 + 2 additions is ~1e-6. */
constexpr int FORWARD_MOST_ROWS = 64;

/* Below, a sum of squares in float32 has lost digits to the smallest subnormal, 2^-149. */
constexpr float LEAST_SQUARES = 0x1p-120f;

/* From here on a float32 has no neighbour so near that the square of their difference is 0. */
constexpr float LEAST_CERTAIN = 0x1p-48f;

/* What the pass leaves for the merge. */
struct forward_partials {
    double2 *sums;       /* [slots, splits] sum (x - K), sum (x - K)^2 */
    uint32_t *nonfinite; /* [slots, splits] */
    int32_t *owner;      /* [features] the seed that was found for each */
};

struct forward_params {
    tiling tiles;
    seed_table table;
    forward_partials out;
    const void *x;
    void *y;
    int granules; /* see row_ring.cuh */
};

/* ---- A block's shared memory ---- */

template <kasmina_dtype D> struct forward_tables {
    using T = typename element<D>::wide;
    using bits = typename element<D>::bits;
    using ring = row_ring<D, 1, FORWARD_ROWS, FORWARD_STAGES>;
    static constexpr int VEC = walker<D>::VEC;

    unsigned char *rows; /* the ring; its memory then serves the four after it */
    T *s1, *s2;          /* [walkers][VEC][lanes] the threads' sums about their k */
    bits *k;             /* [threads][VEC] */
    int *seen;           /* [threads] rows that are in the sums */
    tile_sums sums;
    block_place *place;
    T *shift; /* [width] K */
    coefficient_table<T> blend;

    static __host__ __device__ __forceinline__ uint32_t rows_bytes(const tiling &t, int granules, bool collect)
    {
        const uint32_t sums = (uint32_t)t.threads() * (VEC * (2 * sizeof(T) + sizeof(bits)) + sizeof(int));
        const uint32_t ring_bytes = ring::bytes(t, granules);
        return collect && sums > ring_bytes ? sums : ring_bytes;
    }
    static size_t total_bytes(const tiling &t, int granules, bool collect)
    {
        const size_t width = (size_t)t.width, columns = sum_columns(t);
        const size_t blend_bytes = width * (2 * sizeof(T) + sizeof(uint32_t));
        return rows_bytes(t, granules, collect) + sizeof(block_place) + blend_bytes +
               (collect ? columns * sizeof(double2) + width * (sizeof(T) + sizeof(int32_t) + sizeof(uint32_t)) : 0);
    }
    __device__ __forceinline__ forward_tables(const tiling &t, int granules, bool collect)
    {
        shared_carver shared;
        rows = shared.take<unsigned char>((int)rows_bytes(t, granules, collect));
        s1 = (T *)rows;
        s2 = s1 + t.threads() * VEC;
        k = (bits *)(s2 + t.threads() * VEC);
        seen = (int *)(k + t.threads() * VEC);
        if (collect) sums.columns = shared.take<double2>(sum_columns(t));
        place = shared.take<block_place>(1);
        if (collect) shift = shared.take<T>(t.width);
        blend.a = shared.take<T>(t.width);
        blend.b = shared.take<T>(t.width);
        blend.grafted = shared.take<uint32_t>(t.width);
        if (collect) {
            sums.owner = shared.take<int32_t>(t.width);
            sums.count = shared.take<uint32_t>(t.width);
        }
    }
    /* Look a tile's features up, each by one thread. */
    __device__ __forceinline__ void fill(const forward_params &p, const block_place &here, bool collect) const
    {
        const tiling &t = p.tiles;
        for (int c = (int)threadIdx.x; c < t.width; c += t.threads()) {
            const int64_t column = here.origin + c;
            const bool exists = here.exists(c);
            const int64_t feature = exists ? t.feature_of(column) : 0;
            owner_blend found = {UNOWNED, {}};
            if (exists && p.y) found = find_blend(p.table, feature);
            if (exists && !p.y) found.seed = find_seed(p.table, feature); /* the states are not to be read */
            bits first = 0; /* the seed's first element, loaded while the blend is looked up */
            if (collect && found.seed != UNOWNED)
                first = __ldg((const bits *)p.x + range_of(p.table, found.seed).first * t.inner);
            if (p.y) blend.fill(p.table, c, found.blend, feature);
            if (collect) {
                shift[c] = (T)kasmina_origin((double)element<D>::value(first));
                sums.owner[c] = found.seed;
                sums.count[c] = 0;
                if (here.split == 0 && exists && column == feature * t.inner) p.out.owner[feature] = found.seed;
            }
        }
    }
};

/* ---- A thread's sums ---- */

template <kasmina_dtype D> struct column_sums {
    using T = typename element<D>::wide;
    using bits = typename element<D>::bits;
    using way = walker<D>;
    using tables = forward_tables<D>;
    static constexpr int VEC = way::VEC;

    T s1[VEC], s2[VEC]; /* about k */
    vector_bits k;
    int seen = 0;       /* rows */
    unsigned quiet = 0; /* a bit for each column that has only been 0 */

    __device__ __forceinline__ column_sums()
    {
#pragma unroll
        for (int j = 0; j < VEC; ++j) s1[j] = s2[j] = (T)0;
        const vector_bits nothing = {};
        copy_vector(nothing, k);
    }
    /*
     * The first `count` of these rows of the thread. Elements without a bit in `mask` do not count: like rows that are
     * not there they become k, which differs from itself by nothing.
     */
    template <bool PLAIN, int ROWS>
    __device__ __forceinline__ void add(vector_bits (&rows)[ROWS], int count, unsigned mask)
    {
        if (seen == 0) {
            copy_vector(rows[0], k);
            if constexpr (VEC > 2) quiet = ~nonzero_elements<VEC>(k);
        }
        seen += PLAIN ? ROWS : count;
        if constexpr (VEC > 2) {
            if (quiet) listen(rows, PLAIN ? ROWS : count);
        }
        if (!PLAIN) {
#pragma unroll
            for (int i = 0; i < ROWS; ++i)
                to_vector(merge_elements<VEC>(i < count ? mask : 0u, from_vector(k), from_vector(rows[i])), rows[i]);
        }
        T about[VEC], value[ROWS][VEC];
        element<D>::decode(k, about);
#pragma unroll
        for (int i = 0; i < ROWS; ++i) element<D>::decode(rows[i], value[i]);
#pragma unroll
        for (int j = 0; j < VEC; ++j) {
            T sum = value[0][j] - about[j];
            T squares = sum * sum;
#pragma unroll
            for (int i = 1; i < ROWS; ++i) {
                const T d = value[i][j] - about[j];
                sum += d;
                squares = fused(d, d, squares);
            }
            s1[j] += sum;
            s2[j] += squares;
        }
    }
    /* Which columns are still quiet. One wrongly not so costs time only. */
    template <int ROWS> __device__ __forceinline__ void listen(const vector_bits (&rows)[ROWS], int count)
    {
#pragma unroll
        for (int i = 0; i < ROWS; ++i)
            if (i < count) quiet &= ~nonzero_elements<VEC>(rows[i]);
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
    /* Into shared memory, for the columns' threads. Returns a bit for each column that must be walked again. */
    __device__ __forceinline__ unsigned put_away(const tiling &t, const tables &to, unsigned mask)
    {
        unsigned again = 0;
        T about[VEC];
        element<D>::decode(k, about);
#pragma unroll
        for (int j = 0; j < VEC; ++j) {
            const bool good = seen == 0 || (is_finite(s2[j]) && !vanished(about[j], j));
            if (!good) again |= 1u << j;
            to.s1[way::slot(t, j)] = s1[j];
            to.s2[way::slot(t, j)] = good ? s2[j] : (T)-1; /* no sum of squares: left out */
        }
        *(uint4 *)(to.k + threadIdx.x * VEC) = make_uint4(k[0], k[1], k[2], k[3]);
        to.seen[threadIdx.x] = seen;
        return again & mask;
    }
};

/* A walker's sums of a column, about K, onto `sum`. */
template <kasmina_dtype D>
__device__ __forceinline__ void add_shifted(const tiling &t, const forward_tables<D> &from, int w, int v, double shift,
                                            double2 &sum)
{
    constexpr int VEC = walker<D>::VEC;
    const int lane = v / VEC, j = v % VEC, thread = (w << t.lanes_log2) + lane;
    const int slot = ((w * VEC + j) << t.lanes_log2) + lane;
    const double n = from.seen[thread], s1 = (double)from.s1[slot], s2 = (double)from.s2[slot];
    if (n == 0.0 || s2 < 0.0) return;
    const double up = (double)element<D>::value(from.k[thread * VEC + j]) - shift;
    const double moved = fused(n, up, s1);
    sum.x += moved;
    sum.y += fused(up, moved + s1, s2);
}

/* One of the thread's columns in float64, without what is not finite. */
template <kasmina_dtype D>
__device__ __forceinline__ double2 walk_again(const tiling &t, const forward_tables<D> &tables,
                                              const typename element<D>::bits *x, int j)
{
    using way = walker<D>;
    const int c = way::column(t, j);
    const double shift = (double)tables.shift[c];
    double2 sum = make_double2(0.0, 0.0);
    uint32_t nonfinite = 0;
    way::revisit(t, *tables.place, j, [&](int64_t index) {
        const double number = (double)element<D>::value(__ldg(x + index)), d = number - shift;
        if (is_finite(number))
            sum.x += d, sum.y = fused(d, d, sum.y);
        else
            ++nonfinite;
    });
    /* Integers: the order of the threads does not matter. */
    if (nonfinite) atomicAdd(&tables.sums.count[c], nonfinite);
    return sum;
}

/* ---- The kernel ---- */

/* A thread's coefficients, and what they do to a vector. */
template <kasmina_dtype D> struct column_blend {
    using T = typename element<D>::wide;
    using way = walker<D>;
    static constexpr int VEC = way::VEC;

    T a[VEC], b[VEC];
    unsigned grafted = 0; /* a bit for each column */

    __device__ __forceinline__ void load(const tiling &t, const coefficient_table<T> &table)
    {
#pragma unroll
        for (int j = 0; j < VEC; ++j) {
            const int c = way::column(t, j);
            a[j] = table.a[c];
            b[j] = table.b[c];
            grafted |= table.grafted[c] << j;
        }
    }
    /* Copied, not computed, where idle: a NaN keeps its payload. */
    __device__ __forceinline__ void apply(const vector_bits &raw, vector_bits &result) const
    {
        copy_vector(raw, result);
        if (!grafted) return;
        T value[VEC];
        element<D>::decode(raw, value);
#pragma unroll
        for (int j = 0; j < VEC; ++j) value[j] = add(multiply(a[j], value[j]), b[j]);
        element<D>::encode(value, result);
        if (grafted != way::ALL) to_vector(merge_elements<VEC>(grafted, from_vector(raw), from_vector(result)), result);
    }
};

/* What a thread carries from round to round. */
template <kasmina_dtype D, bool COLLECT> struct forward_walk {
    using way = walker<D>;
    using bits = typename element<D>::bits;
    static constexpr int ROWS = FORWARD_ROWS;

    way walk;
    typename forward_tables<D>::ring ring;
    column_blend<D> blend;
    column_sums<D> sums;

    /* The next ROWS rows. PLAIN: they are all there, their vectors whole and aligned. */
    template <bool PLAIN> __device__ __forceinline__ void round(const forward_params &p)
    {
        const tiling &t = p.tiles;
        const int count = PLAIN ? ROWS : min(walk.left, ROWS);
        vector_bits rows[ROWS] = {};
        ring.template next<PLAIN>(t);
#pragma unroll
        for (int i = 0; i < ROWS; ++i, walk.advance(t)) {
            if (!PLAIN && i >= count) continue;
            ring.template get<PLAIN>(t, i, 0, rows[i]);
            if (!p.y) continue;
            vector_bits result;
            blend.apply(rows[i], result);
            bits *to = (bits *)p.y + walk.at;
            if (PLAIN || (walk.mask == way::ALL && misalignment(p.y) == 0))
                store_vector(to, result);
            else
                store_elements(to, from_vector(result), walk.mask);
        }
        ring.pop(t);
        if constexpr (COLLECT) sums.template add<PLAIN>(rows, count, walk.mask);
    }
};

template <kasmina_dtype D, bool COLLECT>
__global__ void __launch_bounds__(BLOCK, FORWARD_BLOCKS_PER_SM) forward_kernel(const __grid_constant__ forward_params p)
{
    using way = walker<D>;
    if (COLLECT) allow_dependents();
    const tiling &t = p.tiles;
    const block_place here = block_place::here(t);
    const forward_tables<D> tables(t, p.granules, COLLECT);
    const way first(t, here);
    using ring = typename forward_tables<D>::ring;
    forward_walk<D, COLLECT> thread = {first, ring(t, first, tables.rows, &p.x, p.granules)};
    if (threadIdx.x == 0) *tables.place = here; /* for the rare paths: not in registers all the way */
    tables.fill(p, here, COLLECT);              /* while the first rows are on their way */
    if constexpr (COLLECT) clear_columns(t, tables.sums);
    __syncthreads();

    if (p.y && first.mask) thread.blend.load(t, tables.blend);
    if (thread.ring.plain && misalignment(p.y) == 0) {
#pragma unroll 1
        while (thread.walk.left >= FORWARD_ROWS) thread.template round<true>(p);
    }
#pragma unroll 1
    while (thread.walk.left > 0) thread.template round<false>(p);

    if constexpr (COLLECT) {
        __syncthreads(); /* the ring's memory is free */
        const unsigned again = thread.sums.put_away(t, tables, first.mask);
        if (__syncthreads_or(again != 0))
            add_walked<D>(t, tables.sums, again,
                          [&](int j) { return walk_again(t, tables, (const typename element<D>::bits *)p.x, j); });
        const auto add_walker = [&](int c, int w, int v, double2 &sum) {
            add_shifted(t, tables, w, v, (double)tables.shift[c], sum);
        };
        reduce_tile<way::VEC>(t, tables.sums, add_walker, [&](int c, int32_t, double2 sum, uint32_t nonfinite) {
            const block_place &place = *tables.place;
            const int64_t slot = t.slot_of(place.tile, t.feature_of(place.origin + c));
            const int64_t index = slot * t.splits + place.split;
            p.out.sums[index] = sum;
            p.out.nonfinite[index] = nonfinite;
        });
    }
}

} /* namespace kasmina */

#endif
