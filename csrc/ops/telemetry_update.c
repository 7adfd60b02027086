#include "ops/common.h"
#include "ops/ops.h"
#include "ops/validate.h"

enum { X, SEED_OFFSETS, TELEMETRY, NUM_INPUTS };
enum { WORKSPACE = NUM_INPUTS, NUM_TENSORS };

static const char *const names[] = {"x", "seed_offsets", "telemetry"};

static bool validate(const kasmina_call *call, kasmina_status *status)
{
    const kasmina_tensor *t = call->t;
    const kasmina_op_inputs in = {.op = call->op, .x = &t[X], .seed_offsets = &t[SEED_OFFSETS]};
    return kasmina_expect_activations(&in, status) && kasmina_expect_offsets(&in, status) &&
           kasmina_expect_accumulator(&in, "telemetry", &t[TELEMETRY], KASMINA_TELEMETRY_COLUMNS, status);
}

/* The statistics half of the forward kernel: no output is written. */
static bool run(kasmina_call *call, kasmina_status *status)
{
    kasmina_tensor *t = call->t;
    kasmina_forward_args args = {0};
    if (t[X].numel == 0 || t[TELEMETRY].numel == 0) return true;
    if (!kasmina_make_dense(&t[X], NULL, &args.layout, status) ||
        !kasmina_read_chunks(&t[SEED_OFFSETS], &args.seeds.chunks, status))
        return false;
    kasmina_tensor_dtype(&t[X], &args.dtype);
    args.x = kasmina_tensor_data(&t[X], status);
    args.telemetry = kasmina_tensor_mutable_data(&t[TELEMETRY], status);
    return !status->failed &&
           kasmina_make_workspace(&t[WORKSPACE], &args.workspace, KASMINA_WORKSPACE(&call->scope, forward, &args),
                                  &t[X], status) &&
           KASMINA_RUN(call, chunked_forward, &args, status);
}

KASMINA_OPERATOR(telemetry_update, .inputs = NUM_INPUTS, .device_of = X)
