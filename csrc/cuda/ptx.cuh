/*
 * The instructions that CUDA C++ has no words for: copies to shared memory, conversions of the 16-bit
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

/* The compiler knows nothing of this value any more. */
template <typename T> __device__ __forceinline__ void opaque(T *&pointer)
{
    asm volatile("" : "+l"(pointer));
}

__device__ __forceinline__ void opaque(uint32_t (&w)[4])
{
    asm volatile("" : "+r"(w[0]), "+r"(w[1]), "+r"(w[2]), "+r"(w[3]));
}

/* ---- Copies of 16 bytes from global to shared memory, which bypass L1; before sm_80, in two steps ---- */

__device__ __forceinline__ uint32_t shared_address(const void *p)
{
    return (uint32_t)__cvta_generic_to_shared(p);
}

__device__ __forceinline__ void load_shared(uint32_t (&w)[4], uint32_t at)
{
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
                 : "r"(at)
                 : "memory");
}

__device__ __forceinline__ uint32_t load_shared_word(uint32_t at)
{
    uint32_t word;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(at) : "memory");
    return word;
}

__device__ __forceinline__ void store_shared(uint32_t at, uint16_t bits)
{
    asm volatile("st.shared.u16 [%0], %1;" : : "r"(at), "h"(bits) : "memory");
}

__device__ __forceinline__ void store_shared(uint32_t at, uint32_t bits)
{
    asm volatile("st.shared.u32 [%0], %1;" : : "r"(at), "r"(bits) : "memory");
}

__device__ __forceinline__ void store_shared(uint32_t at, uint64_t bits)
{
    asm volatile("st.shared.u64 [%0], %1;" : : "r"(at), "l"(bits) : "memory");
}

/* Plain loads and plain stores; no later copy overtakes them. */
__device__ __forceinline__ void copy_in_steps(uint32_t to, const void *from)
{
    const uint4 w = __ldg((const uint4 *)from);
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};"
                 :
                 : "r"(to), "r"(w.x), "r"(w.y), "r"(w.z), "r"(w.w)
                 : "memory");
}

__device__ __forceinline__ void copy_to_shared(uint32_t to, const void *from)
{
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" : : "r"(to), "l"(from) : "memory");
#else
    copy_in_steps(to, from);
#endif
}

__device__ __forceinline__ void copy_to_shared_through_l1(uint32_t to, const void *from)
{
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.ca.shared.global [%0], [%1], 16;" : : "r"(to), "l"(from) : "memory");
#else
    copy_in_steps(to, from);
#endif
}

/* Of 16 bytes the first `bytes`; the others become 0. */
__device__ __forceinline__ void copy_to_shared(uint32_t to, const void *from, int bytes)
{
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" : : "r"(to), "l"(from), "r"(bytes) : "memory");
#else
    for (int i = 0; i < 16; i += 2)
        store_shared(to + i, i < bytes ? __ldg((const uint16_t *)from + i / 2) : (uint16_t)0);
#endif
}

/* The copies since the last such end are one group. */
__device__ __forceinline__ void end_of_copies()
{
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

/* Until no more than the last GROUPS groups of this thread's copies are under way. */
template <int GROUPS> __device__ __forceinline__ void wait_for_copies()
{
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" : : "n"(GROUPS) : "memory");
#endif
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

/*
 * The next kernel of the stream may start; it waits for this one's end before it reads our writes. Called after
 * wait_for_primary(): what was written before this kernel, the next one may then read at once.
 */
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
