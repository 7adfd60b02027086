"""What a layer has seen: the columns of its accumulators, and what is derived from them."""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kasmina_ext import ops
from kasmina_ext.grafting import GraftingStrategy
from kasmina_ext.handle import SeedHandle
from kasmina_ext.state_layout import StateVar

if TYPE_CHECKING:
    from kasmina_ext.layer import KasminaLayer


class TelemetryColumn(IntEnum):
    """Columns of ``telemetry``, float64 ``[S, 5]``: the finite activations before grafting."""

    COUNT = 0
    MEAN = 1
    M2 = 2
    BATCHES = 3
    NONFINITE = 4


class GradTelemetryColumn(IntEnum):
    """Columns of ``grad_telemetry``, float64 ``[S, 3]``, with u = sum G x and v = sum G over the rows of a feature."""

    SUM_U2 = 0
    SUM_V2 = 1
    BACKWARDS = 2


class ReducedColumn(IntEnum):
    """Columns of what :func:`reduce` gives."""

    MEAN = 0
    VARIANCE = 1
    STD = 2


def reduce(source: KasminaLayer | Tensor) -> Tensor:
    """float64 ``[S, 3]``: mean, variance and standard deviation of a layer's (or an accumulator's) activations.

    NaN where nothing was measured, which is not 0.
    """
    return ops.telemetry_reduce(source if isinstance(source, Tensor) else source._buffers["telemetry"])


def legacy_buffer(telemetry: Tensor) -> Tensor:
    """float32 ``[S, 4]``, as the Triton package laid it out: sum, sum of squares, count, batches."""
    count, mean, m2, batches, _ = telemetry.unbind(1)
    return torch.stack((mean * count, m2 + count * mean * mean, count, batches), 1).float()


def potential(layer: KasminaLayer | SeedHandle, since: Tensor | None = None) -> Tensor:
    """float64 ``[S]`` (of a handle ``[T]``): how much a neutral blueprint in each seed would receive of the gradient, per backward pass.

    The sum of u^2 for MULTIPLICATIVE seeds, of v^2 for ADDITIVE and MIXED ones, both for AFFINE:
    seeds germinate in the order of it. NaN where not measured (no backward pass yet, or telemetry
    off) and for an unknown strategy. ``since`` is an earlier copy of the layer's ``grad_telemetry``:
    what it held already does not count, unless the telemetry was reset in between (not for a handle).
    """
    if isinstance(layer, SeedHandle):
        if since is not None:
            raise TypeError("since is of one layer: ask for the potential of each")
        return layer.potential()
    return potential_of(layer._buffers["state"][StateVar.GRAFTING_STRATEGY], layer._buffers["grad_telemetry"], since)


def potential_of(strategy: Tensor, seen: Tensor, since: Tensor | None = None) -> Tensor:
    """:func:`potential` of seeds with these strategies ``[S]`` that have seen these gradients ``[S, 3]``."""
    if since is not None:
        backwards = GradTelemetryColumn.BACKWARDS
        seen = torch.where((seen[:, backwards] >= since[:, backwards])[:, None], seen - since, seen)
    sum_u2, sum_v2, backwards = seen.unbind(1)
    # Plain numbers: a tensor compared with a member of an enumeration is False to the compiler.
    multiplicative, affine = int(GraftingStrategy.MULTIPLICATIVE), int(GraftingStrategy.AFFINE)
    multiplies = (strategy == multiplicative) | (strategy == affine)
    known = (strategy >= 0) & (strategy < len(GraftingStrategy))
    adds = known & (strategy != multiplicative)
    total = torch.where(multiplies, sum_u2, 0.0) + torch.where(adds, sum_v2, 0.0)
    return torch.where(known & (backwards > 0), total / backwards, torch.nan)
