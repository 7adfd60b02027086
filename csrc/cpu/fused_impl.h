/*
 * The loops of fused.h for one type of activation: included by fused.c with REAL (what is computed in), BITS (an unsigned
 * integer as wide as an activation), TO_REAL(bits), TO_BITS(real), NAME(f) and ROWS defined.
 *
 * One pass with everything in registers; which parts of it are wanted is known when it is compiled. Elements are handled
 * as integers: a float register may quiet a signalling NaN that is only to be copied.
 */

static inline __attribute__((always_inline)) void NAME(forward_rows)(const kasmina_forward_columns *c, void *const *out,
                                                                     const void *const *in, const int rows,
                                                                     const bool sum, const bool blend,
                                                                     const bool masked, int64_t n)
{
    const REAL *a = c->a, *b = c->b, *k = c->shift;
    const BITS *mask = c->mask;
    REAL *s1 = c->s1, *s2 = c->s2;
    const BITS *const *xs = (const BITS *const *)in;
    BITS *const *ys = (BITS *const *)out;
    ROWS(const BITS, x, xs, rows, true);
    ROWS(BITS, y, ys, rows, blend);
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) {
        const BITS raw[4] = {x0[i], x1[i], x2[i], x3[i]};
        const REAL x[4] = {TO_REAL(raw[0]), TO_REAL(raw[1]), TO_REAL(raw[2]), TO_REAL(raw[3])};
        if (sum && rows > 1) {
            const REAL d0 = x[0] - k[i], d1 = x[1] - k[i], d2 = x[2] - k[i], d3 = x[3] - k[i];
            s1[i] += (d0 + d1) + (d2 + d3);
            s2[i] += (d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3);
        } else if (sum) {
            const REAL d = x[0] - k[i];
            s1[i] += d;
            s2[i] += d * d;
        }
        if (!blend) continue;
        BITS y[4];
        for (int r = 0; r < 4; ++r) {
            const BITS computed = TO_BITS(a[i] * x[r] + b[i]);
            y[r] = masked ? (BITS)((computed & mask[i]) | (raw[r] & (BITS)~mask[i])) : computed;
        }
        y0[i] = y[0];
        if (rows > 1) y1[i] = y[1], y2[i] = y[2], y3[i] = y[3];
    }
}

static inline __attribute__((always_inline)) void NAME(forward_by)(const kasmina_forward_columns *c, void *const *y,
                                                                   const void *const *x, const int rows, int64_t n)
{
    if (!c->a)
        NAME(forward_rows)(c, y, x, rows, true, false, false, n);
    else if (!c->shift && !c->mask)
        NAME(forward_rows)(c, y, x, rows, false, true, false, n);
    else if (!c->shift)
        NAME(forward_rows)(c, y, x, rows, false, true, true, n);
    else if (!c->mask)
        NAME(forward_rows)(c, y, x, rows, true, true, false, n);
    else
        NAME(forward_rows)(c, y, x, rows, true, true, true, n);
}

KASMINA_CLONES static void NAME(forward)(const kasmina_forward_columns *c, void *const *y, const void *const *x,
                                         int count, int64_t n)
{
    if (count == KASMINA_ROWS_AT_ONCE) {
        NAME(forward_by)(c, y, x, KASMINA_ROWS_AT_ONCE, n);
        return;
    }
    for (int r = 0; r < count; ++r) NAME(forward_by)(c, y ? y + r : NULL, x + r, 1, n);
}

static inline __attribute__((always_inline)) void NAME(backward_rows)(const kasmina_backward_columns *c,
                                                                      void *const *out, const void *const *grads,
                                                                      const void *const *in, const int rows,
                                                                      const bool sum, const bool scale,
                                                                      const bool masked, int64_t n)
{
    const REAL *a = c->a;
    const BITS *mask = c->mask;
    REAL *u = c->u, *v = c->v;
    const BITS *const *gs = (const BITS *const *)grads, *const *xs = sum ? (const BITS *const *)in : gs;
    BITS *const *ys = (BITS *const *)out;
    ROWS(const BITS, g, gs, rows, true);
    ROWS(const BITS, x, xs, rows, true);
    ROWS(BITS, y, ys, rows, scale);
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) {
        const BITS raw[4] = {g0[i], g1[i], g2[i], g3[i]};
        const REAL g[4] = {TO_REAL(raw[0]), TO_REAL(raw[1]), TO_REAL(raw[2]), TO_REAL(raw[3])};
        if (sum && rows > 1) {
            u[i] += (g[0] * TO_REAL(x0[i]) + g[1] * TO_REAL(x1[i])) + (g[2] * TO_REAL(x2[i]) + g[3] * TO_REAL(x3[i]));
            v[i] += (g[0] + g[1]) + (g[2] + g[3]);
        } else if (sum) {
            u[i] += g[0] * TO_REAL(x0[i]);
            v[i] += g[0];
        }
        if (!scale) continue;
        BITS y[4];
        for (int r = 0; r < 4; ++r) {
            const BITS computed = TO_BITS(a[i] * g[r]);
            y[r] = masked ? (BITS)((computed & mask[i]) | (raw[r] & (BITS)~mask[i])) : computed;
        }
        y0[i] = y[0];
        if (rows > 1) y1[i] = y[1], y2[i] = y[2], y3[i] = y[3];
    }
}

static inline __attribute__((always_inline)) void NAME(backward_by)(const kasmina_backward_columns *c, void *const *dx,
                                                                    const void *const *g, const void *const *x,
                                                                    const int rows, int64_t n)
{
    if (!c->a)
        NAME(backward_rows)(c, dx, g, x, rows, true, false, false, n);
    else if (!c->u && !c->mask)
        NAME(backward_rows)(c, dx, g, x, rows, false, true, false, n);
    else if (!c->u)
        NAME(backward_rows)(c, dx, g, x, rows, false, true, true, n);
    else if (!c->mask)
        NAME(backward_rows)(c, dx, g, x, rows, true, true, false, n);
    else
        NAME(backward_rows)(c, dx, g, x, rows, true, true, true, n);
}

KASMINA_CLONES static void NAME(backward)(const kasmina_backward_columns *c, void *const *dx, const void *const *g,
                                          const void *const *x, int count, int64_t n)
{
    if (count == KASMINA_ROWS_AT_ONCE) {
        NAME(backward_by)(c, dx, g, x, KASMINA_ROWS_AT_ONCE, n);
        return;
    }
    for (int r = 0; r < count; ++r) NAME(backward_by)(c, dx ? dx + r : NULL, g + r, x ? x + r : NULL, 1, n);
}

const kasmina_fused NAME(kasmina_fused) = {.forward = NAME(forward), .backward = NAME(backward)};
