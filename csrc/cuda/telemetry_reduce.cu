/* telemetry_reduce: (mean, variance, std) of each seed's accumulator; one thread a seed. */
#include "kernels.h"
#include "telemetry_math.h"
#include "cuda/launch.cuh"

namespace
{

/* Few registers, no shared memory: any size fills a multiprocessor; small ones spread few seeds wider. */
constexpr int THREADS = 128;

__global__ void __launch_bounds__(THREADS) reduce_kernel(const __grid_constant__ kasmina_telemetry_reduce_args p)
{
    const int64_t s = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (s >= p.num_seeds) return;
    double reduced[KASMINA_REDUCED_COLUMNS];
    kasmina_reduce(p.telemetry + s * KASMINA_TELEMETRY_COLUMNS, reduced);
    for (int i = 0; i < KASMINA_REDUCED_COLUMNS; ++i) p.out[s * KASMINA_REDUCED_COLUMNS + i] = reduced[i];
}

} /* namespace */

int kasmina_telemetry_reduce_cuda(const kasmina_telemetry_reduce_args *args, void *stream)
{
    const int64_t blocks = (args->num_seeds + THREADS - 1) / THREADS;
    return kasmina::launch(reduce_kernel, *args, blocks, THREADS, 0, stream, false);
}
