/*
 * How a tensor [outer, features, inner] is cut into tiles, tiles into row splits, and blocks into
 * threads; the same for the forward and the backward pass. It depends on the shape, the element size
 * and the number of multiprocessors only, so the same call gives the same bits.
 *
 * A row of memory has features * inner columns. Each thread keeps VEC columns and walks down rows:
 *
 *   small inner   a tile is `width` adjacent columns, of whatever features; rows are outer.
 *   large inner   a tile is one feature's plane, cut into chunks of `width`; rows are (outer, chunk),
 *                 so that one look-up of the feature serves many elements.
 *
 * A tile's sums go to slot tile + feature, one for each feature at which a run of equal owners
 * begins: from one run to the next, tile or feature grows, so no two runs share a slot.
 */
#ifndef KASMINA_CUDA_TILING_CUH
#define KASMINA_CUDA_TILING_CUH

#include "kernels.h"
#include "cuda/elements.cuh"

namespace kasmina
{

/* Eight warps hide each other's prologue and epilogue, and share one look-up of the seeds. */
constexpr int BLOCK = 256;
/* 24 warps of 64 bytes a thread keep 48 KiB a multiprocessor in flight; 80 registers remain. */
constexpr int BLOCKS_PER_SM = 3;
/* Lanes side by side: a full warp reads 512 adjacent bytes. */
constexpr int MAX_LANES = 32;
/* Rows that a thread loads before it uses the first. */
constexpr int ROWS_IN_FLIGHT = 4;
/* Sums stay in float32 for so many rows, then move to float64: the error of 32 additions is ~1e-6. */
constexpr int GROUP_ROWS = 32;
/* Above so many waves of blocks the last, half-empty one no longer matters. */
constexpr int MANY_WAVES = 8;
/* How full the last wave must be for the search of a split to stop, and its longest search. */
constexpr double FULL_ENOUGH = 0.9;
constexpr int SPLIT_TRIES = 16;
/* Below so many outer rows a look-up per column does not pay, even where planes are not aligned. */
constexpr int FEW_ROWS = 32;

struct tiling {
    int64_t features, inner;
    int64_t columns;        /* features * inner: elements between one outer index and the next */
    int64_t tile_columns;   /* columns that a tile covers: width, or inner where it is a plane */
    int64_t rows;           /* outer, or outer * chunks */
    int64_t rows_per_split; /* a multiple of the walkers */
    int64_t slots;          /* tiles + features */
    int64_t step, wrap;     /* to a thread's next row: elements forward, and more at a plane's end */
    uint32_t tiles, splits; /* the grid is tiles * splits */
    int32_t width;          /* columns side by side: lanes * VEC */
    int32_t chunks;         /* of a plane, else 1 */
    int32_t chunk_step;     /* chunks from a thread's row to its next */
    int32_t lanes_log2;     /* threads side by side */
    int32_t walkers_log2;   /* threads one row below the other */

    __host__ __device__ int threads() const
    {
        return 1 << (lanes_log2 + walkers_log2);
    }
    __host__ __device__ int walkers() const
    {
        return 1 << walkers_log2;
    }
    __device__ __forceinline__ int64_t feature_of(int64_t column) const
    {
        return inner == 1 ? column : column / inner;
    }
};

/* ---- Host: cutting ---- */

static inline int64_t ceil_div(int64_t a, int64_t b)
{
    return (a + b - 1) / b;
}

static inline int ceil_log2(int64_t n)
{
    int log2 = 0;
    while ((int64_t)1 << log2 < n) ++log2;
    return log2;
}

static inline int64_t least(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

static inline int64_t most(int64_t a, int64_t b)
{
    return a > b ? a : b;
}

/* In how many parts to cut the rows so that whole waves of blocks fill the device. */
static inline int64_t choose_splits(int64_t tiles, int64_t max_splits, int64_t blocks_at_once)
{
    if (max_splits <= 1 || tiles >= MANY_WAVES * blocks_at_once) return 1;
    int64_t first = most(1, (int64_t)(FULL_ENOUGH * (double)blocks_at_once) / tiles);
    if (first >= max_splits) return max_splits;
    int64_t best = first;
    double best_fill = 0.0;
    for (int64_t splits = first; splits <= least(max_splits, first + SPLIT_TRIES); ++splits) {
        const int64_t blocks = tiles * splits, waves = ceil_div(blocks, blocks_at_once);
        const double fill = (double)blocks / (double)(waves * blocks_at_once);
        if (fill > best_fill) best = splits, best_fill = fill;
        if (fill >= FULL_ENOUGH) break;
    }
    return best;
}

/* False where the grid would be larger than CUDA allows, which takes more memory than there is. */
static inline bool make_tiling(tiling *t, kasmina_layout layout, kasmina_dtype dtype, int multiprocessors)
{
    const int vec = VECTOR_BYTES / element_size(dtype);
    const int64_t full_width = (int64_t)MAX_LANES * vec;
    const bool planes = layout.inner >= 2 * full_width && (layout.inner % vec == 0 || layout.outer < FEW_ROWS);
    t->features = layout.features;
    t->inner = layout.inner;
    t->columns = layout.features * layout.inner;
    t->lanes_log2 = ceil_log2(least(MAX_LANES, ceil_div(t->columns, vec)));
    t->width = vec << t->lanes_log2;
    t->tile_columns = planes ? layout.inner : t->width;
    const int64_t tiles = ceil_div(t->columns, t->tile_columns);
    const int64_t chunks = planes ? ceil_div(layout.inner, t->width) : 1;
    t->rows = layout.outer * chunks;

    const int most_log2 = ceil_log2(BLOCK) - t->lanes_log2;
    const int least_log2 = 5 - t->lanes_log2; /* a whole warp */
    const int wanted_log2 = ceil_log2(ceil_div(t->rows, ROWS_IN_FLIGHT));
    t->walkers_log2 = (int)most(least_log2, least(most_log2, wanted_log2));

    const int64_t at_once = (int64_t)multiprocessors * BLOCKS_PER_SM * BLOCK / t->threads();
    const int64_t max_splits = ceil_div(t->rows, (int64_t)ROWS_IN_FLIGHT << t->walkers_log2);
    const int64_t wanted = choose_splits(tiles, max_splits, at_once);
    t->rows_per_split = ceil_div(ceil_div(t->rows, wanted), t->walkers()) << t->walkers_log2;
    const int64_t splits = ceil_div(t->rows, t->rows_per_split);

    t->chunks = (int32_t)chunks;
    t->chunk_step = (int32_t)(t->walkers() % chunks);
    t->step = t->walkers() / chunks * t->columns + (int64_t)t->chunk_step * t->width;
    t->wrap = t->columns - chunks * t->width;
    t->tiles = (uint32_t)tiles;
    t->splits = (uint32_t)splits;
    t->slots = tiles + t->features;
    return tiles <= INT32_MAX && tiles * splits <= INT32_MAX && chunks <= INT32_MAX &&
           t->rows_per_split / t->walkers() <= INT32_MAX;
}

/* Whether every vector of the array starts at a multiple of 16 bytes. */
static inline bool is_aligned(const tiling &t, const void *array, int vec)
{
    const bool lines = t.columns % vec == 0 && t.tile_columns % vec == 0;
    return lines && (uintptr_t)array % VECTOR_BYTES == 0;
}

/* ---- Device ---- */

/* What a block works on. */
struct block_place {
    int64_t origin; /* first column of the tile */
    int64_t extent; /* columns that the tile has */
    uint32_t tile, split;

    __device__ __forceinline__ static block_place here(const tiling &t)
    {
        block_place place;
        place.tile = blockIdx.x % t.tiles;
        place.split = blockIdx.x / t.tiles;
        place.origin = (int64_t)place.tile * t.tile_columns;
        place.extent = min(t.tile_columns, t.columns - place.origin);
        return place;
    }
    /* The element at which a row of the tile begins, and the chunk that the row is. */
    __device__ __forceinline__ int64_t locate(const tiling &t, int64_t row, int &chunk) const
    {
        chunk = 0;
        if (t.chunks == 1) return origin + row * t.columns;
        const int64_t outer = row / t.chunks;
        chunk = (int)(row - outer * t.chunks);
        return origin + outer * t.columns + (int64_t)chunk * t.width;
    }
};

/* One thread's way down its columns. Only what every row needs is kept: registers are scarce. */
template <kasmina_dtype D, bool RAGGED> struct walker {
    using bits = typename element<D>::bits;
    static constexpr int VEC = VECTOR_BYTES / sizeof(bits);

    int64_t at; /* the thread's first element of its current row */
    int chunk;  /* of the current row */
    int left;   /* rows from the current one on; not above 0: there is no row */
    int last;   /* how many of its columns exist in the last chunk; in the others all do */

    __device__ __forceinline__ walker(const tiling &t, const block_place &place)
    {
        const int64_t rest = place.extent - (int64_t)(t.chunks - 1) * t.width - column(t, 0);
        if (rest <= 0)
            last = 0;
        else if (!RAGGED)
            last = VEC;
        else
            last = (int)min((int64_t)VEC, (rest + stride(t) - 1) >> t.lanes_log2);
        left = last == 0 && t.chunks == 1 ? 0 : count_rows(t, place);
        at = place.locate(t, first_row(t, place), chunk) + column(t, 0);
    }
    /* The thread's place in the block: across, down. */
    static __device__ __forceinline__ int lane(const tiling &t)
    {
        return (int)threadIdx.x & ((1 << t.lanes_log2) - 1);
    }
    static __device__ __forceinline__ int level(const tiling &t)
    {
        return (int)threadIdx.x >> t.lanes_log2;
    }
    static __device__ __forceinline__ int64_t first_row(const tiling &t, const block_place &place)
    {
        return (int64_t)place.split * t.rows_per_split + level(t);
    }
    static __device__ __forceinline__ int count_rows(const tiling &t, const block_place &place)
    {
        const int64_t end = min(t.rows, (int64_t)(place.split + 1) * t.rows_per_split);
        const int64_t rest = end - first_row(t, place) + t.walkers() - 1;
        return rest > 0 ? (int)(rest >> t.walkers_log2) : 0;
    }
    /* The thread's j-th column in the tile, and how far apart they lie. */
    static __device__ __forceinline__ int column(const tiling &t, int j)
    {
        return RAGGED ? (j << t.lanes_log2) + lane(t) : lane(t) * VEC + j;
    }
    static __device__ __forceinline__ int stride(const tiling &t)
    {
        return RAGGED ? 1 << t.lanes_log2 : 1;
    }
    /* Where in shared memory the thread keeps its j-th column: lanes side by side, no bank conflict. */
    static __device__ __forceinline__ int slot(const tiling &t, int j)
    {
        return ((level(t) * VEC + j) << t.lanes_log2) + lane(t);
    }
    /* How many of the thread's elements exist in its current row. */
    __device__ __forceinline__ int valid(const tiling &t) const
    {
        if (left <= 0) return 0;
        return chunk + 1 < t.chunks ? VEC : last;
    }
    __device__ __forceinline__ void advance(const tiling &t)
    {
        at += t.step;
        chunk += t.chunk_step;
        if (chunk >= t.chunks) chunk -= t.chunks, at += t.wrap;
        --left;
    }
    /* Load the rows from here on, as many as there are; *this stays where it is. */
    template <int ROWS>
    __device__ __forceinline__ void fetch(const tiling &t, const void *array, fetched<D, RAGGED> (&rows)[ROWS]) const
    {
        walker ahead = *this;
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
            rows[i].load((const bits *)array + ahead.at, ahead.valid(t), stride(t));
            ahead.advance(t);
        }
    }
    /*
     * Visit the thread's j-th column in the `rows` rows before the last `ahead` of its rows, one by
     * one: body(index of the element). For the rare cases that fast sums cannot handle.
     */
    template <typename Body>
    static __device__ __forceinline__ void revisit(const tiling &t, const block_place &place, int j, int ahead,
                                                   int rows, const Body &body)
    {
        const int64_t first = first_row(t, place);
        const int end = count_rows(t, place) - ahead;
        const int c = column(t, j);
#pragma unroll 1
        for (int i = end - rows; i < end; ++i) {
            int chunk;
            const int64_t start = place.locate(t, first + ((int64_t)i << t.walkers_log2), chunk);
            if ((int64_t)chunk * t.width + c < place.extent) body(start + c);
        }
    }
};

} /* namespace kasmina */

#endif
