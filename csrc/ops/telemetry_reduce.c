#include "ops/common.h"
#include "ops/ops.h"
#include "ops/validate.h"

enum { TELEMETRY, NUM_INPUTS };
enum { OUT = NUM_INPUTS, NUM_TENSORS };

static const char op[] = "telemetry_reduce";
static const char *const names[] = {"telemetry"};

static bool run(kasmina_tensor *t, const kasmina_device_scope *scope, kasmina_status *status)
{
    const int64_t sizes[] = {t[TELEMETRY].sizes[0], KASMINA_REDUCED_COLUMNS}, strides[] = {KASMINA_REDUCED_COLUMNS, 1};
    if (!kasmina_tensor_empty(&t[OUT], 2, sizes, strides, t[TELEMETRY].scalar_type, &t[TELEMETRY], status))
        return false;
    if (sizes[0] == 0) return true;
    if (!kasmina_tensor_make_contiguous(&t[TELEMETRY], status)) return false;
    kasmina_telemetry_reduce_args args = {.num_seeds = sizes[0]};
    args.telemetry = kasmina_tensor_data(&t[TELEMETRY], status);
    args.out = kasmina_tensor_mutable_data(&t[OUT], status);
    if (status->failed) return false;
    return kasmina_device_check(scope, KASMINA_LAUNCH(scope, telemetry_reduce, &args), op, status);
}

void kasmina_telemetry_reduce(StableIValue *stack, uint64_t num_args, uint64_t num_outputs)
{
    kasmina_status status = {0};
    kasmina_tensor t[NUM_TENSORS] = {0};
    kasmina_device_scope scope = {0};
    (void)num_args, (void)num_outputs;
    if (!kasmina_tensors_take(t, stack, NUM_INPUTS, op, names, &status)) goto done;
    if (!kasmina_expect_telemetry(op, "telemetry", &t[TELEMETRY], &status)) goto done;
    if (!kasmina_device_enter(&scope, &t[TELEMETRY], &status)) goto done;
    if (run(t, &scope, &status)) kasmina_tensor_return(&t[OUT], &stack[0]);
done:
    kasmina_device_leave(&scope);
    kasmina_tensors_release(t, NUM_TENSORS);
    kasmina_raise(&status, op);
}
