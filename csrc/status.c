#include "status.h"

#include <stdarg.h>
#include <stdio.h>

#include "torch_abi.h"

bool kasmina_fail(kasmina_status *status, const char *format, ...)
{
    if (status->failed) return false;
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(status->message, sizeof status->message, format, arguments);
    va_end(arguments);
    status->failed = true;
    return false;
}

void kasmina_raise(const kasmina_status *status, const char *op)
{
    /* Throws a C++ exception through our frames, which are compiled with -fexceptions and own nothing by now. */
    if (status->failed) aoti_torch_check(false, op, __FILE__, __LINE__, status->message);
}
