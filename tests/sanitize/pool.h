/* What the test tells its thread pool (parallel.c). */
#ifndef KASMINA_SANITIZE_POOL_H
#define KASMINA_SANITIZE_POOL_H

extern int pool_threads;             /* 1 to 8 */
extern int pool_calls_until_failure; /* the call after so many fails; -1: none does */

#endif
