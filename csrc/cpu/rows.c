#include "cpu/rows.h"

#include <float.h>

#include "cpu/convert.h"

#define REAL float
#define REAL_MIN FLT_MIN
#define REAL_MAX FLT_MAX
#define NAME(f) f##_f32
#include "cpu/rows_impl.h"
#undef REAL
#undef REAL_MIN
#undef REAL_MAX
#undef NAME

#define REAL double
#define REAL_MIN DBL_MIN
#define REAL_MAX DBL_MAX
#define NAME(f) f##_f64
#include "cpu/rows_impl.h"

KASMINA_CLONES void kasmina_restore_16(uint16_t *restrict out, const uint16_t *restrict other,
                                       const uint16_t *restrict mask, int64_t n)
{
    for (int64_t i = 0; i < n; ++i) out[i] = (uint16_t)((out[i] & mask[i]) | (other[i] & ~mask[i]));
}
