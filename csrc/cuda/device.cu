/* Which GPUs can run this module, and what the launchers need to know of the current one. */
#include "kernels.h"
#include "cuda/launch.cuh"
#include "cuda/tiling.cuh"

namespace
{

/* Devices whose answer is kept; there is no machine with more. A larger index is asked anew. */
constexpr int KEPT_DEVICES = 64;

/*
 * What is known of each device: multiprocessors * IMAGES + the image's version (90 for sm_90), or 0. Read and written whole
 * and atomically: threads that race find the same answer.
 */
int kept[KEPT_DEVICES];
constexpr int IMAGES = 1000; /* more than any version */

/* The code, not the GPU, decides: PTX of an older target is compiled without the waits. */
kasmina_cuda_device described(int multiprocessors, int image)
{
    return {multiprocessors, image >= 90, kasmina::pass_threads(image)};
}

/* Every kernel is compiled for the same targets, so one without contents answers for all. */
__global__ void probe()
{
}

} /* namespace */

cudaError_t kasmina_cuda_current_device(kasmina_cuda_device *device)
{
    int index = 0;
    cudaError_t error = cudaGetDevice(&index);
    const bool keep = error == cudaSuccess && index >= 0 && index < KEPT_DEVICES;
    const int known = keep ? __atomic_load_n(&kept[index], __ATOMIC_RELAXED) : 0;
    if (known) {
        *device = described(known / IMAGES, known % IMAGES);
        return cudaSuccess;
    }
    int multiprocessors = 0;
    cudaFuncAttributes attributes = {};
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, index);
    /* Where there is no image for the device, the launch will say so. */
    const bool found = error == cudaSuccess && cudaFuncGetAttributes(&attributes, probe) == cudaSuccess;
    if (!found) (void)cudaGetLastError();
    const int image = found ? attributes.ptxVersion : 0;
    *device = described(multiprocessors, image);
    if (keep && found) __atomic_store_n(&kept[index], multiprocessors * IMAGES + image, __ATOMIC_RELAXED);
    return error;
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
