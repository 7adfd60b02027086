/*
 * U requests for state changes, judged and applied on the device: the CUDA kernels.
 *
 * The last request for a seed wins whatever the order of the threads: an integer atomicMax keeps the highest index, and
 * the thread of that request alone reads and writes its seed. Time goes to random access of seeds, not to arithmetic.
 */
#include "cuda/launch.cuh"
#include "lifecycle_math.h"

namespace
{

/* A request is a few scattered reads: many threads hide them, whatever the block. */
constexpr int BLOCK = 256;

__global__ void __launch_bounds__(BLOCK) choose_winners(const __grid_constant__ kasmina_state_update_args args)
{
    const int64_t u = (int64_t)blockIdx.x * BLOCK + threadIdx.x;
    if (u >= args.num_updates) return;
    const int64_t seed = args.seed_ids[u];
    if (seed >= 0 && seed < args.num_seeds) atomicMax(args.winner + seed, (int)u);
}

__global__ void __launch_bounds__(BLOCK) judge_requests(const __grid_constant__ kasmina_state_update_args args)
{
    const int64_t u = (int64_t)blockIdx.x * BLOCK + threadIdx.x;
    if (u >= args.num_updates) return;
    args.verdicts[u] = kasmina_consider(&args, u);
}

} /* namespace */

int kasmina_state_update_cuda(const kasmina_state_update_args *args, void *stream)
{
    const int64_t blocks = (args->num_updates + BLOCK - 1) / BLOCK;
    if (args->num_seeds) {
        const size_t bytes = (size_t)args->num_seeds * sizeof *args->winner;
        const cudaError_t error = cudaMemsetAsync(args->winner, 0xff, bytes, (cudaStream_t)stream); /* int32 -1 */
        if (error != cudaSuccess) {
            (void)cudaGetLastError(); /* or a later call would report it again */
            return error;
        }
    }
    const cudaError_t error = kasmina::launch(choose_winners, *args, blocks, BLOCK, 0, stream, false);
    if (error != cudaSuccess) return error;
    return kasmina::launch(judge_requests, *args, blocks, BLOCK, 0, stream, false);
}
