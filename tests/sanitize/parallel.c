/* Threads for the kernels under test: real ones, so that the sanitizers see what torch's pool would do. */
#include "parallel.h"

#include <pthread.h>

#include "pool.h"

int pool_threads = 1;
int pool_calls_until_failure = -1;

typedef struct {
    int64_t begin, end;
    void (*fn)(int64_t, int64_t, void *);
    void *context;
} slice;

static void *run(void *argument)
{
    slice *s = argument;
    s->fn(s->begin, s->end, s->context);
    return NULL;
}

int kasmina_parallel_for(int64_t begin, int64_t end, int64_t grain, void (*fn)(int64_t, int64_t, void *), void *context)
{
    enum { MOST = 8 };
    pthread_t threads[MOST];
    slice slices[MOST];
    if (pool_calls_until_failure >= 0 && pool_calls_until_failure-- == 0) return 1;
    if (begin >= end) return 0;
    /* Slices below the grain too: what a kernel gives must not depend on the cut. */
    int64_t count = end - begin < pool_threads ? end - begin : pool_threads;
    (void)grain;
    for (int64_t i = 0; i < count; ++i) {
        slices[i] = (slice){begin + (end - begin) * i / count, begin + (end - begin) * (i + 1) / count, fn, context};
        if (pthread_create(&threads[i], NULL, run, &slices[i])) return 2;
    }
    for (int64_t i = 0; i < count; ++i) pthread_join(threads[i], NULL);
    return 0;
}
