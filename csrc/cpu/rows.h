/*
 * The inner loops of the CPU kernels, over the columns of a tile: one table for float32 and one for float64. Pointers are
 * to arrays of `n` numbers of that type ("reals") unless they say otherwise; they do not overlap.
 */
#ifndef KASMINA_CPU_ROWS_H
#define KASMINA_CPU_ROWS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Rows that one call takes together, so that per-column values are loaded once for all of them. */
enum { KASMINA_ROWS_AT_ONCE = 4 };

/* What a column's sums are worth, see `flush`. */
enum { KASMINA_SUMS_GOOD, KASMINA_SUMS_OVERFLOWED, KASMINA_SUMS_VANISHED };

typedef struct {
    size_t size; /* bytes of a real */

    /* shift = row where finite, else 0. */
    void (*choose_shift)(void *shift, const void *row, int64_t n);

    /*
     * Add s1 and s2, sums over `count` elements about `shift`, to the double sums d1 and d2 about `origin`, and set s1 and
     * s2 to 0. A column whose squares left the range of a real is not added but marked in `worth`: OVERFLOWED (or not
     * finite), or VANISHED (zero or denormal: constant, or too small to square). Returns whether any was marked.
     */
    bool (*flush)(double *d1, double *d2, void *s1, void *s2, const void *shift, const double *origin, double count,
                  uint8_t *worth, int64_t n);

    /* varies |= row != shift. */
    void (*compare)(uint8_t *varies, const void *shift, const void *row, int64_t n);

    /* y = a x + b, rounded after each operation. */
    void (*blend)(void *y, const void *x, const void *a, const void *b, int64_t n);

    /* out = x - t. */
    void (*subtract)(void *out, const void *x, const void *t, int64_t n);

    /* u += sum g x, v += sum g over `count` rows. */
    void (*products)(void *u, void *v, const void *const *g, const void *const *x, int count, int64_t n);

    /* d += s, s = 0. */
    void (*drain)(double *d, void *s, int64_t n);
} kasmina_rows;

extern const kasmina_rows kasmina_rows_f32, kasmina_rows_f64;

#endif
