"""What can be said of blueprints by looking at them: per seed, on the device, without a pass through the network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kasmina_ext.chunking import chunk_offsets
from kasmina_ext.grafting import GraftingStrategy
from kasmina_ext.layer import KasminaLayer
from kasmina_ext.side_by_side import SideBySide
from kasmina_ext.state_layout import StateVar
from kasmina_ext.telemetry import TelemetryColumn


class Traits(NamedTuple):
    """Of the blueprint that each seed has or, before it germinates, would have: ``[S]``."""

    parameters: Tensor
    """int64: its weights."""
    reconstruction: Tensor
    """float64: mean of ``(g(x, w) - x)^2``, as if all features of the chunk had the chunk's mean and variance."""
    stability: Tensor
    """float64; see :class:`kasmina_ext.policy.Observation`."""
    nonfinite: Tensor
    """float64: its weights that are NaN or infinite."""


class Blueprints:
    """A layer's bank as seeds see it, with two snapshots to tell how far it has moved."""

    def __init__(self, layer: KasminaLayer) -> None:
        self._layer = layer
        sizes = chunk_offsets(layer.hidden_dim, layer.num_seeds, layer.chunking).diff()
        self.owned_features = int(sizes.sum())
        self.owners = int((sizes > 0).sum())
        """Seeds that own features: with more seeds than features not all do."""
        self.snapshots: list[Tensor] = []
        """``[P, H]`` copies of the bank, the older one first."""

    @property
    def total_parameters(self) -> int:
        """If all seeds used the layer's strategy."""
        return self.owned_features * self._layer.strategy.rows

    def take_snapshot(self) -> None:
        """Of the bank as it is; the last two are kept."""
        self.snapshots = [*self.snapshots[-1:], self._layer.whole_bank().clone()]

    @property
    def bank(self) -> Tensor:
        """``[P, H]``, a constant: as it is."""
        return self._layer.whole_bank()


def traits_of(side: SideBySide, blueprints: Sequence[Blueprints], *, stability: bool = True) -> Traits:
    """Of the seeds ``[T]`` of layers side by side, whose banks these are. Waits for nothing.

    Without ``stability``, a third of the operations, that is NaN.
    """
    state, seen = side.buffer("state"), side.buffer("telemetry")
    owner, owned = side.feature_owner()
    strategy = state[StateVar.GRAFTING_STRATEGY][owner]
    blueprint = state[StateVar.BLUEPRINT_ID][owner]
    slope, shift, finite = _as_change(torch.cat([each.bank for each in blueprints], 1), blueprint, strategy)
    columns = [slope * slope, slope * shift, shift * shift, ~finite]
    if stability and all(len(each.snapshots) == 2 for each in blueprints):
        before = torch.cat([each.snapshots[0].to(owner.device, non_blocking=True) for each in blueprints], 1)
        then_slope, then_shift, _ = _as_change(before, blueprint, strategy)
        columns.append((slope - then_slope) ** 2 + (shift - then_shift) ** 2)
    table = torch.stack([torch.where(owned, column, 0).double() for column in (owned, *columns)], 1)
    sums = table.new_zeros(side.total, table.size(1))
    sums = sums.index_put((owner,), table, accumulate=True)  # deterministic on every device
    size, slope2, mixed, shift2, nonfinite, *moved = sums.unbind(1)
    count, mean, m2 = (seen[:, c] for c in (TelemetryColumn.COUNT, TelemetryColumn.MEAN, TelemetryColumn.M2))
    square = m2 / count + mean * mean
    changes = slope2 + shift2
    # A product with an unknown moment is still nothing where its factor is.
    scaled = torch.where(slope2 > 0, slope2 * square + 2 * mixed * mean, 0.0)
    stable = torch.full_like(changes, torch.nan)
    if moved:
        stable = torch.where(changes > 0, (1 - (moved[0] / changes).sqrt()).clamp(min=0), 1.0)
    rows = 1 + (state[StateVar.GRAFTING_STRATEGY] == int(GraftingStrategy.AFFINE)).long()
    return Traits(
        parameters=size.long() * rows,
        reconstruction=(scaled + shift2) / size.clamp(min=1),
        stability=stable,
        nonfinite=nonfinite,
    )


def _as_change(bank: Tensor, blueprint: Tensor, strategy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``g(x, w) - x = slope x + shift`` of each feature, float64 ``[H]``, and whether its weights are finite.

    Nothing changes where there is no blueprint, nor (for the sums) where it is not finite.
    """
    rows, features = bank.shape
    last = blueprint + (strategy == int(GraftingStrategy.AFFINE))
    valid = (blueprint >= 0) & (last < rows)
    w = bank.gather(0, torch.where(valid, blueprint, 0).long()[None])[0].double()
    v = bank.gather(0, torch.where(valid, last, 0).long()[None])[0].double()
    multiplies = (strategy == int(GraftingStrategy.MULTIPLICATIVE)) | (strategy == int(GraftingStrategy.AFFINE))
    slope = torch.where(multiplies, w - 1, 0.0)
    shift = torch.where(strategy == int(GraftingStrategy.ADDITIVE), w, 0.0)
    slope = torch.where(strategy == int(GraftingStrategy.MIXED), -0.5, slope)
    shift = torch.where(strategy == int(GraftingStrategy.MIXED), w / 2, shift)
    shift = torch.where(strategy == int(GraftingStrategy.AFFINE), v, shift)
    finite = ~valid | (torch.isfinite(slope) & torch.isfinite(shift))
    used = valid & finite
    return torch.where(used, slope, 0.0), torch.where(used, shift, 0.0), finite
