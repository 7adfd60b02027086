"""The operators of ``torch.ops.kasmina``: definitions where no compiled module made them, fake functions, autograd.

Arguments, shapes and dtypes are those of :mod:`kasmina_ext.reference`, whose functions run on every device without a
compiled kernel. In each section: the public function, the fake function (shapes only), the kernel at the Autograd key.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kasmina_ext import _autograd, _native, _validate, reference
from kasmina_ext._schema import SCHEMAS

_kasmina = torch.ops.kasmina

if not _native.available:
    _definitions = torch.library.Library("kasmina", "DEF")
    for _schema in SCHEMAS.values():
        _definitions.define(_schema)

# Kept alive: the registrations end with the object.
_library = torch.library.Library("kasmina", "IMPL")


def _register(name: str, fallback, fake, autograd) -> None:
    def no_vmap(*args, **kwargs):
        raise RuntimeError(f"kasmina::{name} cannot be vmapped: it updates per-layer state; call it on the whole batch")

    _library.impl(name, fallback, "CompositeExplicitAutograd")
    torch.library.register_fake(f"kasmina::{name}", fake, lib=_library)
    _library.impl(name, autograd, "Autograd")
    _library.impl(name, no_vmap, "FuncTorchBatched")


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
    return _kasmina.chunked_forward(x, seed_offsets, state, alpha, blueprint_weights, telemetry, grad_telemetry)


def _forward_fake(x, seed_offsets, state, alpha, blueprint_weights, telemetry, grad_telemetry):
    _validate.chunked_forward(x, seed_offsets, state, alpha, blueprint_weights, telemetry, grad_telemetry)
    return torch.empty_like(x)


def _forward_below_autograd(*args):
    return _below_autograd(_kasmina.chunked_forward.default, *args)


def _forward_beyond(*args):
    raise RuntimeError(
        "kasmina::chunked_forward can be differentiated once, backward: for forward-mode or nested torch.func transforms "
        "give the layer enable_triton=False (KasminaLayer: enable_kernels=False), or call "
        "kasmina_ext.reference.chunked_forward"
    )


def _forward_autograd(x, seed_offsets, state, alpha, blueprint_weights, telemetry, grad_telemetry):
    if x is None or alpha is None or blueprint_weights is None or telemetry is None:
        # torch lets None pass for a tensor: the checks name it.
        _validate.chunked_forward(x, seed_offsets, state, alpha, blueprint_weights, telemetry, grad_telemetry)
    if telemetry.numel() and _autograd.recomputing(x):
        telemetry = telemetry.new_empty(0)
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


class _NoSecondDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        return _below_autograd(_kasmina.chunked_backward.default, *args)

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(
            "kasmina::chunked_backward has no derivative of its own: give the layer enable_triton=False "
            "(KasminaLayer: enable_kernels=False), or call kasmina_ext.reference.chunked_forward; "
            "PyTorch can differentiate these twice"
        )

    @classmethod
    def apply_single_level(cls, *args):
        with _autograd.enable_single_level_autograd_function():
            return super(torch.autograd.Function, cls).apply(*args)


def _backward_autograd(*args):
    if torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
        nested = torch._C._are_functorch_transforms_active()
        return (_NoSecondDerivative.apply_single_level if nested else _NoSecondDerivative.apply)(*args)
    return _below_autograd(_kasmina.chunked_backward.default, *args)


_NATIVE = _autograd.Backend(_forward_below_autograd, _kasmina.chunked_backward, _forward_beyond)


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


_register("chunked_forward", reference.forward_op, _forward_fake, _forward_autograd)
_register("chunked_backward", reference.chunked_backward, _backward_fake, _backward_autograd)
_register("telemetry_update", reference.update_op, _validate.telemetry_update, _update_autograd)
_register("telemetry_reduce", reference.telemetry_reduce, _reduce_fake, _reduce_autograd)
_register("telemetry_merge", reference.telemetry_merge, _validate.telemetry_merge, _merge_autograd)
