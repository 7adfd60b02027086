/* Threads for the CPU kernels; what runs them is chosen at link time (parallel.c: torch's own pool). */
#ifndef KASMINA_PARALLEL_H
#define KASMINA_PARALLEL_H

#include <stdint.h>

/* Call fn(b, e, context) over slices that cover [begin, end), each of at least `grain` where there are enough.
 * Returns 0, or an error code of the thread pool: then part of the range may be missing. */
int kasmina_parallel_for(int64_t begin, int64_t end, int64_t grain, void (*fn)(int64_t, int64_t, void *),
                         void *context);

#endif
