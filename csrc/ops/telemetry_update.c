#include "ops/common.h"
#include "ops/ops.h"
#include "ops/validate.h"

enum { X, SEED_OFFSETS, TELEMETRY, NUM_INPUTS };
enum { WORKSPACE = NUM_INPUTS, NUM_TENSORS };

static const char op[] = "telemetry_update";
static const char *const names[] = {"x", "seed_offsets", "telemetry"};

static bool validate(const kasmina_tensor *t, kasmina_status *status)
{
    const kasmina_op_inputs in = {.op = op, .x = &t[X], .seed_offsets = &t[SEED_OFFSETS]};
    return kasmina_expect_activations(&in, status) && kasmina_expect_offsets(&in, status) &&
           kasmina_expect_accumulator(&in, "telemetry", &t[TELEMETRY], KASMINA_TELEMETRY_COLUMNS, status);
}

/* The statistics half of the forward kernel: no output is written. */
static bool run(kasmina_tensor *t, const kasmina_device_scope *scope, kasmina_status *status)
{
    kasmina_forward_args args = {0};
    if (t[X].numel == 0 || t[TELEMETRY].numel == 0) return true;
    if (!kasmina_tensor_layout(&t[X], &args.layout)) {
        if (!kasmina_tensor_restride(&t[X], NULL, status)) return false;
        kasmina_tensor_layout(&t[X], &args.layout);
    }
    kasmina_tensor_dtype(&t[X], &args.dtype);
    if (!kasmina_read_chunks(&t[SEED_OFFSETS], &args.seeds.chunks, status)) return false;
    args.x = kasmina_tensor_data(&t[X], status);
    args.telemetry = kasmina_tensor_mutable_data(&t[TELEMETRY], status);
    if (status->failed || !kasmina_make_workspace(&t[WORKSPACE], &args.workspace,
                                                  KASMINA_WORKSPACE(scope, forward, &args), &t[X], status))
        return false;
    return kasmina_device_check(scope, KASMINA_LAUNCH(scope, chunked_forward, &args), op, status);
}

void kasmina_telemetry_update(StableIValue *stack, uint64_t num_args, uint64_t num_outputs)
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
