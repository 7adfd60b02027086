#include "ops/common.h"
#include "ops/ops.h"
#include "ops/validate.h"

enum { STATE, HISTORY, HISTORY_COUNT, SEED_IDS, VALUES, MASK, RULES, NUM_INPUTS };
enum { VERDICTS = NUM_INPUTS, WORKSPACE, NUM_TENSORS };

static const char *const names[] = {"state", "history", "history_count", "seed_ids", "values", "mask", "rules"};

static bool validate(const kasmina_call *call, kasmina_status *status)
{
    const kasmina_tensor *t = call->t;
    const kasmina_tensor *state = &t[STATE];
    const char *op = call->op;
    if (!kasmina_expect_state(op, state, &t[HISTORY], &t[HISTORY_COUNT], status)) return false;
    if (!kasmina_expect_requests(op, &t[SEED_IDS], status)) return false;
    const int64_t updates = t[SEED_IDS].sizes[0];
    const int64_t values[] = {updates, 4}, rules[] = {11, 11};
    return kasmina_expect_int32(op, "seed_ids", &t[SEED_IDS], state, 1, &updates, "[U]", status) &&
           kasmina_expect_int32(op, "values", &t[VALUES], state, 2, values, "[U, 4]", status) &&
           kasmina_expect_int32(op, "mask", &t[MASK], state, 1, &updates, "[U]", status) &&
           kasmina_expect_int32(op, "rules", &t[RULES], state, 2, rules, "[11, 11]", status);
}

/* Whether two contiguous int32 tensors that are not empty share memory. False, with a message, where torch refuses. */
static bool overlap(const kasmina_tensor *a, const kasmina_tensor *b, kasmina_status *status)
{
    const int32_t *first = kasmina_tensor_data(a, status), *second = kasmina_tensor_data(b, status);
    return first && second && (uintptr_t)first < (uintptr_t)(second + b->numel) &&
           (uintptr_t)second < (uintptr_t)(first + a->numel);
}

/* The request at `input` as the kernels read it: contiguous, and out of the way of what they write meanwhile. */
static bool make_readable(kasmina_tensor *t, int input, kasmina_status *status)
{
    if (!kasmina_tensor_make_contiguous(&t[input], status)) return false;
    for (int written = STATE; written <= HISTORY_COUNT && t[written].numel; ++written)
        if (overlap(&t[input], &t[written], status)) return kasmina_tensor_restride(&t[input], NULL, status);
    return !status->failed;
}

static bool run(kasmina_call *call, kasmina_status *status)
{
    kasmina_tensor *t = call->t;
    kasmina_state_update_args args = {.num_blueprints = (int64_t)call->scalars[0]};
    args.num_updates = t[SEED_IDS].sizes[0];
    args.num_seeds = t[STATE].sizes[1];
    if (!kasmina_tensor_empty_1d(&t[VERDICTS], args.num_updates, aoti_torch_dtype_int32(), &t[STATE], status))
        return false;
    if (args.num_updates == 0) return true;
    for (int i = SEED_IDS; i <= RULES; ++i)
        if (!make_readable(t, i, status)) return false;
    if (args.num_seeds) {
        args.state = kasmina_tensor_mutable_data(&t[STATE], status);
        args.history = kasmina_tensor_mutable_data(&t[HISTORY], status);
        args.history_count = kasmina_tensor_mutable_data(&t[HISTORY_COUNT], status);
    }
    args.seed_ids = kasmina_tensor_data(&t[SEED_IDS], status);
    args.values = kasmina_tensor_data(&t[VALUES], status);
    args.mask = kasmina_tensor_data(&t[MASK], status);
    args.rules = kasmina_tensor_data(&t[RULES], status);
    args.verdicts = kasmina_tensor_mutable_data(&t[VERDICTS], status);
    void *winner = NULL;
    if (status->failed || !kasmina_make_workspace(&t[WORKSPACE], &winner, (size_t)args.num_seeds * sizeof *args.winner,
                                                  &t[STATE], status))
        return false;
    args.winner = winner;
    return KASMINA_RUN(call, state_update, &args, status);
}

KASMINA_OPERATOR(state_update, .inputs = NUM_INPUTS, .results = 1, .device_of = STATE)
