/* Where an operator runs: its tensor's device made current and that device's current stream; nothing on the CPU. */
#ifndef KASMINA_DEVICE_H
#define KASMINA_DEVICE_H

#include "status.h"
#include "tensor.h"

typedef struct {
    bool is_cuda;
    void *stream;          /* cudaStream_t */
    CUDAGuardHandle guard; /* owned */
} kasmina_device_scope;

/*
 * Look up libtorch's CUDA functions, once, and ask the driver whether it can run this build. False, with the reason in
 * *why (a static string), where there are no CUDA kernels to register: built without, CPU-only torch, an old driver.
 */
bool kasmina_device_find_cuda(const char **why);

/* Make the tensor's device current; kasmina_device_leave() is due whether or not this succeeds. */
bool kasmina_device_enter(kasmina_device_scope *scope, const kasmina_tensor *tensor, kasmina_status *status);

/* Make the former device current again. */
void kasmina_device_leave(kasmina_device_scope *scope);

/* Turn what a launcher returned into a status; 0 is success. */
bool kasmina_device_check(const kasmina_device_scope *scope, int error, const char *op, kasmina_status *status);

/*
 * The launcher (or workspace size) of `name` for the scope's device. A macro, because each takes its own struct.
 */
#ifdef KASMINA_WITH_CUDA
#define KASMINA_LAUNCH(scope, name, args) \
    ((scope)->is_cuda ? kasmina_##name##_cuda((args), (scope)->stream) : kasmina_##name##_cpu(args))
#define KASMINA_WORKSPACE(scope, name, args) \
    ((scope)->is_cuda ? kasmina_##name##_workspace_cuda(args) : kasmina_##name##_workspace_cpu(args))
#else
#define KASMINA_LAUNCH(scope, name, args) kasmina_##name##_cpu(args)
#define KASMINA_WORKSPACE(scope, name, args) kasmina_##name##_workspace_cpu(args)
#endif

#endif
