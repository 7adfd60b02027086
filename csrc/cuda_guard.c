/*
 * nvcc's launch code initialises its static kernel handles through the C++ runtime's guards. These stand in for
 * them, so that the module needs no libstdc++. Hidden: nothing outside the module can meet them.
 */
#ifdef KASMINA_WITH_CUDA

#include <pthread.h>
#include <stdint.h>

/* Itanium C++ ABI, 3.3.3: the first byte of the guard is not 0 once the object is initialised. */
int __cxa_guard_acquire(int64_t *guard);
void __cxa_guard_release(int64_t *guard);
void __cxa_guard_abort(int64_t *guard);

/* One for all: each static is initialised once in a process, by a look-up that initialises no other static. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

/* Returns 1, with the lock held, where the caller must initialise. */
int __cxa_guard_acquire(int64_t *guard)
{
    uint8_t *done = (uint8_t *)guard;
    if (__atomic_load_n(done, __ATOMIC_ACQUIRE)) return 0;
    pthread_mutex_lock(&lock);
    if (!*done) return 1;
    pthread_mutex_unlock(&lock);
    return 0;
}

void __cxa_guard_release(int64_t *guard)
{
    __atomic_store_n((uint8_t *)guard, 1, __ATOMIC_RELEASE);
    pthread_mutex_unlock(&lock);
}

void __cxa_guard_abort(int64_t *guard)
{
    (void)guard;
    pthread_mutex_unlock(&lock);
}

#else
typedef int kasmina_no_cuda; /* ISO C forbids an empty file */
#endif
