/*
 * The pass over two tensors (x, t) of one layout that leaves sums: how the pairs are dealt to blocks and threads, and
 * the loop that loads them.
 *
 *   small inner   a block works on adjacent columns of memory, of whatever features; a unit is a row of them.
 *   large inner   a block works on one feature; a unit is a piece of one of its planes.
 *
 * A thread keeps VEC adjacent columns and takes every `walkers`-th unit. Vectors are one load each where the arrays'
 * starts and lengths allow it, else a load an element. The shape decides which thread sums what; in
 * which groups it does, the alignment, too.
 */
#ifndef KASMINA_CUDA_PAIR_STREAM_CUH
#define KASMINA_CUDA_PAIR_STREAM_CUH

#include <type_traits>

#include "kernels.h"
#include "cuda/elements.cuh"
#include "cuda/launch.cuh"
#include "cuda/tiling.cuh"

namespace kasmina
{

/* Planes from here on are read by a block each. */
constexpr int64_t LEAST_PLANE = 64;
/* Fewer lanes side by side leave too many walkers to the one thread that adds up a column. */
constexpr int LEAST_LANES_LOG2 = 3;
/* Fewer units are not worth a thread's start. */
constexpr int64_t LEAST_UNITS = 4;
/* How full the last wave of blocks must be for the search of a split to stop, and its longest search. */
constexpr double NEARLY_FULL = 0.9;
constexpr int64_t MOST_TRIES = 16;

/* Columns of a thread: six sums in float64 for each must fit its registers. */
__host__ __device__ constexpr int pair_columns(kasmina_dtype dtype)
{
    return dtype == KASMINA_FLOAT64 ? 2 : 4;
}

struct pair_plan {
    kasmina_layout layout;
    int64_t columns;    /* features * inner */
    int64_t parts;      /* what each split leaves sums for: columns, or features where blocks work on planes */
    int64_t units;      /* of a block's columns, in all splits */
    int64_t per_split;  /* units */
    int64_t step, wrap; /* to a thread's next unit: elements forward, and more at a plane's end */
    uint32_t tiles, splits;
    int32_t tile;       /* columns of a block, or elements of a piece */
    int32_t lanes_log2; /* threads side by side */
    int32_t pieces;     /* of a plane; 1 where blocks work on columns */
    int32_t piece_step; /* from a thread's unit to its next */
    bool planes;

    __host__ __device__ int walkers() const
    {
        return BLOCK >> lanes_log2;
    }
    /* Whether a vector of each array can be loaded as a whole. */
    bool vectors_of(kasmina_dtype dtype, const void *x, const void *t) const
    {
        const int vec = pair_columns(dtype);
        const uintptr_t places = (uintptr_t)x | (uintptr_t)t;
        return places % (vec * element_size(dtype)) == 0 && (planes ? layout.inner : columns) % vec == 0;
    }
};

/* In how many parts to cut the units: the fewest with which whole waves of blocks all but fill the device. */
static inline int64_t split_units(const pair_plan &p, int64_t tiles, int64_t blocks_at_once, int64_t most_rows)
{
    const int64_t one_wave = (int64_t)(NEARLY_FULL * (double)blocks_at_once / (double)tiles);
    const int64_t first = most(most(one_wave, 1), ceil_div(p.units, most_rows * p.walkers()));
    const int64_t last = ceil_div(p.units, LEAST_UNITS * p.walkers());
    if (first >= last) return last;
    int64_t best = first;
    double best_fill = 0.0;
    for (int64_t splits = first; splits <= least(last, first + MOST_TRIES) && best_fill < NEARLY_FULL; ++splits) {
        const int64_t blocks = tiles * splits;
        const double fill = (double)blocks / (double)(ceil_div(blocks, blocks_at_once) * blocks_at_once);
        if (fill > best_fill) best = splits, best_fill = fill;
    }
    return best;
}

/*
 * For a device that holds so many blocks at once; no thread takes more than `most_rows` units. False where the grid
 * would be too large.
 */
static inline bool make_pair_plan(pair_plan *p, kasmina_layout layout, kasmina_dtype dtype, int64_t blocks_at_once,
                                  int64_t most_rows)
{
    const int64_t vec = pair_columns(dtype), columns = layout.features * layout.inner;
    p->layout = layout;
    p->columns = columns;
    p->planes = layout.inner >= LEAST_PLANE;
    const int64_t across = p->planes ? layout.inner : columns;
    p->lanes_log2 = (int)most(LEAST_LANES_LOG2, least(ceil_log2(WARP), ceil_log2(ceil_div(across, vec))));
    p->tile = (int32_t)(vec << p->lanes_log2);
    p->parts = p->planes ? layout.features : columns;
    const int64_t tiles = p->planes ? layout.features : ceil_div(columns, p->tile);
    const int64_t pieces = p->planes ? ceil_div(layout.inner, p->tile) : 1;
    p->units = layout.outer * pieces;
    const int64_t wanted = split_units(*p, tiles, blocks_at_once, most_rows);
    p->per_split = ceil_div(ceil_div(p->units, wanted), p->walkers()) * p->walkers();
    const int64_t splits = ceil_div(p->units, p->per_split);
    p->pieces = (int32_t)pieces;
    p->piece_step = (int32_t)(p->walkers() % pieces);
    p->step = p->walkers() / pieces * columns + p->piece_step * p->tile;
    p->wrap = columns - pieces * p->tile;
    p->tiles = (uint32_t)tiles;
    p->splits = (uint32_t)splits;
    return tiles <= INT32_MAX && tiles * splits <= INT32_MAX && pieces <= INT32_MAX / 2 &&
           p->per_split / p->walkers() <= INT32_MAX / 2;
}

/* What a block and a thread of it work on. */
struct pair_place {
    int64_t first;        /* the block's first column in the first outer row */
    int64_t begin;        /* the thread's first unit */
    uint32_t tile, split; /* where blocks work on planes the tile is the feature */
    int left;             /* units of the thread */
    int column;           /* the thread's first, in the block's */
    int rest;             /* columns that exist, in a plane's last piece */

    __device__ __forceinline__ explicit pair_place(const pair_plan &p)
    {
        tile = blockIdx.x % p.tiles;
        split = blockIdx.x / p.tiles;
        first = p.planes ? tile * p.layout.inner : (int64_t)tile * p.tile;
        rest = p.planes ? (int)(p.layout.inner - (int64_t)(p.pieces - 1) * p.tile)
                        : (int)min((int64_t)p.tile, p.columns - first);
        const int lanes = 1 << p.lanes_log2, walkers_log2 = 31 - __clz(p.walkers());
        column = ((int)threadIdx.x & (lanes - 1)) * (p.tile >> p.lanes_log2);
        const int64_t start = (int64_t)split * p.per_split, level = (int)threadIdx.x >> p.lanes_log2;
        begin = start + level;
        const int64_t units = min(start + p.per_split, p.units) - begin;
        left = units > 0 ? (int)((units + p.walkers() - 1) >> walkers_log2) : 0;
    }
    /* Whether the block's column c exists, and which feature's it is; a plane's block has one for all. */
    __device__ __forceinline__ bool exists(const pair_plan &p, int c) const
    {
        return p.planes || c < rest;
    }
    __device__ __forceinline__ int64_t feature(const pair_plan &p, int c) const
    {
        if (p.planes) return tile;
        return p.layout.inner == 1 ? first + c : (first + c) / p.layout.inner;
    }
};

/* Registers of a vector of so many elements, or of so many elements one by one. */
__host__ __device__ constexpr int vector_registers(kasmina_dtype dtype, bool whole, int elements)
{
    const int size = element_size(dtype);
    return elements * (whole || size > 4 ? size : 4) / 4;
}

/* Pairs of ROWS units on their way to a thread that has VEC columns. WHOLE: see pair_plan::vectors_of. */
template <kasmina_dtype D, bool WHOLE, int VEC, int ROWS> struct pair_batch {
    using raw = typename std::conditional<WHOLE, uint32_t, typename element<D>::bits>::type;
    static constexpr int RAWS = WHOLE ? vector_registers(D, true, VEC) : VEC;

    raw x[ROWS][RAWS], t[ROWS][RAWS];
    int room[ROWS]; /* elements of a unit from the thread's first on; not above 0: none */

    using wide = typename element<D>::wide;
    __device__ __forceinline__ wide x_of(int k, int j) const
    {
        return value(x[k], j);
    }
    __device__ __forceinline__ wide t_of(int k, int j) const
    {
        return value(t[k], j);
    }
    /* body(k, has): the k-th unit, if it exists; has(j): its j-th pair does. FULL: all exist. */
    template <bool FULL, typename Body> __device__ __forceinline__ void each(const Body &body) const
    {
#pragma unroll
        for (int k = 0; k < ROWS; ++k)
            if (FULL || room[k] > 0) body(k, [&](int j) { return FULL || WHOLE || room[k] > j; });
    }

  private:
    using bits = typename element<D>::bits;
    static __device__ __forceinline__ wide value(const raw (&v)[RAWS], int j)
    {
        if constexpr (!WHOLE)
            return element<D>::value(v[j]);
        else if constexpr (sizeof(bits) == 2)
            return element<D>::value((bits)(v[j / 2] >> j % 2 * 16));
        else if constexpr (sizeof(bits) == 4)
            return element<D>::value(v[j]);
        else
            return element<D>::value(v[2 * j] | (uint64_t)v[2 * j + 1] << 32);
    }
};

/*
 * A thread's way through its units, and the loads. Two batches of BYTES are under way where one can be loaded while the
 * other is added, else one of as many registers.
 */
template <kasmina_dtype D, bool WHOLE, int BYTES, int VEC = pair_columns(D)> struct pair_rows {
    using bits = typename element<D>::bits;
    static constexpr int ROWS = BYTES / (2 * 4 * vector_registers(D, WHOLE, VEC));
    using batch = pair_batch<D, WHOLE, VEC, ROWS>;
    using long_batch = pair_batch<D, WHOLE, VEC, 2 * ROWS>;

    const bits *x, *t;
    int piece, left, column, rest;

    __device__ __forceinline__ pair_rows(const pair_plan &p, const pair_place &here, const void *x0, const void *t0)
        : piece(0), left(here.left), column(here.column), rest(here.rest)
    {
        int64_t outer = here.begin;
        if (p.pieces > 1) outer = here.begin / p.pieces, piece = (int)(here.begin - outer * p.pieces);
        const int64_t at = here.first + outer * p.columns + (int64_t)piece * p.tile + column;
        x = (const bits *)x0 + at;
        t = (const bits *)t0 + at;
    }
    /* Whether the next units exist, with all their pairs, and lie the same step apart. */
    __device__ __forceinline__ bool full(const pair_plan &p) const
    {
        return WHOLE && left >= ROWS && p.pieces == 1 && rest > column;
    }
    /* Load the next units. FULL: what full() says holds. */
    template <bool FULL, int UNITS>
    __device__ __forceinline__ void next(const pair_plan &p, pair_batch<D, WHOLE, VEC, UNITS> &to)
    {
#pragma unroll
        for (int k = 0; k < UNITS; ++k) {
            to.room[k] = FULL ? VEC : k < left ? (piece < p.pieces - 1 ? p.tile : rest) - column : 0;
            load(x, to.room[k], to.x[k]);
            load(t, to.room[k], to.t[k]);
            x += p.step;
            t += p.step;
            if (FULL || p.pieces == 1) continue; /* before five selections, which this branch costs less than */
            piece += p.piece_step;
            if (piece >= p.pieces) piece -= p.pieces, x += p.wrap, t += p.wrap;
        }
        left -= UNITS;
    }
    /* add(batch, whether it is full) for all units. */
    template <typename Add> __device__ __forceinline__ void for_each(const pair_plan &p, const Add &add)
    {
        if (full(p)) {
            batch first, second;
            next<true>(p, first);
#pragma unroll 1
            for (;;) {
                if (!full(p)) {
                    add(first, std::true_type());
                    break;
                }
                next<true>(p, second);
                add(first, std::true_type());
                if (!full(p)) {
                    add(second, std::true_type());
                    break;
                }
                next<true>(p, first);
                add(second, std::true_type());
            }
        }
#pragma unroll 1
        while (left > 0) {
            long_batch rest_of;
            next<false>(p, rest_of);
            add(rest_of, std::false_type());
        }
    }

  private:
    template <typename raw, int RAWS>
    static __device__ __forceinline__ void load(const bits *from, int room, raw (&v)[RAWS])
    {
        if constexpr (!WHOLE) {
#pragma unroll
            for (int j = 0; j < VEC; ++j)
                if (room > j) v[j] = __ldg(from + j);
        } else if constexpr (RAWS == 2) {
            if (room <= 0) return;
            const uint2 w = __ldg((const uint2 *)from);
            v[0] = w.x, v[1] = w.y;
        } else {
            if (room <= 0) return;
            const uint4 w = __ldg((const uint4 *)from);
            v[0] = w.x, v[1] = w.y, v[2] = w.z, v[3] = w.w;
        }
    }
};

/*
 * N sums of each of the block's columns over its walkers: thread c gets those of column c, the others 0. `room` has
 * N * BLOCK * VEC elements; all threads call this.
 */
template <int N, int VEC, typename T>
__device__ __forceinline__ void add_walkers(const pair_plan &p, T *room, const T (&of_thread)[N][VEC],
                                            double (&of_column)[N])
{
    const int lanes = 1 << p.lanes_log2, tid = (int)threadIdx.x;
    __syncthreads(); /* whoever read it before is done */
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int j = 0; j < VEC; ++j)
            room[n * BLOCK * VEC + (((tid >> p.lanes_log2) * VEC + j) << p.lanes_log2) + (tid & (lanes - 1))] =
                of_thread[n][j];
        of_column[n] = 0.0;
    }
    __syncthreads();
    if (tid >= p.tile) return;
    const T *mine = room + (tid % VEC << p.lanes_log2) + tid / VEC;
#pragma unroll 4
    for (int w = 0; w < p.walkers(); ++w) {
#pragma unroll
        for (int n = 0; n < N; ++n) of_column[n] += (double)mine[n * BLOCK * VEC + (w * VEC << p.lanes_log2)];
    }
}

/* N sums over the block, for thread 0. All threads call this. */
template <int N> __device__ __forceinline__ void add_block(double (&sums)[N])
{
    __shared__ double warps[BLOCK / WARP][N];
#pragma unroll
    for (int n = 0; n < N; ++n)
        for (int distance = WARP / 2; distance > 0; distance /= 2)
            sums[n] += __shfl_xor_sync(0xffffffffu, sums[n], distance);
    __syncthreads();
#pragma unroll
    for (int n = 0; n < N; ++n)
        if (threadIdx.x % WARP == 0) warps[threadIdx.x / WARP][n] = sums[n];
    __syncthreads();
    for (int w = 1; w < BLOCK / WARP; ++w) {
#pragma unroll
        for (int n = 0; n < N; ++n) sums[n] += warps[w][n];
    }
}

} /* namespace kasmina */

#endif
