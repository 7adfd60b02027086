#include "ops/common.h"
#include "ops/ops.h"
#include "ops/validate.h"

enum { X, TARGET, MOMENTS, NUM_INPUTS };
enum { WORKSPACE = NUM_INPUTS, NUM_TENSORS };

static const char *const names[] = {"x", "t", "moments"};

static bool validate(const kasmina_call *call, kasmina_status *status)
{
    const kasmina_tensor *t = call->t;
    const kasmina_op_inputs in = {.op = call->op, .x = &t[X]};
    return kasmina_expect_activations(&in, status) && kasmina_expect_like_x(&in, "t", &t[TARGET], status) &&
           kasmina_expect_moments(&in, &t[MOMENTS], status);
}

static bool run(kasmina_call *call, kasmina_status *status)
{
    kasmina_tensor *t = call->t;
    kasmina_pair_moments_args args = {.workspace = NULL};
    if (t[X].numel == 0) return true;
    if (!kasmina_align_to_x(&t[X], &t[TARGET], &args.layout, status)) return false;
    kasmina_tensor_dtype(&t[X], &args.dtype);
    args.x = kasmina_tensor_data(&t[X], status);
    args.target = kasmina_tensor_data(&t[TARGET], status);
    args.moments = kasmina_tensor_mutable_data(&t[MOMENTS], status);
    return !status->failed &&
           kasmina_make_workspace(&t[WORKSPACE], &args.workspace, KASMINA_WORKSPACE(&call->scope, pair_moments, &args),
                                  &t[X], status) &&
           KASMINA_RUN(call, pair_moments, &args, status);
}

KASMINA_OPERATOR(pair_moments, .inputs = NUM_INPUTS, .device_of = X)
