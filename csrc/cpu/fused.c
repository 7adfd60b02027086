#include "cpu/fused.h"

#include "cpu/convert.h"
#include "cpu/numbers.h"

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
