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

bool kasmina_expect_contiguous(const char *op, const char *argument, const kasmina_tensor *tensor,
                               kasmina_status *status);

#endif
