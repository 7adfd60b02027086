"""The operators of ``torch.ops.kasmina``: definitions where no compiled module made them, fake functions, autograd.

Arguments, shapes and dtypes are those of :mod:`kasmina_ext.reference`, whose functions run on every device without a
compiled kernel. In each section: the public function, the fake function (shapes only), the kernel at the Autograd key.
"""

from __future__ import annotations

import torch
from torch import Tensor, is_grad_enabled

from kasmina_ext import _autograd, _native, _validate, reference, reference_calibration, reference_lifecycle
from kasmina_ext._schema import SCHEMAS

_kasmina = torch.ops.kasmina

if not _native.available:
    _definitions = torch.library.Library("kasmina", "DEF")
    for _schema in SCHEMAS.values():
        _definitions.define(_schema)

# Every forward and backward comes by: the look-ups are made once.
_chunked_forward = _kasmina.chunked_forward.default
_chunked_backward = _kasmina.chunked_backward.default
_BelowAutograd = torch._C._AutoDispatchBelowAutograd
_graph_task_id = torch._C._current_graph_task_id
_alive = torch._C._functorch.unwrap_if_dead  # a tensor that a torch.func transform left behind, without its wrapper
_PLAIN = (Tensor, torch.nn.Parameter)

# Kept alive: the registrations end with the object.
_library = torch.library.Library("kasmina", "IMPL")


def _register(name: str, fallback, fake, autograd, versioned: tuple[int, ...] = ()) -> None:
    """``versioned``: arguments that the operator writes and that a backward may have saved."""

    def no_vmap(*args, **kwargs):
        raise RuntimeError(
            f"kasmina::{name} cannot be vmapped: it has no batching rule, since its seeds belong to one layer; call it "
            "on the whole batch, or give the layer enable_triton=False (KasminaLayer: enable_kernels=False) and "
            "telemetry=False"
        )

    _library.impl(name, fallback, "CompositeExplicitAutograd")
    torch.library.register_fake(f"kasmina::{name}", fake, lib=_library)
    _library.impl(name, autograd, "Autograd")
    _library.impl(name, no_vmap, "FuncTorchBatched")
    if versioned:
        _library.impl(name, _bumping_versions(name, versioned), "ADInplaceOrView")


def _bumping_versions(name: str, versioned: tuple[int, ...]):
    """C operators do not bump version counters: without this, a backward would miss that its inputs have changed."""

    def redispatch_and_bump(*args):
        written = [args[i] for i in versioned if isinstance(args[i], Tensor)]
        counted = [tensor for tensor in written if not tensor.is_inference()]
        if len(counted) < len(written) and not torch.is_inference_mode_enabled():
            raise RuntimeError(f"{name} writes in place: to an inference tensor in inference mode only")
        with torch._C._AutoDispatchBelowADInplaceOrView():
            result = getattr(_kasmina, name).default(*args)
        # Afterwards: a call that was refused has written nothing, nor has one without requests.
        if isinstance(result, Tensor) and isinstance(result.size(0), int) and result.size(0) == 0:
            return result
        torch.autograd.graph.increment_version(counted)
        return result

    return redispatch_and_bump


def _below_autograd(op, *args):
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


# ---- chunked_forward -------------------------------------------------------------------------------------------------


def chunked_forward(
    x: Tensor,
    seed_offsets: Tensor,
    state: Tensor,
    alpha: Tensor,
    blueprint_weights: Tensor,
    telemetry: Tensor,
    grad_telemetry: Tensor,
) -> Tensor:
    """Blend every grafted seed into ``x`` and gather telemetry in the same pass; returns ``y`` like ``x``.

    Differentiable once, in ``x``, ``alpha`` and ``blueprint_weights``. See :func:`kasmina_ext.reference.chunked_forward`.
    """
    if (
        type(x) not in _PLAIN
        or type(alpha) not in _PLAIN
        or type(blueprint_weights) not in _PLAIN
        or not _autograd.plain_eager()  # before what the compiler cannot trace
        or _graph_task_id() != -1
    ):
        return _kasmina.chunked_forward(x, seed_offsets, state, alpha, blueprint_weights, telemetry, grad_telemetry)
    # What the kernel at the Autograd key would do, without the way there: a third of the time of a small forward.
    if is_grad_enabled() and (x.requires_grad or blueprint_weights.requires_grad or alpha.requires_grad):
        x, alpha, weights = _alive(x), _alive(alpha), _alive(blueprint_weights)
        return _autograd.apply_blend(_NATIVE, x, seed_offsets, state, alpha, weights, telemetry, grad_telemetry)
    return _forward_below_autograd(x, seed_offsets, state, alpha, blueprint_weights, telemetry, grad_telemetry)


def _forward_fake(x, seed_offsets, state, alpha, blueprint_weights, telemetry, grad_telemetry):
    _validate.chunked_forward(x, seed_offsets, state, alpha, blueprint_weights, telemetry, grad_telemetry)
    return torch.empty_like(x)


def _forward_below_autograd(x, seed_offsets, state, alpha, blueprint_weights, telemetry, grad_telemetry):
    with _BelowAutograd():
        return _chunked_forward(x, seed_offsets, state, alpha, blueprint_weights, telemetry, grad_telemetry)


def _raise_beyond(name: str, times: str):
    """Where more is asked for than one backward pass."""
    raise RuntimeError(
        f"kasmina::{name} can be differentiated {times}: for forward-mode or nested torch.func transforms give the layer "
        "enable_triton=False (KasminaLayer: enable_kernels=False), or call the function of kasmina_ext.reference"
    )


def _forward_beyond(*args):
    _raise_beyond("chunked_forward", "once, backward")


def _forward_autograd(x, seed_offsets, state, alpha, blueprint_weights, telemetry, grad_telemetry):
    if x is None or alpha is None or blueprint_weights is None or telemetry is None:
        # torch lets None pass for a tensor: the checks name it.
        _validate.chunked_forward(x, seed_offsets, state, alpha, blueprint_weights, telemetry, grad_telemetry)
    if telemetry.numel() and _autograd.recomputing(x):
        telemetry = _autograd.nothing_like(telemetry)
    return _autograd.blend(_NATIVE, x, seed_offsets, state, alpha, blueprint_weights, telemetry, grad_telemetry)


# ---- chunked_backward ------------------------------------------------------------------------------------------------


def chunked_backward(
    grad_y: Tensor,
    x: Tensor,
    seed_offsets: Tensor,
    state: Tensor,
    alpha: Tensor,
    blueprint_weights: Tensor,
    grad_telemetry: Tensor,
    grad_x: bool = True,
    grad_weights: bool = True,
    grad_alpha: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(dx, dw, dalpha)``, and gradient telemetry, in one pass. See :func:`kasmina_ext.reference.chunked_backward`."""
    return _kasmina.chunked_backward(
        grad_y, x, seed_offsets, state, alpha, blueprint_weights, grad_telemetry, grad_x, grad_weights, grad_alpha
    )


def _backward_fake(
    grad_y, x, seed_offsets, state, alpha, blueprint_weights, grad_telemetry, grad_x, grad_weights, grad_alpha
):
    _validate.chunked_backward(grad_y, x, seed_offsets, state, alpha, blueprint_weights, grad_telemetry)
    return (
        torch.empty_like(x) if grad_x else x.new_empty(0),
        blueprint_weights.new_empty(blueprint_weights.shape if grad_weights else 0),
        alpha.new_empty(alpha.shape if grad_alpha else 0),
    )


class _NoSecondDerivative(_autograd.SingleLevelFunction):
    @staticmethod
    def forward(ctx, op, *args):
        ctx.op = op
        return _below_autograd(op, *args)

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(
            f"{ctx.op._schema.name} has no derivative of its own: give the layer enable_triton=False "
            "(KasminaLayer: enable_kernels=False), or call the function of kasmina_ext.reference; "
            "PyTorch can differentiate these twice"
        )


def _without_derivative(op, *args):
    if _autograd.beyond_one_backward(*args):
        _raise_beyond(op._schema.name.removeprefix("kasmina::"), "not at all")
    if torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
        return _NoSecondDerivative.apply_any_level(op, *args)
    return _below_autograd(op, *args)


def _backward_autograd(*args):
    return _without_derivative(_kasmina.chunked_backward.default, *args)


def _backward_once(*args):
    """The derivative: below autograd at once where none of its own can follow."""
    if is_grad_enabled() or not _autograd.plain_eager():
        return _kasmina.chunked_backward(*args)
    with _BelowAutograd():
        return _chunked_backward(*args)


_NATIVE = _autograd.Backend(_forward_below_autograd, _backward_once, _forward_beyond)


# ---- telemetry_update ------------------------------------------------------------------------------------------------


def telemetry_update(x: Tensor, seed_offsets: Tensor, telemetry: Tensor) -> None:
    """Merge the statistics of ``x`` into ``telemetry``; does nothing inside a backward (a recomputation)."""
    _kasmina.telemetry_update(x, seed_offsets, telemetry)


def _update_autograd(x, seed_offsets, telemetry):
    if not _autograd.recomputing(x):
        _below_autograd(_kasmina.telemetry_update.default, x, seed_offsets, telemetry)


# ---- telemetry_reduce ------------------------------------------------------------------------------------------------


def telemetry_reduce(telemetry: Tensor) -> Tensor:
    """``[S, 3]`` float64: mean, variance, standard deviation; NaN where nothing was measured."""
    return _kasmina.telemetry_reduce(telemetry)


def _reduce_fake(telemetry):
    _validate.telemetry_reduce(telemetry)
    return telemetry.new_empty(telemetry.size(0), 3)


def _reduce_autograd(telemetry):
    return _below_autograd(_kasmina.telemetry_reduce.default, telemetry)


# ---- telemetry_merge -------------------------------------------------------------------------------------------------


def telemetry_merge(telemetry: Tensor, other: Tensor) -> None:
    """Join the accumulator ``other`` into ``telemetry``."""
    _kasmina.telemetry_merge(telemetry, other)


def _merge_autograd(telemetry, other):
    _below_autograd(_kasmina.telemetry_merge.default, telemetry, other)


# ---- state_update ----------------------------------------------------------------------------------------------------


def state_update(
    state: Tensor,
    history: Tensor,
    history_count: Tensor,
    seed_ids: Tensor,
    values: Tensor,
    mask: Tensor,
    rules: Tensor,
    num_blueprints: int,
) -> Tensor:
    """Judge and apply U requests on the device; int32 ``[U]`` verdicts. See :mod:`kasmina_ext.reference_lifecycle`."""
    return _kasmina.state_update(state, history, history_count, seed_ids, values, mask, rules, num_blueprints)


def _state_update_fake(state, history, history_count, seed_ids, values, mask, rules, num_blueprints):
    _validate.state_update(state, history, history_count, seed_ids, values, mask, rules)
    return seed_ids.new_empty(seed_ids.size(0))


def _state_update_autograd(*args):
    return _below_autograd(_kasmina.state_update.default, *args)


# ---- lifecycle_step --------------------------------------------------------------------------------------------------


def lifecycle_step(
    state: Tensor,
    history: Tensor,
    history_count: Tensor,
    alpha: Tensor,
    schedule: int,
    ramp_epochs: int,
    advance: bool,
) -> None:
    """One epoch for every seed. See :func:`kasmina_ext.reference_lifecycle.lifecycle_step`."""
    _kasmina.lifecycle_step(state, history, history_count, alpha, schedule, ramp_epochs, advance)


def _lifecycle_step_fake(state, history, history_count, alpha, schedule, ramp_epochs, advance):
    _validate.lifecycle_step(state, history, history_count, alpha, schedule)


def _lifecycle_step_autograd(state, history, history_count, alpha, *rest):
    if alpha is not None and alpha.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("lifecycle_step: alpha requires grad and is written in place: use torch.no_grad()")
    _below_autograd(_kasmina.lifecycle_step.default, state, history, history_count, alpha, *rest)


# ---- reconstruction_loss ---------------------------------------------------------------------------------------------


def reconstruction_loss(
    x: Tensor, target: Tensor, seed_offsets: Tensor, state: Tensor, blueprint_weights: Tensor
) -> Tensor:
    """``[S]`` reconstruction errors of the seeds in TRAINING. See :func:`kasmina_ext.reference.reconstruction_loss`."""
    return _kasmina.reconstruction_loss(x, target, seed_offsets, state, blueprint_weights)


def _reconstruction_fake(x, target, seed_offsets, state, blueprint_weights):
    _validate.reconstruction_loss(x, target, seed_offsets, state, blueprint_weights)
    return x.new_empty(seed_offsets.size(0) - 1, dtype=reference.accumulation_dtype(x.dtype))


def _reconstruction_backward_fake(grad_loss, x, target, seed_offsets, state, blueprint_weights):
    _validate.reconstruction_loss_backward(grad_loss, x, target, seed_offsets, state, blueprint_weights)
    return blueprint_weights.new_empty(blueprint_weights.shape)


class KasminaReconstructionLoss(_autograd.SingleLevelFunction):
    @staticmethod
    def forward(ctx, x, target, seed_offsets, state, blueprint_weights):
        ctx.save_for_backward(x, target, seed_offsets, state, blueprint_weights)
        args = (x, target, seed_offsets, state, blueprint_weights)
        return _below_autograd(_kasmina.reconstruction_loss.default, *args)

    @staticmethod
    def backward(ctx, grad_loss):
        grad = _kasmina.reconstruction_loss_backward(grad_loss, *ctx.saved_tensors)
        return None, None, None, None, grad


def _reconstruction_autograd(x, target, seed_offsets, state, blueprint_weights):
    if x is None or target is None or blueprint_weights is None:
        _validate.reconstruction_loss(x, target, seed_offsets, state, blueprint_weights)
    args = (x.detach(), target.detach(), seed_offsets, state, blueprint_weights)
    if _autograd.beyond_one_backward(blueprint_weights):
        _raise_beyond("reconstruction_loss", "once, backward, in the bank")
    if blueprint_weights.requires_grad and torch.is_grad_enabled():
        return KasminaReconstructionLoss.apply_any_level(*args)
    return _below_autograd(_kasmina.reconstruction_loss.default, *args)


def _reconstruction_backward_autograd(*args):
    return _without_derivative(_kasmina.reconstruction_loss_backward.default, *args)


# ---- pair_moments ----------------------------------------------------------------------------------------------------


def pair_moments(x: Tensor, t: Tensor, moments: Tensor) -> None:
    """Join the pairs of each feature into ``moments [H, 6]``. See :func:`kasmina_ext.reference_calibration.pair_moments`."""
    _kasmina.pair_moments(x, t, moments)


def _pair_moments_autograd(x, t, moments):
    _below_autograd(_kasmina.pair_moments.default, x, t, moments)


_register("chunked_forward", reference.forward_op, _forward_fake, _forward_autograd)
_register("chunked_backward", reference.chunked_backward, _backward_fake, _backward_autograd)
_register("telemetry_update", reference.update_op, _validate.telemetry_update, _update_autograd)
_register("telemetry_reduce", reference.telemetry_reduce, _reduce_fake, _reduce_autograd)
_register("telemetry_merge", reference.telemetry_merge, _validate.telemetry_merge, _merge_autograd)
_register(
    "state_update", reference_lifecycle.state_update, _state_update_fake, _state_update_autograd, versioned=(0, 1, 2)
)
_register(
    "lifecycle_step",
    reference_lifecycle.lifecycle_step,
    _lifecycle_step_fake,
    _lifecycle_step_autograd,
    versioned=(0, 1, 2, 3),
)
_register("reconstruction_loss", reference.reconstruction_loss, _reconstruction_fake, _reconstruction_autograd)
_register(
    "reconstruction_loss_backward",
    reference.reconstruction_loss_backward,
    _reconstruction_backward_fake,
    _reconstruction_backward_autograd,
)
_register("pair_moments", reference_calibration.pair_moments, _validate.pair_moments, _pair_moments_autograd)
