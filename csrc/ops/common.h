/* What the boxed operators share between validation and launch. */
#ifndef KASMINA_OPS_COMMON_H
#define KASMINA_OPS_COMMON_H

#include "device.h"
#include "kernels.h"
#include "tensor.h"

/*
 * Make the seeds' tensors contiguous and describe them to a kernel. Pointers are borrowed from the tensors.
 * False, with a message, if a copy fails.
 */
bool kasmina_read_seeds(kasmina_tensor *seed_offsets, kasmina_tensor *state, kasmina_tensor *alpha,
                        kasmina_tensor *blueprint_weights, kasmina_seeds *seeds, kasmina_status *status);

/* The same without alpha, which is left NULL. */
bool kasmina_read_blueprints(kasmina_tensor *seed_offsets, kasmina_tensor *state, kasmina_tensor *blueprint_weights,
                             kasmina_seeds *seeds, kasmina_status *status);

/*
 * Make x dense and `other`, of x's sizes and dtype, alike, so that a kernel sees one layout. Copies what is not so.
 */
bool kasmina_align_to_x(kasmina_tensor *x, kasmina_tensor *other, kasmina_layout *layout, kasmina_status *status);

/* Offsets alone. */
bool kasmina_read_chunks(kasmina_tensor *seed_offsets, kasmina_chunks *chunks, kasmina_status *status);

/* Allocate `bytes` on the device of `like`; *data is NULL for 0 bytes. The tensor is owned by the caller. */
bool kasmina_make_workspace(kasmina_tensor *workspace, void **data, size_t bytes, const kasmina_tensor *like,
                            kasmina_status *status);

#endif
