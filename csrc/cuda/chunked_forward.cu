/*
 * chunked_forward: y = blend(x) and the telemetry of x, in one pass over x and a merge. telemetry_update is the same
 * without y. Small tensors take one launch that does both.
 */
#include "kernels.h"
#include "cuda/chunked_forward_merge.cuh"
#include "cuda/chunked_forward_pass.cuh"
#include "cuda/chunked_forward_small.cuh"
#include "cuda/launch.cuh"

namespace
{

using namespace kasmina;

/* ---- Launching ---- */

/*
 * Up to so many elements, and so many a seed, one launch that reads x twice is faster than two that read it once (256 x
 * 1024 float32, 256 seeds: 6.2 us and 8.2). Without sums the pass alone is faster sooner (128 x 1024: 4.5 and 3.5).
 */
constexpr int64_t SMALL_ELEMENTS = 1 << 19;
constexpr int64_t SMALL_ELEMENTS_OF_SEED = 1 << 13;
constexpr int64_t SMALL_ELEMENTS_WITHOUT_SUMS = 1 << 16;
/* So many threads fill the device; with more elements, each has several. */
constexpr int64_t SMALL_THREADS = SMALL_ELEMENTS / SMALL_ROWS;
static_assert(SMALL_ELEMENTS_WITHOUT_SUMS <= SMALL_ELEMENTS, "no thread has more than SMALL_ROWS");

bool collects(const kasmina_forward_args *args)
{
    return args->telemetry != NULL && args->seeds.chunks.count > 0;
}

/* The same with and without y, so that the statistics have the same bits. */
bool is_small(const kasmina_forward_args *args)
{
    const kasmina_layout &layout = args->layout;
    const int64_t most_elements = collects(args) ? SMALL_ELEMENTS : SMALL_ELEMENTS_WITHOUT_SUMS;
    if (layout.features > most_elements || layout.inner > most_elements || layout.outer > most_elements) return false;
    const int64_t columns = layout.features * layout.inner;
    if (columns > most_elements || columns * layout.outer > most_elements) return false;
    return columns * layout.outer <= SMALL_ELEMENTS_OF_SEED * most(1, args->seeds.chunks.count);
}

/* Where the partial sums lie in the workspace; returns how long it must be. */
size_t place_partials(const tiling &t, void *workspace, forward_partials *parts)
{
    const int64_t count = t.slots * t.splits;
    const size_t sums = padded(count * (int64_t)sizeof(double2));
    const size_t nonfinite = padded(count * (int64_t)sizeof(uint32_t));
    unsigned char *base = (unsigned char *)workspace;
    parts->sums = (double2 *)base;
    parts->nonfinite = (uint32_t *)(base + sums);
    parts->owner = (int32_t *)(base + sums + nonfinite);
    return sums + nonfinite + padded(t.features * (int64_t)sizeof(int32_t));
}

grid_wish wished_grid(const kasmina_cuda_device &device, const kasmina_forward_args *args, bool collect)
{
    const int64_t row_bytes = args->layout.features * args->layout.inner * element_size(args->dtype);
    return {(int64_t)device.multiprocessors * forward_blocks_per_sm(collect),
            forward_waves(collect, row_bytes % VECTOR_BYTES != 0), device.pass_threads};
}

template <kasmina_dtype D>
cudaError_t launch_forward(const forward_params &params, bool collect, bool dependent, void *stream)
{
    const tiling &t = params.tiles;
    const size_t shared = forward_tables<D>::total_bytes(t, params.threads, collect);
    void (*kernel)(forward_params) = collect ? forward_kernel<D, true> : forward_kernel<D, false>;
    return launch(kernel, params, (int64_t)t.tiles * t.splits, t.threads(), shared, stream, dependent);
}

cudaError_t launch_forward(kasmina_dtype dtype, const forward_params &params, bool collect, bool dependent,
                           void *stream)
{
    switch (dtype) {
    case KASMINA_FLOAT32: return launch_forward<KASMINA_FLOAT32>(params, collect, dependent, stream);
    case KASMINA_FLOAT64: return launch_forward<KASMINA_FLOAT64>(params, collect, dependent, stream);
    case KASMINA_BFLOAT16: return launch_forward<KASMINA_BFLOAT16>(params, collect, dependent, stream);
    case KASMINA_FLOAT16: return launch_forward<KASMINA_FLOAT16>(params, collect, dependent, stream);
    }
    return cudaErrorInvalidValue;
}

cudaError_t launch_merge(const kasmina_forward_args *args, const forward_params &forward, bool dependent, void *stream)
{
    const tiling &t = forward.tiles;
    const int64_t seeds = args->seeds.chunks.count;
    merge_params params = {};
    params.tiles = t;
    params.table = forward.table;
    params.in = forward.out;
    params.x = args->x;
    params.dtype = args->dtype;
    params.numbers_per_feature = (double)args->layout.outer * (double)args->layout.inner;
    params.telemetry = args->telemetry;
    params.by_feature = seeds > t.features;
    params.groups = params.by_feature ? t.features : seeds;
    /* Tiles that a seed of the average size meets, each with its splits. */
    params.lanes = lanes_for((1 + t.columns / params.groups / t.tile_columns) * t.splits);
    params.idle_blocks = params.by_feature ? ceil_div(seeds, BLOCK) : 0;
    const int64_t blocks = params.idle_blocks + ceil_div(params.groups, BLOCK / params.lanes);
    return launch(merge_kernel, params, blocks, BLOCK, 0, stream, dependent);
}

template <kasmina_dtype D>
cudaError_t launch_small(const small_forward_params &params, int64_t blocks, bool dependent, void *stream)
{
    return launch(small_forward_kernel<D>, params, blocks, BLOCK, 0, stream, dependent);
}

cudaError_t launch_small(const kasmina_forward_args *args, bool dependent, void *stream)
{
    const kasmina_layout &layout = args->layout;
    const int64_t seeds = args->seeds.chunks.count;
    small_forward_params params = {};
    params.layout = layout;
    params.table = make_seed_table(args->seeds, layout.features);
    params.x = args->x;
    params.y = args->y;
    params.telemetry = args->telemetry;
    const int64_t columns = layout.features * layout.inner, numbers = layout.outer * columns;
    params.lanes = lanes_for(seeds ? numbers / seeds : 1);
    params.seed_blocks = collects(args) ? (int)ceil_div(seeds, BLOCK / params.lanes) : 0;
    params.across = (uint32_t)ceil_div(columns, BLOCK);
    params.rows = (uint32_t)most(1, ceil_div(numbers, SMALL_THREADS));
    const int64_t blocks = params.seed_blocks + (args->y ? params.across * ceil_div(layout.outer, params.rows) : 0);
    switch (args->dtype) {
    case KASMINA_FLOAT32: return launch_small<KASMINA_FLOAT32>(params, blocks, dependent, stream);
    case KASMINA_FLOAT64: return launch_small<KASMINA_FLOAT64>(params, blocks, dependent, stream);
    case KASMINA_BFLOAT16: return launch_small<KASMINA_BFLOAT16>(params, blocks, dependent, stream);
    case KASMINA_FLOAT16: return launch_small<KASMINA_FLOAT16>(params, blocks, dependent, stream);
    }
    return cudaErrorInvalidValue;
}

} /* namespace */

/* 0 where no statistics are asked for, and where CUDA fails (the launch then says why). */
size_t kasmina_forward_workspace_cuda(const kasmina_forward_args *args)
{
    kasmina_cuda_device device;
    tiling t;
    forward_partials unused;
    if (!collects(args) || is_small(args) || kasmina_cuda_current_device(&device) != cudaSuccess) return 0;
    if (!make_tiling(&t, args->layout, args->dtype, wished_grid(device, args, true))) return 0;
    return place_partials(t, NULL, &unused);
}

/* The arguments as in kernels.h. Returns 0 or a cudaError_t; telemetry is complete when `stream` is. */
int kasmina_chunked_forward_cuda(const kasmina_forward_args *args, void *stream)
{
    const bool collect = collects(args);
    if (!args->y && !collect) return 0;
    if (args->seeds.chunks.count > INT32_MAX) return cudaErrorInvalidConfiguration;
    kasmina_cuda_device device;
    cudaError_t error = kasmina_cuda_current_device(&device);
    if (error != cudaSuccess) return error;
    if (is_small(args)) return launch_small(args, device.dependent_launch, stream);

    forward_params params = {};
    if (!make_tiling(&params.tiles, args->layout, args->dtype, wished_grid(device, args, collect)))
        return cudaErrorInvalidConfiguration;
    params.table = make_seed_table(args->seeds, args->layout.features);
    params.x = args->x;
    params.y = args->y;
    params.granules = granules_of(args->x, NULL);
    params.threads = device.pass_threads;
    if (collect) (void)place_partials(params.tiles, args->workspace, &params.out);
    error = launch_forward(args->dtype, params, collect, device.dependent_launch, stream);
    if (error != cudaSuccess || !collect) return error;
    return launch_merge(args, params, device.dependent_launch, stream);
}
