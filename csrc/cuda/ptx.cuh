/*
 * The instructions that CUDA C++ has no words for: loads that bypass L1, conversions of the 16-bit
 * formats (sm_75 lacks some of them), and the dependent launch of sm_90.
 */
#ifndef KASMINA_CUDA_PTX_CUH
#define KASMINA_CUDA_PTX_CUH

#include <stdint.h>

namespace kasmina
{

/* Cuts a block's dynamic shared memory into arrays: the widest elements first, for alignment. */
struct shared_carver {
    unsigned char *next;

    __device__ __forceinline__ shared_carver()
    {
        extern __shared__ __align__(16) unsigned char kasmina_shared[];
        int nothing = 0;
        /* Keeps the compiler from holding the arrays' addresses in registers between two uses. */
        asm volatile("" : "+r"(nothing));
        next = kasmina_shared + nothing;
    }
    template <typename T> __device__ __forceinline__ T *take(int count)
    {
        T *array = (T *)next;
        next += (size_t)count * sizeof(T);
        return array;
    }
};

/*
 * ---- Loads and stores ----
 * Volatile keeps a batch of them together and ahead of its first use; a load that is not wanted
 * leaves its register alone. The activations are read once, so the wide ones leave no line in L1.
 */

__device__ __forceinline__ void load_vector(uint32_t (&w)[4], const void *p, bool wanted)
{
    asm volatile("{\n\t.reg .pred q;\n\tsetp.ne.s32 q, %5, 0;\n\t"
                 "@q ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];\n\t}"
                 : "+r"(w[0]), "+r"(w[1]), "+r"(w[2]), "+r"(w[3])
                 : "l"(p), "r"((int)wanted));
}

__device__ __forceinline__ void load_element(uint16_t &bits, const void *p, bool wanted)
{
    asm volatile("{\n\t.reg .pred q;\n\tsetp.ne.s32 q, %2, 0;\n\t@q ld.global.nc.u16 %0, [%1];\n\t}"
                 : "+h"(bits)
                 : "l"(p), "r"((int)wanted));
}

__device__ __forceinline__ void load_element(uint32_t &bits, const void *p, bool wanted)
{
    asm volatile("{\n\t.reg .pred q;\n\tsetp.ne.s32 q, %2, 0;\n\t@q ld.global.nc.u32 %0, [%1];\n\t}"
                 : "+r"(bits)
                 : "l"(p), "r"((int)wanted));
}

__device__ __forceinline__ void load_element(uint64_t &bits, const void *p, bool wanted)
{
    asm volatile("{\n\t.reg .pred q;\n\tsetp.ne.s32 q, %2, 0;\n\t@q ld.global.nc.u64 %0, [%1];\n\t}"
                 : "+l"(bits)
                 : "l"(p), "r"((int)wanted));
}

/* A plain store, which stays in L2: the next operator reads what we write. */
__device__ __forceinline__ void store_vector(void *p, const uint32_t (&w)[4])
{
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
                 :
                 : "l"(p), "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3])
                 : "memory");
}

/* ---- 16-bit floats. Rounding is to nearest even; pairs are (low, high) halves of a word. ---- */

__device__ __forceinline__ float from_float16(uint16_t bits)
{
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

__device__ __forceinline__ uint16_t to_float16(float value)
{
    uint16_t bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

__device__ __forceinline__ uint32_t to_float16_pair(float low, float high)
{
#if __CUDA_ARCH__ >= 800
    uint32_t pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
#else
    return to_float16(low) | (uint32_t)to_float16(high) << 16;
#endif
}

__device__ __forceinline__ float from_bfloat16(uint16_t bits)
{
    return __uint_as_float((uint32_t)bits << 16);
}

__device__ __forceinline__ uint32_t to_bfloat16_pair(float low, float high)
{
#if __CUDA_ARCH__ >= 800
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
#else
    const uint32_t l = __float_as_uint(low), h = __float_as_uint(high);
    const uint32_t lower = low != low ? 0x7fffu : (l + 0x7fffu + (l >> 16 & 1u)) >> 16;
    const uint32_t upper = high != high ? 0x7fffu : (h + 0x7fffu + (h >> 16 & 1u)) >> 16;
    return lower | upper << 16;
#endif
}

__device__ __forceinline__ uint16_t to_bfloat16(float value)
{
    return (uint16_t)to_bfloat16_pair(value, 0.0f);
}

/* ---- Programmatic dependent launch. Nothing on older GPUs, where such launches are not made. ---- */

/* The next kernel of the stream may start; it waits for this one's end before it reads our writes. */
__device__ __forceinline__ void allow_dependents()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

/* Until the kernel before this one has ended and its writes are visible. Every thread must call it. */
__device__ __forceinline__ void wait_for_primary()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

} /* namespace kasmina */

#endif
