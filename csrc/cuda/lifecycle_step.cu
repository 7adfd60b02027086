/* One epoch for every seed on the device: the CUDA kernel, a thread a seed. */
#include "cuda/launch.cuh"
#include "lifecycle_math.h"

namespace
{

constexpr int BLOCK = 256;

__global__ void __launch_bounds__(BLOCK) step_seeds(const __grid_constant__ kasmina_lifecycle_step_args args)
{
    const int64_t seed = (int64_t)blockIdx.x * BLOCK + threadIdx.x;
    if (seed < args.num_seeds) kasmina_step_seed(&args, seed);
}

} /* namespace */

int kasmina_lifecycle_step_cuda(const kasmina_lifecycle_step_args *args, void *stream)
{
    return kasmina::launch(step_seeds, *args, (args->num_seeds + BLOCK - 1) / BLOCK, BLOCK, 0, stream, false);
}
