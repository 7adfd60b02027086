/* A tensor as the operators see it: an owned handle beside what was read of it once. */
#ifndef KASMINA_TENSOR_H
#define KASMINA_TENSOR_H

#include <stdbool.h>
#include <stdint.h>

#include "kernels.h"
#include "status.h"
#include "torch_abi.h"

enum { KASMINA_MAX_DIMS = 64 };

typedef struct {
    AtenTensorHandle handle; /* owned; NULL: no tensor */
    int64_t dim, numel;
    const int64_t *sizes, *strides; /* borrowed from the handle */
    int32_t scalar_type, device_type, device_index;
} kasmina_tensor;

/*
 * Take the first `count` arguments, called `names`, of a boxed call of `op`. All handles are owned by `tensors`
 * afterwards, whatever happens, so kasmina_tensors_release() is due on every path. False, with a message, if torch
 * refuses to describe one.
 */
bool kasmina_tensors_take(kasmina_tensor *tensors, const StableIValue *stack, int count, const char *op,
                          const char *const *names, kasmina_status *status);

/* Delete the handles; entries without one are passed over. */
void kasmina_tensors_release(kasmina_tensor *tensors, int count);

/* A new uninitialised tensor on the device of `like`, owned by the caller. On failure: false, and out->handle NULL. */
bool kasmina_tensor_empty(kasmina_tensor *out, int64_t dim, const int64_t *sizes, const int64_t *strides,
                          int32_t scalar_type, const kasmina_tensor *like, kasmina_status *status);
bool kasmina_tensor_empty_1d(kasmina_tensor *out, int64_t size, int32_t scalar_type, const kasmina_tensor *like,
                             kasmina_status *status);

/* With the sizes, dtype and device of `like` and the strides of torch.empty_like(like). */
bool kasmina_tensor_empty_like(kasmina_tensor *out, const kasmina_tensor *like, kasmina_status *status);

/* Replace `tensor` by a copy with the given strides (those of a contiguous tensor if NULL). */
bool kasmina_tensor_restride(kasmina_tensor *tensor, const int64_t *strides, kasmina_status *status);

/* Replace `tensor` by a contiguous copy where it is not contiguous. */
bool kasmina_tensor_make_contiguous(kasmina_tensor *tensor, kasmina_status *status);

bool kasmina_tensor_is_contiguous(const kasmina_tensor *tensor);

/*
 * See a tensor with dim >= 1 and numel > 0 as [outer, features, inner], features being its last dimension. False where
 * its elements do not fill a block of memory without overlap, in which case torch.empty_like would not keep its strides.
 */
bool kasmina_tensor_layout(const kasmina_tensor *tensor, kasmina_layout *layout);

/* NULL, with a message, on failure. */
const void *kasmina_tensor_data(const kasmina_tensor *tensor, kasmina_status *status);
void *kasmina_tensor_mutable_data(const kasmina_tensor *tensor, kasmina_status *status);

/* The kernels' name of the dtype; false where they have none. */
bool kasmina_tensor_dtype(const kasmina_tensor *tensor, kasmina_dtype *dtype);

/* Give the handle away as result `slot` of a boxed call. */
void kasmina_tensor_return(kasmina_tensor *tensor, StableIValue *slot);

#endif
