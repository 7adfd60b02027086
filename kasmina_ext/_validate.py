"""Checks of the operators' arguments, for the reference and the fake functions.

The compiled operators make the same checks in C (``csrc/ops/validate.c``) and word them alike: op, argument, what was
expected, what was given. Values of ``seed_offsets`` are looked at on the CPU only: elsewhere that would be a sync.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
MAX_DIMS = 64
MAX_UPDATES = 2**31 - 1
STATE_ROWS, TELEMETRY_COLUMNS, GRAD_TELEMETRY_COLUMNS = 8, 5, 3


def _fail(op: str, argument: str, expected: str, given: object) -> None:
    raise RuntimeError(f"{op}: {argument} must {expected}, got {given}")


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shape(tensor: Tensor) -> str:
    return "[" + ", ".join(str(int(n)) for n in tensor.shape) + "]"


def _expect_strided(op: str, argument: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        _fail(op, argument, "be a tensor", tensor)
    if tensor.layout != torch.strided:
        _fail(op, argument, "be a strided tensor", tensor.layout)


def _expect_floating(op: str, argument: str, tensor: Tensor) -> None:
    _expect_strided(op, argument, tensor)
    if tensor.dtype not in FLOATING:
        expected = "be float32, float64, bfloat16 or float16"
        _fail(op, argument, expected, _dtype_name(tensor.dtype))


def _expect_dtype(op: str, argument: str, tensor: Tensor, dtype: torch.dtype) -> None:
    _expect_strided(op, argument, tensor)
    if tensor.dtype != dtype:
        _fail(op, argument, f"be {_dtype_name(dtype)}", _dtype_name(tensor.dtype))


def _expect_device(op: str, argument: str, tensor: Tensor, of: str, device: torch.device) -> None:
    if tensor.device != device:
        _fail(op, argument, f"be on {device}, the device of {of}", tensor.device)


def _expect_shape(op: str, argument: str, tensor: Tensor, shape: tuple[int, ...], named: str) -> None:
    if tensor.dim() != len(shape) or any(n != m for n, m in zip(tensor.shape, shape, strict=True)):
        wanted = "[" + ", ".join(str(int(n)) for n in shape) + "]"
        _fail(op, argument, f"have shape {named} = {wanted}", _shape(tensor))


def _expect_contiguous(op: str, argument: str, tensor: Tensor) -> None:
    if not tensor.is_contiguous():
        _fail(op, argument, "be contiguous", f"strides {list(tensor.stride())}")


def _expect_activations(op: str, argument: str, x: Tensor) -> None:
    _expect_floating(op, argument, x)
    if not 1 <= x.dim() <= MAX_DIMS:
        _fail(op, argument, f"have 1 to {MAX_DIMS} dimensions", x.dim())


def _expect_offsets(op: str, x: Tensor, seed_offsets: Tensor) -> None:
    _expect_dtype(op, "seed_offsets", seed_offsets, torch.int32)
    _expect_device(op, "seed_offsets", seed_offsets, "x", x.device)
    if seed_offsets.dim() != 1 or seed_offsets.size(0) < 1:
        _fail(op, "seed_offsets", "have shape [S + 1]", _shape(seed_offsets))
    if seed_offsets.device.type != "cpu" or _is_traced(seed_offsets):
        return
    if seed_offsets[0] != 0:
        _fail(op, "seed_offsets", "start at 0", int(seed_offsets[0]))
    drops = (seed_offsets[1:] < seed_offsets[:-1]).nonzero()
    if drops.numel():
        i = int(drops[0]) + 1
        _fail(op, "seed_offsets", "not decrease", f"{int(seed_offsets[i])} after {int(seed_offsets[i - 1])} at {i}")
    if seed_offsets[-1] > x.size(-1):
        _fail(op, "seed_offsets", f"end at or before H = {x.size(-1)}", int(seed_offsets[-1]))


def _is_traced(tensor: Tensor) -> bool:
    return torch.compiler.is_compiling() or type(tensor) not in (Tensor, torch.nn.Parameter, torch.nn.Buffer)


def _expect_accumulator(
    op: str, argument: str, tensor: Tensor, rows: int, columns: int, of: str, device: torch.device
) -> None:
    _expect_strided(op, argument, tensor)
    if tensor.numel() == 0:
        return
    _expect_dtype(op, argument, tensor, torch.float64)
    _expect_device(op, argument, tensor, of, device)
    _expect_shape(op, argument, tensor, (rows, columns), f"[S, {columns}]")
    _expect_contiguous(op, argument, tensor)


def _expect_blueprints(op: str, x: Tensor, seed_offsets: Tensor, state: Tensor, blueprint_weights: Tensor) -> None:
    _expect_offsets(op, x, seed_offsets)
    _expect_dtype(op, "state", state, torch.int32)
    _expect_device(op, "state", state, "x", x.device)
    _expect_shape(op, "state", state, (STATE_ROWS, seed_offsets.size(0) - 1), "[8, S]")
    _expect_floating(op, "blueprint_weights", blueprint_weights)
    _expect_device(op, "blueprint_weights", blueprint_weights, "x", x.device)
    if blueprint_weights.dim() != 2 or blueprint_weights.size(1) != x.size(-1):
        wanted = f"have shape [P, H] = [P, {x.size(-1)}]"
        _fail(op, "blueprint_weights", wanted, _shape(blueprint_weights))


def _expect_seeds(
    op: str, x: Tensor, seed_offsets: Tensor, state: Tensor, alpha: Tensor, blueprint_weights: Tensor
) -> None:
    _expect_blueprints(op, x, seed_offsets, state, blueprint_weights)
    _expect_dtype(op, "alpha", alpha, torch.float32)
    _expect_device(op, "alpha", alpha, "x", x.device)
    _expect_shape(op, "alpha", alpha, (seed_offsets.size(0) - 1,), "[S]")


def _expect_like_x(op: str, argument: str, tensor: Tensor, x: Tensor) -> None:
    _expect_dtype(op, argument, tensor, x.dtype)
    _expect_device(op, argument, tensor, "x", x.device)
    _expect_shape(op, argument, tensor, tuple(x.shape), "of x")


def chunked_forward(x, seed_offsets, state, alpha, blueprint_weights, telemetry, grad_telemetry) -> None:
    op = "chunked_forward"
    _expect_activations(op, "x", x)
    _expect_seeds(op, x, seed_offsets, state, alpha, blueprint_weights)
    seeds = seed_offsets.size(0) - 1
    _expect_accumulator(op, "telemetry", telemetry, seeds, TELEMETRY_COLUMNS, "x", x.device)
    _expect_accumulator(op, "grad_telemetry", grad_telemetry, seeds, GRAD_TELEMETRY_COLUMNS, "x", x.device)


def chunked_backward(grad_y, x, seed_offsets, state, alpha, blueprint_weights, grad_telemetry) -> None:
    op = "chunked_backward"
    _expect_activations(op, "x", x)
    _expect_like_x(op, "grad_y", grad_y, x)
    _expect_seeds(op, x, seed_offsets, state, alpha, blueprint_weights)
    seeds = seed_offsets.size(0) - 1
    _expect_accumulator(op, "grad_telemetry", grad_telemetry, seeds, GRAD_TELEMETRY_COLUMNS, "x", x.device)


def telemetry_update(x, seed_offsets, telemetry) -> None:
    op = "telemetry_update"
    _expect_activations(op, "x", x)
    _expect_offsets(op, x, seed_offsets)
    seeds = seed_offsets.size(0) - 1
    _expect_accumulator(op, "telemetry", telemetry, seeds, TELEMETRY_COLUMNS, "x", x.device)


def _expect_whole_accumulator(op: str, argument: str, tensor: Tensor) -> None:
    _expect_dtype(op, argument, tensor, torch.float64)
    if tensor.dim() != 2 or tensor.size(1) != TELEMETRY_COLUMNS:
        _fail(op, argument, "have shape [S, 5]", _shape(tensor))


def telemetry_reduce(telemetry) -> None:
    _expect_whole_accumulator("telemetry_reduce", "telemetry", telemetry)


def telemetry_merge(telemetry, other) -> None:
    op = "telemetry_merge"
    _expect_whole_accumulator(op, "telemetry", telemetry)
    _expect_contiguous(op, "telemetry", telemetry)
    _expect_dtype(op, "other", other, torch.float64)
    _expect_device(op, "other", other, "telemetry", telemetry.device)
    _expect_shape(op, "other", other, (telemetry.size(0), TELEMETRY_COLUMNS), "[S, 5]")


def _expect_int32(op: str, argument: str, tensor: Tensor, state: Tensor, shape: tuple[int, ...], named: str) -> None:
    _expect_dtype(op, argument, tensor, torch.int32)
    _expect_device(op, argument, tensor, "state", state.device)
    _expect_shape(op, argument, tensor, shape, named)


def _expect_state(op: str, state: Tensor, history: Tensor, history_count: Tensor) -> None:
    _expect_dtype(op, "state", state, torch.int32)
    if state.dim() != 2 or state.size(0) != STATE_ROWS:
        _fail(op, "state", "have shape [8, S]", _shape(state))
    _expect_contiguous(op, "state", state)
    _expect_int32(op, "history", history, state, (state.size(1), 10, 2), "[S, 10, 2]")
    _expect_contiguous(op, "history", history)
    _expect_int32(op, "history_count", history_count, state, (state.size(1),), "[S]")
    _expect_contiguous(op, "history_count", history_count)


def state_update(state, history, history_count, seed_ids, values, mask, rules) -> None:
    op = "state_update"
    _expect_state(op, state, history, history_count)
    _expect_dtype(op, "seed_ids", seed_ids, torch.int32)
    if seed_ids.dim() != 1:
        _fail(op, "seed_ids", "have shape [U]", f"{seed_ids.dim()} dimensions")
    updates = seed_ids.size(0)
    if updates > MAX_UPDATES:
        _fail(op, "seed_ids", f"have at most {MAX_UPDATES} elements", updates)
    _expect_int32(op, "seed_ids", seed_ids, state, (updates,), "[U]")
    _expect_int32(op, "values", values, state, (updates, 4), "[U, 4]")
    _expect_int32(op, "mask", mask, state, (updates,), "[U]")
    _expect_int32(op, "rules", rules, state, (11, 11), "[11, 11]")


def lifecycle_step(state, history, history_count, alpha, schedule: int) -> None:
    op = "lifecycle_step"
    _expect_state(op, state, history, history_count)
    _expect_dtype(op, "alpha", alpha, torch.float32)
    _expect_device(op, "alpha", alpha, "state", state.device)
    _expect_shape(op, "alpha", alpha, (state.size(1),), "[S]")
    _expect_contiguous(op, "alpha", alpha)
    if not 0 <= schedule <= 3:
        _fail(op, "schedule", "be 0 (none), 1 (linear), 2 (cosine) or 3 (sigmoid)", schedule)


def pair_moments(x, t, moments) -> None:
    op = "pair_moments"
    _expect_activations(op, "x", x)
    _expect_like_x(op, "t", t, x)
    _expect_dtype(op, "moments", moments, torch.float64)
    _expect_device(op, "moments", moments, "x", x.device)
    _expect_shape(op, "moments", moments, (x.size(-1), 6), "[H, 6]")
    _expect_contiguous(op, "moments", moments)


def reconstruction_loss(x, target, seed_offsets, state, blueprint_weights, op: str = "reconstruction_loss") -> None:
    _expect_activations(op, "x", x)
    _expect_like_x(op, "target", target, x)
    _expect_blueprints(op, x, seed_offsets, state, blueprint_weights)


def reconstruction_loss_backward(grad_loss, x, target, seed_offsets, state, blueprint_weights) -> None:
    op = "reconstruction_loss_backward"
    reconstruction_loss(x, target, seed_offsets, state, blueprint_weights, op)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    _expect_dtype(op, "grad_loss", grad_loss, wide)
    _expect_device(op, "grad_loss", grad_loss, "x", x.device)
    _expect_shape(op, "grad_loss", grad_loss, (seed_offsets.size(0) - 1,), "[S]")
