"""Layers side by side: arithmetic that is the same for each of many layers, done once for all of them.

What a tick of a controller does to the seeds of a layer are hundreds of small operations, and all of their time is spent on
launching them: here they are launched once for all layers that lie on one device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from kasmina_ext._dispatch import lifecycle_ops
from kasmina_ext.bank import neutral_first, rows_of
from kasmina_ext.layer import KasminaLayer
from kasmina_ext.lifecycle import ExtendedLifecycle, TransitionRules
from kasmina_ext.measure import Layout
from kasmina_ext.placement import write
from kasmina_ext.policy import STAY
from kasmina_ext.state_layout import NO_ID, StateVar
from kasmina_ext.transitions import columns_of

_GERMINATED, _GRAFTING, _STABILIZATION = map(
    int, (ExtendedLifecycle.GERMINATED, ExtendedLifecycle.GRAFTING, ExtendedLifecycle.STABILIZATION)
)


class Requested(NamedTuple):
    """What came of requests."""

    verdicts: Tensor
    """int32 ``[T]``."""
    changed: Tensor
    """int32 ``[T]``: the states entered, -1 where there was no transition."""
    state: Tensor
    """int32 ``[8, T]``: as it is now; a copy."""


class SideBySide(Layout):
    """Layers on one device whose banks have equally many rows ``P``: their seeds ``[T]`` lie one after the other, and so do
    their features ``[F]``.
    """

    def __init__(self, layers: Sequence[KasminaLayer]) -> None:
        super().__init__(layers)
        self.features = [layer.hidden_dim for layer in self.layers]
        self.num_blueprints = self.layers[0].num_blueprints
        # Made on the CPU, and copied: made of a list on the device, they would be waited for.
        self._first_features, self._first_seeds = (
            torch.tensor([0, *accumulate(sizes)], device="cpu").to(self.device, non_blocking=True)
            for sizes in (self.features, self.sizes)
        )

    def feature_owner(self) -> tuple[Tensor, Tensor]:
        """As :func:`kasmina_ext.reference.feature_owner` of each layer: ``(owner int64 [F], owned bool [F])``, the owners
        numbered through; of a feature without one, the first seed of its layer.
        """
        # The bounds of each layer's seeds move to where its features are; it has one more of them than seeds.
        offsets = torch.cat([layer._buffers["seed_offsets"] for layer in self.layers])
        number = torch.arange(len(self.layers), device=self.device)
        of_bound = torch.repeat_interleave(number, self._first_seeds.diff() + 1, output_size=offsets.size(0))
        bounds = offsets + self._first_features[of_bound]
        index = torch.arange(sum(self.features), device=self.device)
        layer = torch.searchsorted(self._first_features, index, right=True) - 1
        owner = torch.searchsorted(bounds, index, right=True) - 1 - layer
        first = self._first_seeds[layer]
        owned = (owner >= first) & (owner < self._first_seeds[layer + 1])
        return torch.where(owned, owner, first), owned

    def request(self, targets: Tensor, rules: TransitionRules) -> Requested:
        """``request_state_transitions(ids, targets, rules=rules)`` of each layer, for the seeds whose ``targets``, int32
        ``[T]``, are not STAY. Of what transitions bring with them alphas are written; :meth:`make_neutral` and :meth:`forget` do the rest.
        """
        state = self.buffer("state")
        before = state[StateVar.LIFECYCLE_STATE]
        ids = torch.cat([torch.arange(size, dtype=torch.int32, device=self.device) for size in self.sizes])
        ids = torch.where(targets == STAY, NO_ID, ids)
        blueprint, strategy, mask = columns_of(
            targets, state[StateVar.BLUEPRINT_ID], state[StateVar.GRAFTING_STRATEGY], self.num_blueprints
        )
        values = torch.stack((targets, blueprint, torch.zeros_like(targets), strategy), 1)
        table = rules.on(self.device)
        verdicts = []
        for layer, *columns in zip(self.layers, *(each.split(self.sizes) for each in (ids, values, mask)), strict=True):
            own = (layer._buffers[name] for name in ("state", "history", "history_count"))
            update = lifecycle_ops(self.device, layer.enable_kernels).state_update
            verdicts.append(update(*own, *columns, table, self.num_blueprints))
        state = self.buffer("state")
        now = state[StateVar.LIFECYCLE_STATE]
        changed = torch.where(now != before, now, -1)
        ramps = ((changed == end).split(self.sizes) for end in (_GRAFTING, _STABILIZATION))
        for layer, begins, ends in zip(self.layers, *ramps, strict=True):
            layer._begin_or_end_ramp(begins, ends)
        return Requested(torch.cat(verdicts), changed, state)

    def make_neutral(self, requested: Requested, broken: Tensor) -> None:
        """Neutral blueprints where seeds germinated and where ``broken``, bool ``[T]``. The first thing after a request: if
        anything later fails, no seed is left with the weights of another life.
        """
        owner, owned = self.feature_owner()
        chosen = (requested.changed == _GERMINATED) | broken
        is_first, is_second = rows_of(chosen, requested.state, owner, owned, self.num_blueprints)
        first = neutral_first(requested.state, self.buffer("telemetry"))[owner]
        of_layers = first.split(self.features)
        for (layer, firsts, seconds), values in zip(self._by_layer(is_first, is_second), of_layers, strict=True):
            layer._write_bank(firsts | seconds, torch.where(firsts, values, 0.0))

    def forget(
        self,
        state: Tensor,
        stale: Tensor,
        ended: Tensor,
        optimizer: Optimizer | None,
        owners: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Zero the banks' ``.grad`` for the blueprints of the seeds where ``stale [T]``, and what ``optimizer`` remembers of
        those where ``ended [T]``. ``state [8, T]`` is all layers', ``owners`` what :meth:`feature_owner` gives.
        """
        owners = self.feature_owner() if owners is None else owners
        masks = (torch.logical_or(*rows_of(chosen, state, *owners, self.num_blueprints)) for chosen in (stale, ended))
        for layer, is_stale, has_ended in self._by_layer(*masks):
            layer.forget_gradient(is_stale)
            for moment in () if optimizer is None else layer.moments(optimizer):
                write(moment, 0.0, has_ended)

    def _by_layer(self, *along_features: Tensor) -> Iterator[tuple[KasminaLayer, Tensor, Tensor]]:
        """Each layer with its parts of tensors ``[P, F]``, views."""
        return zip(self.layers, *(each.split(self.features, 1) for each in along_features), strict=True)


class Sides:
    """Layers in groups that lie side by side: one group, where all are on one device and have banks of equally many rows."""

    def __init__(self, layers: Sequence[KasminaLayer]) -> None:
        self._layout = Layout(layers)
        self._keys: list[tuple[torch.device, int, type]] = []
        self._groups: list[tuple[list[int], SideBySide]] = []

    def __iter__(self) -> Iterator[SideBySide]:
        """As they are now."""
        layers = self._layout.layers
        keys = [(layer.device, layer.num_blueprints, type(layer._buffers["state"])) for layer in layers]
        if keys != self._keys:
            numbers = [[i for i, one in enumerate(keys) if one == key] for key in dict.fromkeys(keys)]
            self._groups = [(of_group, SideBySide([layers[i] for i in of_group])) for of_group in numbers]
            self._keys = keys
        return iter([side for _, side in self._groups])

    def spread(self, joined: Tensor) -> list[Tensor]:
        """What is ``[T]`` of all layers, for each group in turn, on its device."""
        if len(self._groups) == 1:
            return [joined]
        pieces = self._layout.split(joined)
        return [torch.cat([pieces[i] for i in numbers]) for numbers, _ in self._groups]

    def gather(self, of_groups: Sequence[Tensor]) -> Tensor:
        """The reverse of :meth:`spread`."""
        if len(of_groups) == 1:
            return of_groups[0]
        pieces: dict[int, Tensor] = {}
        for (numbers, side), joined in zip(self._groups, of_groups, strict=True):
            pieces.update(zip(numbers, joined.split(side.sizes), strict=True))
        return self._layout.join([pieces[i] for i in range(len(pieces))])
