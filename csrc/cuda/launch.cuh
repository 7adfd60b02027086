/* Host side of every launch: what the current device is, and the one call that enqueues a kernel. */
#ifndef KASMINA_CUDA_LAUNCH_CUH
#define KASMINA_CUDA_LAUNCH_CUH

#include <stdint.h>
#include <cuda_runtime.h>

/* What decides the grids of the current device. Costs no synchronisation. */
typedef struct {
    int multiprocessors;
    bool dependent_launch; /* our image for it has the dependent launch of sm_90 */
    int pass_threads;      /* of a block of the passes in our image for it, see PASS_THREADS */
} kasmina_cuda_device;

/* 0, or the error of the CUDA call that failed. */
cudaError_t kasmina_cuda_current_device(kasmina_cuda_device *device);

namespace kasmina
{

/* What a block may have without being asked for, and what it may have on every GPU that we have an image for (sm_75). */
constexpr size_t FREE_SHARED_BYTES = 48 << 10;
constexpr size_t LEAST_SHARED_BYTES = 64 << 10;

/*
 * Enqueue kernel<<<blocks, threads, shared_bytes>>>(params). `dependent`: it may start before the
 * kernel enqueued last has ended, and calls wait_for_primary(). Returns the launch's error, which is
 * taken off the runtime's record, so that no later call reports it again.
 */
template <typename Params>
static cudaError_t launch(void (*kernel)(Params), const Params &params, int64_t blocks, int threads,
                          size_t shared_bytes, void *stream, bool dependent)
{
    if (blocks <= 0) return cudaSuccess;
    if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
    if (shared_bytes > FREE_SHARED_BYTES) {
        const cudaError_t error =
            cudaFuncSetAttribute((const void *)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared_bytes);
        if (error != cudaSuccess) {
            (void)cudaGetLastError();
            return error;
        }
    }
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)blocks);
    config.blockDim = dim3((unsigned)threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = (cudaStream_t)stream;
    config.attrs = &attribute;
    config.numAttrs = dependent ? 1 : 0;
    void *arguments[] = {(void *)&params};
    const cudaError_t error = cudaLaunchKernelExC(&config, (const void *)kernel, arguments);
    const cudaError_t recorded = cudaGetLastError();
    return error != cudaSuccess ? error : recorded;
}

__host__ __device__ static inline int64_t ceil_div(int64_t a, int64_t b)
{
    return (a + b - 1) / b;
}

/* A part of the workspace; each begins at a multiple of 256 bytes. */
static inline size_t padded(int64_t bytes)
{
    return ((size_t)bytes + 255) / 256 * 256;
}

} /* namespace kasmina */

#endif
