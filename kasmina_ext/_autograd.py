"""The derivative of the blend: one autograd function for the compiled operators and for the reference."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import Function, forward_ad
from torch.compiler import is_compiling
from torch.utils._python_dispatch import _disable_current_modes


class Backend(NamedTuple):
    """Who computes: with the arguments of the operators ``chunked_forward`` and ``chunked_backward``."""

    forward: Callable[..., Tensor]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    beyond: Callable[..., Tensor]
    """``forward`` where more is asked for than one backward pass: differentiates in any way, or says that it cannot."""


class SingleLevelFunction(Function):
    """An autograd function that a kernel at the Autograd key applies."""

    @classmethod
    def apply_any_level(cls, *args):
        """``apply``; inside a torch.func transform, where the dispatcher has already peeled off the level, of that."""
        if not torch._C._are_functorch_transforms_active():
            return cls.apply(*args)
        with enable_single_level_autograd_function():
            return super(Function, cls).apply(*args)


class KasminaBlend(SingleLevelFunction):
    @staticmethod
    def forward(ctx, backend, x, seed_offsets, state, alpha, weights, telemetry, grad_telemetry):
        ctx.save_for_backward(x, seed_offsets, state, alpha, weights)
        # Not saved: it is written in the backward, which would trip the check for changes of saved tensors.
        ctx.backend, ctx.grad_telemetry = backend, grad_telemetry
        return backend.forward(x, seed_offsets, state, alpha, weights, telemetry, grad_telemetry)

    @staticmethod
    def backward(ctx, grad_y):
        x, seed_offsets, state, alpha, weights = ctx.saved_tensors
        _, want_x, _, _, want_alpha, want_weights, _, _ = ctx.needs_input_grad
        dx, dw, dalpha = ctx.backend.backward(
            grad_y, x, seed_offsets, state, alpha, weights, ctx.grad_telemetry, want_x, want_weights, want_alpha
        )
        return (
            None,
            dx if want_x else None,
            None,
            None,
            dalpha if want_alpha else None,
            dw if want_weights else None,
            None,
            None,
        )


apply_blend = super(Function, KasminaBlend).apply
"""``KasminaBlend.apply`` where ``plain_eager()``: without what it does for torch.func, a third of its time."""


def blend(
    backend: Backend,
    x: Tensor,
    seed_offsets: Tensor,
    state: Tensor,
    alpha: Tensor,
    weights: Tensor,
    telemetry: Tensor,
    grad_telemetry: Tensor,
) -> Tensor:
    """``backend.forward`` with ``backend.backward`` as its derivative."""
    if beyond_one_backward(x, alpha, weights):
        return backend.beyond(x, seed_offsets, state, alpha, weights, telemetry, grad_telemetry)
    needs_grad = x.requires_grad or weights.requires_grad or alpha.requires_grad
    if not (needs_grad and torch.is_grad_enabled()):
        return backend.forward(x, seed_offsets, state, alpha, weights, telemetry, grad_telemetry)
    return KasminaBlend.apply_any_level(backend, x, seed_offsets, state, alpha, weights, telemetry, grad_telemetry)


# Every forward and backward asks these: the look-ups are made once.
_transforms_active = torch._C._are_functorch_transforms_active
_count_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_mode_active = torch._C._is_torch_function_mode_enabled
_jit_tracing = torch._C._is_tracing


def plain_eager() -> bool:
    """Whether a call is neither traced nor transformed nor watched by a mode, so that it needs no dispatcher to be seen."""
    return not (
        is_compiling()
        or _transforms_active()
        or forward_ad._current_level >= 0
        or _count_dispatch_modes()
        or _function_mode_active()
        or _jit_tracing()
    )


def beyond_one_backward(*inputs: object) -> bool:
    """Whether tangents are carried forward, or torch.func differentiates more than once."""
    if torch._C._are_functorch_transforms_active():
        stack = torch._C._functorch.get_interpreter_stack()
        return len(stack) != 1 or stack[0].key() != torch._C._functorch.TransformType.Grad
    if forward_ad._current_level < 0:
        return False
    tensors = (each for each in inputs if isinstance(each, Tensor))
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


@functools.cache
def _nothing(device: torch.device, dtype: torch.dtype) -> Tensor:
    with _disable_current_modes(), torch.inference_mode(False):
        return torch.empty(0, device=device, dtype=dtype)


def nothing_like(tensor: Tensor) -> Tensor:
    """A tensor of size 0, made once: selective checkpointing complains of an operator that the forward did not call."""
    return _nothing(tensor.device, tensor.dtype)


def recomputing(x: Tensor) -> bool:
    """Whether this call runs inside a backward pass: a recomputation, whose activations were already counted.

    Not while a graph is traced: there the forward may run under autograd's engine although it is the first.
    """
    return torch._C._current_graph_task_id() != -1 and not isinstance(x, (FakeTensor, FunctionalTensor))
