"""What the tensors of a layer may hold: asked before anything from a file is copied into one."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kasmina_ext.chunking import chunk_offsets
from kasmina_ext.lifecycle import ExtendedLifecycle
from kasmina_ext.state import state_range
from kasmina_ext.state_layout import INT32_MAX, StateVar
from kasmina_ext.telemetry import TelemetryColumn

if TYPE_CHECKING:
    from kasmina_ext.layer import KasminaLayer

COUNTS = [TelemetryColumn.COUNT, TelemetryColumn.BATCHES, TelemetryColumn.NONFINITE]
"""Columns of the telemetry."""
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def problem_of(layer: KasminaLayer, name: str, value: Any) -> str | None:
    """Why ``value`` cannot become the layer's buffer ``name`` or its bank, said as the end of a sentence; else None.

    Looks at shape, dtype and values. Another dtype will do if it holds the same numbers: int64 or
    whole floats for a state. Tensors without values of their own (meta, fake, sharded) are judged
    by their shape. Waits for the device.
    """
    own = layer._parameters.get(name) if name == "blueprint_weights" else layer._buffers[name]
    problem = problem_of_kind(value, name in ("state", "history", "history_count", "seed_offsets"))
    if problem is None and own is not None and value.shape != own.shape:
        problem = f"must have shape {list(own.shape)}, got {list(value.shape)}"
    look = _LOOKS.get(name)
    if problem is not None or look is None or not _has_values(value) or not value.numel():
        return problem
    return look(layer, value.detach())


def problem_of_kind(value: Any, integral: bool) -> str | None:
    """Why this can be none of a layer's tensors whatever its values; for an integral one, also why not by them."""
    if not isinstance(value, Tensor):
        return f"must be a tensor, got {type(value).__name__}"
    if not (value.is_floating_point() or value.dtype in _INTEGERS):
        return f"must be {'integers' if integral else 'numbers'}, got {value.dtype}"
    if integral and value.is_floating_point() and _has_values(value):
        fractions = value.double()
        fractions = fractions[fractions != fractions.round()]
        return f"must be whole numbers, got {fractions[0].item()}" if fractions.numel() else None
    return None


def problem_of_vector(value: Any, num_seeds: int, low: int, high: int) -> str | None:
    """Why this is no vector ``[S]`` of whole numbers in ``[low, high]``; else None."""
    problem = problem_of_kind(value, integral=True)
    if problem is None and tuple(value.shape) != (num_seeds,):
        problem = f"must have shape [{num_seeds}], one for each seed, got {list(value.shape)}"
    if problem is not None or not _has_values(value) or not value.numel():
        return problem
    return _outside(low, high, value.detach())


def _state_problem(layer: KasminaLayer, value: Tensor) -> str | None:
    value = _comparable(value)
    extremes = torch.stack((value.amin(1), value.amax(1)), 1).cpu()  # all rows at once: a device is waited for once
    for variable in StateVar:
        problem = _outside(*state_range(variable, layer.num_blueprints), extremes[variable])
        if problem is not None:
            return f"{problem} as {variable.name}"
    return None


def _offsets_problem(layer: KasminaLayer, value: Tensor) -> str | None:
    expected = chunk_offsets(layer.hidden_dim, layer.num_seeds, layer.chunking)
    wide = expected.dtype if value.dtype == expected.dtype else torch.float64  # which holds every int32
    if torch.equal(value.to("cpu", wide), expected.to(wide)):
        return None
    return (
        f"cuts the features differently from this layer (chunking={layer.chunking!r}, {layer.num_seeds} seeds, "
        f"{layer.hidden_dim} features)"
    )


def _telemetry_problem(layer: KasminaLayer, value: Tensor) -> str | None:
    extremes = torch.stack(_comparable(value).aminmax(dim=0))
    counts = extremes[:, COUNTS]
    least, greatest = counts[0].amin().item(), counts[1].amax().item()
    if least >= 0 and greatest < math.inf:
        return None
    return f"must be in [0, inf), got {greatest if least >= 0 else least} in a count"


_LOOKS = {
    "seed_offsets": _offsets_problem,
    "state": _state_problem,
    "alpha": lambda layer, value: _outside(0, 1, value),
    "telemetry": _telemetry_problem,
    "grad_telemetry": lambda layer, value: _outside(0, math.inf, value),
    "history": lambda layer, value: _outside(0, len(ExtendedLifecycle) - 1, value),
    "history_count": lambda layer, value: _outside(0, INT32_MAX, value),
}


def _outside(low: float, high: float, value: Tensor) -> str | None:
    """None where all numbers lie between; NaN lies nowhere."""
    least, greatest = (bound.item() for bound in _comparable(value).aminmax())
    if least >= low and greatest <= high:
        return None
    return f"must be in [{low}, {high}], got {greatest if least >= low else least}"


def _comparable(value: Tensor) -> Tensor:
    """Extremes are not there for the smallest floating dtypes."""
    return value.double() if value.is_floating_point() and value.dtype.itemsize < 4 else value


def oddity_of(tensor: Tensor) -> str | None:
    """Why no checkpoint can hold this tensor, said as the end of a sentence; None where one can."""
    if hasattr(tensor, "placements"):
        return "is sharded: use torch.distributed.checkpoint with its state_dict"
    if type(tensor) not in (Tensor, nn.Parameter):
        return f"is a {type(tensor).__name__}, no plain tensor"
    if tensor.is_nested or tensor.layout != torch.strided:
        return "is nested or sparse"
    if tensor.is_cuda and not torch.cuda.is_initialized():
        return "is on a GPU that this process cannot use: it was forked from the one that does"
    return "is on the meta device: to_empty first" if tensor.is_meta else None


def _has_values(value: Tensor) -> bool:
    return type(value) in (Tensor, nn.Parameter) and not value.is_meta
