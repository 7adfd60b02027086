#include "cpu/tiles.h"

#include <string.h>

#include "cpu/convert.h"
#include "seed_math.h"

/* From here on results go past the caches, whose readers would not find them there. */
#ifndef KASMINA_STREAM_BYTES
#define KASMINA_STREAM_BYTES (16 << 20)
#endif

static int64_t ceil_div(int64_t a, int64_t b)
{
    return (a + b - 1) / b;
}

static int64_t min64(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

/* So many that what is done once for a patch costs little; fewer where there would be too few patches for threads to share. */
static int64_t block_rows(const kasmina_tiling *t)
{
    enum { MOST = 512, FEWEST = 128, PATCHES = 16 };
    const int64_t shared = ceil_div(t->rows * t->tiles, PATCHES * KASMINA_GROUP_ROWS) * KASMINA_GROUP_ROWS;
    return shared < FEWEST ? FEWEST : min64(shared, MOST);
}

kasmina_tiling kasmina_make_tiling(const kasmina_layout *layout, kasmina_dtype dtype)
{
    kasmina_tiling t = {.rows = layout->outer, .columns = layout->features * layout->inner, .inner = layout->inner};
    t.tiles = ceil_div(t.columns, KASMINA_TILE_COLUMNS);
    t.block_rows = block_rows(&t);
    t.blocks = ceil_div(t.rows, t.block_rows);
    t.element_size = kasmina_element_size(dtype);
    t.dtype = dtype;
    t.ops = dtype == KASMINA_FLOAT64 ? &kasmina_rows_f64 : &kasmina_rows_f32;
    t.fused = kasmina_find_fused(dtype);
    t.streams = t.rows * t.columns * (int64_t)t.element_size >= KASMINA_STREAM_BYTES;
    return t;
}

kasmina_patch kasmina_get_patch(const kasmina_tiling *t, int64_t index)
{
    kasmina_patch p = {.tile = index % t->tiles, .block = index / t->tiles};
    p.first_row = p.block * t->block_rows;
    p.rows = min64(t->block_rows, t->rows - p.first_row);
    p.first_column = p.tile * KASMINA_TILE_COLUMNS;
    p.columns = min64(KASMINA_TILE_COLUMNS, t->columns - p.first_column);
    return p;
}

int64_t kasmina_patch_grain(const kasmina_tiling *t)
{
    /* 32768 elements take tens of microseconds, several times what waking a thread costs. */
    int64_t elements = min64(t->rows, t->block_rows) * min64(t->columns, KASMINA_TILE_COLUMNS);
    return ceil_div(32768, elements);
}

void kasmina_load_rows(const kasmina_tiling *t, const void *matrix, const kasmina_patch *p, int64_t row, int count,
                       kasmina_tile_storage *scratch, const void **rows)
{
    for (int r = 0; r < count; ++r) {
        rows[r] = kasmina_at(t, matrix, row + r, p->first_column);
        if (t->element_size != 2) continue;
        kasmina_widen(t->dtype, (float *)scratch[r], rows[r], p->columns);
        rows[r] = scratch[r];
    }
}

int64_t kasmina_find_seed(const kasmina_chunks *chunks, int64_t feature)
{
    int64_t lo = -1, hi = chunks->count; /* offsets[lo] <= feature < offsets[hi], as far as known */
    while (hi - lo > 1) {
        int64_t middle = lo + (hi - lo) / 2;
        if (chunks->offsets[middle] <= feature)
            lo = middle;
        else
            hi = middle;
    }
    return lo;
}

int64_t kasmina_next_seed(const kasmina_chunks *chunks, int64_t seed)
{
    const int32_t *offsets = chunks->offsets;
    if (++seed >= chunks->count || offsets[seed + 1] > offsets[seed]) return seed;
    /* Millions of empty seeds may follow each other: no walk. */
    return kasmina_find_seed(chunks, offsets[seed]);
}

/* A run of columns, [begin, end) of a tile, that have one seed or none. */
typedef struct {
    int64_t begin, end;
} run;

static void set_mask(const kasmina_tiling *t, kasmina_tile_coefficients *out, run columns, bool grafted)
{
    memset((char *)out->mask + (size_t)columns.begin * t->element_size, grafted ? 0xff : 0,
           (size_t)(columns.end - columns.begin) * t->element_size);
}

static void fill_identity(const kasmina_tiling *t, kasmina_tile_coefficients *out, run columns)
{
    const bool wide = t->ops->size == sizeof(double);
    for (int64_t i = columns.begin; i < columns.end; ++i) {
        if (wide)
            out->a[i] = 1.0, out->b[i] = -0.0;
        else
            ((float *)out->a)[i] = 1.0f, ((float *)out->b)[i] = -0.0f;
    }
    set_mask(t, out, columns, false);
}

/* Of one seed that takes part; `first_column` is the tile's. */
static void fill_seed(const kasmina_tiling *t, const kasmina_seeds *seeds, int64_t seed, int64_t first_column,
                      kasmina_tile_coefficients *out, run columns)
{
    const bool wide = t->ops->size == sizeof(double);
    const int64_t features = t->columns / t->inner, count = seeds->chunks.count;
    const int32_t strategy = seeds->state[KASMINA_GRAFTING_STRATEGY * count + seed];
    const float alpha = seeds->alpha ? seeds->alpha[seed] : 1.0f;
    const int64_t row = seeds->state[KASMINA_BLUEPRINT_ID * count + seed] * features;
    int64_t feature = (first_column + columns.begin) / t->inner;
    for (int64_t i = columns.begin; i < columns.end; ++feature) {
        const int64_t stop = min64((feature + 1) * t->inner - first_column, columns.end);
        const double w = kasmina_load_scalar(seeds->weights_dtype, seeds->weights, row + feature);
        double v = 0.0;
        if (strategy == KASMINA_AFFINE)
            v = kasmina_load_scalar(seeds->weights_dtype, seeds->weights, row + features + feature);
        if (wide) {
            double a, b;
            kasmina_coefficients_f64(strategy, alpha, w, v, &a, &b);
            for (; i < stop; ++i) out->a[i] = a, out->b[i] = b;
        } else {
            float a, b;
            kasmina_coefficients_f32(strategy, alpha, (float)w, (float)v, &a, &b);
            for (; i < stop; ++i) ((float *)out->a)[i] = a, ((float *)out->b)[i] = b;
        }
    }
    set_mask(t, out, columns, true);
}

void kasmina_fill_coefficients(const kasmina_tiling *t, const kasmina_patch *p, const kasmina_seeds *seeds,
                               kasmina_seed_test *takes_part, kasmina_tile_coefficients *out)
{
    const int64_t features = t->columns / t->inner, count = seeds->chunks.count;
    int64_t seed = kasmina_find_seed(&seeds->chunks, p->first_column / t->inner);
    out->any = false;
    for (int64_t i = 0; i < p->columns;) {
        const int64_t feature = (p->first_column + i) / t->inner;
        if (seed + 1 < count && seeds->chunks.offsets[seed + 1] <= feature)
            seed = kasmina_next_seed(&seeds->chunks, seed);
        int64_t first = 0, end = 0, stop = features; /* of the run, in features */
        if (seed >= 0) kasmina_chunk_range(&seeds->chunks, features, seed, &first, &end);
        const bool owned = seed >= 0 && feature < end;
        if (owned)
            stop = end;
        else if (seed + 1 < count && seeds->chunks.offsets[seed + 1] > feature)
            stop = min64(seeds->chunks.offsets[seed + 1], features);
        else if (seed + 1 < count)
            stop = feature + 1; /* empty seeds, or offsets that decrease: looked at one by one */
        const run columns = {i, min64(stop * t->inner - p->first_column, p->columns)};
        const bool grafted =
            owned && takes_part(seeds->state[KASMINA_LIFECYCLE_STATE * count + seed],
                                seeds->state[KASMINA_BLUEPRINT_ID * count + seed],
                                seeds->state[KASMINA_GRAFTING_STRATEGY * count + seed], seeds->num_blueprints);
        if (grafted)
            fill_seed(t, seeds, seed, p->first_column, out, columns);
        else
            fill_identity(t, out, columns);
        out->any = out->any || grafted;
        i = columns.end;
    }
    const int64_t padded = ceil_div(p->columns, KASMINA_LONGEST_VECTOR) * KASMINA_LONGEST_VECTOR;
    fill_identity(t, out, (run){p->columns, padded});
}
