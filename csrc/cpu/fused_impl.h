/*
 * The loops of fused.h for one type of activation and one instruction set: included by fused_types.h with REAL (what is
 * computed in), BITS (an unsigned integer as wide as an activation), WIDEN(activations), NARROW(reals), STREAM(address,
 * activations), VECTOR_BYTES (of reals), TARGET and NAME(f) defined.
 *
 * One pass with everything in registers; which parts of it are wanted is known when it is compiled. Elements are handled
 * as integers: a float register may quiet a signalling NaN that is only to be copied.
 */
#define LANES ((int)(VECTOR_BYTES / sizeof(REAL)))

typedef REAL NAME(reals) __attribute__((vector_size(VECTOR_BYTES)));
typedef BITS NAME(raw) __attribute__((vector_size(LANES * sizeof(BITS))));

#define INLINE TARGET static inline __attribute__((always_inline))

INLINE NAME(reals) NAME(reals_at)(const void *array, int64_t i)
{
    NAME(reals) v;
    memcpy(&v, (const REAL *)array + i, sizeof v);
    return v;
}

INLINE void NAME(set_reals)(void *array, int64_t i, NAME(reals) v)
{
    memcpy((REAL *)array + i, &v, sizeof v);
}

/* The first m lanes of a vector, the others 0: m is a constant but for the last columns of a row. */
INLINE NAME(raw) NAME(load)(const void *row, int64_t i, int m)
{
    const BITS *from = (const BITS *)row + i;
    NAME(raw) v = {0};
    if (m == LANES) {
        memcpy(&v, from, sizeof v);
        return v;
    }
    BITS part[LANES] = {0};
    for (int lanes = LANES / 2, at = 0; lanes; at += m & lanes, lanes /= 2)
        if (m & lanes) memcpy(part + at, from + at, (size_t)lanes * sizeof(BITS));
    memcpy(&v, part, sizeof v);
    return v;
}

INLINE void NAME(store)(void *row, int64_t i, NAME(raw) v, int m)
{
    BITS *to = (BITS *)row + i;
    if (m == LANES) {
        memcpy(to, &v, sizeof v);
        return;
    }
    BITS part[LANES];
    memcpy(part, &v, sizeof v);
    for (int lanes = LANES / 2, at = 0; lanes; at += m & lanes, lanes /= 2)
        if (m & lanes) memcpy(to + at, part + at, (size_t)lanes * sizeof(BITS));
}

/* `computed` where the mask says so, else x's own bits. */
INLINE NAME(raw) NAME(choose)(NAME(raw) mask, NAME(reals) computed, NAME(raw) x)
{
    return (NARROW(computed) & mask) | (x & ~mask);
}

/* What is done in a pass; constants wherever it is looked at. */
typedef struct {
    bool backward, sums, writes, streams;
    int rows; /* at once: KASMINA_ROWS_AT_ONCE or 1 */
} NAME(kind);

/* The terms t of some rows, added to a sum. */
INLINE void NAME(add)(void *sums, int64_t i, const NAME(reals) * t, int rows)
{
    const NAME(reals) added = rows == 1 ? t[0] : (t[0] + t[1]) + (t[2] + t[3]);
    NAME(set_reals)(sums, i, NAME(reals_at)(sums, i) + added);
}

/* m columns from column i on: `in` is x in a forward, g in a backward; results go to out[row]. */
INLINE void NAME(step)(const kasmina_columns *c, NAME(raw) * out, const char *in, const char *x, int64_t stride,
                       const NAME(kind) kind, int64_t i, int m)
{
    NAME(raw) raw[KASMINA_ROWS_AT_ONCE];
    NAME(reals) value[KASMINA_ROWS_AT_ONCE];
    for (int r = 0; r < kind.rows; ++r) {
        raw[r] = NAME(load)(in + r * stride, i, m);
        value[r] = WIDEN(raw[r]);
    }
    if (kind.sums) {
        NAME(reals) first[KASMINA_ROWS_AT_ONCE], second[KASMINA_ROWS_AT_ONCE];
        for (int r = 0; r < kind.rows; ++r) {
            if (kind.backward) {
                first[r] = value[r] * WIDEN(NAME(load)(x + r * stride, i, m));
                second[r] = value[r];
            } else {
                first[r] = value[r] - NAME(reals_at)(c->shift, i);
                second[r] = first[r] * first[r];
            }
        }
        NAME(add)(c->sum1, i, first, kind.rows);
        NAME(add)(c->sum2, i, second, kind.rows);
    }
    if (kind.writes) {
        const NAME(reals) a = NAME(reals_at)(c->a, i);
        const NAME(raw) mask = NAME(load)(c->mask, i, LANES);
        for (int r = 0; r < kind.rows; ++r) {
            const NAME(reals) scaled = a * value[r];
            out[r] = NAME(choose)(mask, kind.backward ? scaled : scaled + NAME(reals_at)(c->b, i), raw[r]);
        }
    }
}

/* The next rows of these columns are asked for while these are worked on. */
INLINE void NAME(prefetch)(const char *rows, int64_t stride, int64_t i)
{
    for (int r = 0; r < KASMINA_ROWS_AT_ONCE; ++r)
        __builtin_prefetch((const BITS *)(rows + (r + KASMINA_ROWS_AT_ONCE) * stride) + i, 0, 2);
}

INLINE void NAME(rows)(const kasmina_columns *columns, char *to, const char *in, const char *x, int64_t stride,
                       const NAME(kind) kind, int64_t n)
{
    const kasmina_columns c = *columns; /* the compiler knows that no store changes it */
    enum { PARTS = KASMINA_LINE / sizeof(NAME(raw)) };
    const bool asks = kind.rows > 1, asks_x = asks && kind.backward && kind.sums;
    NAME(raw) out[PARTS][KASMINA_ROWS_AT_ONCE];
    int64_t i = 0;
    /* Whole lines: a processor that must give up half a line that it has collected writes it to memory by itself. */
    for (; kind.streams && i + PARTS * LANES <= n; i += PARTS * LANES) {
        if (asks) NAME(prefetch)(in, stride, i);
        if (asks_x) NAME(prefetch)(x, stride, i);
        for (int part = 0; part < PARTS; ++part)
            NAME(step)(&c, out[part], in, x, stride, kind, i + part * LANES, LANES);
        for (int r = 0; r < kind.rows; ++r)
            for (int part = 0; part < PARTS; ++part) STREAM((BITS *)(to + r * stride) + i + part * LANES, out[part][r]);
    }
    for (; i + LANES <= n; i += LANES) {
        if (asks && i % (PARTS * LANES) == 0) NAME(prefetch)(in, stride, i);
        if (asks_x && i % (PARTS * LANES) == 0) NAME(prefetch)(x, stride, i);
        NAME(step)(&c, out[0], in, x, stride, kind, i, LANES);
        for (int r = 0; kind.writes && r < kind.rows; ++r) NAME(store)(to + r * stride, i, out[0][r], LANES);
    }
    if (i == n) return;
    NAME(step)(&c, out[0], in, x, stride, kind, i, (int)(n - i));
    for (int r = 0; kind.writes && r < kind.rows; ++r) NAME(store)(to + r * stride, i, out[0][r], (int)(n - i));
}

INLINE void NAME(pass)(const kasmina_columns *c, char *to, const char *in, const char *x, int64_t stride,
                       const bool backward, const int rows, int64_t n)
{
    const bool streams = c->streams && ((uintptr_t)to | (uintptr_t)stride) % KASMINA_LINE == 0;
    if (!c->a)
        NAME(rows)(c, to, in, x, stride, (NAME(kind)){backward, true, false, false, rows}, n);
    else if (!c->sum1 && streams)
        NAME(rows)(c, to, in, x, stride, (NAME(kind)){backward, false, true, true, rows}, n);
    else if (!c->sum1)
        NAME(rows)(c, to, in, x, stride, (NAME(kind)){backward, false, true, false, rows}, n);
    else if (streams)
        NAME(rows)(c, to, in, x, stride, (NAME(kind)){backward, true, true, true, rows}, n);
    else
        NAME(rows)(c, to, in, x, stride, (NAME(kind)){backward, true, true, false, rows}, n);
}

INLINE void NAME(either)(const kasmina_columns *c, char *to, const char *in, const char *x, int64_t stride,
                         const bool backward, int count, int64_t n)
{
    if (count == KASMINA_ROWS_AT_ONCE) {
        NAME(pass)(c, to, in, x, stride, backward, KASMINA_ROWS_AT_ONCE, n);
        return;
    }
    for (int64_t r = 0; r < count; ++r)
        NAME(pass)(c, to ? to + r * stride : NULL, in + r * stride, x ? x + r * stride : NULL, stride, backward, 1, n);
}

TARGET static void NAME(forward)(const kasmina_columns *c, void *y, const void *x, int64_t stride, int count, int64_t n)
{
    NAME(either)(c, y, x, NULL, stride, false, count, n);
}

TARGET static void NAME(backward)(const kasmina_columns *c, void *dx, const void *g, const void *x, int64_t stride,
                                  int count, int64_t n)
{
    NAME(either)(c, dx, g, x, stride, true, count, n);
}

static const kasmina_fused NAME(fused) = {.forward = NAME(forward), .backward = NAME(backward)};

#undef LANES
#undef INLINE
