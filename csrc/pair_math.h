/* Moments of pairs of numbers (x, t), feature by feature: what C and CUDA share. */
#ifndef KASMINA_PAIR_MATH_H
#define KASMINA_PAIR_MATH_H

#include "kernels.h"
#include "seed_math.h"
#include "telemetry_math.h"

/* What a feature's sums are taken about, so that a large mean costs no digits. */
typedef struct {
    double x, t;
} kasmina_pair_shift;

/* From the feature's first pair, wherever it is asked for; of a pair that is left out nothing may be told. */
KASMINA_FN kasmina_pair_shift kasmina_pair_origin(double x, double t)
{
    const bool counts = (x - x) + (t - t) == 0.0;
    kasmina_pair_shift s = {counts ? kasmina_origin(x) : 0.0, counts ? kasmina_origin(t) : 0.0};
    return s;
}

/* Sums over pairs of deviations dx = x - shift_x and dt = t - shift_t. */
typedef struct {
    double count, x, t, xx, tt, xt;
} kasmina_pair_sums;

KASMINA_FN kasmina_pair_sums kasmina_pair_union(kasmina_pair_sums a, kasmina_pair_sums b)
{
    kasmina_pair_sums s = {a.count + b.count, a.x + b.x, a.t + b.t, a.xx + b.xx, a.tt + b.tt, a.xt + b.xt};
    return s;
}

/* Not below 0, where rounding would leave it; inf - inf is a sum of squares beyond float64. */
KASMINA_FN double kasmina_pair_square(double squares, double sum, double count)
{
    const double m2 = squares - sum * sum / count;
    if (!(m2 >= 0.0)) return m2 < 0.0 ? 0.0 : HUGE_VAL;
    return m2;
}

/* Join `s`, taken about `shift`, into one feature's moments [6]; an empty part changes no bit. Chan et al. (1979). */
KASMINA_FN void kasmina_pair_join(double *m, kasmina_pair_sums s, kasmina_pair_shift shift)
{
    if (s.count == 0.0) return;
    const double mean_x = shift.x + s.x / s.count, mean_t = shift.t + s.t / s.count;
    const double old = m[KASMINA_PAIR_COUNT], count = old + s.count, share = s.count / count;
    const double dx = old == 0.0 ? 0.0 : mean_x - m[KASMINA_PAIR_MEAN_X];
    const double dt = old == 0.0 ? 0.0 : mean_t - m[KASMINA_PAIR_MEAN_T];
    const double between = old * share;
    m[KASMINA_PAIR_COUNT] = count;
    m[KASMINA_PAIR_MEAN_X] = old == 0.0 ? mean_x : m[KASMINA_PAIR_MEAN_X] + dx * share;
    m[KASMINA_PAIR_MEAN_T] = old == 0.0 ? mean_t : m[KASMINA_PAIR_MEAN_T] + dt * share;
    m[KASMINA_PAIR_M2_X] += kasmina_pair_square(s.xx, s.x, s.count) + dx * dx * between;
    m[KASMINA_PAIR_M2_T] += kasmina_pair_square(s.tt, s.t, s.count) + dt * dt * between;
    m[KASMINA_PAIR_C_XT] += s.xt - s.x * s.t / s.count + dx * dt * between;
}

#endif
