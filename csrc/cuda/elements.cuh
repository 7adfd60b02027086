/* The four element types as 16-byte vectors: decoding to the accumulation type, rounding back, storing them. */
#ifndef KASMINA_CUDA_ELEMENTS_CUH
#define KASMINA_CUDA_ELEMENTS_CUH

#include <float.h>

#include "kernels.h"
#include "cuda/ptx.cuh"

namespace kasmina
{

constexpr int VECTOR_BYTES = 16; /* the widest load there is */
constexpr int VECTOR_WORDS = VECTOR_BYTES / 4;

using vector_bits = uint32_t[VECTOR_WORDS];

__host__ __device__ constexpr int element_size(kasmina_dtype dtype)
{
    return dtype == KASMINA_FLOAT64 ? 8 : dtype == KASMINA_FLOAT32 ? 4 : 2;
}

template <kasmina_dtype D> struct element;

template <> struct element<KASMINA_FLOAT32> {
    using wide = float;
    using bits = uint32_t;

    static __device__ __forceinline__ void decode(const vector_bits &w, float (&v)[4])
    {
#pragma unroll
        for (int i = 0; i < 4; ++i) v[i] = __uint_as_float(w[i]);
    }
    static __device__ __forceinline__ void encode(const float (&v)[4], vector_bits &w)
    {
#pragma unroll
        for (int i = 0; i < 4; ++i) w[i] = __float_as_uint(v[i]);
    }
    static __device__ __forceinline__ float value(uint32_t bits)
    {
        return __uint_as_float(bits);
    }
    static __device__ __forceinline__ uint32_t rounded(float value)
    {
        return __float_as_uint(value);
    }
};

template <> struct element<KASMINA_FLOAT64> {
    using wide = double;
    using bits = uint64_t;

    static __device__ __forceinline__ void decode(const vector_bits &w, double (&v)[2])
    {
        v[0] = __hiloint2double((int)w[1], (int)w[0]);
        v[1] = __hiloint2double((int)w[3], (int)w[2]);
    }
    static __device__ __forceinline__ void encode(const double (&v)[2], vector_bits &w)
    {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            w[2 * i] = (uint32_t)__double2loint(v[i]);
            w[2 * i + 1] = (uint32_t)__double2hiint(v[i]);
        }
    }
    static __device__ __forceinline__ double value(uint64_t bits)
    {
        return __longlong_as_double((long long)bits);
    }
    static __device__ __forceinline__ uint64_t rounded(double value)
    {
        return (uint64_t)__double_as_longlong(value);
    }
};

template <> struct element<KASMINA_BFLOAT16> {
    using wide = float;
    using bits = uint16_t;

    static __device__ __forceinline__ void decode(const vector_bits &w, float (&v)[8])
    {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            v[2 * i] = __uint_as_float(w[i] << 16);
            v[2 * i + 1] = __uint_as_float(w[i] & 0xffff0000u);
        }
    }
    static __device__ __forceinline__ void encode(const float (&v)[8], vector_bits &w)
    {
#pragma unroll
        for (int i = 0; i < 4; ++i) w[i] = to_bfloat16_pair(v[2 * i], v[2 * i + 1]);
    }
    static __device__ __forceinline__ float value(uint16_t bits)
    {
        return from_bfloat16(bits);
    }
    static __device__ __forceinline__ uint16_t rounded(float value)
    {
        return to_bfloat16(value);
    }
};

template <> struct element<KASMINA_FLOAT16> {
    using wide = float;
    using bits = uint16_t;

    static __device__ __forceinline__ void decode(const vector_bits &w, float (&v)[8])
    {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            v[2 * i] = from_float16((uint16_t)w[i]);
            v[2 * i + 1] = from_float16((uint16_t)(w[i] >> 16));
        }
    }
    static __device__ __forceinline__ void encode(const float (&v)[8], vector_bits &w)
    {
#pragma unroll
        for (int i = 0; i < 4; ++i) w[i] = to_float16_pair(v[2 * i], v[2 * i + 1]);
    }
    static __device__ __forceinline__ float value(uint16_t bits)
    {
        return from_float16(bits);
    }
    static __device__ __forceinline__ uint16_t rounded(float value)
    {
        return to_float16(value);
    }
};

__device__ __forceinline__ void copy_vector(const vector_bits &from, vector_bits &to)
{
#pragma unroll
    for (int i = 0; i < VECTOR_WORDS; ++i) to[i] = from[i];
}

__device__ __forceinline__ void to_vector(const uint4 &from, vector_bits &to)
{
    to[0] = from.x, to[1] = from.y, to[2] = from.z, to[3] = from.w;
}

/* All bits of the elements with a bit in `chosen`. */
template <int VEC> __device__ __forceinline__ void element_mask(unsigned chosen, vector_bits &mask)
{
#pragma unroll
    for (int i = 0; i < VECTOR_WORDS; ++i) {
        if constexpr (VEC == 8)
            mask[i] = (chosen >> 2 * i & 1u) * 0xffffu + (chosen >> (2 * i + 1) & 1u) * 0xffff0000u;
        else
            mask[i] = 0u - (chosen >> i * VEC / VECTOR_WORDS & 1u);
    }
}

/* Bits outside the mask become those of `other`. */
__device__ __forceinline__ void replace_elements(const vector_bits &mask, const vector_bits &other, vector_bits &vector)
{
#pragma unroll
    for (int i = 0; i < VECTOR_WORDS; ++i) vector[i] = (vector[i] & mask[i]) | (other[i] & ~mask[i]);
}

/* A bit for each element that is neither 0.0 nor -0.0. Not for float64. */
template <int VEC> __device__ __forceinline__ unsigned nonzero_elements(const vector_bits &vector)
{
    unsigned found = 0;
#pragma unroll
    for (int i = 0; i < VECTOR_WORDS; ++i) {
        if constexpr (VEC == 8) {
            if (vector[i] & 0x7fffu) found |= 1u << 2 * i;
            if (vector[i] & 0x7fff0000u) found |= 2u << 2 * i;
        } else {
            static_assert(VEC == 4, "an element a word");
            if (vector[i] & 0x7fffffffu) found |= 1u << i;
        }
    }
    return found;
}

/* Of a vector's elements, those with a bit in `mask`. */
template <typename bits> __device__ __forceinline__ void store_elements(bits *p, const vector_bits &w, unsigned mask)
{
    constexpr int VEC = VECTOR_BYTES / sizeof(bits);
#pragma unroll
    for (int j = 0; j < VEC; ++j) {
        if (!(mask >> j & 1u)) continue;
        if constexpr (sizeof(bits) == 2)
            p[j] = (bits)(w[j / 2] >> (j % 2 * 16));
        else if constexpr (sizeof(bits) == 4)
            p[j] = w[j];
        else
            p[j] = w[2 * j] | (uint64_t)w[2 * j + 1] << 32;
    }
}

/* ---- One number of a type known at run time ---- */

template <typename T> __device__ __forceinline__ T load_number(kasmina_dtype dtype, const void *array, int64_t index)
{
    switch (dtype) {
    case KASMINA_FLOAT32: return (T)((const float *)array)[index];
    case KASMINA_FLOAT64: return (T)((const double *)array)[index];
    case KASMINA_BFLOAT16: return (T)from_bfloat16(((const uint16_t *)array)[index]);
    case KASMINA_FLOAT16: return (T)from_float16(((const uint16_t *)array)[index]);
    }
    return (T)0;
}

/* Rounded once, to nearest even: float32 rounded to odd keeps what a second rounding must know. */
__device__ __forceinline__ float round_to_odd(double value)
{
    const float truncated = __double2float_rz(value);
    const bool exact = (double)truncated == value || value != value;
    return exact ? truncated : __uint_as_float(__float_as_uint(truncated) | 1u);
}

__device__ __forceinline__ void store_number(kasmina_dtype dtype, void *array, int64_t index, double value)
{
    switch (dtype) {
    case KASMINA_FLOAT32: ((float *)array)[index] = (float)value; break;
    case KASMINA_FLOAT64: ((double *)array)[index] = value; break;
    case KASMINA_BFLOAT16: ((uint16_t *)array)[index] = to_bfloat16(round_to_odd(value)); break;
    case KASMINA_FLOAT16: ((uint16_t *)array)[index] = to_float16(round_to_odd(value)); break;
    }
}

/* Products and sums that no compiler flag may contract. */
__device__ __forceinline__ float multiply(float a, float b)
{
    return __fmul_rn(a, b);
}

__device__ __forceinline__ double multiply(double a, double b)
{
    return __dmul_rn(a, b);
}

__device__ __forceinline__ float add(float a, float b)
{
    return __fadd_rn(a, b);
}

__device__ __forceinline__ double add(double a, double b)
{
    return __dadd_rn(a, b);
}

/* a * b + c with one rounding: for sums only, where fewer instructions and more digits are welcome. */
__device__ __forceinline__ float fused(float a, float b, float c)
{
    return __fmaf_rn(a, b, c);
}

__device__ __forceinline__ double fused(double a, double b, double c)
{
    return __fma_rn(a, b, c);
}

__device__ __forceinline__ bool is_finite(float value)
{
    return fabsf(value) <= FLT_MAX;
}

__device__ __forceinline__ bool is_finite(double value)
{
    return fabs(value) <= DBL_MAX;
}

} /* namespace kasmina */

#endif
