/* (mean, variance, std) of every seed: the CPU kernel. */
#include "parallel.h"
#include "telemetry_math.h"

static void reduce_seeds(int64_t begin, int64_t end, void *context)
{
    const kasmina_telemetry_reduce_args *args = context;
    for (int64_t seed = begin; seed < end; ++seed)
        kasmina_reduce(args->telemetry + seed * KASMINA_TELEMETRY_COLUMNS, args->out + seed * KASMINA_REDUCED_COLUMNS);
}

int kasmina_telemetry_reduce_cpu(const kasmina_telemetry_reduce_args *args)
{
    return kasmina_parallel_for(0, args->num_seeds, 4096, reduce_seeds, (void *)args);
}
