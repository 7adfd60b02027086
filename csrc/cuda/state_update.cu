/*
 * U requests for state changes, judged and applied on the device: the CUDA kernels.
 *
 * The last request for a seed wins whatever the order of the threads: an integer atomicMax keeps the highest index, and
 * what it returns tells each loser's verdict once, to the loser itself or to the one that outbids it. The winners are
 * then settled by seed, not by request: all of the state is read and written side by side, and only the request is
 * looked up.
 */
#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"
#include "lifecycle_math.h"

namespace
{

/* A request is a few scattered reads: many threads hide them, whatever the block. */
constexpr int BLOCK = 256;

__global__ void __launch_bounds__(BLOCK) choose_winners(const __grid_constant__ kasmina_state_update_args args)
{
    kasmina::allow_dependents();
    const int64_t u = (int64_t)blockIdx.x * BLOCK + threadIdx.x;
    if (u >= args.num_updates) return;
    const int64_t seed = args.seed_ids[u];
    if (seed < 0 || seed >= args.num_seeds) {
        args.verdicts[u] = KASMINA_SEED_OUT_OF_RANGE;
        return;
    }
    const int before = atomicMax(args.winner + seed, (int)u);
    if (before >= 0) args.verdicts[before < (int)u ? before : (int)u] = KASMINA_SUPERSEDED;
}

/* The four values of a request: one read where they are aligned, as a tensor of its own is. */
__device__ __forceinline__ int4 load_values(const int32_t *values)
{
    if ((uintptr_t)values % sizeof(int4) == 0) return __ldg((const int4 *)values);
    return make_int4(__ldg(values), __ldg(values + 1), __ldg(values + 2), __ldg(values + 3));
}

__global__ void __launch_bounds__(BLOCK) settle_seeds(const __grid_constant__ kasmina_state_update_args args)
{
    const int64_t seed = (int64_t)blockIdx.x * BLOCK + threadIdx.x;
    kasmina::wait_for_primary();
    if (seed >= args.num_seeds) return;
    const int64_t u = args.winner[seed];
    if (u < 0) return;
    const int4 request = load_values(args.values + u * KASMINA_VALUES);
    const int32_t values[KASMINA_VALUES] = {request.x, request.y, request.z, request.w};
    args.verdicts[u] = kasmina_settle(&args, seed, values, __ldg(args.mask + u));
}

} /* namespace */

int kasmina_state_update_cuda(const kasmina_state_update_args *args, void *stream)
{
    const int64_t request_blocks = (args->num_updates + BLOCK - 1) / BLOCK;
    const int64_t seed_blocks = (args->num_seeds + BLOCK - 1) / BLOCK;
    kasmina_cuda_device device;
    cudaError_t error = kasmina_cuda_current_device(&device);
    if (error != cudaSuccess) return error;
    if (args->num_seeds) {
        const size_t bytes = (size_t)args->num_seeds * sizeof *args->winner;
        error = cudaMemsetAsync(args->winner, 0xff, bytes, (cudaStream_t)stream); /* int32 -1 */
        if (error != cudaSuccess) {
            (void)cudaGetLastError(); /* or a later call would report it again */
            return error;
        }
    }
    error = kasmina::launch(choose_winners, *args, request_blocks, BLOCK, 0, stream, false);
    if (error != cudaSuccess) return error;
    return kasmina::launch(settle_seeds, *args, seed_blocks, BLOCK, 0, stream, device.dependent_launch);
}
