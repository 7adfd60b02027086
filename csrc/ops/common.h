/* What the boxed operators share: how a call goes, and what lies between its validation and its launch. */
#ifndef KASMINA_OPS_COMMON_H
#define KASMINA_OPS_COMMON_H

#include "device.h"
#include "kernels.h"
#include "tensor.h"

enum { KASMINA_MAX_TENSORS = 12 };

/* A boxed call as the halves of its operator see it. */
typedef struct {
    const char *op;
    kasmina_tensor *t;           /* the tensors it takes, then those it allocates */
    const StableIValue *scalars; /* what it takes after the tensors, a slot each */
    kasmina_device_scope scope;
} kasmina_call;

typedef struct {
    const char *name;
    const char *const *names; /* of the tensors it takes, for messages */
    int first, inputs;        /* it takes tensors `first` to `inputs` - 1 of `names`; those before have no handle */
    int results;              /* how many of the tensors from `inputs` on it returns */
    int device_of;            /* the tensor whose device it runs on */
    bool (*validate)(const kasmina_call *call, kasmina_status *status);
    bool (*run)(kasmina_call *call, kasmina_status *status);
} kasmina_operator;

/* A bool is the low byte of its slot; the rest is not specified. */
static inline bool kasmina_bool(StableIValue slot)
{
    return (slot & 0xff) != 0;
}

/* Take the arguments from the stack, check them, run on their device, put the results back; raises what failed. */
void kasmina_call_operator(const kasmina_operator *op, StableIValue *stack);

/*
 * Define kasmina_<op>(), the boxed function, from the `names`, validate() and run() of its file and the fields given.
 */
#define KASMINA_OPERATOR(op, ...)                                                                          \
    _Static_assert((int)NUM_TENSORS <= (int)KASMINA_MAX_TENSORS, "more tensors than a call has room for"); \
    void kasmina_##op(StableIValue *stack, uint64_t num_args, uint64_t num_outputs)                        \
    {                                                                                                      \
        static const kasmina_operator described = {                                                        \
            .name = #op, .names = names, .validate = validate, .run = run, __VA_ARGS__};                   \
        (void)num_args, (void)num_outputs;                                                                 \
        kasmina_call_operator(&described, stack);                                                          \
    }

/* Launch kernel `name` where the call runs. A macro, because each takes its own struct. */
#define KASMINA_RUN(call, name, args, status) \
    kasmina_device_check(&(call)->scope, KASMINA_LAUNCH(&(call)->scope, name, args), (call)->op, status)

/*
 * Make the seeds' tensors contiguous and describe them to a kernel. Pointers are borrowed from the tensors.
 * False, with a message, if a copy fails.
 */
bool kasmina_read_seeds(kasmina_tensor *seed_offsets, kasmina_tensor *state, kasmina_tensor *alpha,
                        kasmina_tensor *blueprint_weights, kasmina_seeds *seeds, kasmina_status *status);

/* The same without alpha, which is left NULL. */
bool kasmina_read_blueprints(kasmina_tensor *seed_offsets, kasmina_tensor *state, kasmina_tensor *blueprint_weights,
                             kasmina_seeds *seeds, kasmina_status *status);

/* Read the layout of x, of which a copy with the given strides (contiguous if NULL) is made where it is not dense. */
bool kasmina_make_dense(kasmina_tensor *x, const int64_t *strides, kasmina_layout *layout, kasmina_status *status);

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
