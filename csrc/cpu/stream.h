/* Writing past the caches, for results so large that nobody finds them there: saves reading what is overwritten. */
#ifndef KASMINA_CPU_STREAM_H
#define KASMINA_CPU_STREAM_H

#include <stddef.h>

#if defined(__x86_64__) && defined(__GNUC__)
#define KASMINA_STREAMS 1
#else
#define KASMINA_STREAMS 0
#endif

/* Copies; what was written is seen by other threads after kasmina_stream_end. */
void kasmina_stream_copy(void *target, const void *source, size_t bytes);
void kasmina_stream_end(void);

/* Asks for `bytes` bytes that will be read soon. */
static inline void kasmina_prefetch(const void *address, size_t bytes)
{
    for (size_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char *)address + i);
}

#endif
