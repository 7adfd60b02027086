#include "ops/common.h"
#include "ops/ops.h"
#include "ops/validate.h"

enum { X, SEED_OFFSETS, STATE, ALPHA, BLUEPRINT_WEIGHTS, TELEMETRY, GRAD_TELEMETRY, NUM_INPUTS };
enum { Y = NUM_INPUTS, WORKSPACE, NUM_TENSORS };

static const char *const names[] = {"x",         "seed_offsets",  "state", "alpha", "blueprint_weights",
                                    "telemetry", "grad_telemetry"};

static bool validate(const kasmina_call *call, kasmina_status *status)
{
    const kasmina_tensor *t = call->t;
    const kasmina_op_inputs in = {.op = call->op, .x = &t[X], .seed_offsets = &t[SEED_OFFSETS]};
    return kasmina_expect_activations(&in, status) &&
           kasmina_expect_seeds(&in, &t[STATE], &t[ALPHA], &t[BLUEPRINT_WEIGHTS], status) &&
           kasmina_expect_accumulator(&in, "telemetry", &t[TELEMETRY], KASMINA_TELEMETRY_COLUMNS, status) &&
           kasmina_expect_accumulator(&in, "grad_telemetry", &t[GRAD_TELEMETRY], KASMINA_GRAD_TELEMETRY_COLUMNS,
                                      status);
}

/* Allocate the output and compute it; everything allocated lands in `t`. */
static bool run(kasmina_call *call, kasmina_status *status)
{
    kasmina_tensor *t = call->t;
    kasmina_forward_args args = {0};
    if (!kasmina_tensor_empty_like(&t[Y], &t[X], status)) return false;
    if (t[X].numel == 0) return true;
    /* Elements with gaps or overlaps: a dense copy keeps the kernels to dense layouts. */
    if (!kasmina_make_dense(&t[X], t[Y].strides, &args.layout, status) ||
        !kasmina_read_seeds(&t[SEED_OFFSETS], &t[STATE], &t[ALPHA], &t[BLUEPRINT_WEIGHTS], &args.seeds, status))
        return false;
    kasmina_tensor_dtype(&t[X], &args.dtype);
    args.x = kasmina_tensor_data(&t[X], status);
    args.y = kasmina_tensor_mutable_data(&t[Y], status);
    if (t[TELEMETRY].numel) args.telemetry = kasmina_tensor_mutable_data(&t[TELEMETRY], status);
    return !status->failed &&
           kasmina_make_workspace(&t[WORKSPACE], &args.workspace, KASMINA_WORKSPACE(&call->scope, forward, &args),
                                  &t[X], status) &&
           KASMINA_RUN(call, chunked_forward, &args, status);
}

KASMINA_OPERATOR(chunked_forward, .inputs = NUM_INPUTS, .results = 1, .device_of = X)
