#include "ops/common.h"
#include "ops/ops.h"
#include "ops/validate.h"

enum { X, TARGET, MOMENTS, NUM_INPUTS };
enum { WORKSPACE = NUM_INPUTS, NUM_TENSORS };

static const char op[] = "pair_moments";
static const char *const names[] = {"x", "t", "moments"};

static bool validate(const kasmina_tensor *t, kasmina_status *status)
{
    const kasmina_op_inputs in = {.op = op, .x = &t[X]};
    return kasmina_expect_activations(&in, status) && kasmina_expect_like_x(&in, "t", &t[TARGET], status) &&
           kasmina_expect_moments(&in, &t[MOMENTS], status);
}

static bool run(kasmina_tensor *t, const kasmina_device_scope *scope, kasmina_status *status)
{
    kasmina_pair_moments_args args = {.workspace = NULL};
    if (t[X].numel == 0) return true;
    if (!kasmina_align_to_x(&t[X], &t[TARGET], &args.layout, status)) return false;
    kasmina_tensor_dtype(&t[X], &args.dtype);
    args.x = kasmina_tensor_data(&t[X], status);
    args.target = kasmina_tensor_data(&t[TARGET], status);
    args.moments = kasmina_tensor_mutable_data(&t[MOMENTS], status);
    if (status->failed || !kasmina_make_workspace(&t[WORKSPACE], &args.workspace,
                                                  KASMINA_WORKSPACE(scope, pair_moments, &args), &t[X], status))
        return false;
    return kasmina_device_check(scope, KASMINA_LAUNCH(scope, pair_moments, &args), op, status);
}

void kasmina_pair_moments(StableIValue *stack, uint64_t num_args, uint64_t num_outputs)
{
    kasmina_status status = {0};
    kasmina_tensor t[NUM_TENSORS] = {0};
    kasmina_device_scope scope = {0};
    (void)num_args, (void)num_outputs;
    if (!kasmina_tensors_take(t, stack, NUM_INPUTS, op, names, &status)) goto done;
    if (!validate(t, &status)) goto done;
    if (!kasmina_device_enter(&scope, &t[X], &status)) goto done;
    run(t, &scope, &status);
done:
    kasmina_device_leave(&scope);
    kasmina_tensors_release(t, NUM_TENSORS);
    kasmina_raise(&status, op);
}
