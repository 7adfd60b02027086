/*
 * How the CPU kernels cut their work. A dense [outer, features, inner] array is a matrix of `outer` rows and
 * features * inner columns, column c belonging to feature c / inner. It is cut into blocks of rows and tiles of columns;
 * the cut depends on the shape alone, never on threads, so sums come out the same on every run.
 *
 * A *segment* is a run of columns of one tile that belong to one owner (a seed in the forward, a feature in the
 * backward). Each (block, segment) leaves a partial result in a slot of its own; a second pass adds the slots of an
 * owner in order.
 */
#ifndef KASMINA_CPU_TILES_H
#define KASMINA_CPU_TILES_H

#include "cpu/fused.h"
#include "cpu/rows.h"
#include "kernels.h"

/*
 * 1024 columns: per-column values stay in a second-level cache, and rows are long enough for memory to be read in one go.
 * 32 rows: few enough that float32 sums lose no digit that telemetry promises, before they join double ones.
 */
enum { KASMINA_TILE_COLUMNS = 1024, KASMINA_GROUP_ROWS = 32 };

/*
 * Storage of one number per column, in whole lines. A few lines longer than a tile: arrays a multiple of 4 KiB apart would
 * push each other out of a first-level cache.
 */
typedef double kasmina_tile_storage[KASMINA_TILE_COLUMNS + 40] __attribute__((aligned(KASMINA_LINE)));

typedef struct {
    int64_t rows, columns, inner;
    int64_t tiles, blocks, block_rows;
    size_t element_size; /* bytes of an activation */
    kasmina_dtype dtype;
    const kasmina_rows *ops;    /* loops over reals */
    const kasmina_fused *fused; /* over activations */
    bool streams;               /* results are too large for a cache to keep */
} kasmina_tiling;

kasmina_tiling kasmina_make_tiling(const kasmina_layout *layout, kasmina_dtype dtype);

/* One tile of one block. */
typedef struct {
    int64_t tile, block;
    int64_t first_row, rows;
    int64_t first_column, columns;
} kasmina_patch;

/* Patch `index` of tiles * blocks, all tiles of a block in turn. */
kasmina_patch kasmina_get_patch(const kasmina_tiling *tiling, int64_t index);

/* How many patches are worth a thread. */
int64_t kasmina_patch_grain(const kasmina_tiling *tiling);

/* Address of element (row, column) of a matrix of activations; NULL where there is none. */
static inline const void *kasmina_at(const kasmina_tiling *t, const void *matrix, int64_t row, int64_t column)
{
    return matrix ? (const char *)matrix + (size_t)(row * t->columns + column) * t->element_size : NULL;
}

/* Reals of `count` rows from `row` on: the activations themselves, or, for two-byte ones, widened into `scratch`[count]. */
void kasmina_load_rows(const kasmina_tiling *tiling, const void *matrix, const kasmina_patch *patch, int64_t row,
                       int count, kasmina_tile_storage *scratch, const void **rows);

/* Per-column coefficients of a patch, in reals; `mask` has all bits of an element set where the seed is grafted. As many
   as fused.h may read. */
typedef struct {
    kasmina_tile_storage a, b; /* of reals */
    kasmina_tile_storage mask; /* of integers as wide as an activation */
    bool any;                  /* whether some column is grafted */
} kasmina_tile_coefficients;

/* Whether a seed takes part: kasmina_is_grafted or kasmina_is_training. */
typedef bool kasmina_seed_test(int32_t lifecycle, int32_t blueprint, int32_t strategy, int64_t num_blueprints);

/* Without alphas (seeds->alpha is NULL), alpha is 1. */
void kasmina_fill_coefficients(const kasmina_tiling *tiling, const kasmina_patch *patch, const kasmina_seeds *seeds,
                               kasmina_seed_test *takes_part, kasmina_tile_coefficients *out);

/* The features [first, end) of seed s, clamped to [0, features]. */
static inline void kasmina_chunk_range(const kasmina_chunks *chunks, int64_t features, int64_t seed, int64_t *first,
                                       int64_t *end)
{
    int64_t lo = chunks->offsets[seed], hi = chunks->offsets[seed + 1];
    *first = lo < 0 ? 0 : lo > features ? features : lo;
    *end = hi < *first ? *first : hi > features ? features : hi;
}

/* The next seed that owns something, or the last of the empty ones before it; count where there is none. */
int64_t kasmina_next_seed(const kasmina_chunks *chunks, int64_t seed);

/* The last seed whose chunk starts at or before `feature`; -1 if there is none. It may end before it. */
int64_t kasmina_find_seed(const kasmina_chunks *chunks, int64_t feature);

#endif
