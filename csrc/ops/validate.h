/*
 * Checks of the operators' arguments. Each fills `status` with "ARGUMENT must EXPECTED, got GIVEN" after the name of the
 * operator and returns false; kasmina_ext/_validate.py makes the same checks in the same words for the reference.
 */
#ifndef KASMINA_VALIDATE_H
#define KASMINA_VALIDATE_H

#include "tensor.h"

/* The arguments that chunked_forward, chunked_backward and telemetry_update share. */
typedef struct {
    const char *op;
    const kasmina_tensor *x;
    const kasmina_tensor *seed_offsets;
} kasmina_op_inputs;

/* x is one of the four floating dtypes and has 1 to KASMINA_MAX_DIMS dimensions. */
bool kasmina_expect_activations(const kasmina_op_inputs *in, kasmina_status *status);

/* `grad_y` has the dtype, device and shape of x. */
bool kasmina_expect_like_x(const kasmina_op_inputs *in, const char *argument, const kasmina_tensor *grad_y,
                           kasmina_status *status);

/* seed_offsets is int32 [S + 1] on x's device. Values are looked at on the CPU only: start at 0, rise, end by H. */
bool kasmina_expect_offsets(const kasmina_op_inputs *in, kasmina_status *status);

/* state int32 [8, S], alpha float32 [S], blueprint_weights float [P, H]; offsets as above. */
bool kasmina_expect_seeds(const kasmina_op_inputs *in, const kasmina_tensor *state, const kasmina_tensor *alpha,
                          const kasmina_tensor *blueprint_weights, kasmina_status *status);

/* Size 0, or contiguous float64 [S, columns] on x's device. */
bool kasmina_expect_accumulator(const kasmina_op_inputs *in, const char *argument, const kasmina_tensor *tensor,
                                int64_t columns, kasmina_status *status);

/* float64 [S, 5], S free. */
bool kasmina_expect_telemetry(const char *op, const char *argument, const kasmina_tensor *tensor,
                              kasmina_status *status);

/* `other` is float64 [S, 5] on the device and with the S of `telemetry`. */
bool kasmina_expect_mergeable(const char *op, const kasmina_tensor *telemetry, const kasmina_tensor *other,
                              kasmina_status *status);

/* state int32 [8, S], history int32 [S, 10, 2], history_count int32 [S], all contiguous: an operator writes them. */
bool kasmina_expect_state(const char *op, const kasmina_tensor *state, const kasmina_tensor *history,
                          const kasmina_tensor *history_count, kasmina_status *status);

/* seed_ids is int32 [U], U at most INT32_MAX. */
bool kasmina_expect_requests(const char *op, const kasmina_tensor *seed_ids, kasmina_status *status);

/* int32 of the given shape (`named` in the message) on the device of `state`. */
bool kasmina_expect_int32(const char *op, const char *argument, const kasmina_tensor *tensor,
                          const kasmina_tensor *state, int64_t dim, const int64_t *sizes, const char *named,
                          kasmina_status *status);

/* `alpha`, to be written, is contiguous float32 [S] on the device of `state`. */
bool kasmina_expect_alpha(const char *op, const kasmina_tensor *alpha, const kasmina_tensor *state,
                          kasmina_status *status);

/* state and bank for an operator that reads no alpha; offsets as above. */
bool kasmina_expect_blueprints(const kasmina_op_inputs *in, const kasmina_tensor *state,
                               const kasmina_tensor *blueprint_weights, kasmina_status *status);

/* `moments`, to be written, is contiguous float64 [H, 6] on x's device. */
bool kasmina_expect_moments(const kasmina_op_inputs *in, const kasmina_tensor *moments, kasmina_status *status);

/* `grad_loss` is [S], float32 or, for a float64 x, float64. */
bool kasmina_expect_grad_loss(const kasmina_op_inputs *in, const kasmina_tensor *grad_loss, kasmina_status *status);

bool kasmina_expect_contiguous(const char *op, const char *argument, const kasmina_tensor *tensor,
                               kasmina_status *status);

#endif
