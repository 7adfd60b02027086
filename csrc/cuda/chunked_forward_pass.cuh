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
 * Time over that of a device copy, on an H200, by blocks a multiprocessor x waves of blocks:
 *
 *                                            with sums               without
 *                                        2 x 1  2 x 2  2 x 3    3 x 4  2 x 2  3 x 1
 *    8192 x 4096 bfloat16, 512 seeds      1.35   1.42   1.56     1.15   1.15   1.16
 *   16384 x 8192 bfloat16, 1024 seeds     1.18   1.16   1.16     1.08   1.12   1.12
 *   16384 x 4096 float32, 1024 seeds      1.15   1.14   1.13     1.06   1.10   1.11
 *   16384 x 8192 float16, 8192 seeds      1.18   1.21   1.28     1.08
 *   32768 x 4095 bfloat16, 512 seeds      1.59   1.44   1.36     1.28
 *
 * A block that sums puts its sums away, so one wave is best; without sums a block costs little, and more of them end
 * more evenly. Where tiles are staggered those at the edges take longer, and the others fill the gap. Three blocks that
 * sum leave a thread 80 registers: its sums spill, and the first case takes 1.81.
 */
constexpr int FORWARD_ROWS = 2;
constexpr int FORWARD_STAGES = 4;

constexpr int forward_blocks_per_sm(bool collect)
{
    return collect ? 2 : 3;
}

constexpr int forward_waves(bool collect, bool staggered)
{
    return !collect ? 4 : staggered ? 3 : 1;
}

/* After so many rows a thread's sums move to float64. Two rows are added first: the error of 32 + 2 additions is ~1e-6. */
constexpr int FORWARD_GROUP = 64;

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
    int threads;  /* see PASS_THREADS */
};

/* ---- A block's shared memory ---- */

template <kasmina_dtype D> struct forward_tables {
    using T = typename element<D>::wide;
    using bits = typename element<D>::bits;
    using ring = row_ring<D, 1, FORWARD_ROWS, FORWARD_STAGES>;
    static constexpr int VEC = walker<D>::VEC;

    unsigned char *rows; /* the ring */
    thread_sums<VEC> parts;
    tile_sums sums;
    block_place *place;
    T *shift; /* [width] K */
    coefficient_table<T> blend;

    static constexpr size_t bytes(int width, int threads, int pass_threads, bool collect)
    {
        const size_t sums = (size_t)(threads * VEC + (width > threads ? width : threads)) * sizeof(double2);
        const size_t blend_bytes = (size_t)width * (2 * sizeof(T) + sizeof(uint32_t));
        return ring::bytes(pass_threads) + sizeof(block_place) + blend_bytes +
               (collect ? sums + (size_t)width * (sizeof(T) + sizeof(int32_t) + sizeof(uint32_t)) : 0);
    }
    static size_t total_bytes(const tiling &t, int pass_threads, bool collect)
    {
        static_assert(bytes(MAX_LANES * VEC, BLOCK / 2, BLOCK / 2, true) <= LEAST_SHARED_BYTES, "older GPUs");
        return bytes(t.width, t.threads(), pass_threads, collect);
    }
    __device__ __forceinline__ forward_tables(const tiling &t, bool collect)
    {
        shared_carver shared;
        rows = shared.take<unsigned char>(ring::BYTES);
        if (collect) parts.places = shared.take<double2>(thread_sums<VEC>::count(t));
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
        if (threadIdx.x == 0) *place = here; /* for the rare paths: not in registers all the way */
        if (collect) clear_sums(t, sums, parts);
        for (int c = (int)threadIdx.x; c < t.width; c += t.threads()) {
            const int64_t column = here.origin + c;
            const bool exists = here.exists(c);
            const int64_t feature = exists ? t.feature_of(column) : 0;
            owner_blend found = {UNOWNED, {}};
            if (exists) found = find_blend(p.table, feature);
            bits first = 0; /* the seed's first element, loaded while the blend is looked up */
            if (collect && found.seed != UNOWNED)
                first = __ldg((const bits *)p.x + range_of(p.table, found.seed).first * t.inner);
            blend.fill(p.table, c, found.blend, feature);
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
    vector_bits any;    /* of all the numbers, the bits that are set in one: 0 where there were zeros only */
    int seen = 0;       /* rows */
    unsigned again = 0; /* a bit for each column that must be walked again */

    __device__ __forceinline__ column_sums()
    {
#pragma unroll
        for (int j = 0; j < VEC; ++j) s1[j] = s2[j] = (T)0;
#pragma unroll
        for (int i = 0; i < VECTOR_WORDS; ++i) k[i] = any[i] = 0;
    }
    /*
     * The first `count` of these rows of the thread. Elements without a bit in `mask` do not count: like rows that are
     * not there they become k, which differs from itself by nothing.
     */
    template <bool PLAIN, int ROWS>
    __device__ __forceinline__ void add(vector_bits (&rows)[ROWS], int count, unsigned mask)
    {
        seen += PLAIN ? ROWS : count;
        if (!PLAIN && (mask != way::ALL || count < ROWS)) {
#pragma unroll
            for (int i = 0; i < ROWS; ++i) {
                vector_bits counts;
                element_mask<VEC>(i < count ? mask : 0u, counts);
                replace_elements(counts, k, rows[i]);
            }
        }
        T about[VEC], value[ROWS][VEC];
        opaque(k); /* decoded anew each time: there are no registers to keep it so */
        element<D>::decode(k, about);
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
            element<D>::decode(rows[i], value[i]);
#pragma unroll
            for (int w = 0; VEC > 2 && w < VECTOR_WORDS; ++w) any[w] |= rows[i][w];
        }
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
    /*
     * Whether a column's squares are too small for float32. Zeros alone are not; where the sums are 0 but
     * not all numbers were, tiny ones may have cancelled each other.
     */
    __device__ __forceinline__ bool vanished(T about, bool zeros, int j) const
    {
        if (sizeof(T) == sizeof(double) || s2[j] >= (T)LEAST_SQUARES) return false;
        return s1[j] != (T)0 || s2[j] != (T)0 || !(zeros || fabs(about) >= (T)LEAST_CERTAIN);
    }
    /* The sums move to float64, about the shift that the seed shares, and begin anew. */
    __device__ __forceinline__ void put_away(const tiling &t, const tables &to)
    {
        unsigned nonzero = 0;
        if constexpr (VEC > 2) nonzero = nonzero_elements<VEC>(any);
        T about[VEC];
        element<D>::decode(k, about);
#pragma unroll
        for (int j = 0; j < VEC; ++j) {
            const bool good = is_finite(s2[j]) && !vanished(about[j], !(nonzero >> j & 1u), j);
            if (!good) again |= 1u << j;
            const double up = (double)about[j] - (double)to.shift[way::column(t, j)];
            const double moved = fused((double)seen, up, (double)s1[j]);
            double2 &part = to.parts.of(t, way::level(t), way::lane(t), j);
            double2 sum = part;
            sum.x += moved;
            sum.y += fused(up, moved + (double)s1[j], (double)s2[j]);
            part = again >> j & 1u ? make_double2(0.0, 0.0) : sum;
            s1[j] = s2[j] = (T)0;
        }
#pragma unroll
        for (int i = 0; i < VECTOR_WORDS; ++i) any[i] = 0;
        seen = 0;
    }
};

/* The thread's columns with a bit in `again`, in float64, without what is not finite. All of the block call this. */
template <kasmina_dtype D> __device__ __noinline__ void walk_again(const forward_params &p, unsigned again)
{
    using way = walker<D>;
    using bits = typename element<D>::bits;
    const tiling &t = p.tiles;
    const forward_tables<D> tables(t, true);
    add_walked<D>(t, tables.sums, again, [&](int j) {
        const int c = way::column(t, j);
        const double shift = (double)tables.shift[c];
        double2 sum = make_double2(0.0, 0.0);
        uint32_t nonfinite = 0;
        way::revisit(t, *tables.place, j, [&](int64_t index) {
            const double number = (double)element<D>::value(__ldg((const bits *)p.x + index)), d = number - shift;
            if (is_finite(number))
                sum.x += d, sum.y = fused(d, d, sum.y);
            else
                ++nonfinite;
        });
        /* Integers: the order of the threads does not matter. */
        if (nonfinite) atomicAdd(&tables.sums.count[c], nonfinite);
        return sum;
    });
}

/* ---- The kernel ---- */

/* A thread's coefficients, and what they do to a vector. */
template <kasmina_dtype D> struct column_blend {
    using T = typename element<D>::wide;
    using way = walker<D>;
    static constexpr int VEC = way::VEC;

    T a[VEC], b[VEC];
    vector_bits grafted; /* a mask */

    __device__ __forceinline__ void load(const tiling &t, const coefficient_table<T> &table)
    {
        unsigned found = 0;
#pragma unroll
        for (int j = 0; j < VEC; ++j) {
            const int c = way::column(t, j);
            a[j] = table.a[c];
            b[j] = table.b[c];
            found |= table.grafted[c] << j;
        }
        element_mask<VEC>(found, grafted);
    }
    /* Copied, not computed, where idle: a NaN keeps its payload. No branch: decoding serves the sums too. */
    __device__ __forceinline__ void apply(const vector_bits &raw, vector_bits &result) const
    {
        T value[VEC];
        element<D>::decode(raw, value);
#pragma unroll
        for (int j = 0; j < VEC; ++j) value[j] = add(multiply(a[j], value[j]), b[j]);
        element<D>::encode(value, result);
        replace_elements(grafted, raw, result);
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

    /* The rows of a group, or as many as whole turns have. EDGE: some of the block's vectors are not whole. */
    template <bool EDGE> __device__ __forceinline__ void walk_group(const forward_params &p)
    {
        const tiling &t = p.tiles;
        ring.template walk_turns<EDGE>(t, FORWARD_GROUP / ring.TURN, walk, (char *)p.y,
                                       [&](vector_bits(&rows)[1][ROWS], char *(&out)[ROWS]) {
#pragma unroll
                                           for (int i = 0; i < ROWS; ++i) {
                                               vector_bits result;
                                               blend.apply(rows[0][i], result);
                                               if (p.y) store_columns<EDGE>(out[i], result);
                                           }
                                           if constexpr (COLLECT) sums.template add<!EDGE>(rows[0], ROWS, walk.mask);
                                       });
    }
    /* The next rows, whatever they are. */
    __device__ __forceinline__ void round(const forward_params &p)
    {
        const tiling &t = p.tiles;
        const int count = min(walk.left, ROWS);
        vector_bits rows[1][ROWS];
        ring.next(t, count, rows);
#pragma unroll
        for (int i = 0; i < ROWS; ++i, walk.advance(t)) {
            if (!p.y || i >= count) continue;
            vector_bits result;
            blend.apply(rows[0][i], result);
            bits *to = (bits *)p.y + walk.at;
            if (misalignment(p.y) == 0)
                store_columns<true>(to, result);
            else
                store_elements(to, result, walk.mask);
        }
        if constexpr (COLLECT) sums.template add<false>(rows[0], count, walk.mask);
    }

  private:
    template <bool EDGE> __device__ __forceinline__ void store_columns(void *to, const vector_bits &vector) const
    {
        if (!EDGE || walk.mask == way::ALL)
            store_vector(to, vector);
        else
            store_elements((bits *)to, vector, walk.mask);
    }
};

template <kasmina_dtype D, bool COLLECT>
__global__ void __launch_bounds__(BLOCK, forward_blocks_per_sm(COLLECT))
    forward_kernel(const __grid_constant__ forward_params p)
{
    using way = walker<D>;
    using tables = forward_tables<D>; /* made anew where it is used: its pointers are too many for the loop */
    const tiling &t = p.tiles;
    const block_place here = block_place::here(t);
    const way first(t, here);
    wait_for_primary();
    allow_dependents();
    forward_walk<D, COLLECT> thread = {first, {t, first, tables(t, COLLECT).rows, &p.x, p.granules}};
    tables(t, COLLECT).fill(p, here, COLLECT); /* while the first rows are on their way */
    const bool edge = __syncthreads_or(first.mask != way::ALL && first.mask);

    if (first.mask) thread.blend.load(t, tables(t, COLLECT).blend);
    const bool turns = !t.plane && p.granules == 1 && misalignment(p.y) == 0;
#pragma unroll 1
    while (thread.walk.left > 0) {
        /* A group is 64 rows, whichever way they are walked: its bits do not depend on the alignment. */
        int rows = thread.walk.left;
        if constexpr (COLLECT) thread.ring.peek(0, thread.sums.k);
        if (turns && edge) thread.template walk_group<true>(p);
        if (turns && !edge) thread.template walk_group<false>(p);
        rows -= thread.walk.left;
#pragma unroll 1
        for (; rows < FORWARD_GROUP && thread.walk.left > 0; rows += thread.ROWS) thread.round(p);
        if constexpr (COLLECT) thread.sums.put_away(t, tables(t, COLLECT));
    }

    if constexpr (COLLECT) {
        const tables after(t, COLLECT);
        const unsigned again = thread.sums.again & thread.walk.mask;
        if (__syncthreads_or(again != 0)) walk_again<D>(p, again);
        reduce_tile(t, after.sums, after.parts, [&](int c, int32_t, double2 sum, uint32_t nonfinite) {
            const block_place &place = *after.place;
            const int64_t slot = t.slot_of(place.tile, t.feature_of(place.origin + c));
            const int64_t index = slot * t.splits + place.split;
            p.out.sums[index] = sum;
            p.out.nonfinite[index] = nonfinite;
        });
    }
}

} /* namespace kasmina */

#endif
