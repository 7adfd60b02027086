#include "ops/common.h"
#include "ops/ops.h"
#include "ops/validate.h"

enum { TELEMETRY, OTHER, NUM_TENSORS };

static const char *const names[] = {"telemetry", "other"};

static bool validate(const kasmina_call *call, kasmina_status *status)
{
    const kasmina_tensor *t = call->t;
    return kasmina_expect_telemetry(call->op, "telemetry", &t[TELEMETRY], status) &&
           kasmina_expect_contiguous(call->op, "telemetry", &t[TELEMETRY], status) &&
           kasmina_expect_mergeable(call->op, &t[TELEMETRY], &t[OTHER], status);
}

static bool run(kasmina_call *call, kasmina_status *status)
{
    kasmina_tensor *t = call->t;
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
    return KASMINA_RUN(call, telemetry_merge, &args, status);
}

KASMINA_OPERATOR(telemetry_merge, .inputs = NUM_TENSORS, .device_of = TELEMETRY)
