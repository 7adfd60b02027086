/* The telemetry accumulator's arithmetic, shared by C and CUDA. */
#ifndef KASMINA_TELEMETRY_MATH_H
#define KASMINA_TELEMETRY_MATH_H

#include <float.h>
#include <math.h>

#include "kernels.h"
#include "seed_math.h"

/* Moments of a set of numbers: how many, their mean, the sum of squared deviations from it. */
typedef struct {
    double count, mean, m2;
} kasmina_moments;

/* Beyond, 1e8 ordinary numbers about a float64 origin sum to infinity; about 0 they do not. */
#define KASMINA_LARGEST_ORIGIN 1e300

/* The number that a seed's sums are taken about, from its first element: the same wherever it is asked for. */
KASMINA_FN double kasmina_origin(double first)
{
    return fabs(first) < KASMINA_LARGEST_ORIGIN ? first : 0.0;
}

/* The moments of `count` numbers from S1 = sum (x - shift) and S2 = sum (x - shift)^2. */
KASMINA_FN kasmina_moments kasmina_shifted_moments(double count, double shift, double s1, double s2)
{
    kasmina_moments m = {count, 0.0, 0.0};
    if (count == 0.0) return m;
    if (!(fabs(s1) <= DBL_MAX)) {
        /* Only float64 numbers near the end of the range: the mean saturates, M2 is infinite. */
        m.mean = s1 > 0.0 ? DBL_MAX : s1 < 0.0 ? -DBL_MAX : 0.0;
        m.m2 = HUGE_VAL;
        return m;
    }
    m.mean = shift + s1 / count;
    m.m2 = s2 - s1 * (s1 / count);
    /* Rounding can leave a little below 0; inf - inf is a sum of squares beyond float64. */
    if (!(m.m2 >= 0.0)) m.m2 = m.m2 < 0.0 ? 0.0 : HUGE_VAL;
    return m;
}

/* Moments of a union from the moments of its parts (Chan, Golub and LeVeque, 1979). An empty part changes no bit. */
KASMINA_FN kasmina_moments kasmina_join_moments(kasmina_moments a, kasmina_moments b)
{
    if (b.count == 0.0) return a;
    if (a.count == 0.0) return b;
    double count = a.count + b.count, delta = b.mean - a.mean, share = b.count / count;
    kasmina_moments m = {count, a.mean + delta * share, a.m2 + b.m2 + delta * delta * a.count * share};
    /* Means at opposite ends of the range: their distance overflows, their average does not. */
    if (!(fabs(delta) <= DBL_MAX)) m.mean = a.mean * (1.0 - share) + b.mean * share;
    return m;
}

/* Join moments, batches and non-finite elements into one seed's accumulator [5]. */
KASMINA_FN void kasmina_accumulate(double *telemetry, kasmina_moments added, double batches, double nonfinite)
{
    kasmina_moments old = {telemetry[KASMINA_COUNT], telemetry[KASMINA_MEAN], telemetry[KASMINA_M2]};
    kasmina_moments m = kasmina_join_moments(old, added);
    telemetry[KASMINA_COUNT] = m.count;
    telemetry[KASMINA_MEAN] = m.mean;
    telemetry[KASMINA_M2] = m.m2;
    telemetry[KASMINA_BATCHES] += batches;
    telemetry[KASMINA_NONFINITE] += nonfinite;
}

/* (mean, variance, std) of one seed's accumulator into out[3]; NaN where nothing was counted. */
KASMINA_FN void kasmina_reduce(const double *telemetry, double *out)
{
    bool measured = telemetry[KASMINA_COUNT] > 0.0;
    double variance = measured ? telemetry[KASMINA_M2] / telemetry[KASMINA_COUNT] : (double)NAN;
    out[0] = measured ? telemetry[KASMINA_MEAN] : (double)NAN;
    out[1] = variance;
    out[2] = sqrt(variance);
}

#endif
