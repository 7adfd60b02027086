/*
 * Random calls of the CPU kernels against plain double arithmetic, to be built with AddressSanitizer and
 * UndefinedBehaviorSanitizer: every array has exactly its size, and every output begins as garbage.
 *
 *   kernels [cases = 400] [seed = 1]
 */
#define _POSIX_C_SOURCE 200809L
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "pool.h"
#include "problem.h"

static int64_t failures = 0, case_number = 0;

static void complain(const problem *p, const char *what, int64_t index, double got, double want, double slack)
{
    if (++failures > 20) return;
    printf("case %lld (outer %lld, features %lld, inner %lld, dtype %d, weights %d, seeds %lld): %s[%lld] is %.17g, "
           "expected %.17g within %.3g\n",
           (long long)case_number, (long long)p->layout.outer, (long long)p->layout.features,
           (long long)p->layout.inner, (int)p->dtype, (int)p->weights_dtype, (long long)p->num_seeds, what,
           (long long)index, got, want, slack);
}

static void *garbage(size_t bytes)
{
    return memset(allocate(bytes), 0xa5, bytes ? bytes : 1);
}

static void *workspace(size_t bytes)
{
    void *memory = NULL;
    if (!bytes) return NULL;
    if (posix_memalign(&memory, 64, bytes)) exit(2);
    return memset(memory, 0xff, bytes);
}

static void *copy(const void *source, size_t bytes)
{
    return memcpy(allocate(bytes), source, bytes);
}

static bool near(double got, double want, double slack)
{
    if (isnan(want)) return isnan(got);
    return got == want || fabs(got - want) <= slack;
}

/* Near the end of the dtype's range a number may or may not be infinite: then it is only asked to be large. */
static bool near_as(kasmina_dtype dtype, double got, double want, double slack)
{
    static const double largest[] = {[KASMINA_FLOAT32] = 3.4e38,
                                     [KASMINA_FLOAT64] = 1.79e308,
                                     [KASMINA_BFLOAT16] = 3.38e38,
                                     [KASMINA_FLOAT16] = 65504.0};
    if (fabs(want) > 0.25 * largest[dtype]) return !(fabs(got) < 0.2 * largest[dtype]);
    return near(got, want, slack);
}

static void compare(const problem *p, const char *what, kasmina_dtype dtype, const void *got, const double *want,
                    const double *slack, int64_t count)
{
    for (int64_t i = 0; i < count; ++i) {
        double value = load(dtype, got, i);
        if (!near_as(dtype, value, want[i], slack[i])) complain(p, what, i, value, want[i], slack[i]);
    }
}

/* Elementwise results: near where a seed is grafted, else the source's own bits. */
static void compare_elements(const problem *p, const char *what, const void *got, const void *source,
                             const double *want, const double *slack)
{
    size_t size = element_size(p->dtype);
    for (int64_t i = 0; i < num_elements(p); ++i) {
        size_t at = (size_t)i * size;
        double value = load(p->dtype, got, i), from = load(p->dtype, source, i);
        if (slack[i] < 0.0) {
            if (memcmp((const char *)got + at, (const char *)source + at, size)) complain(p, what, i, value, from, 0.0);
        } else if (!near_as(p->dtype, value, want[i], slack[i])) {
            complain(p, what, i, value, want[i], slack[i]);
        }
    }
}

static kasmina_seeds seeds_of(const problem *p)
{
    return (kasmina_seeds){
        {p->num_seeds, p->offsets}, p->num_blueprints, p->state, p->alpha, p->weights, p->weights_dtype};
}

/* ---- Forward ---- */

typedef struct {
    void *y;
    double *telemetry;
} forward_result;

static forward_result forward(const problem *p, bool wants_y, bool wants_telemetry)
{
    forward_result out = {NULL, NULL};
    if (wants_y) out.y = garbage((size_t)num_elements(p) * element_size(p->dtype));
    if (wants_telemetry)
        out.telemetry = copy(p->telemetry, (size_t)(p->num_seeds * KASMINA_TELEMETRY_COLUMNS) * sizeof(double));
    kasmina_forward_args args = {p->layout, p->dtype, p->x, out.y, seeds_of(p), out.telemetry, NULL};
    /* Statistics alone know nothing of seeds but their chunks. */
    if (!wants_y) args.seeds = (kasmina_seeds){.chunks = {p->num_seeds, p->offsets}};
    args.workspace = workspace(kasmina_forward_workspace_cpu(&args));
    if (kasmina_chunked_forward_cpu(&args)) complain(p, "forward's error", 0, 1, 0, 0);
    free(args.workspace);
    return out;
}

static void check_forward(const problem *p, const answer *want)
{
    size_t bytes = (size_t)num_elements(p) * element_size(p->dtype);
    size_t telemetry_bytes = (size_t)(p->num_seeds * KASMINA_TELEMETRY_COLUMNS) * sizeof(double);
    pool_threads = 1;
    forward_result first = forward(p, true, true);
    pool_threads = (int)random_int(2, 8);
    forward_result second = forward(p, true, true), y_alone = forward(p, true, false), sums = forward(p, false, true);
    compare_elements(p, "y", first.y, p->x, want->y, want->slack_y);
    if (p->ordinary)
        compare(p, "telemetry", KASMINA_FLOAT64, first.telemetry, want->telemetry, want->slack_telemetry,
                p->num_seeds * KASMINA_TELEMETRY_COLUMNS);
    for (int64_t s = 0; s < p->num_seeds; ++s) {
        for (int column = 0; column < KASMINA_TELEMETRY_COLUMNS; ++column) {
            int64_t at = s * KASMINA_TELEMETRY_COLUMNS + column;
            bool counts = column == KASMINA_COUNT || column == KASMINA_BATCHES || column == KASMINA_NONFINITE;
            if (counts && first.telemetry[at] != want->telemetry[at])
                complain(p, "telemetry", at, first.telemetry[at], want->telemetry[at], 0.0);
            if (isnan(first.telemetry[at])) complain(p, "telemetry", at, first.telemetry[at], 0.0, 0.0);
        }
    }
    if (memcmp(first.y, second.y, bytes)) complain(p, "y of other threads", 0, 0, 0, 0);
    if (memcmp(first.y, y_alone.y, bytes)) complain(p, "y without telemetry", 0, 0, 0, 0);
    if (memcmp(first.telemetry, second.telemetry, telemetry_bytes))
        complain(p, "telemetry of other threads", 0, 0, 0, 0);
    if (memcmp(first.telemetry, sums.telemetry, telemetry_bytes)) complain(p, "telemetry without y", 0, 0, 0, 0);
    void *all[] = {first.y, first.telemetry, second.y, second.telemetry, y_alone.y, sums.telemetry};
    for (size_t i = 0; i < sizeof all / sizeof *all; ++i) free(all[i]);
}

/* ---- Backward ---- */

enum { DX, DW, DALPHA, GRADS, OUTPUTS };

/* The outputs that `wanted` names, one bit each; the others are NULL. */
static void backward(const problem *p, unsigned wanted, void *out[OUTPUTS], size_t bytes[OUTPUTS])
{
    bytes[DX] = (size_t)num_elements(p) * element_size(p->dtype);
    bytes[DW] = (size_t)(p->num_blueprints * p->layout.features) * element_size(p->weights_dtype);
    bytes[DALPHA] = (size_t)p->num_seeds * sizeof(float);
    bytes[GRADS] = (size_t)(p->num_seeds * KASMINA_GRAD_TELEMETRY_COLUMNS) * sizeof(double);
    for (int i = 0; i < OUTPUTS; ++i) out[i] = wanted >> i & 1 ? garbage(bytes[i]) : NULL;
    if (out[GRADS]) memcpy(out[GRADS], p->grad_telemetry, bytes[GRADS]);
    kasmina_backward_args args = {.layout = p->layout, .dtype = p->dtype, .x = p->x, .grad_y = p->grad_y};
    args.seeds = seeds_of(p);
    args.grad_x = out[DX], args.grad_weights = out[DW], args.grad_alpha = out[DALPHA], args.grad_telemetry = out[GRADS];
    args.workspace = workspace(kasmina_backward_workspace_cpu(&args));
    if (kasmina_chunked_backward_cpu(&args)) complain(p, "backward's error", 0, 1, 0, 0);
    free(args.workspace);
}

static void check_backward(const problem *p, const answer *want)
{
    static const char *const names[OUTPUTS] = {"dx", "dw", "dalpha", "gradient telemetry"};
    void *all[OUTPUTS], *some[OUTPUTS];
    size_t bytes[OUTPUTS];
    const unsigned everything = (1u << OUTPUTS) - 1, wanted = (unsigned)random_int(0, everything);
    pool_threads = 1;
    backward(p, everything, all, bytes);
    pool_threads = (int)random_int(2, 8);
    backward(p, wanted, some, bytes);
    compare_elements(p, names[DX], all[DX], p->grad_y, want->dx, want->slack_dx);
    if (p->ordinary) {
        compare(p, names[DW], p->weights_dtype, all[DW], want->dw, want->slack_dw,
                p->num_blueprints * p->layout.features);
        compare(p, names[DALPHA], KASMINA_FLOAT32, all[DALPHA], want->dalpha, want->slack_dalpha, p->num_seeds);
        compare(p, names[GRADS], KASMINA_FLOAT64, all[GRADS], want->grad_telemetry, want->slack_grad_telemetry,
                p->num_seeds * KASMINA_GRAD_TELEMETRY_COLUMNS);
    }
    for (int i = 0; i < OUTPUTS; ++i) {
        if (some[i] && memcmp(all[i], some[i], bytes[i])) complain(p, names[i], -1, 0, 0, 0);
        free(all[i]);
        free(some[i]);
    }
}

/* ---- Telemetry's own ---- */

static void check_reduce_and_merge(const problem *p, const answer *want)
{
    const int64_t s = p->num_seeds;
    double *reduced = garbage((size_t)(s * KASMINA_REDUCED_COLUMNS) * sizeof(double));
    double *merged = copy(want->telemetry, (size_t)(s * KASMINA_TELEMETRY_COLUMNS) * sizeof(double));
    kasmina_telemetry_reduce_args reduce = {s, want->telemetry, reduced};
    kasmina_telemetry_merge_args merge = {s, merged, want->telemetry}, itself = {s, merged, merged};
    if (kasmina_telemetry_reduce_cpu(&reduce) || kasmina_telemetry_merge_cpu(&merge) ||
        kasmina_telemetry_merge_cpu(&itself))
        complain(p, "reduce's or merge's error", 0, 1, 0, 0);
    for (int64_t i = 0; p->ordinary && i < s; ++i) {
        const double *row = want->telemetry + i * KASMINA_TELEMETRY_COLUMNS,
                     *out = reduced + i * KASMINA_REDUCED_COLUMNS;
        const double *four = merged + i * KASMINA_TELEMETRY_COLUMNS; /* twice joined with itself: four of everything */
        bool measured = row[KASMINA_COUNT] > 0.0;
        double variance = measured ? row[KASMINA_M2] / row[KASMINA_COUNT] : NAN;
        double mean = measured ? row[KASMINA_MEAN] : NAN;
        if (!near(out[0], mean, 0.0)) complain(p, "reduced mean", i, out[0], mean, 0.0);
        if (!near(out[1], variance, 1e-12 * variance)) complain(p, "reduced variance", i, out[1], variance, 0.0);
        if (!near(out[2], sqrt(variance), 1e-12 * sqrt(variance))) complain(p, "std", i, out[2], sqrt(variance), 0.0);
        for (int column = 0; column < KASMINA_TELEMETRY_COLUMNS; ++column) {
            double factor = column == KASMINA_MEAN ? 1.0 : 4.0, expected = factor * row[column];
            if (!near(four[column], expected, 1e-12 * fabs(expected)))
                complain(p, "merged telemetry", i, four[column], expected, 1e-12);
        }
    }
    free(reduced);
    free(merged);
}

/* ---- Moments of pairs ---- */

static size_t pair_bytes(const problem *p)
{
    return (size_t)(p->layout.features * KASMINA_PAIR_COLUMNS) * sizeof(double);
}

/* Of x with grad_y, joined into moments of one pair (1, -1) for every second feature. */
static double *pair_moments(const problem *p)
{
    double *moments = memset(allocate(pair_bytes(p)), 0, pair_bytes(p));
    for (int64_t f = 0; f < p->layout.features; f += 2) {
        double *m = moments + f * KASMINA_PAIR_COLUMNS;
        m[KASMINA_PAIR_COUNT] = m[KASMINA_PAIR_MEAN_X] = 1.0, m[KASMINA_PAIR_MEAN_T] = -1.0;
    }
    kasmina_pair_moments_args args = {p->layout, p->dtype, p->x, p->grad_y, moments, NULL};
    args.workspace = workspace(kasmina_pair_moments_workspace_cpu(&args));
    if (kasmina_pair_moments_cpu(&args)) complain(p, "pair_moments' error", 0, 1, 0, 0);
    free(args.workspace);
    return moments;
}

/* Two passes over one feature's finite pairs; means first, then what is about them. */
static void solve_pairs(const problem *p, int64_t feature, double want[KASMINA_PAIR_COLUMNS])
{
    const double start = feature % 2 ? 0.0 : 1.0;
    double count = start, sum_x = start, sum_t = -start, xx = 0.0, tt = 0.0, xt = 0.0;
    for (int pass = 0; pass < 2; ++pass) {
        const double mean_x = count ? sum_x / count : 0.0, mean_t = count ? sum_t / count : 0.0;
        if (pass) {
            const double x = 1.0 - mean_x, t = -1.0 - mean_t;
            xx = start * x * x, tt = start * t * t, xt = start * x * t;
        }
        for (int64_t o = 0; o < p->layout.outer; ++o) {
            for (int64_t i = 0; i < p->layout.inner; ++i) {
                const int64_t at = (o * p->layout.features + feature) * p->layout.inner + i;
                const double x = load(p->dtype, p->x, at), t = load(p->dtype, p->grad_y, at);
                if (!isfinite(x) || !isfinite(t)) continue;
                if (pass)
                    xx += (x - mean_x) * (x - mean_x), tt += (t - mean_t) * (t - mean_t),
                        xt += (x - mean_x) * (t - mean_t);
                else
                    count += 1.0, sum_x += x, sum_t += t;
            }
        }
    }
    const double solved[KASMINA_PAIR_COLUMNS] = {
        count, count ? sum_x / count : 0.0, count ? sum_t / count : 0.0, xx, tt, xt};
    memcpy(want, solved, sizeof solved);
}

static void check_pair_moments(const problem *p)
{
    pool_threads = 1;
    double *first = pair_moments(p);
    pool_threads = (int)random_int(2, 8);
    double *second = pair_moments(p);
    if (memcmp(first, second, pair_bytes(p))) complain(p, "moments of other threads", 0, 0, 0, 0);
    for (int64_t f = 0; f < p->layout.features; ++f) {
        double want[KASMINA_PAIR_COLUMNS], *m = first + f * KASMINA_PAIR_COLUMNS;
        solve_pairs(p, f, want);
        if (m[KASMINA_PAIR_COUNT] != want[KASMINA_PAIR_COUNT])
            complain(p, "count of pairs", f, m[KASMINA_PAIR_COUNT], want[KASMINA_PAIR_COUNT], 0.0);
        for (int column = 1; p->ordinary && column < KASMINA_PAIR_COLUMNS; ++column) {
            /* Values are below 102, and sums of them are taken about one that is as large. */
            const double slack = 1e-11 * (column < KASMINA_PAIR_M2_X ? 100.0 : 1e4 * want[KASMINA_PAIR_COUNT]);
            if (!near(m[column], want[column], slack)) complain(p, "moments", f, m[column], want[column], slack);
        }
    }
    free(first);
    free(second);
}

/* ---- A thread pool that fails ---- */

/* The call reports it, and holds no lock afterwards (the next case would hang). */
static void check_failing_pool(const problem *p)
{
    double *telemetry = copy(p->telemetry, (size_t)(p->num_seeds * KASMINA_TELEMETRY_COLUMNS) * sizeof(double));
    kasmina_forward_args args = {p->layout, p->dtype, p->x, NULL, seeds_of(p), telemetry, NULL};
    args.workspace = workspace(kasmina_forward_workspace_cpu(&args));
    for (int call = 0; call < 2; ++call) {
        pool_calls_until_failure = call;
        if (!kasmina_chunked_forward_cpu(&args)) complain(p, "a failing pool's error", call, 0, 1, 0);
    }
    double *moments = memset(allocate(pair_bytes(p)), 0, pair_bytes(p));
    kasmina_pair_moments_args pairs = {p->layout, p->dtype, p->x, p->grad_y, moments, NULL};
    pairs.workspace = workspace(kasmina_pair_moments_workspace_cpu(&pairs));
    for (int call = 0; call < 2; ++call) {
        pool_calls_until_failure = call;
        if (!kasmina_pair_moments_cpu(&pairs)) complain(p, "a failing pool's error in pairs", call, 0, 1, 0);
    }
    pool_calls_until_failure = -1;
    void *all[] = {args.workspace, telemetry, pairs.workspace, moments};
    for (size_t i = 0; i < sizeof all / sizeof *all; ++i) free(all[i]);
}

int main(int argc, char **argv)
{
    int64_t cases = argc > 1 ? atoll(argv[1]) : 400;
    uint64_t seed = argc > 2 ? strtoull(argv[2], NULL, 10) : 1;
    alarm((unsigned)(60 + cases)); /* a lock that is never released must not hang the check */
    for (case_number = 0; case_number < cases; ++case_number) {
        random_seed(seed + (uint64_t)case_number);
        problem p = make_problem();
        answer want = solve(&p);
        check_forward(&p, &want);
        check_backward(&p, &want);
        check_reduce_and_merge(&p, &want);
        check_pair_moments(&p);
        if (case_number % 16 == 0) check_failing_pool(&p);
        free_answer(&want);
        free_problem(&p);
    }
    printf("kernels: %lld cases from seed %llu, %lld failures\n", (long long)cases, (unsigned long long)seed,
           (long long)failures);
    return failures ? 1 : 0;
}
