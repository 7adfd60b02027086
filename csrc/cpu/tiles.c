#include "cpu/tiles.h"

#include <string.h>

#include "cpu/convert.h"
#include "seed_math.h"

static int64_t ceil_div(int64_t a, int64_t b)
{
    return (a + b - 1) / b;
}

static int64_t min64(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

kasmina_tiling kasmina_make_tiling(const kasmina_layout *layout, kasmina_dtype dtype)
{
    kasmina_tiling t = {.rows = layout->outer, .columns = layout->features * layout->inner, .inner = layout->inner};
    t.tiles = ceil_div(t.columns, KASMINA_TILE_COLUMNS);
    t.blocks = ceil_div(t.rows, KASMINA_BLOCK_ROWS);
    t.element_size = kasmina_element_size(dtype);
    t.dtype = dtype;
    t.ops = dtype == KASMINA_FLOAT64 ? &kasmina_rows_f64 : &kasmina_rows_f32;
    return t;
}

kasmina_patch kasmina_get_patch(const kasmina_tiling *t, int64_t index)
{
    kasmina_patch p = {.tile = index % t->tiles, .block = index / t->tiles};
    p.first_row = p.block * KASMINA_BLOCK_ROWS;
    p.rows = min64(KASMINA_BLOCK_ROWS, t->rows - p.first_row);
    p.first_column = p.tile * KASMINA_TILE_COLUMNS;
    p.columns = min64(KASMINA_TILE_COLUMNS, t->columns - p.first_column);
    return p;
}

int64_t kasmina_patch_grain(const kasmina_tiling *t)
{
    /* 32768 elements take tens of microseconds, several times what waking a thread costs. */
    int64_t elements = min64(t->rows, KASMINA_BLOCK_ROWS) * min64(t->columns, KASMINA_TILE_COLUMNS);
    return ceil_div(32768, elements);
}

void kasmina_load_rows(const kasmina_tiling *t, const void *matrix, const kasmina_patch *p, int64_t row, int count,
                       void *scratch, const void **rows)
{
    for (int r = 0; r < count; ++r) {
        rows[r] = kasmina_at(t, matrix, row + r, p->first_column);
        if (t->element_size != 2) continue;
        float *wide = (float *)scratch + r * KASMINA_TILE_COLUMNS;
        kasmina_widen(t->dtype, wide, rows[r], p->columns);
        rows[r] = wide;
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

/* Coefficients of one feature; false where its seed takes no part. */
static bool feature_coefficients(const kasmina_seeds *seeds, int64_t features, int64_t seed, int64_t feature, bool wide,
                                 kasmina_seed_test *takes_part, double *a, double *b)
{
    int64_t count = seeds->chunks.count;
    int32_t strategy = seeds->state[KASMINA_GRAFTING_STRATEGY * count + seed];
    int32_t blueprint = seeds->state[KASMINA_BLUEPRINT_ID * count + seed];
    int32_t lifecycle = seeds->state[KASMINA_LIFECYCLE_STATE * count + seed];
    float alpha = seeds->alpha ? seeds->alpha[seed] : 1.0f;
    if (!takes_part(lifecycle, blueprint, strategy, seeds->num_blueprints)) return false;
    int64_t at = blueprint * features + feature;
    double w = kasmina_load_scalar(seeds->weights_dtype, seeds->weights, at), v = 0.0;
    if (strategy == KASMINA_AFFINE) v = kasmina_load_scalar(seeds->weights_dtype, seeds->weights, at + features);
    if (wide) {
        kasmina_coefficients_f64(strategy, alpha, w, v, a, b);
    } else {
        float slope, intercept;
        kasmina_coefficients_f32(strategy, alpha, (float)w, (float)v, &slope, &intercept);
        *a = slope, *b = intercept;
    }
    return true;
}

static void set_column(const kasmina_tiling *t, kasmina_tile_coefficients *out, int64_t i, bool grafted, double a,
                       double b)
{
    if (t->ops->size == sizeof(double)) {
        out->a[i] = a, out->b[i] = b;
    } else {
        ((float *)out->a)[i] = (float)a, ((float *)out->b)[i] = (float)b;
    }
    memset((char *)out->mask + (size_t)i * t->element_size, grafted ? 0xff : 0, t->element_size);
}

void kasmina_fill_coefficients(const kasmina_tiling *t, const kasmina_patch *p, const kasmina_seeds *seeds,
                               kasmina_seed_test *takes_part, kasmina_tile_coefficients *out)
{
    const bool wide = t->ops->size == sizeof(double);
    const int64_t features = t->columns / t->inner;
    int64_t feature = p->first_column / t->inner, seed = kasmina_find_seed(&seeds->chunks, feature);
    out->any = false, out->all = true;
    for (int64_t i = 0; i < p->columns; ++feature) {
        double a = 1.0, b = -0.0;
        int64_t first, end, stop = min64((feature + 1) * t->inner - p->first_column, p->columns);
        if (seed + 1 < seeds->chunks.count && seeds->chunks.offsets[seed + 1] <= feature)
            seed = kasmina_next_seed(&seeds->chunks, seed);
        bool grafted = false;
        if (seed >= 0) {
            kasmina_chunk_range(&seeds->chunks, features, seed, &first, &end);
            grafted = feature < end && feature_coefficients(seeds, features, seed, feature, wide, takes_part, &a, &b);
        }
        out->any = out->any || grafted;
        out->all = out->all && grafted;
        for (; i < stop; ++i) set_column(t, out, i, grafted, a, b);
    }
}

void kasmina_store_row(const kasmina_tiling *t, void *target, const void *computed, const void *source,
                       const kasmina_tile_coefficients *c, int64_t n)
{
    if (!c->any) {
        memcpy(target, source, (size_t)n * t->element_size);
    } else if (t->element_size == 2) {
        kasmina_narrow(t->dtype, target, computed, n);
        if (!c->all) kasmina_restore_16(target, source, (const uint16_t *)c->mask, n);
    } else if (c->all) {
        memcpy(target, computed, (size_t)n * t->element_size);
    } else {
        t->ops->select(target, computed, source, c->mask, n);
    }
}
