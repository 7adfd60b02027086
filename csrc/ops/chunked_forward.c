#include "ops/common.h"
#include "ops/ops.h"
#include "ops/validate.h"

enum { X, SEED_OFFSETS, STATE, ALPHA, BLUEPRINT_WEIGHTS, TELEMETRY, GRAD_TELEMETRY, NUM_INPUTS };
enum { Y = NUM_INPUTS, WORKSPACE, NUM_TENSORS };

static const char op[] = "chunked_forward";
static const char *const names[] = {"x",         "seed_offsets",  "state", "alpha", "blueprint_weights",
                                    "telemetry", "grad_telemetry"};

static bool validate(const kasmina_tensor *t, kasmina_status *status)
{
    const kasmina_op_inputs in = {.op = op, .x = &t[X], .seed_offsets = &t[SEED_OFFSETS]};
    return kasmina_expect_activations(&in, status) &&
           kasmina_expect_seeds(&in, &t[STATE], &t[ALPHA], &t[BLUEPRINT_WEIGHTS], status) &&
           kasmina_expect_accumulator(&in, "telemetry", &t[TELEMETRY], KASMINA_TELEMETRY_COLUMNS, status) &&
           kasmina_expect_accumulator(&in, "grad_telemetry", &t[GRAD_TELEMETRY], KASMINA_GRAD_TELEMETRY_COLUMNS,
                                      status);
}

/* Allocate the output and compute it; everything allocated lands in `t`. */
static bool run(kasmina_tensor *t, const kasmina_device_scope *scope, kasmina_status *status)
{
    kasmina_forward_args args = {0};
    if (!kasmina_tensor_empty_like(&t[Y], &t[X], status)) return false;
    if (t[X].numel == 0) return true;
    if (!kasmina_tensor_layout(&t[X], &args.layout)) {
        /* Elements with gaps or overlaps: a dense copy keeps the kernels to dense layouts. */
        if (!kasmina_tensor_restride(&t[X], t[Y].strides, status)) return false;
        kasmina_tensor_layout(&t[X], &args.layout);
    }
    kasmina_tensor_dtype(&t[X], &args.dtype);
    if (!kasmina_read_seeds(&t[SEED_OFFSETS], &t[STATE], &t[ALPHA], &t[BLUEPRINT_WEIGHTS], &args.seeds, status))
        return false;
    args.x = kasmina_tensor_data(&t[X], status);
    args.y = kasmina_tensor_mutable_data(&t[Y], status);
    if (t[TELEMETRY].numel) args.telemetry = kasmina_tensor_mutable_data(&t[TELEMETRY], status);
    if (status->failed || !kasmina_make_workspace(&t[WORKSPACE], &args.workspace,
                                                  KASMINA_WORKSPACE(scope, forward, &args), &t[X], status))
        return false;
    return kasmina_device_check(scope, KASMINA_LAUNCH(scope, chunked_forward, &args), op, status);
}

void kasmina_chunked_forward(StableIValue *stack, uint64_t num_args, uint64_t num_outputs)
{
    kasmina_status status = {0};
    kasmina_tensor t[NUM_TENSORS] = {0};
    kasmina_device_scope scope = {0};
    (void)num_args, (void)num_outputs;
    if (!kasmina_tensors_take(t, stack, NUM_INPUTS, op, names, &status)) goto done;
    if (!validate(t, &status)) goto done;
    if (!kasmina_device_enter(&scope, &t[X], &status)) goto done;
    if (run(t, &scope, &status)) kasmina_tensor_return(&t[Y], &stack[0]);
done:
    kasmina_device_leave(&scope);
    kasmina_tensors_release(t, NUM_TENSORS);
    kasmina_raise(&status, op);
}
