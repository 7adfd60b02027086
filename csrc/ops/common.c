#include "ops/common.h"

#include <inttypes.h>

bool kasmina_read_chunks(kasmina_tensor *seed_offsets, kasmina_chunks *chunks, kasmina_status *status)
{
    if (!kasmina_tensor_make_contiguous(seed_offsets, status)) return false;
    chunks->count = seed_offsets->sizes[0] - 1;
    chunks->offsets = kasmina_tensor_data(seed_offsets, status);
    return !status->failed;
}

bool kasmina_read_seeds(kasmina_tensor *seed_offsets, kasmina_tensor *state, kasmina_tensor *alpha,
                        kasmina_tensor *blueprint_weights, kasmina_seeds *seeds, kasmina_status *status)
{
    if (!kasmina_read_chunks(seed_offsets, &seeds->chunks, status) || !kasmina_tensor_make_contiguous(state, status) ||
        !kasmina_tensor_make_contiguous(alpha, status) || !kasmina_tensor_make_contiguous(blueprint_weights, status))
        return false;
    seeds->num_blueprints = blueprint_weights->sizes[0];
    seeds->state = kasmina_tensor_data(state, status);
    seeds->alpha = kasmina_tensor_data(alpha, status);
    seeds->weights = kasmina_tensor_data(blueprint_weights, status);
    return kasmina_tensor_dtype(blueprint_weights, &seeds->weights_dtype) && !status->failed;
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
