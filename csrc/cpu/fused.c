#include "cpu/fused.h"

#include "cpu/convert.h"
#include "cpu/numbers.h"

/* p0 to p3: four rows of `from`, or its one row four times over; where none is wanted, `from` is not looked at. */
#define ROWS(type, p, from, rows, wanted)                                                        \
    type *p##0 = (wanted) ? (from)[0] : NULL, *p##1 = (wanted) && (rows) > 1 ? (from)[1] : p##0, \
         *p##2 = (wanted) && (rows) > 1 ? (from)[2] : p##0, *p##3 = (wanted) && (rows) > 1 ? (from)[3] : p##0

#define REAL float
#define BITS uint32_t
#define TO_REAL kasmina_float_from_bits
#define TO_BITS kasmina_bits_of_float
#define NAME(f) f##_f32
#include "cpu/fused_impl.h"
#undef BITS
#undef TO_REAL
#undef TO_BITS
#undef NAME

#define BITS uint16_t
#define TO_REAL kasmina_from_bfloat16
#define TO_BITS kasmina_to_bfloat16
#define NAME(f) f##_bf16
#include "cpu/fused_impl.h"
#undef REAL
#undef BITS
#undef TO_REAL
#undef TO_BITS
#undef NAME

#define REAL double
#define BITS uint64_t
#define TO_REAL kasmina_double_from_bits
#define TO_BITS kasmina_bits_of_double
#define NAME(f) f##_f64
#include "cpu/fused_impl.h"
