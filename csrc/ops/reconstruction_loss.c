#include "ops/common.h"
#include "ops/ops.h"
#include "ops/validate.h"

/* Both operators: the derivative has grad_loss on top of the stack, below it the same arguments. */
enum { X, TARGET, SEED_OFFSETS, STATE, BLUEPRINT_WEIGHTS, GRAD_LOSS, NUM_INPUTS };
enum { RESULT = NUM_INPUTS, WORKSPACE, NUM_TENSORS };

static const char *const names[] = {"x", "target", "seed_offsets", "state", "blueprint_weights", "grad_loss"};

static bool validate(const char *op, const kasmina_tensor *t, kasmina_status *status)
{
    const kasmina_op_inputs in = {.op = op, .x = &t[X], .seed_offsets = &t[SEED_OFFSETS]};
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

static bool run(const char *op, kasmina_tensor *t, const kasmina_device_scope *scope, kasmina_status *status)
{
    kasmina_reconstruction_args args = {.seeds.alpha = NULL};
    if (!allocate(t, status)) return false;
    if (t[X].numel == 0 || t[RESULT].numel == 0 || t[SEED_OFFSETS].sizes[0] == 1)
        return aoti_torch_zero_(t[RESULT].handle) == 0 || kasmina_fail(status, "%s: could not zero the result", op);
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
    if (status->failed || !kasmina_make_workspace(&t[WORKSPACE], &args.workspace,
                                                  KASMINA_WORKSPACE(scope, reconstruction, &args), &t[X], status))
        return false;
    return kasmina_device_check(scope, KASMINA_LAUNCH(scope, reconstruction, &args), op, status);
}

static void compute(const char *op, StableIValue *stack, bool derivative)
{
    kasmina_status status = {0};
    kasmina_tensor t[NUM_TENSORS] = {0};
    kasmina_device_scope scope = {0};
    bool taken = kasmina_tensors_take(t, stack + derivative, GRAD_LOSS, op, names, &status);
    if (derivative) taken = kasmina_tensors_take(&t[GRAD_LOSS], stack, 1, op, &names[GRAD_LOSS], &status) && taken;
    if (!taken) goto done;
    if (!validate(op, t, &status)) goto done;
    if (!kasmina_device_enter(&scope, &t[X], &status)) goto done;
    if (run(op, t, &scope, &status)) kasmina_tensor_return(&t[RESULT], &stack[0]);
done:
    kasmina_device_leave(&scope);
    kasmina_tensors_release(t, NUM_TENSORS);
    kasmina_raise(&status, op);
}

void kasmina_reconstruction_loss(StableIValue *stack, uint64_t num_args, uint64_t num_outputs)
{
    (void)num_args, (void)num_outputs;
    compute("reconstruction_loss", stack, false);
}

void kasmina_reconstruction_loss_backward(StableIValue *stack, uint64_t num_args, uint64_t num_outputs)
{
    (void)num_args, (void)num_outputs;
    compute("reconstruction_loss_backward", stack, true);
}
