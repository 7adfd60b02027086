/*
 * The operators of the namespace `kasmina`: each schema once, for module.c and, through the build, for Python.
 *
 *   x, grad_y          float   (..., H)  float32, float64, bfloat16 or float16; any strides
 *   seed_offsets       int32   [S + 1]   starts at 0, does not decrease, ends at or before H
 *   state              int32   [8, S]    rows as in seed_math.h
 *   alpha              float32 [S]       blend factors
 *   blueprint_weights  float   [P, H]    any of the four dtypes
 *   telemetry, other   float64 [S, 5]    count, mean, M2, batches, nonfinite; of size 0: do not collect
 *   grad_telemetry     float64 [S, 3]    sum u^2, sum v^2, backwards; of size 0: do not collect
 */
#ifndef KASMINA_SCHEMA_H
#define KASMINA_SCHEMA_H

/* y like torch.empty_like(x); x's statistics join telemetry; grad_telemetry is only handed on to the backward. */
#define KASMINA_SCHEMA_CHUNKED_FORWARD                                            \
    "chunked_forward(Tensor x, Tensor seed_offsets, Tensor state, Tensor alpha, " \
    "Tensor blueprint_weights, Tensor(a!) telemetry, Tensor grad_telemetry) -> Tensor"

/* dx like x, dw [P, H] in the bank's dtype, dalpha float32 [S]; one that is not asked for has size 0. */
#define KASMINA_SCHEMA_CHUNKED_BACKWARD                                                           \
    "chunked_backward(Tensor grad_y, Tensor x, Tensor seed_offsets, Tensor state, Tensor alpha, " \
    "Tensor blueprint_weights, Tensor(a!) grad_telemetry, bool grad_x, bool grad_weights, "       \
    "bool grad_alpha) -> (Tensor, Tensor, Tensor)"

/* x's statistics join telemetry. */
#define KASMINA_SCHEMA_TELEMETRY_UPDATE "telemetry_update(Tensor x, Tensor seed_offsets, Tensor(a!) telemetry) -> ()"

/* float64 [S, 3]: mean, variance, std; NaN where the count is 0. */
#define KASMINA_SCHEMA_TELEMETRY_REDUCE "telemetry_reduce(Tensor telemetry) -> Tensor"

/* telemetry becomes what it would be had it seen both. */
#define KASMINA_SCHEMA_TELEMETRY_MERGE "telemetry_merge(Tensor(a!) telemetry, Tensor other) -> ()"

/*
 * Judge and apply requests; int32 [U] verdicts. state, history and history_count must be contiguous. seed_ids, mask
 * int32 [U]; values int32 [U, 4]; rules int32 [11, 11].
 */
#define KASMINA_SCHEMA_STATE_UPDATE                                                 \
    "state_update(Tensor(a!) state, Tensor(b!) history, Tensor(c!) history_count, " \
    "Tensor seed_ids, Tensor values, Tensor mask, Tensor rules, int num_blueprints) -> Tensor"

/* One epoch for every seed. history int32 [S, 10, 2], history_count int32 [S]. */
#define KASMINA_SCHEMA_LIFECYCLE_STEP                                                 \
    "lifecycle_step(Tensor(a!) state, Tensor(b!) history, Tensor(c!) history_count, " \
    "Tensor(d!) alpha, int schedule, int ramp_epochs, bool advance) -> ()"

/*
 * [S] mean squared error of the blueprints of seeds in TRAINING; target like x. Kernels square in x's accumulation type:
 * a residual above 1.8e19 of a float32 x makes the loss infinite.
 */
#define KASMINA_SCHEMA_RECONSTRUCTION_LOSS                                             \
    "reconstruction_loss(Tensor x, Tensor target, Tensor seed_offsets, Tensor state, " \
    "Tensor blueprint_weights) -> Tensor"

/* [P, H], its derivative in the bank; grad_loss [S] like the loss. */
#define KASMINA_SCHEMA_RECONSTRUCTION_LOSS_BACKWARD                            \
    "reconstruction_loss_backward(Tensor grad_loss, Tensor x, Tensor target, " \
    "Tensor seed_offsets, Tensor state, Tensor blueprint_weights) -> Tensor"

/* Moments of pairs per feature: moments float64 [H, 6] (count, means of x and t, M2 of each, C); t like x. */
#define KASMINA_SCHEMA_PAIR_MOMENTS "pair_moments(Tensor x, Tensor t, Tensor(a!) moments) -> ()"

#endif
