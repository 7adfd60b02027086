/* Rows of the four dtypes to and from the type that the kernels compute in. */
#ifndef KASMINA_CPU_CONVERT_H
#define KASMINA_CPU_CONVERT_H

#include <stddef.h>
#include <stdint.h>

#include "kernels.h"

static inline size_t kasmina_element_size(kasmina_dtype dtype)
{
    return dtype == KASMINA_FLOAT64 ? 8 : dtype == KASMINA_FLOAT32 ? 4 : 2;
}

/* dst[0, n) = the bfloat16 or float16 numbers at src, exactly. */
void kasmina_widen(kasmina_dtype dtype, float *restrict dst, const void *restrict src, int64_t n);

/* Element `index` of an array of any of the four dtypes. */
double kasmina_load_scalar(kasmina_dtype dtype, const void *array, int64_t index);
void kasmina_store_scalar(kasmina_dtype dtype, void *array, int64_t index, double value);

#endif
