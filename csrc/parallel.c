#include "parallel.h"

#include "torch_abi.h"

int kasmina_parallel_for(int64_t begin, int64_t end, int64_t grain, void (*fn)(int64_t, int64_t, void *), void *context)
{
    if (end - begin > grain) return torch_parallel_for(begin, end, grain, fn, context);
    /* Small work stays out of the pool, which costs more than it. */
    if (end > begin) fn(begin, end, context);
    return 0;
}
