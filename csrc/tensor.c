#include "tensor.h"

#include <inttypes.h>
#include <string.h>

static bool describe(kasmina_tensor *tensor)
{
    int64_t *sizes = NULL, *strides = NULL;
    AtenTensorHandle handle = tensor->handle;
    if (aoti_torch_get_dim(handle, &tensor->dim) || aoti_torch_get_numel(handle, &tensor->numel) ||
        aoti_torch_get_sizes(handle, &sizes) || aoti_torch_get_strides(handle, &strides) ||
        aoti_torch_get_dtype(handle, &tensor->scalar_type) ||
        aoti_torch_get_device_type(handle, &tensor->device_type) ||
        aoti_torch_get_device_index(handle, &tensor->device_index))
        return false;
    tensor->sizes = sizes;
    tensor->strides = strides;
    return true;
}

bool kasmina_tensors_take(kasmina_tensor *tensors, const StableIValue *stack, int count, const char *op,
                          const char *const *names, kasmina_status *status)
{
    for (int i = 0; i < count; ++i) {
        tensors[i] = (kasmina_tensor){.handle = NULL};
        memcpy(&tensors[i].handle, &stack[i], sizeof tensors[i].handle);
    }
    for (int i = 0; i < count; ++i)
        if (!describe(&tensors[i])) return kasmina_fail(status, "%s: %s must be a tensor, got None", op, names[i]);
    return true;
}

void kasmina_tensors_release(kasmina_tensor *tensors, int count)
{
    for (int i = 0; i < count; ++i) {
        if (tensors[i].handle) aoti_torch_delete_tensor_object(tensors[i].handle);
        tensors[i].handle = NULL;
    }
}

bool kasmina_tensor_empty(kasmina_tensor *out, int64_t dim, const int64_t *sizes, const int64_t *strides,
                          int32_t scalar_type, const kasmina_tensor *like, kasmina_status *status)
{
    *out = (kasmina_tensor){.handle = NULL};
    if (aoti_torch_empty_strided(dim, sizes, strides, scalar_type, like->device_type, like->device_index, &out->handle))
        return kasmina_fail(status, "could not allocate a tensor of %" PRId64 " dimensions", dim);
    if (!describe(out)) return kasmina_fail(status, "could not read a new tensor");
    return true;
}

bool kasmina_tensor_empty_1d(kasmina_tensor *out, int64_t size, int32_t scalar_type, const kasmina_tensor *like,
                             kasmina_status *status)
{
    int64_t stride = 1;
    return kasmina_tensor_empty(out, 1, &size, &stride, scalar_type, like, status);
}

/* Positive where dimension p must lie outside q, negative inside, 0 where strides do not tell. */
static int compare_dims(const kasmina_tensor *tensor, int p, int q)
{
    int64_t sp = tensor->strides[p], sq = tensor->strides[q];
    if (sp == 0 || sq == 0) return 0;
    if (sp != sq) return sp < sq ? -1 : 1;
    return tensor->sizes[p] > tensor->sizes[q] ? 1 : 0;
}

/* The strides that torch gives an empty_like of a tensor that is not dense: its order of dimensions, without gaps. */
static void dense_strides(const kasmina_tensor *tensor, int64_t *strides)
{
    int order[KASMINA_MAX_DIMS]; /* dimensions from the innermost out */
    int dim = (int)tensor->dim;
    for (int i = 0; i < dim; ++i) order[i] = dim - 1 - i;
    for (int i = 1; i < dim; ++i) {
        /* Insertion sort that steps over dimensions it cannot compare, as torch's TensorIterator orders them. */
        int moving = i;
        for (int j = i - 1; j >= 0; --j) {
            int comparison = compare_dims(tensor, order[j], order[moving]);
            if (comparison < 0) break;
            if (comparison > 0) {
                int swapped = order[j];
                order[j] = order[moving];
                order[moving] = swapped;
                moving = j;
            }
        }
    }
    int64_t stride = 1;
    for (int i = 0; i < dim; ++i) {
        strides[order[i]] = stride;
        if (tensor->sizes[order[i]] > 1) stride *= tensor->sizes[order[i]];
    }
}

bool kasmina_tensor_empty_like(kasmina_tensor *out, const kasmina_tensor *like, kasmina_status *status)
{
    kasmina_layout layout;
    int64_t strides[KASMINA_MAX_DIMS];
    const int64_t *wanted = like->strides;
    if (like->numel > 0 && !kasmina_tensor_layout(like, &layout)) {
        dense_strides(like, strides);
        wanted = strides;
    }
    return kasmina_tensor_empty(out, like->dim, like->sizes, wanted, like->scalar_type, like, status);
}

bool kasmina_tensor_restride(kasmina_tensor *tensor, const int64_t *strides, kasmina_status *status)
{
    int64_t contiguous[KASMINA_MAX_DIMS];
    if (!strides) {
        int64_t stride = 1;
        for (int64_t d = tensor->dim - 1; d >= 0; --d) {
            contiguous[d] = stride;
            stride *= tensor->sizes[d] > 1 ? tensor->sizes[d] : 1;
        }
        strides = contiguous;
    }
    kasmina_tensor copy;
    if (!kasmina_tensor_empty(&copy, tensor->dim, tensor->sizes, strides, tensor->scalar_type, tensor, status)) {
        kasmina_tensors_release(&copy, 1);
        return false;
    }
    if (aoti_torch_copy_(copy.handle, tensor->handle, 0)) {
        kasmina_tensors_release(&copy, 1);
        return kasmina_fail(status, "could not copy a tensor");
    }
    kasmina_tensors_release(tensor, 1);
    *tensor = copy;
    return true;
}

bool kasmina_tensor_is_contiguous(const kasmina_tensor *tensor)
{
    int64_t expected = 1;
    if (tensor->numel == 0) return true;
    for (int64_t d = tensor->dim - 1; d >= 0; --d) {
        if (tensor->sizes[d] == 1) continue;
        if (tensor->strides[d] != expected) return false;
        expected *= tensor->sizes[d];
    }
    return true;
}

bool kasmina_tensor_make_contiguous(kasmina_tensor *tensor, kasmina_status *status)
{
    return kasmina_tensor_is_contiguous(tensor) || kasmina_tensor_restride(tensor, NULL, status);
}

bool kasmina_tensor_layout(const kasmina_tensor *tensor, kasmina_layout *layout)
{
    int last = (int)tensor->dim - 1;
    int order[KASMINA_MAX_DIMS]; /* dimensions of more than one element by stride */
    int count = 0;
    for (int d = 0; d <= last; ++d) {
        if (tensor->sizes[d] == 1) continue;
        int at = count++;
        for (; at > 0 && tensor->strides[order[at - 1]] > tensor->strides[d]; --at) order[at] = order[at - 1];
        order[at] = d;
    }
    *layout = (kasmina_layout){.outer = 1, .features = tensor->sizes[last], .inner = 1};
    int64_t expected = 1;
    bool inside = tensor->sizes[last] != 1; /* with one feature, everything else lies outside of it */
    for (int i = 0; i < count; ++i) {
        int d = order[i];
        if (tensor->strides[d] != expected) return false;
        expected *= tensor->sizes[d];
        if (d == last)
            inside = false;
        else if (inside)
            layout->inner *= tensor->sizes[d];
        else
            layout->outer *= tensor->sizes[d];
    }
    return true;
}

const void *kasmina_tensor_data(const kasmina_tensor *tensor, kasmina_status *status)
{
    const void *data = NULL;
    if (torch_get_const_data_ptr(tensor->handle, &data)) kasmina_fail(status, "a tensor has no data to read");
    return data;
}

void *kasmina_tensor_mutable_data(const kasmina_tensor *tensor, kasmina_status *status)
{
    void *data = NULL;
    if (torch_get_mutable_data_ptr(tensor->handle, &data)) kasmina_fail(status, "a tensor has no data to write");
    return data;
}

bool kasmina_tensor_dtype(const kasmina_tensor *tensor, kasmina_dtype *dtype)
{
    int32_t type = tensor->scalar_type;
    if (type == aoti_torch_dtype_float32())
        *dtype = KASMINA_FLOAT32;
    else if (type == aoti_torch_dtype_float64())
        *dtype = KASMINA_FLOAT64;
    else if (type == aoti_torch_dtype_bfloat16())
        *dtype = KASMINA_BFLOAT16;
    else if (type == aoti_torch_dtype_float16())
        *dtype = KASMINA_FLOAT16;
    else
        return false;
    return true;
}

void kasmina_tensor_return(kasmina_tensor *tensor, StableIValue *slot)
{
    *slot = 0;
    memcpy(slot, &tensor->handle, sizeof tensor->handle);
    tensor->handle = NULL;
}
