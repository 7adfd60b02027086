#include "cpu/fused.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "cpu/clones.h"
#include "cpu/numbers.h"

#if defined(__x86_64__)
#define KASMINA_STREAMS 1
#include <immintrin.h>
#else
#define KASMINA_STREAMS 0
#endif

/* What this file is compiled for without a word about it. */
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define VECTOR_BYTES 64
#elif defined(__AVX2__) && defined(__F16C__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif
#define TARGET
#define ISA(f) f##_default
#include "cpu/fused_types.h"

#if KASMINA_CHOOSES

#define VECTOR_BYTES 32
#define TARGET __attribute__((target("avx2,f16c")))
#define ISA(f) f##_avx2
#include "cpu/fused_types.h"

#define VECTOR_BYTES 64
#define TARGET __attribute__((target("avx2,f16c,avx512f,avx512bw,avx512dq,avx512vl")))
#define ISA(f) f##_avx512
#include "cpu/fused_types.h"

static const kasmina_fused *(*find)(kasmina_dtype) = find_default;

/* The widest that the processor has and ATEN_CPU_CAPABILITY, torch's own variable, allows. */
static void choose(void)
{
    const char *most = getenv("ATEN_CPU_CAPABILITY");
    if (most && !strcmp(most, "default")) return;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c")) find = find_avx2;
    if (most && !strcmp(most, "avx2")) return;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        find = find_avx512;
}

const kasmina_fused *kasmina_find_fused(kasmina_dtype dtype)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, choose);
    return find(dtype);
}

#else

const kasmina_fused *kasmina_find_fused(kasmina_dtype dtype)
{
    return find_default(dtype);
}

#endif

void kasmina_end_streams(void)
{
#if KASMINA_STREAMS
    _mm_sfence();
#endif
}
