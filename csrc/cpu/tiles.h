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
 * 512 columns: per-column values and four widened rows stay in a 32 KiB first-level cache. 32 rows: few enough that
 * float32 sums lose no digit that telemetry promises, before they join double ones. 256 rows: partials cost below 1 %.
 */
enum { KASMINA_TILE_COLUMNS = 512, KASMINA_GROUP_ROWS = 32, KASMINA_BLOCK_ROWS = 256 };

typedef struct {
    int64_t rows, columns, inner;
    int64_t tiles, blocks;
    size_t element_size; /* bytes of an activation */
    kasmina_dtype dtype;
    const kasmina_rows *ops;    /* loops over reals */
    const kasmina_fused *fused; /* over activations; over reals, which activations are widened to, if `widens` */
    bool widens;
    bool streams; /* results are too large for a cache to keep */
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

/* Address of element (row, column) of a matrix of activations. */
static inline const void *kasmina_at(const kasmina_tiling *t, const void *matrix, int64_t row, int64_t column)
{
    return (const char *)matrix + (size_t)(row * t->columns + column) * t->element_size;
}

/* Reals of `count` rows from `row` on: the activations themselves, or, for two-byte ones, widened into `scratch`. */
void kasmina_load_rows(const kasmina_tiling *tiling, const void *matrix, const kasmina_patch *patch, int64_t row,
                       int count, void *scratch, const void **rows);

/* Per-column coefficients of a patch, in reals; `mask` has all bits of an element set where the seed is grafted. */
typedef struct {
    double a[KASMINA_TILE_COLUMNS], b[KASMINA_TILE_COLUMNS]; /* storage; of floats where reals are float */
    uint64_t mask[KASMINA_TILE_COLUMNS];                     /* storage, of integers as wide as an activation */
    bool any, all;                                           /* whether some, all columns are grafted */
} kasmina_tile_coefficients;

/* The mask that a pass is to heed. */
static inline const void *kasmina_pass_mask(const kasmina_tiling *t, const kasmina_tile_coefficients *c)
{
    return c->all || t->widens ? NULL : c->mask; /* widened rows are mended when they are finished */
}

/* Whether a seed takes part: kasmina_is_grafted or kasmina_is_training. */
typedef bool kasmina_seed_test(int32_t lifecycle, int32_t blueprint, int32_t strategy, int64_t num_blueprints);

/* Without alphas (seeds->alpha is NULL), alpha is 1. */
void kasmina_fill_coefficients(const kasmina_tiling *tiling, const kasmina_patch *patch, const kasmina_seeds *seeds,
                               kasmina_seed_test *takes_part, kasmina_tile_coefficients *out);

/* A few rows on their way through a pass of fused.h. Zeroed by nobody: what is used is written first. */
typedef struct {
    double wide[KASMINA_ROWS_AT_ONCE * KASMINA_TILE_COLUMNS / 2]; /* storage of widened activations */
    double out[KASMINA_ROWS_AT_ONCE * KASMINA_TILE_COLUMNS];      /* of results that are not written in place */
} kasmina_rows_buffer;

/* Rows as a pass wants them: in place or widened. Those that follow in the patch are asked for ahead of time. */
void kasmina_fetch_rows(const kasmina_tiling *tiling, const void *matrix, const kasmina_patch *patch, int64_t row,
                        int count, void *wide, const void **rows);

/* Where a pass writes its results for these rows: in place, or into the buffer. */
void kasmina_place_rows(const kasmina_tiling *tiling, void *matrix, const kasmina_patch *patch, int64_t row, int count,
                        kasmina_rows_buffer *buffer, void **rows);

/*
 * After the pass: brings results that are not in place there; where no column is grafted, copies `source` instead, for
 * which no pass is needed.
 */
void kasmina_finish_rows(const kasmina_tiling *tiling, void *matrix, const void *source, const kasmina_patch *patch,
                         int64_t row, int count, void *const *rows, const kasmina_tile_coefficients *coefficients);

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
