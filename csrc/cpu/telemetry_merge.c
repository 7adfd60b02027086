/* One accumulator joined into another, seed by seed: the CPU kernel. */
#include "cpu/lock.h"
#include "parallel.h"
#include "telemetry_math.h"

static void merge_seeds(int64_t begin, int64_t end, void *context)
{
    const kasmina_telemetry_merge_args *args = context;
    for (int64_t seed = begin; seed < end; ++seed) {
        const double *other = args->other + seed * KASMINA_TELEMETRY_COLUMNS;
        kasmina_moments added = {other[KASMINA_COUNT], other[KASMINA_MEAN], other[KASMINA_M2]};
        kasmina_accumulate(args->telemetry + seed * KASMINA_TELEMETRY_COLUMNS, added, other[KASMINA_BATCHES],
                           other[KASMINA_NONFINITE]);
    }
}

int kasmina_telemetry_merge_cpu(const kasmina_telemetry_merge_args *args)
{
    kasmina_lock();
    int error = kasmina_parallel_for(0, args->num_seeds, 4096, merge_seeds, (void *)args);
    kasmina_unlock();
    return error;
}
