#include "ops/common.h"
#include "ops/ops.h"
#include "ops/validate.h"

enum { GRAD_Y, X, SEED_OFFSETS, STATE, ALPHA, BLUEPRINT_WEIGHTS, GRAD_TELEMETRY, NUM_INPUTS };
enum { GRAD_X = NUM_INPUTS, GRAD_WEIGHTS, GRAD_ALPHA, WORKSPACE, NUM_TENSORS };
enum { NUM_RESULTS = 3 };

static const char *const names[] = {"grad_y",        "x", "seed_offsets", "state", "alpha", "blueprint_weights",
                                    "grad_telemetry"};

static bool validate(const kasmina_call *call, kasmina_status *status)
{
    const kasmina_tensor *t = call->t;
    const kasmina_op_inputs in = {.op = call->op, .x = &t[X], .seed_offsets = &t[SEED_OFFSETS]};
    return kasmina_expect_activations(&in, status) && kasmina_expect_like_x(&in, "grad_y", &t[GRAD_Y], status) &&
           kasmina_expect_seeds(&in, &t[STATE], &t[ALPHA], &t[BLUEPRINT_WEIGHTS], status) &&
           kasmina_expect_accumulator(&in, "grad_telemetry", &t[GRAD_TELEMETRY], KASMINA_GRAD_TELEMETRY_COLUMNS,
                                      status);
}

/* A result, of size 0 where it is not wanted; contiguous with the sizes of `like`. */
static bool allocate(kasmina_tensor *out, bool wanted, const kasmina_tensor *like, kasmina_status *status)
{
    const int64_t strides[] = {like->dim == 2 ? like->sizes[1] : 1, 1};
    if (!wanted) return kasmina_tensor_empty_1d(out, 0, like->scalar_type, like, status);
    return kasmina_tensor_empty(out, like->dim, like->sizes, strides, like->scalar_type, like, status);
}

/* Allocate the results and compute them; everything allocated lands in `t`. */
static bool run(kasmina_call *call, kasmina_status *status)
{
    kasmina_tensor *t = call->t;
    bool wanted[NUM_RESULTS];
    for (int i = 0; i < NUM_RESULTS; ++i) wanted[i] = kasmina_bool(call->scalars[i]);
    kasmina_backward_args args = {0};
    if (!(wanted[0] ? kasmina_tensor_empty_like(&t[GRAD_X], &t[X], status)
                    : kasmina_tensor_empty_1d(&t[GRAD_X], 0, t[X].scalar_type, &t[X], status)) ||
        !allocate(&t[GRAD_WEIGHTS], wanted[1], &t[BLUEPRINT_WEIGHTS], status) ||
        !allocate(&t[GRAD_ALPHA], wanted[2], &t[ALPHA], status))
        return false;
    if (t[X].numel == 0) {
        if (aoti_torch_zero_(t[GRAD_WEIGHTS].handle) || aoti_torch_zero_(t[GRAD_ALPHA].handle))
            return kasmina_fail(status, "%s: could not zero the results", call->op);
        return true;
    }
    if (!kasmina_align_to_x(&t[X], &t[GRAD_Y], &args.layout, status) ||
        !kasmina_read_seeds(&t[SEED_OFFSETS], &t[STATE], &t[ALPHA], &t[BLUEPRINT_WEIGHTS], &args.seeds, status))
        return false;
    kasmina_tensor_dtype(&t[X], &args.dtype);
    args.x = kasmina_tensor_data(&t[X], status);
    args.grad_y = kasmina_tensor_data(&t[GRAD_Y], status);
    if (t[GRAD_X].numel) args.grad_x = kasmina_tensor_mutable_data(&t[GRAD_X], status);
    if (t[GRAD_WEIGHTS].numel) args.grad_weights = kasmina_tensor_mutable_data(&t[GRAD_WEIGHTS], status);
    if (t[GRAD_ALPHA].numel) args.grad_alpha = kasmina_tensor_mutable_data(&t[GRAD_ALPHA], status);
    if (t[GRAD_TELEMETRY].numel) args.grad_telemetry = kasmina_tensor_mutable_data(&t[GRAD_TELEMETRY], status);
    return !status->failed &&
           kasmina_make_workspace(&t[WORKSPACE], &args.workspace, KASMINA_WORKSPACE(&call->scope, backward, &args),
                                  &t[X], status) &&
           KASMINA_RUN(call, chunked_backward, &args, status);
}

KASMINA_OPERATOR(chunked_backward, .inputs = NUM_INPUTS, .results = NUM_RESULTS, .device_of = X)
