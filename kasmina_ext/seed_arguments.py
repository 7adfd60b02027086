"""How seeds, and values for them, may be written: ints, lists, tensors of any device, masks, slices."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from kasmina_ext.state_layout import INT32_MAX, INT32_MIN, NO_ID

SeedIds = int | Iterable[int] | Tensor | slice | None
"""Seeds: an id, a list or tensor of ids, a bool mask ``[S]``, a slice, or None for all of them."""

_NARROW = (torch.int32, torch.int16, torch.int8, torch.uint8)


def checked_seed_id(seed_id: int, num_seeds: int) -> int:
    """``seed_id`` as an int; ValueError unless 0 <= seed_id < num_seeds, TypeError for what is no integer."""
    if isinstance(seed_id, bool) or not hasattr(seed_id, "__index__"):
        raise TypeError(f"seed_id must be an integer, got {type(seed_id).__name__}")
    seed = seed_id.__index__()
    if not 0 <= seed < num_seeds:
        raise ValueError(f"seed_id must be in [0, {num_seeds}), got {seed}")
    return seed


def is_single(value: object) -> bool:
    """An int, or what stands for one: a NumPy integer, a scalar tensor."""
    if isinstance(value, Tensor):
        return value.dim() == 0
    return hasattr(value, "__index__") and not hasattr(value, "__len__")


def integers(values: Any, what: str) -> Tensor:
    """As a tensor of integers or bools; TypeError for anything else."""
    tensor = values if isinstance(values, Tensor) else _tensor_of(values, what)
    if tensor.is_floating_point() or tensor.is_complex():
        raise TypeError(f"{what} must be integers, got {str(tensor.dtype).removeprefix('torch.')}")
    return tensor


def _tensor_of(values: Any, what: str) -> Tensor:
    if isinstance(values, Iterable) and not hasattr(values, "__array__"):
        values = list(values)
    try:
        tensor = torch.as_tensor(values, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        kind = ValueError if "verflow" in str(error) else TypeError  # torch's own type for it varies
        raise kind(f"{what} must be integers: {error}") from None
    return tensor.long() if tensor.numel() == 0 else tensor  # an empty list is float32 to torch


def last_of_each(ids: Tensor, num_seeds: int) -> Tensor | None:
    """Positions of the last occurrence of each id; None where all are distinct."""
    order = torch.arange(ids.numel(), device=ids.device)
    last = order.new_full((num_seeds,), -1).scatter_reduce_(0, ids, order, "amax")
    kept = last[ids] == order
    return None if kept.all() else kept


# ---- for batches: nothing here looks at a value, so nothing waits for the device ----------------------------------


def batch_ids(seed_ids: SeedIds, num_seeds: int, device: torch.device) -> Tensor:
    """int32 ``[U]`` on ``device``, whatever the values: an id that does not exist stays one that does not.

    A mask becomes one request for each seed, -1 where it is False: a list of its own length would
    have to be waited for.
    """
    if seed_ids is None or isinstance(seed_ids, slice):
        every = torch.arange(num_seeds, dtype=torch.int32, device=device)
        return every if seed_ids is None else every[seed_ids]
    if isinstance(seed_ids, bool):
        raise TypeError("seed_ids must be integers, got bool")
    ids = on_device(device, integers(seed_ids, "seed_ids")).flatten()
    if ids.dtype != torch.bool:
        return _narrowed(ids)
    if ids.shape != (num_seeds,):
        raise ValueError(f"a mask of seeds must have shape [{num_seeds}], got {list(ids.shape)}")
    return torch.where(ids, torch.arange(num_seeds, dtype=torch.int32, device=device), NO_ID)


def batch_values(values: Any, what: str, parse: Callable[[Any], int] | None, like: Tensor) -> Tensor:
    """int32 ``[U]`` beside the ids ``like``: one value for all of them or one for each; names go through ``parse``."""
    if parse is not None and isinstance(values, str):
        values = parse(values)
    elif parse is not None and not isinstance(values, Tensor) and isinstance(values, Iterable):
        values = [parse(value) if isinstance(value, str) else value for value in values]
    if isinstance(values, bool):
        raise TypeError(f"{what} must be integers, got bool")
    if isinstance(values, int):
        return torch.full_like(like, min(max(values, INT32_MIN), INT32_MAX))
    tensor = integers(values, what)
    if tensor.dtype == torch.bool:
        raise TypeError(f"{what} must be integers, got bool")
    tensor = _narrowed(on_device(like.device, tensor))
    if tensor.dim() == 0:
        return tensor.expand(like.shape)
    tensor = tensor.flatten()
    if tensor.size(0) != like.size(0):
        raise ValueError(f"{tensor.size(0)} {what} for {like.size(0)} seed_ids")
    return tensor


def on_device(device: torch.device, tensor: Tensor) -> Tensor:
    """``tensor`` there, without waiting for the device where it is the target."""
    if tensor.device == device or device.type == "cpu":
        return tensor.to(device)
    if tensor.device.type == "cpu":
        tensor = tensor.clone()  # pageable, so staged before the copy returns: the caller may write it again
    return tensor.to(device, non_blocking=True)


def _narrowed(values: Tensor) -> Tensor:
    """int32; what does not fit becomes the nearest that does, which is as far out of every range."""
    if values.dtype in _NARROW:
        return values.int()
    return values.long().clamp(INT32_MIN, INT32_MAX).int()
