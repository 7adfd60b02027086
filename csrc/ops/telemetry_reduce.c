#include "ops/common.h"
#include "ops/ops.h"
#include "ops/validate.h"

enum { TELEMETRY, NUM_INPUTS };
enum { OUT = NUM_INPUTS, NUM_TENSORS };

static const char *const names[] = {"telemetry"};

static bool validate(const kasmina_call *call, kasmina_status *status)
{
    return kasmina_expect_telemetry(call->op, "telemetry", &call->t[TELEMETRY], status);
}

static bool run(kasmina_call *call, kasmina_status *status)
{
    kasmina_tensor *t = call->t;
    const int64_t sizes[] = {t[TELEMETRY].sizes[0], KASMINA_REDUCED_COLUMNS}, strides[] = {KASMINA_REDUCED_COLUMNS, 1};
    if (!kasmina_tensor_empty(&t[OUT], 2, sizes, strides, t[TELEMETRY].scalar_type, &t[TELEMETRY], status))
        return false;
    if (sizes[0] == 0) return true;
    if (!kasmina_tensor_make_contiguous(&t[TELEMETRY], status)) return false;
    kasmina_telemetry_reduce_args args = {.num_seeds = sizes[0]};
    args.telemetry = kasmina_tensor_data(&t[TELEMETRY], status);
    args.out = kasmina_tensor_mutable_data(&t[OUT], status);
    if (status->failed) return false;
    return KASMINA_RUN(call, telemetry_reduce, &args, status);
}

KASMINA_OPERATOR(telemetry_reduce, .inputs = NUM_INPUTS, .results = 1, .device_of = TELEMETRY)
