/* Moments of pairs of numbers (x, t), feature by feature: what C and CUDA share. */
#ifndef KASMINA_PAIR_MATH_H
#define KASMINA_PAIR_MATH_H

#include "kernels.h"
#include "seed_math.h"

/* Sums over pairs of deviations dx = x - shift_x and dt = t - shift_t. */
typedef struct {
    double count, x, t, xx, tt, xt;
} kasmina_pair_sums;

KASMINA_FN kasmina_pair_sums kasmina_pair_union(kasmina_pair_sums a, kasmina_pair_sums b)
{
    kasmina_pair_sums s = {a.count + b.count, a.x + b.x, a.t + b.t, a.xx + b.xx, a.tt + b.tt, a.xt + b.xt};
    return s;
}

/* Not below 0, where rounding would leave it. */
KASMINA_FN double kasmina_pair_square(double squares, double sum, double count)
{
    double m2 = squares - sum * (sum / count);
    return m2 < 0.0 ? 0.0 : m2;
}

/* Join `s`, taken about the shifts, into one feature's moments [6]; an empty part changes no bit. Chan et al. (1979). */
KASMINA_FN void kasmina_pair_join(double *m, kasmina_pair_sums s, double shift_x, double shift_t)
{
    if (s.count == 0.0) return;
    const double mean_x = shift_x + s.x / s.count, mean_t = shift_t + s.t / s.count;
    const double old = m[KASMINA_PAIR_COUNT], count = old + s.count, share = s.count / count;
    const double dx = old == 0.0 ? 0.0 : mean_x - m[KASMINA_PAIR_MEAN_X];
    const double dt = old == 0.0 ? 0.0 : mean_t - m[KASMINA_PAIR_MEAN_T];
    const double between = old * share;
    m[KASMINA_PAIR_COUNT] = count;
    m[KASMINA_PAIR_MEAN_X] = old == 0.0 ? mean_x : m[KASMINA_PAIR_MEAN_X] + dx * share;
    m[KASMINA_PAIR_MEAN_T] = old == 0.0 ? mean_t : m[KASMINA_PAIR_MEAN_T] + dt * share;
    m[KASMINA_PAIR_M2_X] += kasmina_pair_square(s.xx, s.x, s.count) + dx * dx * between;
    m[KASMINA_PAIR_M2_T] += kasmina_pair_square(s.tt, s.t, s.count) + dt * dt * between;
    m[KASMINA_PAIR_C_XT] += s.xt - s.x * (s.t / s.count) + dx * dt * between;
}

#endif
