/*
 * The passes over activations of chunked_forward and chunked_backward: a few rows of a tile at once, read once, all that is
 * wanted of them computed meanwhile and results written straight to where they belong. One table for each type of
 * activation, in the widest vectors that the processor has.
 */
#ifndef KASMINA_CPU_FUSED_H
#define KASMINA_CPU_FUSED_H

#include <stdbool.h>
#include <stdint.h>

#include "cpu/rows.h"
#include "kernels.h"

enum { KASMINA_LONGEST_VECTOR = 16, KASMINA_LINE = 64 }; /* columns, bytes */

/*
 * What a pass has of each column, from the tile's first on. Arrays may be read, and sums written, up to the next multiple of
 * KASMINA_LONGEST_VECTOR columns.
 */
typedef struct {
    const void *a, *b; /* reals: y = a x + b, rounded after each operation, dx = a g; NULL: neither is wanted */
    const void *mask; /* integers as wide as an activation: all bits set where that is so, none where y is x, dx is g */
    const void *shift; /* reals, for the sums of a forward */
    void *sum1, *sum2; /* reals: += sum d, += sum d d with d = x - shift; += sum g x, += sum g; NULL: not wanted */
    bool streams;      /* results go past the caches where rows are aligned */
} kasmina_columns;

/* `count` rows of n activations, at most KASMINA_ROWS_AT_ONCE, `stride` bytes apart in all arrays. */
typedef struct {
    void (*forward)(const kasmina_columns *c, void *y, const void *x, int64_t stride, int count, int64_t n);
    void (*backward)(const kasmina_columns *c, void *dx, const void *g, const void *x, int64_t stride, int count,
                     int64_t n);
} kasmina_fused;

/* The widest vectors that this processor has and torch's variable ATEN_CPU_CAPABILITY (default, avx2, avx512) allows. */
const kasmina_fused *kasmina_find_fused(kasmina_dtype dtype);

/* What was streamed is seen by other threads from here on. */
void kasmina_end_streams(void);

#endif
