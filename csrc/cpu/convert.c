#include "cpu/convert.h"

#include "cpu/numbers.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(KASMINA_NO_CLONES)
#define KASMINA_F16C 1
#include <immintrin.h>
#endif

KASMINA_CLONES static void widen_bfloat16(float *restrict dst, const uint16_t *restrict src, int64_t n)
{
    for (int64_t i = 0; i < n; ++i) dst[i] = kasmina_from_bfloat16(src[i]);
}

KASMINA_CLONES static void narrow_bfloat16(uint16_t *restrict dst, const float *restrict src, int64_t n)
{
    for (int64_t i = 0; i < n; ++i) dst[i] = kasmina_to_bfloat16(src[i]);
}

/* ---- float16: in bits, so that no compiler support is needed; F16C where the machine has it ---- */

static inline float from_float16(uint16_t half)
{
    uint32_t sign = (uint32_t)(half & 0x8000u) << 16, magnitude = half & 0x7fffu;
    if (magnitude >= 0x7c00u) return kasmina_float_from_bits(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
    if (magnitude >= 0x0400u) return kasmina_float_from_bits(sign | ((magnitude << 13) + 0x38000000u));
    /* Subnormal: the magnitude counts units of 2^-24. */
    float value = (float)magnitude * 0x1p-24f;
    return sign ? -value : value;
}

static inline uint16_t to_float16(float value)
{
    uint32_t bits = kasmina_bits_of_float(value), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return (uint16_t)(sign | 0x7e00u);
    if (magnitude >= 0x47800000u) return (uint16_t)(sign | 0x7c00u); /* 2^16 and more */
    if (magnitude < 0x38800000u) {
        /* Below 2^-14: adding 0.5 leaves the number, rounded to units of 2^-24, in the low bits. */
        uint32_t shifted = kasmina_bits_of_float(kasmina_float_from_bits(magnitude) + 0.5f) - 0x3f000000u;
        return (uint16_t)(sign | shifted);
    }
    uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
    return (uint16_t)(sign | (rounded - 0x38000000u) >> 13);
}

static void widen_float16_portable(float *restrict dst, const uint16_t *restrict src, int64_t n)
{
    for (int64_t i = 0; i < n; ++i) dst[i] = from_float16(src[i]);
}

static void narrow_float16_portable(uint16_t *restrict dst, const float *restrict src, int64_t n)
{
    for (int64_t i = 0; i < n; ++i) dst[i] = to_float16(src[i]);
}

#ifdef KASMINA_F16C

__attribute__((target("avx,f16c"))) static void widen_float16_f16c(float *restrict dst, const uint16_t *restrict src,
                                                                   int64_t n)
{
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) _mm256_storeu_ps(dst + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(src + i))));
    widen_float16_portable(dst + i, src + i, n - i);
}

__attribute__((target("avx,f16c"))) static void narrow_float16_f16c(uint16_t *restrict dst, const float *restrict src,
                                                                    int64_t n)
{
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
        _mm_storeu_si128((__m128i *)(dst + i),
                         _mm256_cvtps_ph(_mm256_loadu_ps(src + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    narrow_float16_portable(dst + i, src + i, n - i);
}

static void widen_float16(float *restrict dst, const uint16_t *restrict src, int64_t n)
{
    (__builtin_cpu_supports("f16c") ? widen_float16_f16c : widen_float16_portable)(dst, src, n);
}

static void narrow_float16(uint16_t *restrict dst, const float *restrict src, int64_t n)
{
    (__builtin_cpu_supports("f16c") ? narrow_float16_f16c : narrow_float16_portable)(dst, src, n);
}

#else
#define widen_float16 widen_float16_portable
#define narrow_float16 narrow_float16_portable
#endif

/* ---- Any dtype ---- */

void kasmina_widen(kasmina_dtype dtype, float *restrict dst, const void *restrict src, int64_t n)
{
    (dtype == KASMINA_BFLOAT16 ? widen_bfloat16 : widen_float16)(dst, src, n);
}

void kasmina_narrow(kasmina_dtype dtype, void *restrict dst, const float *restrict src, int64_t n)
{
    (dtype == KASMINA_BFLOAT16 ? narrow_bfloat16 : narrow_float16)(dst, src, n);
}

double kasmina_load_scalar(kasmina_dtype dtype, const void *array, int64_t index)
{
    switch (dtype) {
    case KASMINA_FLOAT32: return ((const float *)array)[index];
    case KASMINA_FLOAT64: return ((const double *)array)[index];
    case KASMINA_BFLOAT16: return kasmina_from_bfloat16(((const uint16_t *)array)[index]);
    default: return from_float16(((const uint16_t *)array)[index]);
    }
}

void kasmina_store_scalar(kasmina_dtype dtype, void *array, int64_t index, double value)
{
    switch (dtype) {
    case KASMINA_FLOAT32: ((float *)array)[index] = (float)value; break;
    case KASMINA_FLOAT64: ((double *)array)[index] = value; break;
    case KASMINA_BFLOAT16: ((uint16_t *)array)[index] = kasmina_to_bfloat16((float)value); break;
    default: ((uint16_t *)array)[index] = to_float16((float)value); break;
    }
}
