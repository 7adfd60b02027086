/* One epoch for every seed: the CPU kernel. */
#include "lifecycle_math.h"
#include "parallel.h"

static void step_seeds(int64_t begin, int64_t end, void *context)
{
    for (int64_t seed = begin; seed < end; ++seed) kasmina_step_seed(context, seed);
}

int kasmina_lifecycle_step_cpu(const kasmina_lifecycle_step_args *args)
{
    return kasmina_parallel_for(0, args->num_seeds, 8192, step_seeds, (void *)args);
}
