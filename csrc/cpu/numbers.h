/* Numbers and their bits. */
#ifndef KASMINA_CPU_NUMBERS_H
#define KASMINA_CPU_NUMBERS_H

#include <stdint.h>
#include <string.h>

static inline float kasmina_float_from_bits(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint32_t kasmina_bits_of_float(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline double kasmina_double_from_bits(uint64_t bits)
{
    double value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint64_t kasmina_bits_of_double(double value)
{
    uint64_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* bfloat16 is the upper half of a float32. */
static inline float kasmina_from_bfloat16(uint16_t half)
{
    return kasmina_float_from_bits((uint32_t)half << 16);
}

/* To nearest even; NaN stays NaN, its payload does not. */
static inline uint16_t kasmina_to_bfloat16(float value)
{
    uint32_t bits = kasmina_bits_of_float(value);
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

/* float16 in bits, so that no compiler support is needed. */
static inline float kasmina_from_float16(uint16_t half)
{
    uint32_t sign = (uint32_t)(half & 0x8000u) << 16, magnitude = half & 0x7fffu;
    if (magnitude >= 0x7c00u) return kasmina_float_from_bits(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
    if (magnitude >= 0x0400u) return kasmina_float_from_bits(sign | ((magnitude << 13) + 0x38000000u));
    /* Subnormal: the magnitude counts units of 2^-24. */
    float value = (float)magnitude * 0x1p-24f;
    return sign ? -value : value;
}

/* To nearest even; NaN stays NaN, its payload does not. */
static inline uint16_t kasmina_to_float16(float value)
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

#endif
