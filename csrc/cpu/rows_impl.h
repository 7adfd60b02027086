/* The loops of rows.h for one type: included by rows.c with REAL, REAL_MIN, REAL_MAX and NAME(f) defined. */

KASMINA_CLONES static void NAME(choose_shift)(void *shift, const void *row, int64_t n)
{
    REAL *restrict k = shift;
    const REAL *restrict x = row;
    for (int64_t i = 0; i < n; ++i) k[i] = x[i] >= -REAL_MAX && x[i] <= REAL_MAX ? x[i] : (REAL)0;
}

KASMINA_CLONES static bool NAME(flush)(double *restrict d1, double *restrict d2, void *sum1, void *sum2,
                                       const void *shift, const double *restrict origin, double count,
                                       uint8_t *restrict worth, int64_t n)
{
    REAL *restrict s1 = sum1, *restrict s2 = sum2;
    const REAL *restrict k = shift;
    int good = 1;
    for (int64_t i = 0; i < n; ++i) good &= (s2[i] >= REAL_MIN) & (s2[i] <= REAL_MAX);
    if (good) {
        for (int64_t i = 0; i < n; ++i) {
            double move = (double)k[i] - origin[i], first = s1[i], second = s2[i];
            d1[i] += first + count * move;
            d2[i] += second + 2.0 * move * first + count * move * move;
        }
    } else {
        for (int64_t i = 0; i < n; ++i) {
            worth[i] = s2[i] >= REAL_MIN && s2[i] <= REAL_MAX ? KASMINA_SUMS_GOOD
                       : s2[i] < REAL_MIN                     ? KASMINA_SUMS_VANISHED
                                                              : KASMINA_SUMS_OVERFLOWED;
            if (worth[i] != KASMINA_SUMS_GOOD) continue;
            double move = (double)k[i] - origin[i], first = s1[i], second = s2[i];
            d1[i] += first + count * move;
            d2[i] += second + 2.0 * move * first + count * move * move;
        }
    }
    for (int64_t i = 0; i < n; ++i) s1[i] = s2[i] = (REAL)0;
    return !good;
}

KASMINA_CLONES static void NAME(compare)(uint8_t *restrict varies, const void *shift, const void *row, int64_t n)
{
    const REAL *restrict k = shift, *restrict x = row;
    for (int64_t i = 0; i < n; ++i) varies[i] |= x[i] != k[i];
}

KASMINA_CLONES static void NAME(blend)(void *out, const void *in, const void *slope, const void *intercept, int64_t n)
{
    REAL *restrict y = out;
    const REAL *restrict x = in, *restrict a = slope, *restrict b = intercept;
    for (int64_t i = 0; i < n; ++i) y[i] = a[i] * x[i] + b[i];
}

KASMINA_CLONES static void NAME(subtract)(void *out, const void *in, const void *target, int64_t n)
{
    REAL *restrict r = out;
    const REAL *restrict x = in, *restrict t = target;
    for (int64_t i = 0; i < n; ++i) r[i] = x[i] - t[i];
}

KASMINA_CLONES static void NAME(products)(void *sum_u, void *sum_v, const void *const *gs, const void *const *xs,
                                          int count, int64_t n)
{
    REAL *restrict u = sum_u, *restrict v = sum_v;
    if (count == KASMINA_ROWS_AT_ONCE) {
        const REAL *restrict g0 = gs[0], *restrict g1 = gs[1], *restrict g2 = gs[2], *restrict g3 = gs[3];
        const REAL *restrict x0 = xs[0], *restrict x1 = xs[1], *restrict x2 = xs[2], *restrict x3 = xs[3];
        for (int64_t i = 0; i < n; ++i) {
            u[i] += (g0[i] * x0[i] + g1[i] * x1[i]) + (g2[i] * x2[i] + g3[i] * x3[i]);
            v[i] += (g0[i] + g1[i]) + (g2[i] + g3[i]);
        }
        return;
    }
    for (int r = 0; r < count; ++r) {
        const REAL *restrict g = gs[r], *restrict x = xs[r];
        for (int64_t i = 0; i < n; ++i) {
            u[i] += g[i] * x[i];
            v[i] += g[i];
        }
    }
}

KASMINA_CLONES static void NAME(drain)(double *restrict d, void *sum, int64_t n)
{
    REAL *restrict s = sum;
    for (int64_t i = 0; i < n; ++i) {
        d[i] += s[i];
        s[i] = (REAL)0;
    }
}

const kasmina_rows NAME(kasmina_rows) = {
    .size = sizeof(REAL),
    .choose_shift = NAME(choose_shift),
    .flush = NAME(flush),
    .compare = NAME(compare),
    .blend = NAME(blend),
    .subtract = NAME(subtract),
    .products = NAME(products),
    .drain = NAME(drain),
};
