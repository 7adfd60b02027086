/* Rows of the four dtypes to and from the type that the kernels compute in. */
#ifndef KASMINA_CPU_CONVERT_H
#define KASMINA_CPU_CONVERT_H

#include <stddef.h>
#include <stdint.h>

#include "kernels.h"

/*
 * One clone per instruction set, chosen when the module is loaded, by what the processor can do: names of processors
 * (haswell, skylake-avx512), which older compilers must make do with, match nobody else's.
 */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(KASMINA_NO_CLONES)
#if !defined(__clang__) && __GNUC__ >= 12
#define KASMINA_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define KASMINA_CLONES __attribute__((target_clones("default", "arch=haswell", "arch=skylake-avx512")))
#endif
#else
#define KASMINA_CLONES
#endif

static inline size_t kasmina_element_size(kasmina_dtype dtype)
{
    return dtype == KASMINA_FLOAT64 ? 8 : dtype == KASMINA_FLOAT32 ? 4 : 2;
}

/* dst[0, n) = the bfloat16 or float16 numbers at src, exactly. */
void kasmina_widen(kasmina_dtype dtype, float *restrict dst, const void *restrict src, int64_t n);

/* The bfloat16 or float16 numbers dst[0, n) = src rounded to nearest even; NaN stays NaN, its payload does not. */
void kasmina_narrow(kasmina_dtype dtype, void *restrict dst, const float *restrict src, int64_t n);

/* Element `index` of an array of any of the four dtypes. */
double kasmina_load_scalar(kasmina_dtype dtype, const void *array, int64_t index);
void kasmina_store_scalar(kasmina_dtype dtype, void *array, int64_t index, double value);

#endif
