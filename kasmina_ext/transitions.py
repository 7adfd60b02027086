"""What a layer lets you change about its seeds, and what each change does to alpha and the bank."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from kasmina_ext._dispatch import lifecycle_ops
from kasmina_ext.grafting import AlphaSchedule, GraftingStrategy, strategy_number
from kasmina_ext.lifecycle import (
    ExtendedLifecycle,
    LifecycleManager,
    TransitionContext,
    TransitionRules,
    begins_or_ends,
    state_number,
)
from kasmina_ext.seed_arguments import SeedIds, batch_ids, batch_values, checked_seed_id, on_device
from kasmina_ext.state import REQUEST_BITS, ExtendedStateTensor
from kasmina_ext.state_layout import StateVar

_METADATA_VARIABLES = (
    "blueprint",
    "blueprint_id",
    "strategy",
    "grafting_strategy",
    "epochs",
    "epochs_in_state",
)
# Plain numbers: a tensor compared with a member of an enumeration is False to the compiler.
_GERMINATED, _GRAFTING, _STABILIZATION = map(
    int, (ExtendedLifecycle.GERMINATED, ExtendedLifecycle.GRAFTING, ExtendedLifecycle.STABILIZATION)
)
_AFFINE = int(GraftingStrategy.AFFINE)
_RECYCLING = TransitionRules.recycling()
_SETS_LIFECYCLE = REQUEST_BITS[StateVar.LIFECYCLE_STATE]
_SETS_BLUEPRINT = REQUEST_BITS[StateVar.BLUEPRINT_ID]
_SETS_STRATEGY = REQUEST_BITS[StateVar.GRAFTING_STRATEGY]


class SeedTransitions:
    """The part of :class:`~kasmina_ext.layer.KasminaLayer` that changes seeds."""

    num_seeds: int
    num_blueprints: int
    alpha_schedule: AlphaSchedule
    ramp_epochs: int
    auto_advance: bool
    enable_kernels: bool
    lifecycle_manager: LifecycleManager
    transition_rules: TransitionRules
    extended_state: ExtendedStateTensor
    device: torch.device

    # ---- one seed --------------------------------------------------------------------------------

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
        ValueError for a seed, state, blueprint or strategy that does not exist; RuntimeError where the
        bank cannot be made neutral, since it is parametrized. Nothing is written then.
        """
        seed = checked_seed_id(seed_id, self.num_seeds)
        target = ExtendedLifecycle.parse(target_state)
        metadata = dict(metadata or {})
        updates = {key: metadata[key] for key in _METADATA_VARIABLES if metadata.get(key) is not None}
        state = self._buffers["state"]
        current = state[:, seed].tolist()
        germinates = target is ExtendedLifecycle.GERMINATED
        neutral = germinates and not metadata.get("keep_blueprint", False)
        if neutral:
            self.check_own_bank()
        if germinates and current[StateVar.BLUEPRINT_ID] < 0 and not updates.keys() & {"blueprint", "blueprint_id"}:
            updates["blueprint"] = 0
        ids, values = self._checked(seed, updates)
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
        before = state[StateVar.LIFECYCLE_STATE].clone()
        values[StateVar.LIFECYCLE_STATE] = torch.full_like(ids, int(target), dtype=state.dtype)
        self.extended_state.write(ids, values)
        if neutral:
            self._make_neutral(self._entered(before) == _GERMINATED)
        return True

    # ---- many seeds, on the device ---------------------------------------------------------------

    def request_state_transitions(
        self,
        seed_ids: SeedIds,
        targets: ExtendedLifecycle | int | str | Iterable | Tensor,
        blueprints: int | Iterable[int] | Tensor | None = None,
        strategies: GraftingStrategy | int | str | Iterable | Tensor | None = None,
        *,
        rules: TransitionRules | Tensor | None = None,
        keep_blueprints: bool = False,
    ) -> Tensor:
        """Judge U requests and apply the good ones, on the device: int32 ``[U]`` of :class:`~kasmina_ext.lifecycle.Verdict`.

        Nothing waits for the device when the arguments lie there (a Python number does no harm,
        either), and the call can be traced into a graph. Each request is applied whole or not at
        all; of several for one seed only the last is considered.

        Arguments:
            seed_ids: ``[U]`` of any integer dtype; ids that do not exist get a verdict, so a batch
                of fixed size may be filled up with -1. None is every seed; a mask ``[S]`` is a
                request for every seed, -1 where it is False.
            targets, blueprints, strategies: one for all or one for each; None leaves blueprint and
                strategy as they are, but a germinating seed without a blueprint takes 0. An AFFINE
                blueprint whose second row would lie outside the bank is BLUEPRINT_OUT_OF_RANGE.
            rules: which transitions there are, after how many epochs: a
                :class:`~kasmina_ext.lifecycle.TransitionRules` or its tensor, by default the
                layer's ``transition_rules``. The single request's ``lifecycle_manager`` is Python
                and has no say here.
            keep_blueprints: leave the bank as it is where seeds germinate, instead of neutral.

        What a transition brings with it follows the verdicts: neutral germination as in
        :meth:`request_state_transition`, and under an alpha schedule alpha 0 on entering GRAFTING,
        1 on entering STABILIZATION. What the bank's ``.grad`` has gathered for a blueprint that begins
        or ends is zeroed, so that a step that is still to come moves neither it nor a fossil (in a
        compiled graph or a CUDA graph: not before that step, see :func:`kasmina_ext.param_groups`).

        TypeError or ValueError for arguments of the wrong kind or number, RuntimeError where seeds
        may germinate in a bank that cannot be made neutral since it is parametrized, before anything
        is written. :func:`kasmina_ext.explain_verdicts` puts verdicts into words.
        """
        state = self._buffers["state"]
        ids = batch_ids(seed_ids, self.num_seeds, state.device)
        targets = state_number(targets) if isinstance(targets, str) else targets
        to = batch_values(targets, "targets", state_number, like=ids)
        blueprint, strategy, mask = self._blueprint_and_strategy(ids, to, blueprints, strategies)
        values = torch.stack((to, blueprint, torch.zeros_like(to), strategy), 1)
        may_germinate = not isinstance(targets, int) or targets == _GERMINATED
        neutral = may_germinate and not keep_blueprints
        if neutral:
            self.check_own_bank()
        rules = self.transition_rules if rules is None else rules
        return self._update(ids, values, mask, rules, neutral)

    def recycle(self, seed_ids: SeedIds = None) -> Tensor:
        """Seeds that were CULLED, CANCELLED or ROLLED_BACK become DORMANT again; verdicts as in
        :meth:`request_state_transitions`. None asks for every seed.

        Blueprint, strategy and alpha stay as they are: nothing of them shows until the seed
        germinates again.
        """
        ids = batch_ids(seed_ids, self.num_seeds, self.device)
        values = ids.new_zeros((ids.size(0), len(REQUEST_BITS)))  # DORMANT is 0
        return self._update(ids, values, torch.full_like(ids, _SETS_LIFECYCLE), _RECYCLING, False)

    def step_lifecycle(self) -> None:
        """One epoch for every seed; call it once an epoch, after backward and outside of the training graph.

        Epochs in the state + 1. With an ``alpha_schedule``, alpha of seeds in GRAFTING follows it
        over ``ramp_epochs`` epochs, and with ``auto_advance`` they go on to STABILIZATION at its
        end. Never waits for the device.
        """
        buffers = self._buffers
        state = buffers["state"]
        lifecycle_ops(state.device, self.enable_kernels).lifecycle_step(
            state,
            buffers["history"],
            buffers["history_count"],
            buffers["alpha"],
            int(self.alpha_schedule),
            self.ramp_epochs,
            self.auto_advance,
        )

    def _blueprint_and_strategy(
        self, ids: Tensor, to: Tensor, blueprints: Any, strategies: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Columns of the requests, and the mask that says which of them count; all int32 ``[U]``."""
        state = self._buffers["state"]
        seed = ids.clamp(0, self.num_seeds - 1).long()  # of an id that does not exist, any: it is refused
        blueprints = None if blueprints is None else batch_values(blueprints, "blueprints", None, like=ids)
        strategies = None if strategies is None else batch_values(strategies, "strategies", strategy_number, like=ids)
        now = state[StateVar.BLUEPRINT_ID][seed], state[StateVar.GRAFTING_STRATEGY][seed]
        return columns_of(to, *now, self.num_blueprints, blueprints, strategies)

    def _update(
        self, ids: Tensor, values: Tensor, mask: Tensor, rules: TransitionRules | Tensor, neutral: bool
    ) -> Tensor:
        """Verdicts; what the transitions bring with them is done. ``neutral``: seeds may germinate, neutrally."""
        buffers = self._buffers
        state = buffers["state"]
        table = on_device(state.device, rules) if isinstance(rules, Tensor) else rules.on(state.device)
        before = state[StateVar.LIFECYCLE_STATE].clone()
        verdicts = lifecycle_ops(state.device, self.enable_kernels).state_update(
            state,
            buffers["history"],
            buffers["history_count"],
            ids,
            values,
            mask,
            table,
            self.num_blueprints,
        )
        entered = self._follow_transitions(before)
        if neutral:
            self._make_neutral(entered == _GERMINATED)
        return verdicts

    def _bring_rules(self) -> None:
        """Rules to where the layer is, so that no request has to: a first copy within a graph would be part of it."""
        for rules in (self.transition_rules, _RECYCLING):
            rules.on(self.device)

    def _entered(self, before: Tensor) -> Tensor:
        """int32 ``[S]``: the states of seeds that are not in those of ``before [S]`` any more, -1 for the others."""
        now = self._buffers["state"][StateVar.LIFECYCLE_STATE]
        return torch.where(now != before, now, -1)

    def _follow_transitions(self, before: Tensor) -> Tensor:
        """What transitions from the states ``before [S]`` bring with them, but for germination, on the device; what
        :meth:`_entered` gives.
        """
        entered = self._entered(before)
        self._begin_or_end_ramp(entered == _GRAFTING, entered == _STABILIZATION)
        if not torch.compiler.is_compiling() and self.gathers_gradient:
            self.forget_gradient(begins_or_ends(entered))
        return entered

    def _begin_or_end_ramp(self, begins: Tensor, ends: Tensor) -> None:
        """Under an alpha schedule, alpha 0 where ``begins [S]``, and 1 where ``ends [S]``."""
        if self.alpha_schedule is not AlphaSchedule.NONE:
            alpha = self._buffers["alpha"]
            with torch.no_grad():
                alpha.masked_fill_(begins, 0.0)
                alpha.masked_fill_(ends, 1.0)

    # ---- directly --------------------------------------------------------------------------------

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
            if ((strategy == _AFFINE) & (blueprint == last)).any():
                raise ValueError(
                    f"AFFINE takes the rows p and p + 1 of the bank, so the blueprint must be below {last}, got {last}"
                )
        return ids, values


def columns_of(
    to: Tensor,
    current: Tensor,
    current_strategy: Tensor,
    num_blueprints: int,
    blueprints: Tensor | None = None,
    strategies: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Blueprints and strategies of requests for states ``to``, and the mask that says which columns count; all int32
    ``[U]``, as are what the seeds have now and what is asked for. None leaves it, but for germination without a blueprint.
    """
    if blueprints is None:
        sets_blueprint = (to == _GERMINATED) & (current < 0)
        blueprint = torch.where(sets_blueprint, 0, current)
    else:
        sets_blueprint = torch.ones_like(to, dtype=torch.bool)
        blueprint = blueprints
    if strategies is None:
        sets_strategy = torch.zeros_like(to, dtype=torch.bool)
        strategy = current_strategy
    else:
        sets_strategy = torch.ones_like(to, dtype=torch.bool)
        strategy = strategies
    # A pair of rows of which one would lie outside: asked for as what is outside altogether.
    half = (sets_blueprint | sets_strategy) & (strategy == _AFFINE) & (blueprint == num_blueprints - 1)
    blueprint = torch.where(half, num_blueprints, blueprint)
    mask = _SETS_LIFECYCLE + _SETS_BLUEPRINT * (sets_blueprint | half).int() + _SETS_STRATEGY * sets_strategy.int()
    return blueprint, strategy, mask
