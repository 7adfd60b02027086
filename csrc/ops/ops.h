/* The boxed operators: arguments come on the stack as owned handles, results go back on it. One function an op. */
#ifndef KASMINA_OPS_H
#define KASMINA_OPS_H

#include "torch_abi.h"

void kasmina_chunked_forward(StableIValue *stack, uint64_t num_args, uint64_t num_outputs);
void kasmina_chunked_backward(StableIValue *stack, uint64_t num_args, uint64_t num_outputs);
void kasmina_telemetry_update(StableIValue *stack, uint64_t num_args, uint64_t num_outputs);
void kasmina_telemetry_reduce(StableIValue *stack, uint64_t num_args, uint64_t num_outputs);
void kasmina_telemetry_merge(StableIValue *stack, uint64_t num_args, uint64_t num_outputs);
void kasmina_state_update(StableIValue *stack, uint64_t num_args, uint64_t num_outputs);
void kasmina_lifecycle_step(StableIValue *stack, uint64_t num_args, uint64_t num_outputs);
void kasmina_reconstruction_loss(StableIValue *stack, uint64_t num_args, uint64_t num_outputs);
void kasmina_reconstruction_loss_backward(StableIValue *stack, uint64_t num_args, uint64_t num_outputs);
void kasmina_pair_moments(StableIValue *stack, uint64_t num_args, uint64_t num_outputs);

#endif
