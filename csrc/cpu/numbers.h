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

#endif
