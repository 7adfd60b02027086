/*
 * How a tensor [outer, features, inner] is cut into tiles, tiles into row splits, and blocks into
 * threads; the same for the forward and the backward pass. It depends on the shape, the element size
 * and the number of multiprocessors only, so the same call gives the same bits.
 *
 * A row of memory has features * inner columns. Each thread keeps VEC columns and walks down rows:
 *
 *   small inner   a tile is adjacent columns, of whatever features; rows are outer.
 *   large inner   a tile is one feature's plane, so that one look-up serves many elements. The vectors of
 *                 all its planes, one after the other, are dealt to the threads; `lanes` of them are a row.
 *
 * Vectors begin at multiples of 16 bytes. Where rows do not (columns is no multiple of VEC), tiles are
 * staggered: each row of a tile begins up to VEC - 1 columns to the left, at its last such multiple.
 * Rows that are a multiple of VEC apart begin alike, and a thread walks only such rows: its columns
 * stay the same. At the ends of a row some of a vector's elements belong to another row.
 *
 * A tile's sums go to slot tile * (lead + 1) + feature, one for each feature at which a run of equal
 * owners begins: from one run to the next, tile or feature grows, so no two runs share a slot.
 */
#ifndef KASMINA_CUDA_TILING_CUH
#define KASMINA_CUDA_TILING_CUH

#include "kernels.h"
#include "cuda/elements.cuh"
#include "cuda/launch.cuh"

namespace kasmina
{

constexpr int WARP = 32;
/* Eight warps hide each other's prologue and epilogue, and share one look-up of the seeds. */
constexpr int BLOCK = 256;
/*
 * Threads of a block of the passes over tensors. Half as many where a block may have no more than 64 (sm_75) or 99 KiB of
 * shared memory (sm_86, sm_89, which run the image of sm_80, and sm_120): the largest of ours then takes 57 KiB.
 */
__host__ __device__ constexpr int pass_threads(int architecture)
{
    return architecture >= 90 && architecture < 120 ? BLOCK : BLOCK / 2;
}

#ifdef __CUDA_ARCH__
constexpr int PASS_THREADS = pass_threads(__CUDA_ARCH__ / 10);
#else
constexpr int PASS_THREADS = BLOCK; /* the host goes by kasmina_cuda_device */
#endif

/* Lanes side by side: a full warp reads 512 adjacent bytes. */
constexpr int MAX_LANES = 32;
/* Fewer rows than this are not worth a thread's start. */
constexpr int LEAST_ROWS = 4;
/* Nor is a further wave of blocks, if its threads have fewer rows than this. */
constexpr int LEAST_ROWS_OF_WAVES = 16;
/* How full the waves are with which the search of a split begins and ends, and its longest search. */
constexpr double FULL_ENOUGH = 0.9;
constexpr double FULL = 0.95;
constexpr int SPLIT_TRIES = 16;

struct tiling {
    int64_t features, inner;
    int64_t columns;        /* features * inner: elements between one outer index and the next */
    int64_t elements;       /* of the whole tensor */
    int64_t tile_columns;   /* from one tile to the next */
    int64_t rows;           /* outer, or outer * chunks */
    int64_t rows_per_split; /* a multiple of the walkers */
    int64_t slots;          /* tiles * (lead + 1) + features */
    int64_t vectors;        /* of a tile: rows * lanes; where it is a plane, of all its planes */
    int64_t step, wrap;     /* to a thread's next row: elements forward, and more at a plane's end */
    uint32_t tiles, splits; /* the grid is tiles * splits */
    int32_t lanes;          /* threads side by side with columns of their own */
    int32_t lanes_log2;     /* the same rounded up to a power of two */
    int32_t walkers_log2;   /* threads one row below the other */
    int32_t lead;           /* VEC - 1 where tiles are staggered, else 0 */
    int32_t stagger;        /* columns % VEC */
    int32_t width;          /* columns that a tile's tables cover: lead + lanes * VEC */
    int32_t plane;          /* vectors of a plane, or 0 where tiles are no planes */
    int32_t plane_step;     /* the same from a thread's row to its next */

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
    /* Where the sums of a run go that begins at `feature` in `tile`. */
    __device__ __forceinline__ int64_t slot_of(int64_t tile, int64_t feature) const
    {
        return tile * (lead + 1) + feature;
    }
    /* The tiles that have columns [first, last], and the first column in one of them. */
    __device__ __forceinline__ int64_t first_tile(int64_t first) const
    {
        return first / tile_columns;
    }
    __device__ __forceinline__ int64_t last_tile(int64_t last) const
    {
        return (last + lead) / tile_columns;
    }
    __device__ __forceinline__ int64_t first_column(int64_t tile, int64_t first) const
    {
        return max(tile * tile_columns - lead, first);
    }
};

/* ---- Host: cutting ---- */

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

/* What a pass wishes for. */
struct grid_wish {
    int64_t blocks_at_once; /* blocks of BLOCK threads that the device holds */
    int waves;              /* how many times that many it would like, for an even end */
    int threads;            /* of a block, at most: that of the image that will run */
};

/* In how many parts to cut the rows so that whole waves of blocks fill the device. */
static inline int64_t choose_splits(int64_t tiles, int64_t rows, int64_t walkers, grid_wish wish)
{
    const int64_t blocks_at_once = wish.blocks_at_once;
    const int64_t one_wave = (int64_t)(FULL_ENOUGH * (double)blocks_at_once / (double)tiles);
    const int64_t waves = least(wish.waves * one_wave, rows / (LEAST_ROWS_OF_WAVES * walkers));
    const int64_t first = most(most(one_wave, waves), 1);
    const int64_t last = ceil_div(rows, LEAST_ROWS * walkers);
    if (first >= last) return last;
    int64_t best = first;
    double best_fill = 0.0;
    for (int64_t splits = first; splits <= least(last, first + SPLIT_TRIES); ++splits) {
        const int64_t blocks = tiles * splits, filled = ceil_div(blocks, blocks_at_once) * blocks_at_once;
        const double fill = (double)blocks / (double)filled;
        if (fill > best_fill) best = splits, best_fill = fill;
        if (fill >= FULL) break;
    }
    return best;
}

/* False where the grid would be larger than CUDA allows, which takes more memory than there is. */
static inline bool make_tiling(tiling *t, kasmina_layout layout, kasmina_dtype dtype, grid_wish wish)
{
    const int vec = VECTOR_BYTES / element_size(dtype);
    const bool planes = layout.inner % vec == 0 && layout.inner >= MAX_LANES * vec;
    t->features = layout.features;
    t->inner = layout.inner;
    t->columns = layout.features * layout.inner;
    t->elements = layout.outer * t->columns;
    t->stagger = (int32_t)(t->columns % vec);
    t->lead = t->stagger ? vec - 1 : 0;

    /* Tiles of equal width; with the lead a staggered one still has no more columns than a block has threads. */
    const int64_t across = ceil_div(t->columns + t->lead, vec);
    const int staggered_lanes = (int)least(MAX_LANES, wish.threads / vec) - 1;
    const int64_t pieces = planes ? layout.features : ceil_div(across, t->stagger ? staggered_lanes : MAX_LANES);
    t->lanes = planes ? MAX_LANES : (int32_t)ceil_div(across, pieces);
    t->lanes_log2 = ceil_log2(t->lanes);
    t->width = t->lead + t->lanes * vec;
    t->tile_columns = planes ? layout.inner : t->lanes * vec;
    t->vectors = layout.outer * (planes ? layout.inner / vec : t->lanes);
    t->rows = ceil_div(t->vectors, t->lanes);

    const int most_log2 = ceil_log2(wish.threads) - t->lanes_log2;
    const int warp_log2 = ceil_log2(WARP) - t->lanes_log2;
    const int least_log2 = (int)most(warp_log2, t->stagger ? ceil_log2(vec) : 0);
    const int wanted_log2 = ceil_log2(ceil_div(t->rows, LEAST_ROWS));
    t->walkers_log2 = (int)most(least_log2, least(most_log2, wanted_log2));

    wish.blocks_at_once = wish.blocks_at_once * BLOCK / t->threads();
    const int64_t wanted = choose_splits(pieces, t->rows, t->walkers(), wish);
    t->rows_per_split = ceil_div(ceil_div(t->rows, wanted), t->walkers()) << t->walkers_log2;
    const int64_t splits = ceil_div(t->rows, t->rows_per_split);

    const int64_t plane = planes ? layout.inner / vec : 0, vectors_on = (int64_t)t->walkers() * t->lanes;
    t->plane = (int32_t)plane;
    t->plane_step = (int32_t)(planes ? vectors_on % plane : 0);
    t->step = planes ? vectors_on / plane * t->columns + t->plane_step * vec : t->walkers() * t->columns;
    t->wrap = t->columns - layout.inner;
    t->tiles = (uint32_t)pieces;
    t->splits = (uint32_t)splits;
    t->slots = pieces * (t->lead + 1) + t->features;
    return pieces <= INT32_MAX && pieces * splits <= INT32_MAX && plane <= INT32_MAX / 2 &&
           t->rows_per_split / t->walkers() <= INT32_MAX;
}

/* ---- Device ---- */

/* By how many columns the rows of a walker lie to the left of where a tile's own columns begin. */
template <int VEC> __device__ __forceinline__ int shift_of(const tiling &t, int level)
{
    return level * t.stagger % VEC;
}

/* What a block works on. */
struct block_place {
    int64_t origin; /* the column of memory that its tables begin with; negative in a staggered first tile */
    int64_t extent; /* columns from there on that exist in the tensor, or in the plane that the tile is */
    uint32_t tile, split;

    __device__ __forceinline__ static block_place here(const tiling &t)
    {
        block_place place;
        place.tile = blockIdx.x % t.tiles;
        place.split = blockIdx.x / t.tiles;
        place.origin = (int64_t)place.tile * t.tile_columns - t.lead;
        place.extent = t.plane ? t.inner : t.columns - place.origin;
        return place;
    }
    /* Whether column c of the tables is one of the tensor. */
    __device__ __forceinline__ bool exists(int c) const
    {
        return c < extent && origin + c >= 0;
    }
};

/* One thread's way down its columns. Only what every row needs is kept: registers are scarce. */
template <kasmina_dtype D> struct walker {
    using bits = typename element<D>::bits;
    static constexpr int VEC = VECTOR_BYTES / sizeof(bits);
    static constexpr unsigned ALL = ~(~0u << VEC);

    int64_t at;    /* the thread's first element of its current row */
    int in_plane;  /* the vector that this is in its plane */
    int left;      /* rows from the current one on; not above 0: there is no row */
    unsigned mask; /* a bit for each of its elements that exists; those before it may lie to the left of the row */

    __device__ __forceinline__ walker(const tiling &t, const block_place &place)
    {
        const int64_t first = place.origin + column(t, 0), last = t.plane ? first + VEC : t.columns;
        const int before = (int)max(-first, (int64_t)0), end = (int)min(max(last - first, (int64_t)0), (int64_t)VEC);
        mask = lane(t) < t.lanes ? ALL << before & ~(~0u << end) : 0u;
        left = mask ? count_rows(t, place, level(t), lane(t)) : 0;
        at = locate(t, place, first_row(t, place, level(t)), in_plane);
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
    static __device__ __forceinline__ int64_t first_row(const tiling &t, const block_place &place, int level)
    {
        return (int64_t)place.split * t.rows_per_split + level;
    }
    static __device__ __forceinline__ int count_rows(const tiling &t, const block_place &place, int level, int lane)
    {
        const int64_t rows = t.plane ? (t.vectors - lane + MAX_LANES - 1) / MAX_LANES : t.rows;
        const int64_t end = min(rows, (int64_t)(place.split + 1) * t.rows_per_split);
        const int64_t rest = end - first_row(t, place, level) + t.walkers() - 1;
        return rest > 0 ? (int)(rest >> t.walkers_log2) : 0;
    }
    /* The first of the thread's elements in a row, and the vector in its plane that it is. */
    static __device__ __forceinline__ int64_t locate(const tiling &t, const block_place &place, int64_t row,
                                                     int &in_plane)
    {
        in_plane = 0;
        if (!t.plane) return place.origin + row * t.columns + column(t, 0);
        const int64_t vector = row * t.lanes + lane(t), outer = vector / t.plane;
        in_plane = (int)(vector - outer * t.plane);
        return place.origin + outer * t.columns + (int64_t)in_plane * VEC;
    }
    /* The thread's j-th column in the tables. */
    static __device__ __forceinline__ int column(const tiling &t, int j)
    {
        return lane(t) * VEC + j + t.lead - shift_of<VEC>(t, level(t));
    }
    /* Where in shared memory the thread keeps its j-th column: lanes side by side, no bank conflict. */
    static __device__ __forceinline__ int slot(const tiling &t, int j)
    {
        return ((level(t) * VEC + j) << t.lanes_log2) + lane(t);
    }
    __device__ __forceinline__ void advance(const tiling &t)
    {
        at += t.step;
        --left;
        if (!t.plane) return;
        in_plane += t.plane_step;
        if (in_plane >= t.plane) in_plane -= t.plane, at += t.wrap;
    }
    /* Visit the thread's j-th column in all of its rows, one by one: body(index of the element). For rare cases. */
    template <typename Body>
    static __device__ __forceinline__ void revisit(const tiling &t, const block_place &place, int j, const Body &body)
    {
        const int64_t first = first_row(t, place, level(t));
        const int count = count_rows(t, place, level(t), lane(t));
#pragma unroll 1
        for (int i = 0; i < count; ++i) {
            int in_plane;
            body(locate(t, place, first + ((int64_t)i << t.walkers_log2), in_plane) + j);
        }
    }
};

} /* namespace kasmina */

#endif
