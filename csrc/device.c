#define _GNU_SOURCE
#include "device.h"

#include <dlfcn.h>

#ifdef KASMINA_WITH_CUDA

static struct {
    /* By the types of torch_abi.h, which are proven against torch's headers. */
    __typeof__(aoti_torch_create_cuda_guard) *create_guard;
    __typeof__(aoti_torch_delete_cuda_guard) *delete_guard;
    __typeof__(aoti_torch_get_current_cuda_stream) *current_stream;
} cuda;

static void *find(void *library, const char *name)
{
    return library ? dlsym(library, name) : NULL;
}

bool kasmina_device_find_cuda(const char **why)
{
    void *library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    /* POSIX lets a data pointer from dlsym become a function pointer; ISO C does not say so. */
    *(void **)&cuda.create_guard = find(library, "aoti_torch_create_cuda_guard");
    *(void **)&cuda.delete_guard = find(library, "aoti_torch_delete_cuda_guard");
    *(void **)&cuda.current_stream = find(library, "aoti_torch_get_current_cuda_stream");
    *why = "";
    if (!library) {
        *why = "this torch has no CUDA";
        return false;
    }
    if (!cuda.create_guard || !cuda.delete_guard || !cuda.current_stream) {
        *why = "this torch's CUDA library lacks the C functions that are needed";
        return false;
    }
    return kasmina_cuda_driver_check(why) == 0;
}

bool kasmina_device_enter(kasmina_device_scope *scope, const kasmina_tensor *tensor, kasmina_status *status)
{
    *scope = (kasmina_device_scope){.is_cuda = tensor->device_type == aoti_torch_device_type_cuda()};
    if (!scope->is_cuda) return true;
    if (cuda.create_guard(tensor->device_index, &scope->guard)) {
        scope->guard = NULL;
        return kasmina_fail(status, "could not make cuda:%d the current device", (int)tensor->device_index);
    }
    if (cuda.current_stream(tensor->device_index, &scope->stream))
        return kasmina_fail(status, "could not get the current stream of cuda:%d", (int)tensor->device_index);
    return true;
}

void kasmina_device_leave(kasmina_device_scope *scope)
{
    if (scope->guard) cuda.delete_guard(scope->guard);
    scope->guard = NULL;
}

bool kasmina_device_check(const kasmina_device_scope *scope, int error, const char *op, kasmina_status *status)
{
    if (error == 0) return true;
    if (!scope->is_cuda) return kasmina_fail(status, "%s: the thread pool failed", op);
    return kasmina_fail(status, "%s: CUDA error %d: %s", op, error, kasmina_cuda_error_string(error));
}

#else

bool kasmina_device_find_cuda(const char **why)
{
    *why = "built without CUDA";
    return false;
}

bool kasmina_device_enter(kasmina_device_scope *scope, const kasmina_tensor *tensor, kasmina_status *status)
{
    *scope = (kasmina_device_scope){.is_cuda = false};
    if (tensor->device_type == aoti_torch_device_type_cpu()) return true;
    return kasmina_fail(status, "only CPU tensors are served: built without CUDA");
}

void kasmina_device_leave(kasmina_device_scope *scope)
{
    (void)scope;
}

bool kasmina_device_check(const kasmina_device_scope *scope, int error, const char *op, kasmina_status *status)
{
    (void)scope;
    return error == 0 || kasmina_fail(status, "%s: the thread pool failed", op);
}

#endif
