/*
 * telemetry_merge: joins each seed's accumulator with another's by Chan's formula; one thread a seed. Accumulators are
 * five numbers long: a block brings its own and takes them back side by side, through shared memory.
 */
#include "kernels.h"
#include "telemetry_math.h"
#include "cuda/launch.cuh"

namespace
{

/* Small blocks spread few seeds wider. */
constexpr int THREADS = 128;
constexpr int COLUMNS = KASMINA_TELEMETRY_COLUMNS;

/* `other` may be the accumulator itself: each block has read all before it writes. */
__global__ void __launch_bounds__(THREADS) merge_kernel(const __grid_constant__ kasmina_telemetry_merge_args p)
{
    __shared__ double ours[THREADS * COLUMNS], theirs[THREADS * COLUMNS];
    const int64_t first = (int64_t)blockIdx.x * THREADS, seeds = min(p.num_seeds - first, (int64_t)THREADS);
    double *const into = p.telemetry + first * COLUMNS;
    const double *const from = p.other + first * COLUMNS;
    const int tid = (int)threadIdx.x, count = (int)seeds * COLUMNS;
#pragma unroll
    for (int i = 0; i < COLUMNS; ++i) {
        const int at = i * THREADS + tid;
        if (at >= count) continue;
        ours[at] = into[at];
        theirs[at] = from[at];
    }
    __syncthreads();
    if (tid < seeds) {
        const double *other = theirs + tid * COLUMNS;
        const kasmina_moments added = {other[KASMINA_COUNT], other[KASMINA_MEAN], other[KASMINA_M2]};
        kasmina_accumulate(ours + tid * COLUMNS, added, other[KASMINA_BATCHES], other[KASMINA_NONFINITE]);
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < COLUMNS; ++i) {
        const int at = i * THREADS + tid;
        if (at < count) into[at] = ours[at];
    }
}

} /* namespace */

int kasmina_telemetry_merge_cuda(const kasmina_telemetry_merge_args *args, void *stream)
{
    const int64_t blocks = (args->num_seeds + THREADS - 1) / THREADS;
    return kasmina::launch(merge_kernel, *args, blocks, THREADS, 0, stream, false);
}
