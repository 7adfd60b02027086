/* telemetry_merge: joins each seed's accumulator with another's by Chan's formula; one thread a seed. */
#include "kernels.h"
#include "telemetry_math.h"
#include "cuda/launch.cuh"

namespace
{

/* Few registers, no shared memory: any size fills a multiprocessor; small ones spread few seeds wider. */
constexpr int THREADS = 128;

/* `other` may be the accumulator itself: each thread has read all before it writes. */
__global__ void __launch_bounds__(THREADS) merge_kernel(const __grid_constant__ kasmina_telemetry_merge_args p)
{
    const int64_t s = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (s >= p.num_seeds) return;
    const double *other = p.other + s * KASMINA_TELEMETRY_COLUMNS;
    const kasmina_moments added = {other[KASMINA_COUNT], other[KASMINA_MEAN], other[KASMINA_M2]};
    kasmina_accumulate(p.telemetry + s * KASMINA_TELEMETRY_COLUMNS, added, other[KASMINA_BATCHES],
                       other[KASMINA_NONFINITE]);
}

} /* namespace */

int kasmina_telemetry_merge_cuda(const kasmina_telemetry_merge_args *args, void *stream)
{
    const int64_t blocks = (args->num_seeds + THREADS - 1) / THREADS;
    return kasmina::launch(merge_kernel, *args, blocks, THREADS, 0, stream, false);
}
