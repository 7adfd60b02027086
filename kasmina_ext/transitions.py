"""What a layer lets you change about its seeds, and what each change does to alpha and the bank."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from kasmina_ext import reference
from kasmina_ext.grafting import AlphaSchedule, GraftingStrategy
from kasmina_ext.lifecycle import ExtendedLifecycle, LifecycleManager, TransitionContext
from kasmina_ext.state import ExtendedStateTensor, SeedIds, StateVar, checked_seed_id
from kasmina_ext.telemetry import TelemetryColumn

_METADATA_VARIABLES = (
    "blueprint",
    "blueprint_id",
    "strategy",
    "grafting_strategy",
    "epochs",
    "epochs_in_state",
)
_ALPHA_ON_ENTRY = {ExtendedLifecycle.GRAFTING: 0.0, ExtendedLifecycle.STABILIZATION: 1.0}


class SeedTransitions:
    """The part of :class:`~kasmina_ext.layer.KasminaLayer` that changes seeds; a class of its own
    only for its length.
    """

    num_seeds: int
    num_blueprints: int
    hidden_dim: int
    alpha_schedule: AlphaSchedule
    lifecycle_manager: LifecycleManager
    extended_state: ExtendedStateTensor
    device: torch.device

    # ---- changing seeds --------------------------------------------------------------------------

    def request_state_transition(
        self,
        seed_id: int,
        target_state: ExtendedLifecycle | int | str,
        metadata: Mapping[str, Any] | None = None,
    ) -> bool:
        """Move one seed if ``lifecycle_manager`` agrees; False, and nothing changed, if not. Waits for the device.

        ``metadata`` may carry ``blueprint`` (or ``blueprint_id``), ``strategy`` (or
        ``grafting_strategy``) and ``epochs`` (or ``epochs_in_state``) to be written with the
        transition, ``performance_metrics`` (a dict; single metrics may stand beside) for the gate,
        and whatever else a validator wants to see.

        A germinating seed without a blueprint takes 0, and its slice of the bank becomes the
        strategy's neutral element (MIXED: the mean of its activations, 0 where not measured), so
        that growth preserves the function, unless ``metadata["keep_blueprint"]`` is true.
        ValueError for a seed, state, blueprint or strategy that does not exist.
        """
        seed = checked_seed_id(seed_id, self.num_seeds)
        target = ExtendedLifecycle.parse(target_state)
        metadata = dict(metadata or {})
        updates = {key: metadata[key] for key in _METADATA_VARIABLES if metadata.get(key) is not None}
        current = self._buffers["state"][:, seed].tolist()
        germinates = target is ExtendedLifecycle.GERMINATED
        if germinates and current[StateVar.BLUEPRINT_ID] < 0 and not updates.keys() & {"blueprint", "blueprint_id"}:
            updates["blueprint"] = 0
        checked = self._checked(seed, {"lifecycle": target, **updates})
        if not 0 <= current[StateVar.LIFECYCLE_STATE] < len(ExtendedLifecycle):
            return False
        context = TransitionContext(
            seed_id=seed,
            current_state=current[StateVar.LIFECYCLE_STATE],
            target_state=target,
            epochs_in_state=current[StateVar.EPOCHS_IN_STATE],
            performance_metrics=dict(metadata.get("performance_metrics") or {}),
            error_count=current[StateVar.ERROR_COUNT],
            metadata=metadata,
        )
        if not self.lifecycle_manager.request_transition(context):
            return False
        self.extended_state.write(*checked)
        if germinates and not metadata.get("keep_blueprint", False):
            self._make_neutral(checked[0])
        if self.alpha_schedule is not AlphaSchedule.NONE and target in _ALPHA_ON_ENTRY:
            self.set_alpha(seed, _ALPHA_ON_ENTRY[target])
        return True

    def set_alpha(self, seed_ids: SeedIds, alpha: float | Iterable[float] | Tensor) -> None:
        """Blend factors of these seeds (None: all), one for all or one for each; ValueError outside [0, 1]."""
        ids = self.extended_state.ids(seed_ids)
        values = torch.as_tensor(alpha, dtype=torch.float32).detach().to(self.device)
        wrong = ~((values >= 0) & (values <= 1))  # NaN is wrong too
        if wrong.any():
            raise ValueError(f"alpha must be in [0, 1], got {values[wrong][0].item()}")
        if values.dim() and values.numel() != ids.numel():
            raise ValueError(f"{values.numel()} values of alpha for {ids.numel()} seeds")
        with torch.no_grad():
            self._buffers["alpha"][ids] = values.flatten() if values.dim() else values

    def set_blueprint(
        self,
        seed_ids: SeedIds,
        blueprint_ids: int | Iterable[int] | Tensor,
        strategies: GraftingStrategy | int | str | Iterable | Tensor | None = None,
    ) -> None:
        """Which rows of the bank these seeds use (-1: none), and with which strategy where given.
        The bank is left alone.

        ValueError, and nothing written, for an id that does not exist or a strategy whose rows end
        outside the bank.
        """
        updates = {"blueprint": blueprint_ids}
        if strategies is not None:
            updates["strategy"] = strategies
        self.extended_state.write(*self._checked(seed_ids, updates))

    def set_strategy(self, seed_ids: SeedIds, strategies: GraftingStrategy | int | str | Iterable | Tensor) -> None:
        """How these seeds' blueprints are blended in; errors as in :meth:`set_blueprint`."""
        self.extended_state.write(*self._checked(seed_ids, {"strategy": strategies}))

    def _checked(self, seed_ids: SeedIds, updates: Mapping[str, Any]) -> tuple[Tensor, dict[StateVar, Tensor]]:
        """Ids and values to write; ValueError also where a blueprint's last row would lie outside the bank."""
        ids, values = self.extended_state.checked(seed_ids, updates)
        if StateVar.BLUEPRINT_ID in values or StateVar.GRAFTING_STRATEGY in values:
            state = self._buffers["state"]
            blueprint = values.get(StateVar.BLUEPRINT_ID, state[StateVar.BLUEPRINT_ID, ids])
            strategy = values.get(StateVar.GRAFTING_STRATEGY, state[StateVar.GRAFTING_STRATEGY, ids])
            last = self.num_blueprints - 1
            if ((strategy == GraftingStrategy.AFFINE) & (blueprint == last)).any():
                raise ValueError(
                    f"AFFINE takes the rows p and p + 1 of the bank, so the blueprint must be below {last}, got {last}"
                )
        return ids, values

    # ---- the bank --------------------------------------------------------------------------------

    def _make_neutral(self, ids: Tensor) -> None:
        """The blueprints of these seeds become their strategies' neutral elements, in their own features only."""
        buffers = self._buffers
        state, seen = buffers["state"], buffers["telemetry"]
        owner, owned = reference.feature_owner(buffers["seed_offsets"], self.hidden_dim)
        chosen = torch.zeros(self.num_seeds, dtype=torch.bool, device=state.device)
        chosen[ids] = True
        chosen = chosen[owner] & owned
        blueprint = state[StateVar.BLUEPRINT_ID][owner]
        strategy = state[StateVar.GRAFTING_STRATEGY][owner]
        measured = seen[:, TelemetryColumn.COUNT] > 0
        mean = torch.where(measured, seen[:, TelemetryColumn.MEAN], 0.0)[owner]
        scales = (strategy == GraftingStrategy.MULTIPLICATIVE) | (strategy == GraftingStrategy.AFFINE)
        first = torch.where(strategy == GraftingStrategy.MIXED, mean, scales.to(mean.dtype))
        row = torch.arange(self.num_blueprints, device=state.device)[:, None]
        is_first = chosen & (row == blueprint)
        is_second = chosen & (strategy == GraftingStrategy.AFFINE) & (row == blueprint + 1)
        self._write_bank(is_first | is_second, torch.where(is_first, first, 0.0))

    def _write_bank(self, mask: Tensor, values: Tensor) -> None:
        """The one place that writes the bank: ``values`` where ``mask``, both ``[P, H]`` on the bank's device."""
        if "blueprint_weights" not in self._parameters:
            raise RuntimeError("blueprint_weights is parametrized: what is written to it would be lost")
        with torch.no_grad():
            bank = self.blueprint_weights
            bank.copy_(torch.where(mask, values.to(bank.dtype), bank))
