#include "cpu/rows.h"

#include <float.h>

#include "cpu/clones.h"

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
