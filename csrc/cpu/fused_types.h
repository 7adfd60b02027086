/*
 * The loops of fused_impl.h for each type of activation, for one instruction set: included by fused.c with VECTOR_BYTES
 * (64: AVX-512, 32: AVX2 and F16C, 16: what every processor has), TARGET (the attribute of its functions) and ISA(f)
 * defined.
 */
typedef float ISA(floats) __attribute__((vector_size(VECTOR_BYTES)));
typedef uint32_t ISA(words) __attribute__((vector_size(VECTOR_BYTES)));
typedef uint16_t ISA(halves) __attribute__((vector_size(VECTOR_BYTES / 2)));

#define INLINE TARGET static inline __attribute__((always_inline))

INLINE ISA(floats) ISA(from_bfloat16)(ISA(halves) v)
{
#if VECTOR_BYTES == 64
    /* Each into the upper half of its lane, zero below: one instruction. */
    const __m512i to = _mm512_set_epi16(15, 0, 14, 0, 13, 0, 12, 0, 11, 0, 10, 0, 9, 0, 8, 0, 7, 0, 6, 0, 5, 0, 4, 0, 3,
                                        0, 2, 0, 1, 0, 0, 0);
    return (ISA(floats))_mm512_maskz_permutexvar_epi16(0xaaaaaaaau, to, _mm512_castsi256_si512((__m256i)v));
#elif VECTOR_BYTES == 32
    return (ISA(floats))_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)v), 16);
#else
    return (ISA(floats))(__builtin_convertvector(v, ISA(words)) << 16);
#endif
}

/* As kasmina_to_bfloat16. */
INLINE ISA(halves) ISA(to_bfloat16)(ISA(floats) v)
{
#if VECTOR_BYTES == 64
    const __m512i bits = (__m512i)v;
    const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
    const __mmask16 number = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_ORD_Q);
    const __m512i down = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
    const __m512i rounded = _mm512_mask_add_epi32(down, odd, bits, _mm512_set1_epi32(0x8000));
    return (ISA(halves))_mm512_cvtepi32_epi16(_mm512_mask_srli_epi32(_mm512_set1_epi32(0x7fc0), number, rounded, 16));
#else
    const ISA(words) bits = (ISA(words))v, rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const ISA(words) nan = (ISA(words))(v != v), chosen = (nan & 0x7fc0u) | (rounded & ~nan);
#if VECTOR_BYTES == 32
    /* Packing works within each half of a register: the quarters that hold numbers are 0 and 2. */
    const __m256i packed = _mm256_packus_epi32((__m256i)chosen, (__m256i)chosen);
    return (ISA(halves))_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
#else
    return __builtin_convertvector(chosen, ISA(halves));
#endif
#endif
}

INLINE ISA(floats) ISA(from_float16)(ISA(halves) v)
{
#if VECTOR_BYTES == 64
    return (ISA(floats))_mm512_cvtph_ps((__m256i)v);
#elif VECTOR_BYTES == 32
    return (ISA(floats))_mm256_cvtph_ps((__m128i)v);
#else
    ISA(floats) out = {0};
    for (int lane = 0; lane < VECTOR_BYTES / 4; ++lane) out[lane] = kasmina_from_float16(v[lane]);
    return out;
#endif
}

INLINE ISA(halves) ISA(to_float16)(ISA(floats) v)
{
#if VECTOR_BYTES == 64
    return (ISA(halves))_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif VECTOR_BYTES == 32
    return (ISA(halves))_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    ISA(halves) out = {0};
    for (int lane = 0; lane < VECTOR_BYTES / 4; ++lane) out[lane] = kasmina_to_float16(v[lane]);
    return out;
#endif
}

#undef INLINE

/* Stores past the caches, of vectors as long as VECTOR_BYTES and half of it. */
#if !KASMINA_STREAMS
#define STREAM_WHOLE(to, v) memcpy(to, &(v), sizeof(v))
#define STREAM_HALF(to, v) memcpy(to, &(v), sizeof(v))
#elif VECTOR_BYTES == 64
#define STREAM_WHOLE(to, v) _mm512_stream_si512((void *)(to), (__m512i)(v))
#define STREAM_HALF(to, v) _mm256_stream_si256((void *)(to), (__m256i)(v))
#elif VECTOR_BYTES == 32
#define STREAM_WHOLE(to, v) _mm256_stream_si256((void *)(to), (__m256i)(v))
#define STREAM_HALF(to, v) _mm_stream_si128((void *)(to), (__m128i)(v))
#else
#define STREAM_WHOLE(to, v) _mm_stream_si128((void *)(to), (__m128i)(v))
#define STREAM_HALF(to, v) _mm_stream_si64((void *)(to), (long long)(v))
#endif

#define REAL float
#define BITS uint32_t
#define NAME(f) ISA(f##_f32)
#define WIDEN(v) ((ISA(floats))(v))
#define NARROW(v) ((ISA(words))(v))
#define STREAM STREAM_WHOLE
#include "cpu/fused_impl.h"
#undef BITS
#undef NAME
#undef WIDEN
#undef NARROW
#undef STREAM

#define BITS uint16_t
#define NAME(f) ISA(f##_bf16)
#define WIDEN ISA(from_bfloat16)
#define NARROW ISA(to_bfloat16)
#define STREAM STREAM_HALF
#include "cpu/fused_impl.h"
#undef NAME
#undef WIDEN
#undef NARROW

#define NAME(f) ISA(f##_f16)
#define WIDEN ISA(from_float16)
#define NARROW ISA(to_float16)
#include "cpu/fused_impl.h"
#undef REAL
#undef BITS
#undef NAME
#undef WIDEN
#undef NARROW
#undef STREAM

#define REAL double
#define BITS uint64_t
#define NAME(f) ISA(f##_f64)
#define WIDEN(v) ((NAME(reals))(v))
#define NARROW(v) ((NAME(raw))(v))
#define STREAM STREAM_WHOLE
#include "cpu/fused_impl.h"
#undef REAL
#undef BITS
#undef NAME
#undef WIDEN
#undef NARROW
#undef STREAM

static const kasmina_fused *ISA(find)(kasmina_dtype dtype)
{
    switch (dtype) {
    case KASMINA_FLOAT32: return &ISA(fused_f32);
    case KASMINA_FLOAT64: return &ISA(fused_f64);
    case KASMINA_BFLOAT16: return &ISA(fused_bf16);
    case KASMINA_FLOAT16: return &ISA(fused_f16);
    }
    return NULL;
}

#undef STREAM_WHOLE
#undef STREAM_HALF
#undef VECTOR_BYTES
#undef TARGET
#undef ISA
