/* Which GPUs can run this module, and what the launchers need to know of the current one. */
#include "kernels.h"
#include "cuda/launch.cuh"

namespace
{

/* Devices whose answer is kept; there is no machine with more. A larger index is asked anew. */
constexpr int KEPT_DEVICES = 64;

enum image { UNKNOWN, NO_IMAGE, PLAIN_IMAGE, DEPENDENT_IMAGE };

/* Read and written whole and atomically: threads that race find the same answer. */
int kept_images[KEPT_DEVICES];

/* Every kernel is compiled for the same targets, so one without contents answers for all. */
__global__ void probe()
{
}

/* The image that the current device, `index`, would run. UNKNOWN where CUDA itself fails. */
image image_for(int index)
{
    const bool kept = index >= 0 && index < KEPT_DEVICES;
    if (kept) {
        const int known = __atomic_load_n(&kept_images[index], __ATOMIC_RELAXED);
        if (known != UNKNOWN) return (image)known;
    }
    cudaFuncAttributes attributes;
    const cudaError_t error = cudaFuncGetAttributes(&attributes, probe);
    image found = UNKNOWN;
    if (error == cudaSuccess) {
        /* The code, not the GPU, decides: PTX of an older target is compiled without the waits. */
        found = attributes.ptxVersion >= 90 ? DEPENDENT_IMAGE : PLAIN_IMAGE;
    } else {
        (void)cudaGetLastError();
        if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction ||
            error == cudaErrorUnsupportedPtxVersion)
            found = NO_IMAGE;
    }
    if (kept && found != UNKNOWN) __atomic_store_n(&kept_images[index], found, __ATOMIC_RELAXED);
    return found;
}

} /* namespace */

cudaError_t kasmina_cuda_current_device(kasmina_cuda_device *device)
{
    int index = 0;
    cudaError_t error = cudaGetDevice(&index);
    if (error == cudaSuccess)
        error = cudaDeviceGetAttribute(&device->multiprocessors, cudaDevAttrMultiProcessorCount, index);
    if (error != cudaSuccess) {
        (void)cudaGetLastError();
        return error;
    }
    device->dependent_launch = image_for(index) == DEPENDENT_IMAGE;
    return cudaSuccess;
}

const char *kasmina_cuda_error_string(int code)
{
    return cudaGetErrorString((cudaError_t)code);
}

int kasmina_cuda_driver_check(const char **why)
{
#define KASMINA_QUOTE(x) #x
#define KASMINA_STRING(x) KASMINA_QUOTE(x)
    int driver = 0;
    const cudaError_t error = cudaDriverGetVersion(&driver);
    if (error != cudaSuccess || driver == 0) {
        (void)cudaGetLastError();
        *why = "no NVIDIA driver is installed";
        return error != cudaSuccess ? (int)error : (int)cudaErrorInsufficientDriver;
    }
    /* Drivers serve every runtime of their own major version, and older ones. */
    if (driver / 1000 < CUDART_VERSION / 1000) {
        *why = "the NVIDIA driver is too old for CUDA " KASMINA_STRING(__CUDACC_VER_MAJOR__);
        return (int)cudaErrorInsufficientDriver;
    }
    *why = "";
    return 0;
}
