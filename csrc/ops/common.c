#include "ops/common.h"

void kasmina_call_operator(const kasmina_operator *op, StableIValue *stack)
{
    kasmina_status status = {0};
    kasmina_tensor t[KASMINA_MAX_TENSORS] = {0};
    kasmina_call call = {.op = op->name, .t = t, .scalars = stack + op->inputs - op->first};
    if (kasmina_tensors_take(t + op->first, stack, op->inputs - op->first, op->name, op->names + op->first, &status) &&
        op->validate(&call, &status) && kasmina_device_enter(&call.scope, &t[op->device_of], &status) &&
        op->run(&call, &status))
        for (int i = 0; i < op->results; ++i) kasmina_tensor_return(&t[op->inputs + i], &stack[i]);
    kasmina_device_leave(&call.scope);
    kasmina_tensors_release(t, KASMINA_MAX_TENSORS);
    kasmina_raise(&status, op->name);
}

bool kasmina_read_chunks(kasmina_tensor *seed_offsets, kasmina_chunks *chunks, kasmina_status *status)
{
    if (!kasmina_tensor_make_contiguous(seed_offsets, status)) return false;
    chunks->count = seed_offsets->sizes[0] - 1;
    chunks->offsets = kasmina_tensor_data(seed_offsets, status);
    return !status->failed;
}

bool kasmina_read_blueprints(kasmina_tensor *seed_offsets, kasmina_tensor *state, kasmina_tensor *blueprint_weights,
                             kasmina_seeds *seeds, kasmina_status *status)
{
    if (!kasmina_read_chunks(seed_offsets, &seeds->chunks, status) || !kasmina_tensor_make_contiguous(state, status) ||
        !kasmina_tensor_make_contiguous(blueprint_weights, status))
        return false;
    seeds->num_blueprints = blueprint_weights->sizes[0];
    seeds->state = kasmina_tensor_data(state, status);
    seeds->alpha = NULL;
    seeds->weights = kasmina_tensor_data(blueprint_weights, status);
    return kasmina_tensor_dtype(blueprint_weights, &seeds->weights_dtype) && !status->failed;
}

bool kasmina_read_seeds(kasmina_tensor *seed_offsets, kasmina_tensor *state, kasmina_tensor *alpha,
                        kasmina_tensor *blueprint_weights, kasmina_seeds *seeds, kasmina_status *status)
{
    if (!kasmina_read_blueprints(seed_offsets, state, blueprint_weights, seeds, status) ||
        !kasmina_tensor_make_contiguous(alpha, status))
        return false;
    seeds->alpha = kasmina_tensor_data(alpha, status);
    return !status->failed;
}

bool kasmina_make_dense(kasmina_tensor *x, const int64_t *strides, kasmina_layout *layout, kasmina_status *status)
{
    if (kasmina_tensor_layout(x, layout)) return true;
    if (!kasmina_tensor_restride(x, strides, status)) return false;
    return kasmina_tensor_layout(x, layout) || kasmina_fail(status, "could not make a tensor dense");
}

bool kasmina_align_to_x(kasmina_tensor *x, kasmina_tensor *other, kasmina_layout *layout, kasmina_status *status)
{
    if (!kasmina_tensor_layout(x, layout)) {
        kasmina_tensor like;
        bool dense = kasmina_tensor_empty_like(&like, x, status) && kasmina_make_dense(x, like.strides, layout, status);
        kasmina_tensors_release(&like, 1);
        if (!dense) return false;
    }
    bool same = true;
    for (int64_t d = 0; d < x->dim; ++d) same = same && (x->sizes[d] == 1 || x->strides[d] == other->strides[d]);
    return same || kasmina_tensor_restride(other, x->strides, status);
}

bool kasmina_make_workspace(kasmina_tensor *workspace, void **data, size_t bytes, const kasmina_tensor *like,
                            kasmina_status *status)
{
    *data = NULL;
    if (bytes == 0) return true;
    if (bytes > (size_t)INT64_MAX ||
        !kasmina_tensor_empty_1d(workspace, (int64_t)bytes, aoti_torch_dtype_uint8(), like, status))
        return kasmina_fail(status, "could not allocate a workspace of %zu bytes", bytes);
    *data = kasmina_tensor_mutable_data(workspace, status);
    return *data != NULL;
}
