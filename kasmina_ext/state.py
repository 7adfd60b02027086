"""The one state tensor, and the API of the Triton package as a face on it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from kasmina_ext._dispatch import lifecycle_ops
from kasmina_ext.arguments import at_least
from kasmina_ext.grafting import GraftingStrategy
from kasmina_ext.lifecycle import ACTIVE_STATES, ExtendedLifecycle, TransitionRules, state_number
from kasmina_ext.seed_arguments import (
    SeedIds,
    batch_values,
    checked_seed_id,
    integers,
    is_single,
    last_of_each,
)
from kasmina_ext.state_layout import (
    HISTORY_LENGTH,
    INT32_MAX,
    INT32_MIN,
    NO_ID,
    PerformanceColumn,
    StateVar,
    fill_fresh,
    new_state,
    row_view,
)

__all__ = ["ExtendedStateTensor", "PerformanceColumn", "SeedIds", "StateVar"]

_NAMES = {
    "lifecycle": StateVar.LIFECYCLE_STATE,
    "lifecycle_state": StateVar.LIFECYCLE_STATE,
    "blueprint": StateVar.BLUEPRINT_ID,
    "blueprint_id": StateVar.BLUEPRINT_ID,
    "epochs": StateVar.EPOCHS_IN_STATE,
    "epochs_in_state": StateVar.EPOCHS_IN_STATE,
    "strategy": StateVar.GRAFTING_STRATEGY,
    "grafting_strategy": StateVar.GRAFTING_STRATEGY,
    "parent": StateVar.PARENT_STATE,
    "parent_state": StateVar.PARENT_STATE,
    "checkpoint": StateVar.CHECKPOINT_ID,
    "checkpoint_id": StateVar.CHECKPOINT_ID,
    "evaluation_score": StateVar.EVALUATION_SCORE,
    "error_count": StateVar.ERROR_COUNT,
}
_PARSERS = {
    StateVar.LIFECYCLE_STATE: ExtendedLifecycle.parse,
    StateVar.PARENT_STATE: ExtendedLifecycle.parse,
    StateVar.GRAFTING_STRATEGY: GraftingStrategy.parse,
}
# Least and greatest value of each variable; the bank's size bounds blueprints where it is known.
_RANGES = {
    StateVar.LIFECYCLE_STATE: (0, len(ExtendedLifecycle) - 1),
    StateVar.BLUEPRINT_ID: (NO_ID, INT32_MAX - 1),
    StateVar.EPOCHS_IN_STATE: (0, INT32_MAX),
    StateVar.GRAFTING_STRATEGY: (0, len(GraftingStrategy) - 1),
    StateVar.PARENT_STATE: (0, len(ExtendedLifecycle) - 1),
    StateVar.CHECKPOINT_ID: (NO_ID, INT32_MAX),
    StateVar.EVALUATION_SCORE: (INT32_MIN, INT32_MAX),
    StateVar.ERROR_COUNT: (0, INT32_MAX),
}


def state_range(variable: StateVar, num_blueprints: int | None = None) -> tuple[int, int]:
    """Least and greatest value of a variable, in a layer with so many rows in its bank where that is known."""
    low, high = _RANGES[variable]
    if variable is StateVar.BLUEPRINT_ID and num_blueprints is not None:
        high = num_blueprints - 1
    return low, high


ANY_TRANSITION = TransitionRules.any()
STRICT = TransitionRules.strict()
# Columns of a batched request's values, and the bits of its mask.
REQUEST_BITS = {
    StateVar.LIFECYCLE_STATE: 1,
    StateVar.BLUEPRINT_ID: 2,
    StateVar.EPOCHS_IN_STATE: 4,
    StateVar.GRAFTING_STRATEGY: 8,
}


class ExtendedStateTensor:
    """State, history and metrics of ``num_seeds`` seeds; on the CPU unless a device is given.

    A layer's ``extended_state`` is the same API on the layer's own tensors (see :meth:`over`): it
    holds none itself, so it follows every move of the layer. There, what a transition does to alpha
    follows it, as it does a request: under an alpha schedule alpha is 0 on entering GRAFTING and 1
    on entering STABILIZATION. A blueprint is not made neutral: that is for requests. A state on its
    own has neither alpha nor blueprints.

    Seeds are given as :data:`SeedIds`, from any device; an id out of range is a ValueError and
    writes nothing. Methods that take ids or return Python values wait for the device.
    """

    (
        LIFECYCLE_STATE,
        BLUEPRINT_ID,
        EPOCHS_IN_STATE,
        GRAFTING_STRATEGY,
        PARENT_STATE,
        CHECKPOINT_ID,
        EVALUATION_SCORE,
        ERROR_COUNT,
    ) = StateVar

    def __init__(self, num_seeds: int, device: torch.device | str | None = None) -> None:
        num_seeds = at_least("num_seeds", num_seeds, 0)
        self._buffers: Mapping[str, Tensor] = new_state(num_seeds, "cpu" if device is None else device)
        self._num_blueprints: int | None = None
        self._after_transitions: Callable[[Tensor], None] | None = None
        fill_fresh(self._buffers)

    @classmethod
    def over(
        cls,
        buffers: Mapping[str, Tensor],
        num_blueprints: int,
        after_transitions: Callable[[Tensor], None] | None = None,
    ) -> ExtendedStateTensor:
        """A face on ``buffers``, looked up by name at each use; blueprint ids are checked against the bank's size.

        ``after_transitions`` is called with the lifecycle states ``[S]`` as they were, after
        lifecycle states were written.
        """
        face = cls.__new__(cls)
        face._buffers, face._num_blueprints, face._after_transitions = buffers, num_blueprints, after_transitions
        return face

    # ---- the tensors -----------------------------------------------------------------------------

    @property
    def num_seeds(self) -> int:
        return self._buffers["state"].size(1)

    @property
    def device(self) -> torch.device:
        return self._buffers["state"].device

    @property
    def state_tensor(self) -> Tensor:
        """int32 ``[S, 8]``, a view of the state: writing it is writing the state."""
        return self._buffers["state"].t()

    @property
    def transition_history(self) -> Tensor:
        """int32 ``[S, 10, 2]``: a ring of (from, to)."""
        return self._buffers["history"]

    @property
    def history_count(self) -> Tensor:
        """int32 ``[S]``: transitions ever recorded."""
        return self._buffers["history_count"]

    @property
    def history_pointers(self) -> Tensor:
        """int32 ``[S]``: where in the ring the next transition goes."""
        return self._buffers["history_count"] % HISTORY_LENGTH

    @property
    def performance_metrics(self) -> Tensor:
        """float32 ``[S, 4]``: loss, accuracy, stability, efficiency."""
        return self._buffers["performance_metrics"]

    lifecycle_states = row_view(StateVar.LIFECYCLE_STATE, "int32 ``[S]``, a view.")
    blueprint_ids = row_view(StateVar.BLUEPRINT_ID, "int32 ``[S]``, a view; -1: none.")
    grafting_strategies = row_view(StateVar.GRAFTING_STRATEGY, "int32 ``[S]``, a view.")

    # ---- reading ---------------------------------------------------------------------------------

    def get_state(self, seed_ids: SeedIds = None) -> Tensor:
        """Lifecycle states, int32, a copy: one for each of ``seed_ids``; a scalar tensor for a single id."""
        return self._read(StateVar.LIFECYCLE_STATE, seed_ids)

    def get_rollback_states(self, seed_ids: SeedIds = None) -> Tensor:
        """The states that these seeds were in before, PARENT_STATE, in the form of :meth:`get_state`; a copy, too."""
        return self._read(StateVar.PARENT_STATE, seed_ids)

    def get_seeds_in_state(self, state: ExtendedLifecycle | int | str) -> Tensor:
        """int64: the seeds in ``state``, in order."""
        return (self.lifecycle_states == state_number(state)).nonzero().flatten()

    def get_active_seeds_mask(self) -> Tensor:
        """bool ``[S]``: TRAINING, GRAFTING or FINE_TUNING."""
        states = self.lifecycle_states
        training, grafting, fine_tuning = (states == state for state in ACTIVE_STATES)
        return training | grafting | fine_tuning

    def get_state_summary(self) -> dict[str, int]:
        """How many seeds are in each of the eleven states, by name."""
        states = self.lifecycle_states
        every = torch.arange(len(ExtendedLifecycle), dtype=states.dtype, device=states.device)
        counts = torch.stack([(states == state).sum() for state in every]).tolist()
        return {state.name: count for state, count in zip(ExtendedLifecycle, counts, strict=True)}

    def get_transition_history(self, seed_id: int) -> list[tuple[int, int]]:
        """(from, to) of the last ten transitions at most, newest first, as :class:`ExtendedLifecycle`."""
        seed = checked_seed_id(seed_id, self.num_seeds)
        count = int(self.history_count[seed])
        ring = self.transition_history[seed].tolist()
        newest_first = (ring[(count - 1 - k) % HISTORY_LENGTH] for k in range(min(count, HISTORY_LENGTH)))
        return [(_named(source), _named(target)) for source, target in newest_first]

    def validate_transitions(
        self,
        seed_ids: SeedIds,
        target_states: ExtendedLifecycle | int | str | Iterable | Tensor,
        rules: TransitionRules = STRICT,
    ) -> Tensor:
        """bool, one for each of ``seed_ids``: whether ``rules`` allow this transition now. Changes nothing.

        The rules' default is the strict table with its least epochs. A target that is no state is
        False.
        """
        ids = self.ids(seed_ids)
        state, states = self._buffers["state"], len(ExtendedLifecycle)
        target = batch_values(target_states, "target_states", state_number, like=ids.int())
        source = state[StateVar.LIFECYCLE_STATE, ids]
        known = (source >= 0) & (source < states) & (target >= 0) & (target < states)
        pair = (source.clamp(0, states - 1).long(), target.clamp(0, states - 1).long())
        least = rules.on(self.device)[pair]
        return known & (least >= 0) & (state[StateVar.EPOCHS_IN_STATE, ids] >= least)

    def to_dict(self) -> dict[str, Any]:
        """Copies on the CPU of everything, for :meth:`from_dict`; safe for ``torch.save`` with ``weights_only``."""
        return {
            "num_seeds": self.num_seeds,
            "state_tensor": self.state_tensor.detach().to("cpu", copy=True).contiguous(),
            "transition_history": self.transition_history.detach().to("cpu", copy=True),
            "history_count": self.history_count.detach().to("cpu", copy=True),
            "history_pointers": self.history_pointers.to("cpu"),
            "performance_metrics": self.performance_metrics.detach().to("cpu", copy=True),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], device: torch.device | str | None = None) -> ExtendedStateTensor:
        """What :meth:`to_dict` gave, as a state of its own; ValueError for an entry that is missing or does not fit, or
        a value that no state has.

        A dict with ``history_pointers`` alone has forgotten how often its ring went round.
        """
        if "history_count" not in data and "history_pointers" in data:
            data = {**data, "history_count": data["history_pointers"]}
        needed = {"num_seeds", "state_tensor", "transition_history", "history_count", "performance_metrics"}
        missing = needed - data.keys()
        if missing:
            raise ValueError(f"the dict has no {', '.join(sorted(missing))}")
        fresh = cls(data["num_seeds"], device)
        targets = {
            "state_tensor": fresh.state_tensor,
            "transition_history": fresh.transition_history,
            "history_count": fresh.history_count,
            "performance_metrics": fresh.performance_metrics,
        }
        for name, target in targets.items():
            values = torch.as_tensor(data[name])
            if values.shape != target.shape:
                raise ValueError(f"{name} must have shape {list(target.shape)}, got {list(values.shape)}")
            if not target.is_floating_point():
                if values.is_floating_point() or values.is_complex():
                    raise ValueError(f"{name} must be integers, got {values.dtype}")
                _check_range(name, values.long())
            target.copy_(values.detach())
        return fresh

    # ---- writing ---------------------------------------------------------------------------------

    def set_state(self, seed_ids: SeedIds, states: ExtendedLifecycle | int | str | Iterable | Tensor) -> None:
        """Put seeds in lifecycle states, one for all or one for each; recorded as transitions, legal or not."""
        self.update_state(seed_ids, {"lifecycle": states})

    def update_state(self, seed_ids: SeedIds, updates: Mapping[str, Any]) -> None:
        """Write variables of seeds, each one value for all or one for each seed.

        Keys: lifecycle, blueprint, epochs, strategy (or grafting_strategy), parent, checkpoint,
        evaluation_score, error_count, also with ``_state``, ``_id`` or ``_in_state`` as in
        :class:`StateVar`. Where the lifecycle changes, PARENT_STATE is written, the epochs start at
        0 (unless given) and the transition is recorded. Everything is checked before anything is
        written; of a seed named twice the last counts. A seed whose lifecycle is no state at all
        (written through a view) counts as DORMANT.
        """
        self.write(*self.checked(seed_ids, updates))

    def checked(self, seed_ids: SeedIds, updates: Mapping[str, Any]) -> tuple[Tensor, dict[StateVar, Tensor]]:
        """What :meth:`update_state` is given, as distinct ids and one value for each; errors as
        there. Writes nothing.
        """
        ids = self.ids(seed_ids)
        variables = [_variable(name) for name in updates]
        if len(set(variables)) < len(variables):
            raise ValueError(f"a state variable is named twice: {', '.join(map(str, updates))}")
        values = {
            variable: self._values(variable, value, ids)
            for variable, value in zip(variables, updates.values(), strict=True)
        }
        kept = last_of_each(ids, self.num_seeds)
        if kept is None:
            return ids, values
        return ids[kept], {variable: value[kept] for variable, value in values.items()}

    def write(self, ids: Tensor, values: Mapping[StateVar, Tensor]) -> None:
        """Write what :meth:`checked` gave. A lifecycle that stays as it is makes no transition."""
        state = self._buffers["state"]
        zeros = torch.zeros_like(ids, dtype=state.dtype)
        lifecycle, before = state[StateVar.LIFECYCLE_STATE], None
        if StateVar.LIFECYCLE_STATE in values:  # the operator refuses what starts from no state
            before = lifecycle.clone()
            source = lifecycle[ids]
            known = (source >= 0) & (source < len(ExtendedLifecycle))
            lifecycle[ids] = torch.where(known, source, ExtendedLifecycle.DORMANT)
        bits = sum(bit for variable, bit in REQUEST_BITS.items() if variable in values)
        if bits:
            lifecycle_ops(state.device).state_update(
                state,
                self._buffers["history"],
                self._buffers["history_count"],
                ids.to(state.dtype),
                torch.stack([values.get(variable, zeros) for variable in REQUEST_BITS], 1),
                zeros + bits,
                ANY_TRANSITION.on(state.device),
                INT32_MAX if self._num_blueprints is None else self._num_blueprints,
            )
        with torch.no_grad():
            for variable, value in values.items():
                if variable not in REQUEST_BITS:
                    state[variable, ids] = value
        if before is not None and self._after_transitions is not None:
            self._after_transitions(before)

    def increment_epochs(self, seed_ids: SeedIds = None) -> None:
        """One epoch more in its state, for these seeds or for all."""
        self._add(StateVar.EPOCHS_IN_STATE, seed_ids)

    def update_blueprint(self, seed_ids: SeedIds, blueprint_ids: Any, grafting_strategies: Any | None = None) -> None:
        """Which blueprint, and with which strategy where given, these seeds use."""
        updates = {"blueprint": blueprint_ids}
        if grafting_strategies is not None:
            updates["strategy"] = grafting_strategies
        self.update_state(seed_ids, updates)

    def update_performance(self, seed_ids: SeedIds, metrics: Mapping[str, Any] | Tensor) -> None:
        """Metrics by name (loss, accuracy, stability, efficiency), one for all seeds or one for each, or all four as a
        tensor ``[4]`` or ``[U, 4]``; a loss may come with its graph, which is left behind. Of a seed named twice the last
        counts.
        """
        ids, table = self.ids(seed_ids), self.performance_metrics
        rows = table[ids]
        if isinstance(metrics, Mapping):
            columns = {column.name.lower(): rows[:, column] for column in PerformanceColumn}
            for name, value in metrics.items():
                if name not in columns:
                    raise ValueError(f"unknown metric {name!r}; known are {', '.join(columns)}")
                _fill(columns[name], value, name)
        else:
            _fill(rows, metrics, "metrics")
        kept = last_of_each(ids, self.num_seeds)
        with torch.no_grad():
            table[ids if kept is None else ids[kept]] = rows if kept is None else rows[kept]

    def increment_error_count(self, seed_ids: SeedIds) -> None:
        """One error more for each of these seeds."""
        self._add(StateVar.ERROR_COUNT, seed_ids)

    def reset_error_count(self, seed_ids: SeedIds) -> None:
        """No errors any more."""
        self.update_state(seed_ids, {"error_count": 0})

    def set_checkpoint(self, seed_ids: SeedIds, checkpoint_ids: Any) -> None:
        """The number of the checkpoint that these seeds would go back to; -1: none."""
        self.update_state(seed_ids, {"checkpoint": checkpoint_ids})

    # ---- what the methods share ------------------------------------------------------------------

    def ids(self, seed_ids: SeedIds) -> Tensor:
        """int64 ids on the state's device, flat; ValueError for one out of range."""
        if seed_ids is None or isinstance(seed_ids, slice):
            every = torch.arange(self.num_seeds, device=self.device)
            return every if seed_ids is None else every[seed_ids]
        if is_single(seed_ids):
            return torch.tensor([checked_seed_id(seed_ids, self.num_seeds)], device=self.device)
        ids = integers(seed_ids, "seed_ids").to(self.device)
        if ids.dtype == torch.bool:
            if ids.shape != (self.num_seeds,):
                raise ValueError(f"a mask of seeds must have shape [{self.num_seeds}], got {list(ids.shape)}")
            return ids.nonzero().flatten()
        ids = ids.flatten().long()
        wrong = (ids < 0) | (ids >= self.num_seeds)
        if wrong.any():
            raise ValueError(f"seed_ids must be in [0, {self.num_seeds}), got {int(ids[wrong][0])}")
        return ids

    def _values(self, variable: StateVar, value: Any, ids: Tensor) -> Tensor:
        """int32 values, one for each of ``ids``; ValueError for one out of range or another number of them."""
        parse = _PARSERS.get(variable)
        if parse is not None and (isinstance(value, (str, int)) or is_single(value)):
            value = parse(value)
        elif parse is not None and not isinstance(value, Tensor):
            value = [parse(one) for one in value]
        values = integers(value, variable.name)
        if values.dtype == torch.bool:
            raise TypeError(f"{variable.name} must be integers, got bool")
        values = values.long()  # a comparison in a narrower type would wrap
        low, high = state_range(variable, self._num_blueprints)
        wrong = (values < low) | (values > high)
        if wrong.any():
            raise ValueError(f"{variable.name} must be in [{low}, {high}], got {int(values[wrong][0])}")
        values = values.to(torch.int32).to(self.device)
        if values.dim() == 0:
            return values.expand(ids.numel())
        values = values.flatten()
        if values.numel() != ids.numel():
            raise ValueError(f"{values.numel()} values of {variable.name} for {ids.numel()} seeds")
        return values

    def _read(self, variable: StateVar, seed_ids: SeedIds) -> Tensor:
        row = self._buffers["state"][variable]
        if is_single(seed_ids):
            return row[checked_seed_id(seed_ids, self.num_seeds)].clone()
        return row[self.ids(seed_ids)]

    def _add(self, variable: StateVar, seed_ids: SeedIds) -> None:
        """One more for each time that a seed is named; the greatest int32 stays."""
        row, ids = self._buffers["state"][variable], self.ids(seed_ids)
        added = torch.zeros_like(row, dtype=torch.int64)
        added.index_put_((ids,), torch.ones_like(ids), accumulate=True)
        with torch.no_grad():
            row.copy_((row + added).clamp(max=INT32_MAX))


def _variable(name: str | StateVar) -> StateVar:
    """The row that a key of :meth:`ExtendedStateTensor.update_state` means."""
    if isinstance(name, StateVar):
        return name
    variable = _NAMES.get(name.lower()) if isinstance(name, str) else None
    if variable is None:
        raise ValueError(f"unknown state variable {name!r}; known are {', '.join(_NAMES)}")
    return variable


def _check_range(name: str, values: Tensor) -> None:
    """ValueError for a value (int64) that the state's tensor of this name cannot have."""
    columns = [(name, values, 0, INT32_MAX)]
    if name == "state_tensor":
        columns = [(variable.name, values[:, variable], *_RANGES[variable]) for variable in StateVar]
    elif name == "transition_history":
        columns = [(name, values, *_RANGES[StateVar.LIFECYCLE_STATE])]
    for what, column, low, high in columns:
        wrong = (column < low) | (column > high)
        if wrong.any():
            raise ValueError(f"{what} must be in [{low}, {high}], got {int(column[wrong][0])}")


def _fill(target: Tensor, value: Any, name: str) -> None:
    value = torch.as_tensor(value, dtype=target.dtype).detach().to(target.device)
    if value.dim() and value.shape not in (target.shape, target.shape[1:]):
        raise ValueError(f"{name} must have shape {list(target.shape)}, got {list(value.shape)}")
    target.copy_(value)


def _named(state: int) -> int:
    """As a member, or the bare number where somebody wrote what is no state."""
    return ExtendedLifecycle(state) if 0 <= state < len(ExtendedLifecycle) else state
