#include "problem.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "seed_math.h"

static uint64_t generator = 1;

void random_seed(uint64_t seed)
{
    generator = seed * 2654435769u + 1;
}

uint64_t random_bits(void)
{
    /* splitmix64 */
    uint64_t z = (generator += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

int64_t random_int(int64_t low, int64_t high)
{
    return low + (int64_t)(random_bits() % (uint64_t)(high - low + 1));
}

static double random_unit(void)
{
    return (double)(random_bits() >> 11) * 0x1p-53;
}

static bool one_in(int64_t n)
{
    return random_int(1, n) == 1;
}

void *allocate(size_t bytes)
{
    void *memory = malloc(bytes ? bytes : 1);
    if (!memory) {
        fprintf(stderr, "no memory\n");
        exit(2);
    }
    return memory;
}

/* ---- Numbers ---- */

size_t element_size(kasmina_dtype dtype)
{
    return dtype == KASMINA_FLOAT64 ? 8 : dtype == KASMINA_FLOAT32 ? 4 : 2;
}

/* A two-byte float with `mantissa` bits: value = (-1)^sign 2^(exponent - bias) 1.m */
static double decode(uint16_t bits, int mantissa)
{
    int width = 15 - mantissa, exponent = (bits >> mantissa) & ((1 << width) - 1);
    int bias = (1 << (width - 1)) - 1, fraction = bits & ((1 << mantissa) - 1);
    double size;
    if (exponent == (1 << width) - 1)
        size = fraction ? NAN : INFINITY;
    else if (exponent == 0)
        size = ldexp(fraction, 1 - bias - mantissa);
    else
        size = ldexp(fraction + (1 << mantissa), exponent - bias - mantissa);
    return bits >> 15 ? -size : size;
}

/* The two-byte float next to `value`, towards zero; finite and of moderate size. */
static uint16_t encode(double value, int mantissa)
{
    int width = 15 - mantissa, bias = (1 << (width - 1)) - 1, exponent;
    double fraction = frexp(fabs(value), &exponent); /* in [0.5, 1) */
    int biased = exponent - 1 + bias;
    uint16_t sign = signbit(value) ? 0x8000 : 0;
    if (value == 0.0 || biased < 1) return sign;
    return (uint16_t)(sign | biased << mantissa | ((int)ldexp(fraction, mantissa + 1) & ((1 << mantissa) - 1)));
}

double load(kasmina_dtype dtype, const void *array, int64_t index)
{
    switch (dtype) {
    case KASMINA_FLOAT64: return ((const double *)array)[index];
    case KASMINA_FLOAT32: return ((const float *)array)[index];
    case KASMINA_BFLOAT16: return decode(((const uint16_t *)array)[index], 7);
    default: return decode(((const uint16_t *)array)[index], 10);
    }
}

static void store(kasmina_dtype dtype, void *array, int64_t index, double value)
{
    switch (dtype) {
    case KASMINA_FLOAT64: ((double *)array)[index] = value; break;
    case KASMINA_FLOAT32: ((float *)array)[index] = (float)value; break;
    case KASMINA_BFLOAT16: ((uint16_t *)array)[index] = encode(value, 7); break;
    default: ((uint16_t *)array)[index] = encode(value, 10); break;
    }
}

/* ---- A random problem ---- */

int64_t num_elements(const problem *p)
{
    return p->layout.outer * p->layout.features * p->layout.inner;
}

/* Sizes near what the kernels cut by: 4, 32, 128 and 512 rows, 1024 columns; some whole lines, which are streamed. */
static int64_t random_size(int64_t limit)
{
    static const int64_t edges[] = {1, 2, 3, 4, 5, 31, 32, 33, 127, 128, 129, 511, 512, 513, 1023, 1024, 1025, 2080};
    int64_t size = one_in(2) ? edges[random_int(0, sizeof edges / sizeof *edges - 1)] : random_int(1, 90);
    return size < limit ? size : limit;
}

/* Any bits at all: NaN, infinities, denormals, the largest numbers (of float64 those whose sums stay finite). */
static uint64_t any_bits(kasmina_dtype dtype)
{
    uint64_t bits = random_bits(), exponent = bits >> 52 & 0x7ff;
    if (dtype != KASMINA_FLOAT64 || exponent < 0x7e0) return bits;
    return bits | (uint64_t)0x7ff << 52;
}

/* Values about a mean of up to 100 deviations, or any bits. */
static void *random_values(kasmina_dtype dtype, int64_t count, bool ordinary)
{
    size_t size = element_size(dtype);
    unsigned char *values = allocate((size_t)count * size);
    double mean = one_in(3) ? 0.0 : (double)random_int(-100, 100), scale = one_in(3) ? 1e-2 : 1.0;
    bool constant = one_in(10);
    for (int64_t i = 0; i < count; ++i) {
        uint64_t bits = any_bits(dtype);
        if (ordinary || !one_in(3))
            store(dtype, values, i, constant ? mean * scale : scale * (mean + 4.0 * random_unit() - 2.0));
        else
            memcpy(values + (size_t)i * size, &bits, size);
    }
    return values;
}

static void random_chunks(problem *p)
{
    int64_t at = 0, left = p->layout.features;
    p->offsets[0] = 0;
    for (int64_t s = 0; s < p->num_seeds; ++s) {
        int64_t even = left / (p->num_seeds - s), size = one_in(4) ? 0 : one_in(2) ? even : random_int(0, 2 * even);
        if (size > left) size = left;
        at += size, left -= size;
        p->offsets[s + 1] = (int32_t)at;
    }
    /* The kernels clamp what lies outside the features. */
    if (p->num_seeds && one_in(8)) p->offsets[0] -= 3, p->offsets[p->num_seeds] += 5;
}

/* States of every kind, with ids that are out of range, far out too. */
static int32_t random_id(int64_t in_range)
{
    static const int32_t far[] = {INT32_MIN, INT32_MAX, -1, INT32_MAX - 1};
    if (one_in(8)) return far[random_int(0, 3)];
    return (int32_t)(one_in(8) ? random_int(-2, in_range + 3) : random_int(0, in_range > 0 ? in_range - 1 : 0));
}

problem make_problem(void)
{
    problem p = {.dtype = (kasmina_dtype)random_int(0, 3), .weights_dtype = (kasmina_dtype)random_int(0, 3)};
    const int64_t most = 60000;
    p.layout.features = random_size(2080);
    p.layout.inner = one_in(3) ? random_size(most / p.layout.features) : 1;
    p.layout.outer = random_size(most / (p.layout.features * p.layout.inner) + 1);
    p.num_seeds = one_in(10) ? 0 : one_in(4) ? random_size(1200) : random_int(1, p.layout.features);
    p.num_blueprints = one_in(10) ? 0 : random_int(1, 4);
    p.ordinary = !one_in(3);
    p.offsets = allocate((size_t)(p.num_seeds + 1) * sizeof *p.offsets);
    p.state = allocate((size_t)(p.num_seeds * KASMINA_STATE_ROWS) * sizeof *p.state);
    p.alpha = allocate((size_t)p.num_seeds * sizeof *p.alpha);
    p.telemetry = allocate((size_t)(p.num_seeds * KASMINA_TELEMETRY_COLUMNS) * sizeof(double));
    p.grad_telemetry = allocate((size_t)(p.num_seeds * KASMINA_GRAD_TELEMETRY_COLUMNS) * sizeof(double));
    random_chunks(&p);
    for (int64_t s = 0; s < p.num_seeds; ++s) {
        for (int64_t row = 0; row < KASMINA_STATE_ROWS; ++row) p.state[row * p.num_seeds + s] = (int32_t)random_bits();
        p.state[KASMINA_LIFECYCLE_STATE * p.num_seeds + s] = one_in(3) ? random_id(11) : (int32_t)random_int(3, 7);
        p.state[KASMINA_BLUEPRINT_ID * p.num_seeds + s] = random_id(p.num_blueprints);
        p.state[KASMINA_GRAFTING_STRATEGY * p.num_seeds + s] = random_id(4);
        p.alpha[s] = one_in(3) ? (float)random_int(0, 1) : (float)random_unit();
        double seen = one_in(2) ? 0.0 : (double)random_int(1, 100000);
        double before[KASMINA_TELEMETRY_COLUMNS] = {seen, seen ? 3.0 : 0.0, seen * 0.5, seen ? 7.0 : 0.0, 0.0};
        memcpy(p.telemetry + s * KASMINA_TELEMETRY_COLUMNS, before, sizeof before);
        for (int i = 0; i < KASMINA_GRAD_TELEMETRY_COLUMNS; ++i)
            p.grad_telemetry[s * KASMINA_GRAD_TELEMETRY_COLUMNS + i] = seen;
    }
    p.weights = random_values(p.weights_dtype, p.num_blueprints * p.layout.features, true);
    p.x = random_values(p.dtype, num_elements(&p), p.ordinary);
    p.grad_y = random_values(p.dtype, num_elements(&p), p.ordinary);
    return p;
}

void free_problem(problem *p)
{
    void *all[] = {p->offsets, p->state, p->alpha, p->weights, p->x, p->grad_y, p->telemetry, p->grad_telemetry};
    for (size_t i = 0; i < sizeof all / sizeof *all; ++i) free(all[i]);
}
