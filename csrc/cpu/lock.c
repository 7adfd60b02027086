#include "cpu/lock.h"

#include <pthread.h>

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_once_t once = PTHREAD_ONCE_INIT;

void kasmina_unlock(void)
{
    pthread_mutex_unlock(&mutex);
}

/* A fork while another thread holds the lock would leave it locked for ever in the child: fork waits for it instead. */
static void watch_fork(void)
{
    pthread_atfork(kasmina_lock, kasmina_unlock, kasmina_unlock);
}

void kasmina_lock(void)
{
    pthread_once(&once, watch_fork);
    pthread_mutex_lock(&mutex);
}
