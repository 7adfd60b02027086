/* U requests for state changes, judged and applied: the CPU kernel. */
#include "lifecycle_math.h"
#include "parallel.h"

/* Who is last for each seed: one thread, in order. */
static void choose_winners(const kasmina_state_update_args *args)
{
    for (int64_t seed = 0; seed < args->num_seeds; ++seed) args->winner[seed] = -1;
    for (int64_t u = 0; u < args->num_updates; ++u) {
        int64_t seed = args->seed_ids[u];
        if (seed >= 0 && seed < args->num_seeds) args->winner[seed] = (int32_t)u;
    }
}

static int32_t consider(const kasmina_state_update_args *args, int64_t u)
{
    const int64_t seed = args->seed_ids[u];
    if (seed < 0 || seed >= args->num_seeds) return KASMINA_SEED_OUT_OF_RANGE;
    if (args->winner[seed] != u) return KASMINA_SUPERSEDED;
    return kasmina_settle(args, seed, args->values + u * KASMINA_VALUES, args->mask[u]);
}

static void judge_requests(int64_t begin, int64_t end, void *context)
{
    const kasmina_state_update_args *args = context;
    for (int64_t u = begin; u < end; ++u) args->verdicts[u] = consider(args, u);
}

int kasmina_state_update_cpu(const kasmina_state_update_args *args)
{
    choose_winners(args);
    /* Each seed has one winner, so no two threads write the same seed. */
    return kasmina_parallel_for(0, args->num_updates, 4096, judge_requests, (void *)args);
}
