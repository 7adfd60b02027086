/*
 * The lifecycle's arithmetic, shared by C and CUDA: what a request for a seed is worth, what it writes, and how alpha rises
 * while a seed is grafted.
 */
#ifndef KASMINA_LIFECYCLE_MATH_H
#define KASMINA_LIFECYCLE_MATH_H

#include <math.h>

#include "kernels.h"
#include "seed_math.h"

enum { KASMINA_NUM_STATES = 11, KASMINA_HISTORY_LENGTH = 10 };
enum { KASMINA_STABILIZATION = 4 };

/* Columns of a request's values, and the bits of its mask that choose them. */
enum { KASMINA_VALUE_LIFECYCLE, KASMINA_VALUE_BLUEPRINT, KASMINA_VALUE_EPOCHS, KASMINA_VALUE_STRATEGY, KASMINA_VALUES };
enum { KASMINA_SETS_LIFECYCLE = 1, KASMINA_SETS_BLUEPRINT = 2, KASMINA_SETS_EPOCHS = 4, KASMINA_SETS_STRATEGY = 8 };

typedef enum {
    KASMINA_APPLIED = 0,
    KASMINA_SEED_OUT_OF_RANGE = 1,
    KASMINA_ILLEGAL_TRANSITION = 2,
    KASMINA_TOO_FEW_EPOCHS = 3,
    KASMINA_BLUEPRINT_OUT_OF_RANGE = 4,
    KASMINA_STRATEGY_OUT_OF_RANGE = 5,
    KASMINA_SUPERSEDED = 6,
    KASMINA_EPOCHS_OUT_OF_RANGE = 7
} kasmina_verdict;

/* Row `row` of the state of one of S seeds. */
KASMINA_FN int32_t *kasmina_state_cell(int32_t *state, int64_t num_seeds, int64_t seed, int row)
{
    return state + row * num_seeds + seed;
}

/* Whether the rules [11, 11] let a seed go from one state to another: the least epochs are in *least. */
KASMINA_FN bool kasmina_rule(const int32_t *rules, int32_t from, int32_t to, int32_t *least)
{
    if (from < 0 || from >= KASMINA_NUM_STATES || to < 0 || to >= KASMINA_NUM_STATES) return false;
    *least = rules[from * KASMINA_NUM_STATES + to];
    return *least >= 0;
}

/* What a request that is the last for an existing seed is worth; reads only what its mask chooses. */
KASMINA_FN kasmina_verdict kasmina_judge(const kasmina_state_update_args *args, int64_t seed, const int32_t *values,
                                         int32_t mask)
{
    if (mask & KASMINA_SETS_LIFECYCLE) {
        int32_t least = 0;
        int32_t from = *kasmina_state_cell(args->state, args->num_seeds, seed, KASMINA_LIFECYCLE_STATE);
        if (!kasmina_rule(args->rules, from, values[KASMINA_VALUE_LIFECYCLE], &least))
            return KASMINA_ILLEGAL_TRANSITION;
        if (*kasmina_state_cell(args->state, args->num_seeds, seed, KASMINA_EPOCHS_IN_STATE) < least)
            return KASMINA_TOO_FEW_EPOCHS;
    }
    if (mask & KASMINA_SETS_BLUEPRINT) {
        int32_t blueprint = values[KASMINA_VALUE_BLUEPRINT];
        if (blueprint < -1 || blueprint >= args->num_blueprints) return KASMINA_BLUEPRINT_OUT_OF_RANGE;
    }
    if (mask & KASMINA_SETS_STRATEGY) {
        int32_t strategy = values[KASMINA_VALUE_STRATEGY];
        if (strategy < 0 || strategy >= KASMINA_NUM_STRATEGIES) return KASMINA_STRATEGY_OUT_OF_RANGE;
    }
    if (mask & KASMINA_SETS_EPOCHS && values[KASMINA_VALUE_EPOCHS] < 0) return KASMINA_EPOCHS_OUT_OF_RANGE;
    return KASMINA_APPLIED;
}

/* Move a seed to another state: parent, epochs and history follow. */
KASMINA_FN void kasmina_transition(int32_t *state, int32_t *history, int32_t *history_count, int64_t num_seeds,
                                   int64_t seed, int32_t to)
{
    int32_t *lifecycle = kasmina_state_cell(state, num_seeds, seed, KASMINA_LIFECYCLE_STATE);
    /* A count past 2^31 - 1 has wrapped (added to as unsigned: the sum is defined): % rounds down, as in Python. */
    int32_t slot = history_count[seed] % KASMINA_HISTORY_LENGTH;
    int64_t at = seed * KASMINA_HISTORY_LENGTH + slot + (slot < 0 ? KASMINA_HISTORY_LENGTH : 0);
    history[2 * at] = *lifecycle;
    history[2 * at + 1] = to;
    history_count[seed] = (int32_t)((uint32_t)history_count[seed] + 1u);
    *kasmina_state_cell(state, num_seeds, seed, KASMINA_PARENT_STATE) = *lifecycle;
    *kasmina_state_cell(state, num_seeds, seed, KASMINA_EPOCHS_IN_STATE) = 0;
    *lifecycle = to;
}

/* Write what an APPLIED request chooses. A transition from a state to itself writes nothing. */
KASMINA_FN void kasmina_apply(const kasmina_state_update_args *args, int64_t seed, const int32_t *values, int32_t mask)
{
    int32_t *state = args->state;
    int64_t n = args->num_seeds;
    if (mask & KASMINA_SETS_LIFECYCLE && *kasmina_state_cell(state, n, seed, KASMINA_LIFECYCLE_STATE) != values[0])
        kasmina_transition(state, args->history, args->history_count, n, seed, values[KASMINA_VALUE_LIFECYCLE]);
    if (mask & KASMINA_SETS_BLUEPRINT)
        *kasmina_state_cell(state, n, seed, KASMINA_BLUEPRINT_ID) = values[KASMINA_VALUE_BLUEPRINT];
    if (mask & KASMINA_SETS_EPOCHS)
        *kasmina_state_cell(state, n, seed, KASMINA_EPOCHS_IN_STATE) = values[KASMINA_VALUE_EPOCHS];
    if (mask & KASMINA_SETS_STRATEGY)
        *kasmina_state_cell(state, n, seed, KASMINA_GRAFTING_STRATEGY) = values[KASMINA_VALUE_STRATEGY];
}

/* Judge request u, the last for an existing seed; apply it if it is good, and return the verdict. */
KASMINA_FN int32_t kasmina_settle(const kasmina_state_update_args *args, int64_t seed, const int32_t *values,
                                  int32_t mask)
{
    kasmina_verdict verdict = kasmina_judge(args, seed, values, mask);
    if (verdict == KASMINA_APPLIED) kasmina_apply(args, seed, values, mask);
    return verdict;
}

/* Alpha schedules. */
enum { KASMINA_SCHEDULE_NONE, KASMINA_LINEAR, KASMINA_COSINE, KASMINA_SIGMOID, KASMINA_NUM_SCHEDULES };

/* The ramp at t in [0, 1]: 0 at 0 and 1 at 1 exactly, rising. */
KASMINA_FN double kasmina_ramp(int64_t schedule, double t)
{
    const double slope = 12.0;
    double low, high;
    if (t >= 1.0) return 1.0;
    if (t <= 0.0) return 0.0;
    switch (schedule) {
    case KASMINA_COSINE: return (1.0 - cos(3.14159265358979323846 * t)) / 2.0;
    case KASMINA_SIGMOID:
        low = 1.0 / (1.0 + exp(slope / 2.0));
        high = 1.0 / (1.0 + exp(-slope / 2.0));
        return (1.0 / (1.0 + exp(-slope * (t - 0.5))) - low) / (high - low);
    default: return t;
    }
}

/* One epoch for one seed, see kasmina_lifecycle_step_args. */
KASMINA_FN void kasmina_step_seed(const kasmina_lifecycle_step_args *args, int64_t seed)
{
    int32_t *epochs = kasmina_state_cell(args->state, args->num_seeds, seed, KASMINA_EPOCHS_IN_STATE);
    double t = 1.0;
    if (*epochs < INT32_MAX) ++*epochs;
    if (*kasmina_state_cell(args->state, args->num_seeds, seed, KASMINA_LIFECYCLE_STATE) != KASMINA_GRAFTING) return;
    if (args->ramp_epochs > 0 && *epochs < args->ramp_epochs) t = (double)*epochs / (double)args->ramp_epochs;
    if (args->schedule != KASMINA_SCHEDULE_NONE) args->alpha[seed] = (float)kasmina_ramp(args->schedule, t);
    if (args->advance && t >= 1.0)
        kasmina_transition(args->state, args->history, args->history_count, args->num_seeds, seed,
                           KASMINA_STABILIZATION);
}

#endif
