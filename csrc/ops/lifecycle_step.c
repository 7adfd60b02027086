#include <inttypes.h>

#include "lifecycle_math.h"
#include "ops/common.h"
#include "ops/ops.h"
#include "ops/validate.h"

enum { STATE, HISTORY, HISTORY_COUNT, ALPHA, NUM_TENSORS };
enum { SCHEDULE = NUM_TENSORS, RAMP_EPOCHS, ADVANCE }; /* slots of what is no tensor */

static const char op[] = "lifecycle_step";
static const char *const names[] = {"state", "history", "history_count", "alpha"};

static bool validate(const kasmina_tensor *t, int64_t schedule, kasmina_status *status)
{
    if (!kasmina_expect_state(op, &t[STATE], &t[HISTORY], &t[HISTORY_COUNT], status) ||
        !kasmina_expect_alpha(op, &t[ALPHA], &t[STATE], status))
        return false;
    if (schedule >= 0 && schedule < KASMINA_NUM_SCHEDULES) return true;
    return kasmina_fail(status, "%s: schedule must be 0 (none), 1 (linear), 2 (cosine) or 3 (sigmoid), got %" PRId64,
                        op, schedule);
}

static bool run(kasmina_tensor *t, kasmina_lifecycle_step_args *args, const kasmina_device_scope *scope,
                kasmina_status *status)
{
    args->num_seeds = t[STATE].sizes[1];
    if (args->num_seeds == 0) return true;
    args->state = kasmina_tensor_mutable_data(&t[STATE], status);
    args->history = kasmina_tensor_mutable_data(&t[HISTORY], status);
    args->history_count = kasmina_tensor_mutable_data(&t[HISTORY_COUNT], status);
    args->alpha = kasmina_tensor_mutable_data(&t[ALPHA], status);
    if (status->failed) return false;
    return kasmina_device_check(scope, KASMINA_LAUNCH(scope, lifecycle_step, args), op, status);
}

void kasmina_lifecycle_step(StableIValue *stack, uint64_t num_args, uint64_t num_outputs)
{
    kasmina_status status = {0};
    kasmina_tensor t[NUM_TENSORS] = {0};
    kasmina_device_scope scope = {0};
    kasmina_lifecycle_step_args args = {.schedule = (int64_t)stack[SCHEDULE],
                                        .ramp_epochs = (int64_t)stack[RAMP_EPOCHS]};
    args.advance = (stack[ADVANCE] & 0xff) != 0; /* a bool is the low byte of its slot */
    (void)num_args, (void)num_outputs;
    if (!kasmina_tensors_take(t, stack, NUM_TENSORS, op, names, &status)) goto done;
    if (!validate(t, args.schedule, &status)) goto done;
    if (!kasmina_device_enter(&scope, &t[STATE], &status)) goto done;
    run(t, &args, &scope, &status);
done:
    kasmina_device_leave(&scope);
    kasmina_tensors_release(t, NUM_TENSORS);
    kasmina_raise(&status, op);
}
