/*
 * The passes over activations of chunked_forward and chunked_backward: a few rows of a tile at once, read once, all that is
 * wanted of them computed meanwhile. One table for each type that is read as it is; float16 goes by way of float32.
 */
#ifndef KASMINA_CPU_FUSED_H
#define KASMINA_CPU_FUSED_H

#include <stdint.h>

#include "cpu/rows.h"

/* What a forward pass has of each column: arrays of reals, but for the mask. */
typedef struct {
    const void *a, *b; /* y = a x + b, rounded after each operation; NULL: no y is wanted */
    const void *mask;  /* integers as wide as an activation: no bit set where y is x; NULL: set everywhere */
    const void *shift; /* NULL: no sums are wanted */
    void *s1, *s2;     /* += sum (x - shift), += sum (x - shift)^2 */
} kasmina_forward_columns;

typedef struct {
    const void *a;    /* dx = a g; NULL: no dx is wanted */
    const void *mask; /* as above: no bit set where dx is g */
    void *u, *v;      /* += sum g x, += sum g; NULL: neither is wanted */
} kasmina_backward_columns;

typedef struct {
    /* `count` rows of n activations, at most KASMINA_ROWS_AT_ONCE. */
    void (*forward)(const kasmina_forward_columns *c, void *const *y, const void *const *x, int count, int64_t n);
    void (*backward)(const kasmina_backward_columns *c, void *const *dx, const void *const *g, const void *const *x,
                     int count, int64_t n);
} kasmina_fused;

extern const kasmina_fused kasmina_fused_f32, kasmina_fused_f64, kasmina_fused_bf16;

#endif
