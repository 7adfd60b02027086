#include "ops/validate.h"

#include <inttypes.h>
#include <stdio.h>

enum { TEXT = 160 };

static const char *dtype_name(int32_t scalar_type)
{
    const struct {
        int32_t code;
        const char *name;
    } names[] = {
        {aoti_torch_dtype_float32(), "float32"},
        {aoti_torch_dtype_float64(), "float64"},
        {aoti_torch_dtype_bfloat16(), "bfloat16"},
        {aoti_torch_dtype_float16(), "float16"},
        {aoti_torch_dtype_int32(), "int32"},
        {aoti_torch_dtype_int64(), "int64"},
        {aoti_torch_dtype_int16(), "int16"},
        {aoti_torch_dtype_int8(), "int8"},
        {aoti_torch_dtype_uint8(), "uint8"},
        {aoti_torch_dtype_bool(), "bool"},
        {aoti_torch_dtype_complex64(), "complex64"},
        {aoti_torch_dtype_complex128(), "complex128"},
        {aoti_torch_dtype_uint16(), "uint16"},
        {aoti_torch_dtype_uint32(), "uint32"},
        {aoti_torch_dtype_uint64(), "uint64"},
        {aoti_torch_dtype_complex32(), "complex32"},
        {aoti_torch_dtype_float8_e5m2(), "float8_e5m2"},
        {aoti_torch_dtype_float8_e4m3fn(), "float8_e4m3fn"},
        {aoti_torch_dtype_float8_e5m2fnuz(), "float8_e5m2fnuz"},
        {aoti_torch_dtype_float8_e4m3fnuz(), "float8_e4m3fnuz"},
    };
    for (size_t i = 0; i < sizeof names / sizeof *names; ++i)
        if (names[i].code == scalar_type) return names[i].name;
    return "another dtype";
}

/* "[2, 3]" into `text`, cut with "..." where it does not fit; returns text. */
static const char *list_text(char text[TEXT], const int64_t *values, int64_t count)
{
    int at = snprintf(text, TEXT, "[");
    for (int64_t i = 0; i < count && at < TEXT - 32; ++i)
        at += snprintf(text + at, (size_t)(TEXT - at), i ? ", %" PRId64 : "%" PRId64, values[i]);
    snprintf(text + at, (size_t)(TEXT - at), at < TEXT - 32 ? "]" : ", ...]");
    return text;
}

static const char *device_text(char text[TEXT], const kasmina_tensor *tensor)
{
    if (tensor->device_type == aoti_torch_device_type_cpu())
        snprintf(text, TEXT, "cpu");
    else if (tensor->device_type == aoti_torch_device_type_cuda())
        snprintf(text, TEXT, "cuda:%d", (int)tensor->device_index);
    else
        snprintf(text, TEXT, "a device of type %d", (int)tensor->device_type);
    return text;
}

static bool is_floating(const kasmina_tensor *tensor)
{
    kasmina_dtype dtype;
    return kasmina_tensor_dtype(tensor, &dtype);
}

static bool expect_dtype(const char *op, const char *argument, const kasmina_tensor *tensor, int32_t scalar_type,
                         kasmina_status *status)
{
    if (tensor->scalar_type == scalar_type) return true;
    return kasmina_fail(status, "%s: %s must be %s, got %s", op, argument, dtype_name(scalar_type),
                        dtype_name(tensor->scalar_type));
}

static bool expect_floating(const char *op, const char *argument, const kasmina_tensor *tensor, kasmina_status *status)
{
    if (is_floating(tensor)) return true;
    return kasmina_fail(status, "%s: %s must be float32, float64, bfloat16 or float16, got %s", op, argument,
                        dtype_name(tensor->scalar_type));
}

static bool expect_device(const char *op, const char *argument, const kasmina_tensor *tensor, const char *of,
                          const kasmina_tensor *on, kasmina_status *status)
{
    char wanted[TEXT], given[TEXT];
    if (tensor->device_type == on->device_type && tensor->device_index == on->device_index) return true;
    return kasmina_fail(status, "%s: %s must be on %s, the device of %s, got %s", op, argument, device_text(wanted, on),
                        of, device_text(given, tensor));
}

static bool expect_shape(const char *op, const char *argument, const kasmina_tensor *tensor, int64_t dim,
                         const int64_t *sizes, const char *named, kasmina_status *status)
{
    char wanted[TEXT], given[TEXT];
    bool same = tensor->dim == dim;
    for (int64_t d = 0; same && d < dim; ++d) same = tensor->sizes[d] == sizes[d];
    if (same) return true;
    return kasmina_fail(status, "%s: %s must have shape %s = %s, got %s", op, argument, named,
                        list_text(wanted, sizes, dim), list_text(given, tensor->sizes, tensor->dim));
}

bool kasmina_expect_contiguous(const char *op, const char *argument, const kasmina_tensor *tensor,
                               kasmina_status *status)
{
    char given[TEXT];
    if (kasmina_tensor_is_contiguous(tensor)) return true;
    return kasmina_fail(status, "%s: %s must be contiguous, got strides %s", op, argument,
                        list_text(given, tensor->strides, tensor->dim));
}

static int64_t num_features(const kasmina_op_inputs *in)
{
    return in->x->sizes[in->x->dim - 1];
}

static int64_t num_seeds(const kasmina_op_inputs *in)
{
    return in->seed_offsets->sizes[0] - 1;
}

bool kasmina_expect_activations(const kasmina_op_inputs *in, kasmina_status *status)
{
    if (!expect_floating(in->op, "x", in->x, status)) return false;
    if (in->x->dim >= 1 && in->x->dim <= KASMINA_MAX_DIMS) return true;
    return kasmina_fail(status, "%s: x must have 1 to %d dimensions, got %" PRId64, in->op, KASMINA_MAX_DIMS,
                        in->x->dim);
}

bool kasmina_expect_like_x(const kasmina_op_inputs *in, const char *argument, const kasmina_tensor *grad_y,
                           kasmina_status *status)
{
    return expect_dtype(in->op, argument, grad_y, in->x->scalar_type, status) &&
           expect_device(in->op, argument, grad_y, "x", in->x, status) &&
           expect_shape(in->op, argument, grad_y, in->x->dim, in->x->sizes, "of x", status);
}

static bool expect_offset_values(const kasmina_op_inputs *in, kasmina_status *status)
{
    kasmina_tensor offsets = *in->seed_offsets;
    const int32_t *values = kasmina_tensor_data(&offsets, status);
    int64_t stride = offsets.strides[0], last = num_seeds(in), features = num_features(in);
    if (!values) return false;
    if (values[0] != 0) return kasmina_fail(status, "%s: seed_offsets must start at 0, got %d", in->op, (int)values[0]);
    for (int64_t i = 1; i <= last; ++i)
        if (values[i * stride] < values[(i - 1) * stride])
            return kasmina_fail(status, "%s: seed_offsets must not decrease, got %d after %d at %" PRId64, in->op,
                                (int)values[i * stride], (int)values[(i - 1) * stride], i);
    if (values[last * stride] > features)
        return kasmina_fail(status, "%s: seed_offsets must end at or before H = %" PRId64 ", got %d", in->op, features,
                            (int)values[last * stride]);
    return true;
}

bool kasmina_expect_offsets(const kasmina_op_inputs *in, kasmina_status *status)
{
    char given[TEXT];
    const kasmina_tensor *offsets = in->seed_offsets;
    if (!expect_dtype(in->op, "seed_offsets", offsets, aoti_torch_dtype_int32(), status) ||
        !expect_device(in->op, "seed_offsets", offsets, "x", in->x, status))
        return false;
    if (offsets->dim != 1 || offsets->sizes[0] < 1)
        return kasmina_fail(status, "%s: seed_offsets must have shape [S + 1], got %s", in->op,
                            list_text(given, offsets->sizes, offsets->dim));
    return offsets->device_type != aoti_torch_device_type_cpu() || expect_offset_values(in, status);
}

bool kasmina_expect_blueprints(const kasmina_op_inputs *in, const kasmina_tensor *state,
                               const kasmina_tensor *blueprint_weights, kasmina_status *status)
{
    char given[TEXT];
    const char *op = in->op;
    if (!kasmina_expect_offsets(in, status)) return false;
    const int64_t state_sizes[] = {8, num_seeds(in)};
    if (!expect_dtype(op, "state", state, aoti_torch_dtype_int32(), status) ||
        !expect_device(op, "state", state, "x", in->x, status) ||
        !expect_shape(op, "state", state, 2, state_sizes, "[8, S]", status) ||
        !expect_floating(op, "blueprint_weights", blueprint_weights, status) ||
        !expect_device(op, "blueprint_weights", blueprint_weights, "x", in->x, status))
        return false;
    if (blueprint_weights->dim == 2 && blueprint_weights->sizes[1] == num_features(in)) return true;
    return kasmina_fail(status, "%s: blueprint_weights must have shape [P, H] = [P, %" PRId64 "], got %s", op,
                        num_features(in), list_text(given, blueprint_weights->sizes, blueprint_weights->dim));
}

bool kasmina_expect_seeds(const kasmina_op_inputs *in, const kasmina_tensor *state, const kasmina_tensor *alpha,
                          const kasmina_tensor *blueprint_weights, kasmina_status *status)
{
    if (!kasmina_expect_blueprints(in, state, blueprint_weights, status)) return false;
    const int64_t seeds = num_seeds(in);
    return expect_dtype(in->op, "alpha", alpha, aoti_torch_dtype_float32(), status) &&
           expect_device(in->op, "alpha", alpha, "x", in->x, status) &&
           expect_shape(in->op, "alpha", alpha, 1, &seeds, "[S]", status);
}

bool kasmina_expect_accumulator(const kasmina_op_inputs *in, const char *argument, const kasmina_tensor *tensor,
                                int64_t columns, kasmina_status *status)
{
    const int64_t sizes[] = {num_seeds(in), columns};
    if (tensor->numel == 0) return true;
    return expect_dtype(in->op, argument, tensor, aoti_torch_dtype_float64(), status) &&
           expect_device(in->op, argument, tensor, "x", in->x, status) &&
           expect_shape(in->op, argument, tensor, 2, sizes, columns == 5 ? "[S, 5]" : "[S, 3]", status) &&
           kasmina_expect_contiguous(in->op, argument, tensor, status);
}

bool kasmina_expect_telemetry(const char *op, const char *argument, const kasmina_tensor *tensor,
                              kasmina_status *status)
{
    char given[TEXT];
    if (!expect_dtype(op, argument, tensor, aoti_torch_dtype_float64(), status)) return false;
    if (tensor->dim == 2 && tensor->sizes[1] == KASMINA_TELEMETRY_COLUMNS) return true;
    return kasmina_fail(status, "%s: %s must have shape [S, 5], got %s", op, argument,
                        list_text(given, tensor->sizes, tensor->dim));
}

bool kasmina_expect_mergeable(const char *op, const kasmina_tensor *telemetry, const kasmina_tensor *other,
                              kasmina_status *status)
{
    const int64_t sizes[] = {telemetry->sizes[0], KASMINA_TELEMETRY_COLUMNS};
    return expect_dtype(op, "other", other, aoti_torch_dtype_float64(), status) &&
           expect_device(op, "other", other, "telemetry", telemetry, status) &&
           expect_shape(op, "other", other, 2, sizes, "[S, 5]", status);
}

bool kasmina_expect_int32(const char *op, const char *argument, const kasmina_tensor *tensor,
                          const kasmina_tensor *state, int64_t dim, const int64_t *sizes, const char *named,
                          kasmina_status *status)
{
    return expect_dtype(op, argument, tensor, aoti_torch_dtype_int32(), status) &&
           expect_device(op, argument, tensor, "state", state, status) &&
           expect_shape(op, argument, tensor, dim, sizes, named, status);
}

bool kasmina_expect_requests(const char *op, const kasmina_tensor *seed_ids, kasmina_status *status)
{
    if (!expect_dtype(op, "seed_ids", seed_ids, aoti_torch_dtype_int32(), status)) return false;
    if (seed_ids->dim != 1)
        return kasmina_fail(status, "%s: seed_ids must have shape [U], got %" PRId64 " dimensions", op, seed_ids->dim);
    if (seed_ids->sizes[0] > INT32_MAX)
        return kasmina_fail(status, "%s: seed_ids must have at most %d elements, got %" PRId64, op, INT32_MAX,
                            seed_ids->sizes[0]);
    return true;
}

bool kasmina_expect_state(const char *op, const kasmina_tensor *state, const kasmina_tensor *history,
                          const kasmina_tensor *history_count, kasmina_status *status)
{
    char given[TEXT];
    if (!expect_dtype(op, "state", state, aoti_torch_dtype_int32(), status)) return false;
    if (state->dim != 2 || state->sizes[0] != 8)
        return kasmina_fail(status, "%s: state must have shape [8, S], got %s", op,
                            list_text(given, state->sizes, state->dim));
    const int64_t seeds = state->sizes[1], history_sizes[] = {seeds, 10, 2};
    return kasmina_expect_contiguous(op, "state", state, status) &&
           kasmina_expect_int32(op, "history", history, state, 3, history_sizes, "[S, 10, 2]", status) &&
           kasmina_expect_contiguous(op, "history", history, status) &&
           kasmina_expect_int32(op, "history_count", history_count, state, 1, &seeds, "[S]", status) &&
           kasmina_expect_contiguous(op, "history_count", history_count, status);
}

bool kasmina_expect_alpha(const char *op, const kasmina_tensor *alpha, const kasmina_tensor *state,
                          kasmina_status *status)
{
    return expect_dtype(op, "alpha", alpha, aoti_torch_dtype_float32(), status) &&
           expect_device(op, "alpha", alpha, "state", state, status) &&
           expect_shape(op, "alpha", alpha, 1, &state->sizes[1], "[S]", status) &&
           kasmina_expect_contiguous(op, "alpha", alpha, status);
}

bool kasmina_expect_grad_loss(const kasmina_op_inputs *in, const kasmina_tensor *grad_loss, kasmina_status *status)
{
    const bool wide = in->x->scalar_type == aoti_torch_dtype_float64();
    const int64_t seeds = num_seeds(in);
    return expect_dtype(in->op, "grad_loss", grad_loss, wide ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32(),
                        status) &&
           expect_device(in->op, "grad_loss", grad_loss, "x", in->x, status) &&
           expect_shape(in->op, "grad_loss", grad_loss, 1, &seeds, "[S]", status);
}

bool kasmina_expect_moments(const kasmina_op_inputs *in, const kasmina_tensor *moments, kasmina_status *status)
{
    const int64_t sizes[] = {in->x->sizes[in->x->dim - 1], KASMINA_PAIR_COLUMNS};
    return expect_dtype(in->op, "moments", moments, aoti_torch_dtype_float64(), status) &&
           expect_device(in->op, "moments", moments, "x", in->x, status) &&
           expect_shape(in->op, "moments", moments, 2, sizes, "[H, 6]", status) &&
           kasmina_expect_contiguous(in->op, "moments", moments, status);
}
