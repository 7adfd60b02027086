/*
 * U requests for state changes, judged and applied on the device: the CUDA kernels.
 *
 * The last request for a seed wins whatever the order of the threads: an integer atomicMax keeps the highest index, and
 * what it returns tells each loser's verdict once, to the loser itself or to the one that outbids it. The winners are
 * then settled by seed, not by request: all of the state is read and written side by side, and only the request is
 * looked up. What bounds it is the number of scattered accesses: one for a bid, one for the values and one for the
 * verdict of a winner. The mask travels with the bid where it fits in.
 */
#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"
#include "lifecycle_math.h"

namespace
{

constexpr int BLOCK = 256;
/*
 * Requests, or seeds, of a thread. Four, that so many scattered accesses are under way at once, win where threads would
 * come in several waves; before, they are four accesses one after the other (H200, one and four, in us: 10,000 requests
 * 4.4 and 7.2; 100,000: 8.6 and 9.8; 1,000,000: 47 and 43).
 */
constexpr int MOST_EACH = 4;
constexpr int64_t MANY = 1 << 19;
/* Bits of a bid below the request's index: all of a mask that counts. */
constexpr int MASK_BITS = 4;
constexpr int32_t MASK_OF_ALL = (1 << MASK_BITS) - 1;
constexpr int32_t NOBODY = -1;
/* Values up to so many bytes stay in L2 (50 MiB on an H200) from their prefetch until they are looked up. */
constexpr int64_t MOST_PREFETCHED = 32 << 20;

struct update_params {
    kasmina_state_update_args args;
    int mask_bits; /* MASK_BITS, or 0 where there are too many requests */
    bool vectors;  /* a request's values are one read */
    bool prefetch; /* ... and are brought to L2 in order before they are looked up at random */
};

/* The i-th item of this thread: lanes side by side, whatever the round. */
template <int EACH> __device__ __forceinline__ int64_t item(int i)
{
    return ((int64_t)blockIdx.x * EACH + i) * BLOCK + threadIdx.x;
}

template <int EACH> __global__ void __launch_bounds__(BLOCK) clear_winners(const __grid_constant__ update_params p)
{
    kasmina::allow_dependents();
#pragma unroll
    for (int i = 0; i < EACH; ++i)
        if (item<EACH>(i) < p.args.num_seeds) p.args.winner[item<EACH>(i)] = NOBODY;
}

/* The values of the block's requests. */
template <int EACH> __device__ __forceinline__ void prefetch_values(const kasmina_state_update_args &args)
{
#if __CUDA_ARCH__ >= 900
    const int64_t first = (int64_t)blockIdx.x * EACH * BLOCK, last = min(first + EACH * BLOCK, args.num_updates);
    const uint32_t bytes = (uint32_t)(last - first) * KASMINA_VALUES * sizeof(int32_t);
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;"
                 :
                 : "l"(args.values + first * KASMINA_VALUES), "r"(bytes)
                 : "memory");
#endif
}

template <int EACH> __global__ void __launch_bounds__(BLOCK) choose_winners(const __grid_constant__ update_params p)
{
    const kasmina_state_update_args &args = p.args;
    int32_t seed[EACH], bid[EACH], before[EACH];
    kasmina::allow_dependents();
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        const int64_t u = item<EACH>(i);
        seed[i] = NOBODY;
        if (u >= args.num_updates) continue;
        seed[i] = __ldg(args.seed_ids + u);
        bid[i] = (int32_t)u;
        if (p.mask_bits) bid[i] = (int32_t)u << MASK_BITS | (__ldg(args.mask + u) & MASK_OF_ALL);
    }
    if (p.prefetch && threadIdx.x == 0) prefetch_values<EACH>(args);
    kasmina::wait_for_primary();
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        before[i] = NOBODY;
        if (seed[i] >= 0 && seed[i] < args.num_seeds) before[i] = atomicMax(args.winner + seed[i], bid[i]);
    }
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        if (item<EACH>(i) >= args.num_updates) continue;
        if (seed[i] < 0 || seed[i] >= args.num_seeds)
            args.verdicts[item<EACH>(i)] = KASMINA_SEED_OUT_OF_RANGE;
        else if (before[i] != NOBODY)
            args.verdicts[min(before[i], bid[i]) >> p.mask_bits] = KASMINA_SUPERSEDED;
    }
}

/* The four values of a request. */
__device__ __forceinline__ int4 load_values(const int32_t *values, bool vectors)
{
    if (vectors) return __ldg((const int4 *)values);
    return make_int4(__ldg(values), __ldg(values + 1), __ldg(values + 2), __ldg(values + 3));
}

/*
 * One seed: judged on copies of the cells that decide, so that these can be read before the request is known; of all
 * the cells, those that the request changes are written.
 */
__device__ __forceinline__ int32_t settle(const kasmina_state_update_args &args, int64_t seed, int32_t lifecycle,
                                          int32_t epochs, const int4 &request, int32_t mask)
{
    const int32_t values[KASMINA_VALUES] = {request.x, request.y, request.z, request.w};
    int32_t cells[KASMINA_STATE_ROWS] = {};
    cells[KASMINA_LIFECYCLE_STATE] = lifecycle;
    cells[KASMINA_EPOCHS_IN_STATE] = epochs;
    kasmina_state_update_args one = args;
    one.num_seeds = 1;
    one.state = cells;
    one.history += seed * KASMINA_HISTORY_LENGTH * 2;
    one.history_count += seed;
    const int32_t verdict = kasmina_settle(&one, 0, values, mask);
    if (verdict != KASMINA_APPLIED) return verdict;
    const auto write = [&](int row) { *kasmina_state_cell(args.state, args.num_seeds, seed, row) = cells[row]; };
    const bool moved = mask & KASMINA_SETS_LIFECYCLE && cells[KASMINA_LIFECYCLE_STATE] != lifecycle;
    if (moved) write(KASMINA_LIFECYCLE_STATE), write(KASMINA_PARENT_STATE);
    if (moved || mask & KASMINA_SETS_EPOCHS) write(KASMINA_EPOCHS_IN_STATE);
    if (mask & KASMINA_SETS_BLUEPRINT) write(KASMINA_BLUEPRINT_ID);
    if (mask & KASMINA_SETS_STRATEGY) write(KASMINA_GRAFTING_STRATEGY);
    return verdict;
}

template <int EACH> __global__ void __launch_bounds__(BLOCK) settle_seeds(const __grid_constant__ update_params p)
{
    const kasmina_state_update_args &args = p.args;
    int32_t lifecycle[EACH], epochs[EACH], bid[EACH], mask[EACH];
    int4 values[EACH];
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        lifecycle[i] = epochs[i] = 0;
        if (item<EACH>(i) >= args.num_seeds) continue;
        lifecycle[i] = *kasmina_state_cell(args.state, args.num_seeds, item<EACH>(i), KASMINA_LIFECYCLE_STATE);
        epochs[i] = *kasmina_state_cell(args.state, args.num_seeds, item<EACH>(i), KASMINA_EPOCHS_IN_STATE);
    }
    kasmina::wait_for_primary();
#pragma unroll
    for (int i = 0; i < EACH; ++i) bid[i] = item<EACH>(i) < args.num_seeds ? args.winner[item<EACH>(i)] : NOBODY;
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        if (bid[i] == NOBODY) continue;
        values[i] = load_values(args.values + (int64_t)(bid[i] >> p.mask_bits) * KASMINA_VALUES, p.vectors);
        mask[i] = p.mask_bits ? bid[i] & MASK_OF_ALL : __ldg(args.mask + bid[i]);
    }
#pragma unroll
    for (int i = 0; i < EACH; ++i)
        if (bid[i] != NOBODY)
            args.verdicts[bid[i] >> p.mask_bits] =
                settle(args, item<EACH>(i), lifecycle[i], epochs[i], values[i], mask[i]);
}

template <int EACH> cudaError_t launch_all(const update_params &params, bool dependent_launch, void *stream)
{
    const int64_t request_blocks = kasmina::ceil_div(params.args.num_updates, BLOCK * EACH);
    const int64_t seed_blocks = kasmina::ceil_div(params.args.num_seeds, BLOCK * EACH);
    cudaError_t error = kasmina::launch(clear_winners<EACH>, params, seed_blocks, BLOCK, 0, stream, false);
    if (error != cudaSuccess) return error;
    /* Where there is no seed there is nothing to clear, and so no kernel of ours to depend on. */
    const bool dependent = dependent_launch && seed_blocks > 0;
    error = kasmina::launch(choose_winners<EACH>, params, request_blocks, BLOCK, 0, stream, dependent);
    if (error != cudaSuccess) return error;
    return kasmina::launch(settle_seeds<EACH>, params, seed_blocks, BLOCK, 0, stream, dependent_launch);
}

} /* namespace */

int kasmina_state_update_cuda(const kasmina_state_update_args *args, void *stream)
{
    kasmina_cuda_device device;
    const cudaError_t error = kasmina_cuda_current_device(&device);
    if (error != cudaSuccess) return error;
    const int64_t updates = args->num_updates;
    const bool vectors = (uintptr_t)args->values % sizeof(int4) == 0;
    const int64_t bytes = updates * KASMINA_VALUES * (int64_t)sizeof *args->values;
    const update_params params = {*args, updates <= INT32_MAX >> MASK_BITS ? MASK_BITS : 0, vectors,
                                  vectors && bytes <= MOST_PREFETCHED};
    const bool many = (updates > args->num_seeds ? updates : args->num_seeds) > MANY;
    return many ? launch_all<MOST_EACH>(params, device.dependent_launch, stream)
                : launch_all<1>(params, device.dependent_launch, stream);
}
