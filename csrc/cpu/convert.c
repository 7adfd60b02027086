#include "cpu/convert.h"

#include "cpu/clones.h"
#include "cpu/numbers.h"

#if KASMINA_CHOOSES
#include <immintrin.h>
#endif

KASMINA_CLONES static void widen_bfloat16(float *restrict dst, const uint16_t *restrict src, int64_t n)
{
    for (int64_t i = 0; i < n; ++i) dst[i] = kasmina_from_bfloat16(src[i]);
}

static void widen_float16_portable(float *restrict dst, const uint16_t *restrict src, int64_t n)
{
    for (int64_t i = 0; i < n; ++i) dst[i] = kasmina_from_float16(src[i]);
}

#if KASMINA_CHOOSES

__attribute__((target("avx,f16c"))) static void widen_float16_f16c(float *restrict dst, const uint16_t *restrict src,
                                                                   int64_t n)
{
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) _mm256_storeu_ps(dst + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(src + i))));
    widen_float16_portable(dst + i, src + i, n - i);
}

static void widen_float16(float *restrict dst, const uint16_t *restrict src, int64_t n)
{
    (__builtin_cpu_supports("f16c") ? widen_float16_f16c : widen_float16_portable)(dst, src, n);
}

#else
#define widen_float16 widen_float16_portable
#endif

/* ---- Any dtype ---- */

void kasmina_widen(kasmina_dtype dtype, float *restrict dst, const void *restrict src, int64_t n)
{
    (dtype == KASMINA_BFLOAT16 ? widen_bfloat16 : widen_float16)(dst, src, n);
}

double kasmina_load_scalar(kasmina_dtype dtype, const void *array, int64_t index)
{
    switch (dtype) {
    case KASMINA_FLOAT32: return ((const float *)array)[index];
    case KASMINA_FLOAT64: return ((const double *)array)[index];
    case KASMINA_BFLOAT16: return kasmina_from_bfloat16(((const uint16_t *)array)[index]);
    default: return kasmina_from_float16(((const uint16_t *)array)[index]);
    }
}

void kasmina_store_scalar(kasmina_dtype dtype, void *array, int64_t index, double value)
{
    switch (dtype) {
    case KASMINA_FLOAT32: ((float *)array)[index] = (float)value; break;
    case KASMINA_FLOAT64: ((double *)array)[index] = value; break;
    case KASMINA_BFLOAT16: ((uint16_t *)array)[index] = kasmina_to_bfloat16((float)value); break;
    default: ((uint16_t *)array)[index] = kasmina_to_float16((float)value); break;
    }
}
