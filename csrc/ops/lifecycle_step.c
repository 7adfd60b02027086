#include <inttypes.h>

#include "lifecycle_math.h"
#include "ops/common.h"
#include "ops/ops.h"
#include "ops/validate.h"

enum { STATE, HISTORY, HISTORY_COUNT, ALPHA, NUM_TENSORS };
enum { SCHEDULE, RAMP_EPOCHS, ADVANCE }; /* of the scalars */

static const char *const names[] = {"state", "history", "history_count", "alpha"};

static bool validate(const kasmina_call *call, kasmina_status *status)
{
    const kasmina_tensor *t = call->t;
    const int64_t schedule = (int64_t)call->scalars[SCHEDULE];
    if (!kasmina_expect_state(call->op, &t[STATE], &t[HISTORY], &t[HISTORY_COUNT], status) ||
        !kasmina_expect_alpha(call->op, &t[ALPHA], &t[STATE], status))
        return false;
    if (schedule >= 0 && schedule < KASMINA_NUM_SCHEDULES) return true;
    return kasmina_fail(status, "%s: schedule must be 0 (none), 1 (linear), 2 (cosine) or 3 (sigmoid), got %" PRId64,
                        call->op, schedule);
}

static bool run(kasmina_call *call, kasmina_status *status)
{
    const kasmina_tensor *t = call->t;
    kasmina_lifecycle_step_args args = {.num_seeds = t[STATE].sizes[1]};
    if (args.num_seeds == 0) return true;
    args.schedule = (int64_t)call->scalars[SCHEDULE];
    args.ramp_epochs = (int64_t)call->scalars[RAMP_EPOCHS];
    args.advance = kasmina_bool(call->scalars[ADVANCE]);
    args.state = kasmina_tensor_mutable_data(&t[STATE], status);
    args.history = kasmina_tensor_mutable_data(&t[HISTORY], status);
    args.history_count = kasmina_tensor_mutable_data(&t[HISTORY_COUNT], status);
    args.alpha = kasmina_tensor_mutable_data(&t[ALPHA], status);
    return !status->failed && KASMINA_RUN(call, lifecycle_step, &args, status);
}

KASMINA_OPERATOR(lifecycle_step, .inputs = NUM_TENSORS, .device_of = STATE)
