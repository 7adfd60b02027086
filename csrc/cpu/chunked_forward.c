/*
 * y = a x + b for grafted seeds, x's bits elsewhere, and the pre-graft statistics of x, in one pass: the CPU kernel.
 *
 * Sums are taken about a shift, so that a mean far from 0 costs no digits: within a group of rows about the group's
 * first row, column by column, in x's accumulation type; then, in double, about one origin for the whole seed, the
 * first element of its chunk, so that partial sums simply add.
 */
#include <math.h>
#include <string.h>

#include "cpu/convert.h"
#include "cpu/lock.h"
#include "cpu/tiles.h"
#include "parallel.h"
#include "telemetry_math.h"

typedef struct {
    double s1, s2; /* about the seed's origin */
    int64_t nonfinite;
} partial;

typedef struct {
    const kasmina_forward_args *args;
    kasmina_tiling tiling;
    partial *partials; /* [blocks, slots] */
    int64_t slots;
} plan;

/* Per-column sums of one patch. */
typedef struct {
    kasmina_tile_storage d1, d2, origin;
    kasmina_tile_storage s1, s2, shift; /* of reals */
    int64_t nonfinite[KASMINA_TILE_COLUMNS];
} column_sums;

/*
 * A seed's overlap with a tile is its segment. There are at most tiles + S of them; with more seeds than columns, whose
 * chunks are mostly empty, the first column tells segments apart more thriftily.
 */
static int64_t count_slots(const kasmina_tiling *t, int64_t num_seeds)
{
    return num_seeds <= t->columns ? t->tiles + num_seeds : t->columns;
}

static int64_t segment_slot(const plan *p, int64_t tile, int64_t seed, int64_t first_column)
{
    return p->args->seeds.chunks.count <= p->tiling.columns ? tile + seed : first_column;
}

size_t kasmina_forward_workspace_cpu(const kasmina_forward_args *args)
{
    kasmina_tiling t = kasmina_make_tiling(&args->layout, args->dtype);
    if (!args->telemetry) return 0;
    return (size_t)(t.blocks * count_slots(&t, args->seeds.chunks.count)) * sizeof(partial);
}

/* The number that a seed's sums are taken about. */
static double seed_origin(const plan *p, int64_t first_feature)
{
    return kasmina_origin(kasmina_load_scalar(p->args->dtype, p->args->x, first_feature * p->tiling.inner));
}

/* Visit the segments of a patch: columns [begin, end) within it belong to `seed`. */
typedef void (*segment_visitor)(const plan *p, const kasmina_patch *patch, column_sums *sums, int64_t seed,
                                int64_t first_feature, int64_t begin, int64_t end);

static void for_each_segment(const plan *p, const kasmina_patch *patch, column_sums *sums, segment_visitor visit)
{
    const kasmina_chunks *chunks = &p->args->seeds.chunks;
    const int64_t features = p->args->layout.features, inner = p->tiling.inner;
    const int64_t first = patch->first_column, last = first + patch->columns;
    int64_t seed = kasmina_find_seed(chunks, first / inner);
    for (seed = seed < 0 ? 0 : seed; seed < chunks->count; seed = kasmina_next_seed(chunks, seed)) {
        int64_t from, to;
        kasmina_chunk_range(chunks, features, seed, &from, &to);
        if (from * inner >= last) return;
        int64_t begin = from * inner > first ? from * inner : first, end = to * inner < last ? to * inner : last;
        if (begin < end) visit(p, patch, sums, seed, from, begin - first, end - first);
    }
}

static void set_origins(const plan *p, const kasmina_patch *patch, column_sums *sums, int64_t seed,
                        int64_t first_feature, int64_t begin, int64_t end)
{
    double origin = seed_origin(p, first_feature);
    (void)patch, (void)seed;
    for (int64_t i = begin; i < end; ++i) sums->origin[i] = origin;
}

static void write_partial(const plan *p, const kasmina_patch *patch, column_sums *sums, int64_t seed,
                          int64_t first_feature, int64_t begin, int64_t end)
{
    partial total = {0.0, 0.0, 0};
    (void)first_feature;
    for (int64_t i = begin; i < end; ++i) {
        total.s1 += sums->d1[i];
        total.s2 += sums->d2[i];
        total.nonfinite += sums->nonfinite[i];
    }
    p->partials[patch->block * p->slots + segment_slot(p, patch->tile, seed, patch->first_column + begin)] = total;
}

/* One column of a group again, in double and without its non-finite elements. */
static void sum_carefully(const plan *p, const kasmina_patch *patch, int64_t row, int64_t rows, int64_t i,
                          column_sums *sums)
{
    for (int64_t r = row; r < row + rows; ++r) {
        double value =
            kasmina_load_scalar(p->args->dtype, kasmina_at(&p->tiling, p->args->x, r, patch->first_column + i), 0);
        double deviation = value - sums->origin[i];
        if (isfinite(value)) {
            sums->d1[i] += deviation;
            sums->d2[i] += deviation * deviation;
        } else {
            ++sums->nonfinite[i];
        }
    }
}

/* The columns of a group that flush() could not add: constant ones are known, the others are summed again. */
static void repair_group(const plan *p, const kasmina_patch *patch, int64_t row, int64_t rows, const uint8_t *worth,
                         kasmina_tile_storage *scratch, column_sums *sums)
{
    const kasmina_tiling *t = &p->tiling;
    uint8_t varies[KASMINA_TILE_COLUMNS] = {0};
    const void *x[1];
    for (int64_t r = row; r < row + rows; ++r) {
        kasmina_load_rows(t, p->args->x, patch, r, 1, scratch, x);
        t->ops->compare(varies, sums->shift, x[0], patch->columns);
    }
    for (int64_t i = 0; i < patch->columns; ++i) {
        if (worth[i] == KASMINA_SUMS_GOOD) continue;
        if (varies[i]) {
            sum_carefully(p, patch, row, rows, i, sums);
        } else {
            double shift = t->ops->size == sizeof(double) ? sums->shift[i] : (double)((float *)sums->shift)[i];
            double move = shift - sums->origin[i];
            sums->d1[i] += (double)rows * move;
            sums->d2[i] += (double)rows * move * move;
        }
    }
}

/* As many as fused.h may look at. */
static void clear_sums(column_sums *sums, int64_t columns)
{
    const size_t n = (size_t)(columns + KASMINA_LONGEST_VECTOR);
    double *const all[] = {sums->d1, sums->d2, sums->origin, sums->s1, sums->s2, sums->shift};
    for (size_t i = 0; i < sizeof all / sizeof *all; ++i) memset(all[i], 0, n * sizeof(double));
    memset(sums->nonfinite, 0, (size_t)columns * sizeof *sums->nonfinite);
}

/* The group's first row is the shift of its sums. */
static void begin_group(const plan *p, const kasmina_patch *patch, int64_t row, kasmina_tile_storage *scratch,
                        column_sums *sums)
{
    const void *first;
    kasmina_load_rows(&p->tiling, p->args->x, patch, row, 1, scratch, &first);
    p->tiling.ops->choose_shift(sums->shift, first, patch->columns);
}

static void process_patch(const plan *p, const kasmina_patch *patch)
{
    const kasmina_tiling *t = &p->tiling;
    const kasmina_forward_args *args = p->args;
    const int64_t n = patch->columns, end = patch->first_row + patch->rows;
    const int64_t stride = t->columns * (int64_t)t->element_size;
    kasmina_tile_storage scratch; /* of a row of reals */
    uint8_t worth[KASMINA_TILE_COLUMNS];
    kasmina_tile_coefficients coefficients;
    column_sums sums;
    kasmina_columns pass = {.streams = t->streams};
    if (args->y) {
        kasmina_fill_coefficients(t, patch, &args->seeds, kasmina_is_grafted, &coefficients);
        pass.a = coefficients.a, pass.b = coefficients.b, pass.mask = coefficients.mask;
    }
    if (args->telemetry) {
        clear_sums(&sums, n);
        for_each_segment(p, patch, &sums, set_origins);
        pass.shift = sums.shift, pass.sum1 = sums.s1, pass.sum2 = sums.s2;
    }
    for (int64_t group = patch->first_row; group < end; group += KASMINA_GROUP_ROWS) {
        int64_t rows = end - group < KASMINA_GROUP_ROWS ? end - group : KASMINA_GROUP_ROWS;
        if (args->telemetry) begin_group(p, patch, group, &scratch, &sums);
        for (int64_t row = group; row < group + rows; row += KASMINA_ROWS_AT_ONCE) {
            const int64_t left = group + rows - row;
            t->fused->forward(&pass, (void *)kasmina_at(t, args->y, row, patch->first_column),
                              kasmina_at(t, args->x, row, patch->first_column), stride,
                              left < KASMINA_ROWS_AT_ONCE ? (int)left : KASMINA_ROWS_AT_ONCE, n);
        }
        if (args->telemetry &&
            t->ops->flush(sums.d1, sums.d2, sums.s1, sums.s2, sums.shift, sums.origin, (double)rows, worth, n))
            repair_group(p, patch, group, rows, worth, &scratch, &sums);
    }
    if (args->telemetry) for_each_segment(p, patch, &sums, write_partial);
    if (args->y && t->streams) kasmina_end_streams();
}

static void process_patches(int64_t begin, int64_t end, void *context)
{
    const plan *p = context;
    for (int64_t index = begin; index < end; ++index) {
        kasmina_patch patch = kasmina_get_patch(&p->tiling, index);
        process_patch(p, &patch);
    }
}

/* Second pass: add a seed's partials in order and join the sum to its accumulator. */
static void merge_seeds(int64_t begin, int64_t end, void *context)
{
    const plan *p = context;
    const kasmina_tiling *t = &p->tiling;
    for (int64_t seed = begin; seed < end; ++seed) {
        int64_t from, to;
        kasmina_chunk_range(&p->args->seeds.chunks, p->args->layout.features, seed, &from, &to);
        partial total = {0.0, 0.0, 0};
        double count = (double)((to - from) * t->inner) * (double)t->rows;
        for (int64_t block = 0; from < to && block < t->blocks; ++block) {
            for (int64_t column = from * t->inner; column < to * t->inner;) {
                int64_t tile = column / KASMINA_TILE_COLUMNS;
                const partial *part = &p->partials[block * p->slots + segment_slot(p, tile, seed, column)];
                total.s1 += part->s1;
                total.s2 += part->s2;
                total.nonfinite += part->nonfinite;
                column = (tile + 1) * KASMINA_TILE_COLUMNS;
            }
        }
        count -= (double)total.nonfinite;
        kasmina_accumulate(p->args->telemetry + seed * KASMINA_TELEMETRY_COLUMNS,
                           kasmina_shifted_moments(count, from < to ? seed_origin(p, from) : 0.0, total.s1, total.s2),
                           1.0, (double)total.nonfinite);
    }
}

int kasmina_chunked_forward_cpu(const kasmina_forward_args *args)
{
    plan p = {.args = args, .tiling = kasmina_make_tiling(&args->layout, args->dtype), .partials = args->workspace};
    p.slots = count_slots(&p.tiling, args->seeds.chunks.count);
    int error =
        kasmina_parallel_for(0, p.tiling.tiles * p.tiling.blocks, kasmina_patch_grain(&p.tiling), process_patches, &p);
    if (error || !args->telemetry) return error;
    kasmina_lock();
    error = kasmina_parallel_for(0, args->seeds.chunks.count, 4096, merge_seeds, &p);
    kasmina_unlock();
    return error;
}
