/* How a failure travels: inner functions fill a status and return false; only a boxed function's last line raises. */
#ifndef KASMINA_STATUS_H
#define KASMINA_STATUS_H

#include <stdbool.h>

typedef struct {
    bool failed;
    char message[512];
} kasmina_status;

/* Record a message (printf-style, cut at the buffer's end); the first failure of a status stands. Returns false. */
bool kasmina_fail(kasmina_status *status, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* Raise RuntimeError(status->message) through torch if the status failed: then it does not return. */
void kasmina_raise(const kasmina_status *status, const char *op);

#endif
