#include "ops/common.h"
#include "ops/ops.h"
#include "ops/validate.h"

/* Both operators: the derivative takes grad_loss first, then the same arguments. */
enum { GRAD_LOSS, X, TARGET, SEED_OFFSETS, STATE, BLUEPRINT_WEIGHTS, NUM_INPUTS };
enum { RESULT = NUM_INPUTS, WORKSPACE, NUM_TENSORS };

static const char *const names[] = {"grad_loss", "x", "target", "seed_offsets", "state", "blueprint_weights"};

static bool validate(const kasmina_call *call, kasmina_status *status)
{
    const kasmina_tensor *t = call->t;
    const kasmina_op_inputs in = {.op = call->op, .x = &t[X], .seed_offsets = &t[SEED_OFFSETS]};
    return kasmina_expect_activations(&in, status) && kasmina_expect_like_x(&in, "target", &t[TARGET], status) &&
           kasmina_expect_blueprints(&in, &t[STATE], &t[BLUEPRINT_WEIGHTS], status) &&
           (!t[GRAD_LOSS].handle || kasmina_expect_grad_loss(&in, &t[GRAD_LOSS], status));
}

static bool allocate(kasmina_tensor *t, kasmina_status *status)
{
    const kasmina_tensor *bank = &t[BLUEPRINT_WEIGHTS];
    const int64_t strides[] = {bank->sizes[1], 1};
    const bool wide = t[X].scalar_type == aoti_torch_dtype_float64();
    if (t[GRAD_LOSS].handle)
        return kasmina_tensor_empty(&t[RESULT], 2, bank->sizes, strides, bank->scalar_type, bank, status);
    return kasmina_tensor_empty_1d(&t[RESULT], t[SEED_OFFSETS].sizes[0] - 1,
                                   wide ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32(), &t[X], status);
}

static bool run(kasmina_call *call, kasmina_status *status)
{
    kasmina_tensor *t = call->t;
    kasmina_reconstruction_args args = {.seeds.alpha = NULL};
    if (!allocate(t, status)) return false;
    if (t[X].numel == 0 || t[RESULT].numel == 0 || t[SEED_OFFSETS].sizes[0] == 1)
        return aoti_torch_zero_(t[RESULT].handle) == 0 ||
               kasmina_fail(status, "%s: could not zero the result", call->op);
    if (!kasmina_align_to_x(&t[X], &t[TARGET], &args.layout, status) ||
        !kasmina_read_blueprints(&t[SEED_OFFSETS], &t[STATE], &t[BLUEPRINT_WEIGHTS], &args.seeds, status))
        return false;
    kasmina_tensor_dtype(&t[X], &args.dtype);
    args.x = kasmina_tensor_data(&t[X], status);
    args.target = kasmina_tensor_data(&t[TARGET], status);
    void *result = kasmina_tensor_mutable_data(&t[RESULT], status);
    if (t[GRAD_LOSS].handle) {
        if (!kasmina_tensor_make_contiguous(&t[GRAD_LOSS], status)) return false;
        args.grad_loss = kasmina_tensor_data(&t[GRAD_LOSS], status);
        args.grad_weights = result;
    } else {
        args.loss = result;
    }
    return !status->failed &&
           kasmina_make_workspace(&t[WORKSPACE], &args.workspace,
                                  KASMINA_WORKSPACE(&call->scope, reconstruction, &args), &t[X], status) &&
           KASMINA_RUN(call, reconstruction, &args, status);
}

KASMINA_OPERATOR(reconstruction_loss, .first = X, .inputs = NUM_INPUTS, .results = 1, .device_of = X)

KASMINA_OPERATOR(reconstruction_loss_backward, .inputs = NUM_INPUTS, .results = 1, .device_of = X)
