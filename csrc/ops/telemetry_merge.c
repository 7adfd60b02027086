#include "ops/common.h"
#include "ops/ops.h"
#include "ops/validate.h"

enum { TELEMETRY, OTHER, NUM_TENSORS };

static const char op[] = "telemetry_merge";
static const char *const names[] = {"telemetry", "other"};

static bool validate(const kasmina_tensor *t, kasmina_status *status)
{
    return kasmina_expect_telemetry(op, "telemetry", &t[TELEMETRY], status) &&
           kasmina_expect_contiguous(op, "telemetry", &t[TELEMETRY], status) &&
           kasmina_expect_mergeable(op, &t[TELEMETRY], &t[OTHER], status);
}

static bool run(kasmina_tensor *t, const kasmina_device_scope *scope, kasmina_status *status)
{
    kasmina_telemetry_merge_args args = {.num_seeds = t[TELEMETRY].sizes[0]};
    if (args.num_seeds == 0) return true;
    if (!kasmina_tensor_make_contiguous(&t[OTHER], status)) return false;
    args.telemetry = kasmina_tensor_mutable_data(&t[TELEMETRY], status);
    args.other = kasmina_tensor_data(&t[OTHER], status);
    if (status->failed) return false;
    const double *begin = args.telemetry, *end = begin + t[TELEMETRY].numel;
    if (args.other != begin && args.other < end && args.other + t[OTHER].numel > begin) {
        /* Another part of the same memory: rows would be read after they were written. */
        if (!kasmina_tensor_restride(&t[OTHER], NULL, status)) return false;
        args.other = kasmina_tensor_data(&t[OTHER], status);
        if (status->failed) return false;
    }
    return kasmina_device_check(scope, KASMINA_LAUNCH(scope, telemetry_merge, &args), op, status);
}

void kasmina_telemetry_merge(StableIValue *stack, uint64_t num_args, uint64_t num_outputs)
{
    kasmina_status status = {0};
    kasmina_tensor t[NUM_TENSORS] = {0};
    kasmina_device_scope scope = {0};
    (void)num_args, (void)num_outputs;
    if (!kasmina_tensors_take(t, stack, NUM_TENSORS, op, names, &status)) goto done;
    if (!validate(t, &status)) goto done;
    if (!kasmina_device_enter(&scope, &t[TELEMETRY], &status)) goto done;
    run(t, &scope, &status);
done:
    kasmina_device_leave(&scope);
    kasmina_tensors_release(t, NUM_TENSORS);
    kasmina_raise(&status, op);
}
