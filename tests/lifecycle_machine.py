"""A layer's seeds under random orders, side by side with the plain-Python model: a hypothesis state machine.

tests/test_lifecycle_machine.py runs some of them, scripts/run_state_machine.py thousands.
"""

from __future__ import annotations

import copy
import io

import lifecycle_model as model
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from lifecycle_model import POLICIES, Seed, Tensors

from kasmina_ext import KasminaLayer
from kasmina_ext.lifecycle import TransitionRules

SEEDS, BLUEPRINTS, FEATURES = 5, 3, 12
STEPS = 50
OWNED = [range(0, 3), range(3, 6), range(6, 8), range(8, 10), range(10, 12)]  # balanced: the first get one more
AFFINE, LAST = 3, BLUEPRINTS - 1
FIRST_ROW, SECOND_ROW = {0: 1.0, 1: 0.0, 2: 0.0, AFFINE: 1.0}, 0.0  # neutral; MIXED: the mean of nothing measured
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

_ids, _some_ids = st.integers(0, SEEDS - 1), st.integers(-1, SEEDS)
_states, _strategies, _blueprints = st.integers(0, 10), st.integers(0, 3), st.integers(-1, LAST)
_maybe_wrong = st.one_of(st.integers(-1, 11), st.sampled_from([model.INT_MIN, model.INT_MAX]))


def _legal(seed: Seed) -> st.SearchStrategy[int]:
    """States that the graph has an edge to, where there is one: else hardly a seed would get far."""
    targets = [to for source, to in POLICIES["gate"] if source == seed.lifecycle]
    return st.sampled_from(targets) if targets else _states


class LifecycleMachine(RuleBasedStateMachine):
    """Every rule does the same to `layer` and to `seeds` and `bank`; the invariant compares them."""

    device = torch.device("cpu")
    runs = steps = 0  # of all machines

    @initialize(
        schedule=st.integers(0, 3),
        ramp_epochs=st.integers(-1, 8),
        advance=st.booleans(),
        strategy=_strategies,
        kernels=st.booleans(),
    )
    def begin(self, schedule: int, ramp_epochs: int, advance: bool, strategy: int, kernels: bool) -> None:
        self.layer = KasminaLayer(
            torch.nn.Linear(FEATURES, FEATURES),
            num_seeds=SEEDS,
            num_blueprints=BLUEPRINTS,
            strategy=strategy,
            alpha_schedule=schedule,
            ramp_epochs=ramp_epochs,
            auto_advance=advance,
            enable_kernels=kernels,
            device=self.device,
        )
        self.schedule, self.ramp_epochs, self.advance = schedule, ramp_epochs, advance
        self.seeds = [Seed(strategy=strategy) for _ in range(SEEDS)]
        # Whole numbers that every dtype holds, and none of them neutral.
        self.bank = [[float(2 + p * FEATURES + f) for f in range(FEATURES)] for p in range(BLUEPRINTS)]
        self.saved = None
        with torch.no_grad():
            self.layer.blueprint_weights.copy_(torch.tensor(self.bank))
        type(self).runs += 1

    # ---- what a transition brings with it ----

    def follow_up(self, before: list[int], neutral: bool) -> None:
        for s, seed in enumerate(self.seeds):
            if seed.lifecycle == before[s]:
                continue
            if self.schedule and seed.lifecycle in (model.GRAFTING, model.STABILIZATION):
                seed.alpha = 0.0 if seed.lifecycle == model.GRAFTING else 1.0
            if neutral and seed.lifecycle == model.GERMINATED and 0 <= seed.blueprint < BLUEPRINTS:
                for f in OWNED[s]:
                    self.bank[seed.blueprint][f] = FIRST_ROW[seed.strategy]
                    if seed.strategy == AFFINE and seed.blueprint < LAST:
                        self.bank[seed.blueprint + 1][f] = SECOND_ROW

    def lives(self) -> list[int]:
        return [seed.lifecycle for seed in self.seeds]

    # ---- requests ----

    @rule(data=st.data(), s=_ids, keep=st.booleans(), given=st.integers(0, 31))
    def request_one(self, data, s: int, keep: bool, given: int) -> None:
        """`given`: which of the things that metadata may carry."""
        seed = self.seeds[s]
        to = data.draw(st.one_of(_legal(seed), _legal(seed), _states), label="to")
        metadata = {"keep_blueprint": keep}
        if given & 1:
            metadata["blueprint"] = data.draw(_blueprints, label="blueprint")
        if given & 2:
            metadata["strategy"] = data.draw(_strategies, label="strategy")
        if given & 4:
            metadata["epochs"] = data.draw(st.integers(0, 9), label="epochs")
        metrics = {}
        if given & 8:
            metrics["training_loss"] = data.draw(st.sampled_from([0.5, 1.0]), label="loss")
        if given & 16:
            metrics["accuracy"] = data.draw(st.sampled_from([0.95, 0.9]), label="accuracy")

        blueprint = metadata.get("blueprint")
        if blueprint is None and to == model.GERMINATED and seed.blueprint < 0:
            blueprint = 0
        strategy = metadata.get("strategy", seed.strategy)
        whole = blueprint is None and "strategy" not in metadata
        rows_end_outside = strategy == AFFINE and (seed.blueprint if blueprint is None else blueprint) == LAST
        if not whole and rows_end_outside:
            try:
                self.layer.request_state_transition(s, to, {**metadata, **metrics})
            except ValueError:
                return
            raise AssertionError("AFFINE in the last row was taken")
        least = POLICIES["gate"].get((seed.lifecycle, to))
        allowed = least is not None and seed.epochs >= least
        if to == model.GRAFTING:
            allowed = allowed and metrics.get("training_loss", 0) < 1
        if to == model.FOSSILIZED:
            allowed = allowed and metrics.get("accuracy", 1) > 0.9
        metadata["performance_metrics"] = metrics
        assert self.layer.request_state_transition(s, to, metadata) is allowed
        if allowed:
            before = self.lives()
            seed.move(to)
            seed.blueprint = seed.blueprint if blueprint is None else blueprint
            seed.strategy, seed.epochs = strategy, metadata.get("epochs", 0)
            self.follow_up(before, not keep)

    @rule(
        data=st.data(),
        ids=st.lists(_some_ids, max_size=6),
        policy=st.sampled_from([None, *POLICIES, "gate tenth"]),
        keep=st.booleans(),
        form=st.sampled_from(["list", "tensor", "int64"]),
    )
    def request_many(self, data, ids: list[int], policy: str | None, keep: bool, form: str) -> None:
        one = [_legal(self.seeds[s]) if 0 <= s < SEEDS else _states for s in ids]
        targets = [data.draw(st.one_of(likely, likely, _maybe_wrong), label="to") for likely in one]
        many = lambda of: st.one_of(st.none(), st.lists(of, min_size=len(ids), max_size=len(ids)))  # noqa: E731
        blueprints = data.draw(many(st.integers(-2, BLUEPRINTS)), label="blueprints")
        strategies = data.draw(many(st.integers(-1, 4)), label="strategies")
        rules = TransitionRules.gate().scaled(0.1) if policy == "gate tenth" else None
        table = model.table({edge: min(least, 1) for edge, least in POLICIES["gate"].items()})
        if policy in POLICIES:
            rules = getattr(TransitionRules, policy)()
        if policy != "gate tenth":
            table = model.table(POLICIES[policy or "gate"])

        values, masks = [], []
        for u, s in enumerate(ids):
            seed = self.seeds[s] if 0 <= s < SEEDS else Seed()
            strategy = seed.strategy if strategies is None else strategies[u]
            blueprint, sets = (seed.blueprint, 0) if blueprints is None else (blueprints[u], 2)
            if blueprints is None and targets[u] == model.GERMINATED and blueprint < 0:
                blueprint, sets = 0, 2
            if strategy == AFFINE and blueprint == LAST and (blueprints, strategies) != (None, None):
                blueprint, sets = BLUEPRINTS, 2  # its second row would be outside
            values.append((targets[u], blueprint, 0, strategy))
            masks.append(1 + sets + 8 * (strategies is not None))
        before = self.lives()
        expected = model.update(self.seeds, ids, values, masks, table, BLUEPRINTS)
        self.follow_up(before, not keep)

        dtype = {"tensor": torch.int32, "int64": torch.int64}.get(form)
        as_given = lambda v: v if dtype is None or v is None else torch.tensor(v, dtype=dtype, device=self.device)  # noqa: E731
        verdicts = self.layer.request_state_transitions(
            *map(as_given, (ids, targets, blueprints, strategies)), rules=rules, keep_blueprints=keep
        )
        assert verdicts.tolist() == expected

    @rule(mask=st.lists(st.booleans(), min_size=SEEDS, max_size=SEEDS), times=st.integers(1, 3))
    def carry_on(self, mask: list[bool], times: int) -> None:
        """On along the main road, so that runs get somewhere; a mask of seeds is a request for every seed."""
        table = model.table({edge: 0 for edge in POLICIES["gate"]})
        for _ in range(times):
            targets = [seed.lifecycle + 1 if 0 <= seed.lifecycle < model.STATES else 0 for seed in self.seeds]
            needed = [
                2 * (to == model.GERMINATED and s.blueprint < 0) for to, s in zip(targets, self.seeds, strict=True)
            ]
            ids = [s if chosen else -1 for s, chosen in enumerate(mask)]
            values, before = [(to, 0, 0, 0) for to in targets], self.lives()
            expected = model.update(self.seeds, ids, values, [1 + bit for bit in needed], table, BLUEPRINTS)
            self.follow_up(before, True)
            chosen = torch.tensor(mask, device=self.device)
            verdicts = self.layer.request_state_transitions(chosen, targets, rules=TransitionRules.gate().scaled(0))
            assert verdicts.tolist() == expected

    @rule(ids=st.one_of(st.none(), st.lists(_some_ids, max_size=4)))
    def recycle(self, ids: list[int] | None) -> None:
        verdicts = self.layer.recycle(ids)
        ids = list(range(SEEDS)) if ids is None else ids
        requests = [(model.DORMANT, 0, 0, 0)] * len(ids), [1] * len(ids)
        assert verdicts.tolist() == model.update(self.seeds, ids, *requests, model.table(POLICIES["recycling"]), 0)

    @rule(times=st.integers(1, 6))
    def step(self, times: int) -> None:
        for _ in range(times):
            self.layer.step_lifecycle()
            for seed in self.seeds:
                seed.step(self.schedule, self.ramp_epochs, self.advance)

    # ---- writing ----

    @rule(s=_ids, value=_maybe_wrong)
    def write_lifecycle(self, s: int, value: int) -> None:
        """Through the view: no transition, no check."""
        self.layer.lifecycle_states[s] = value
        self.seeds[s].lifecycle = value

    @rule(s=_ids, value=st.integers(-1, BLUEPRINTS + 1))
    def write_blueprint(self, s: int, value: int) -> None:
        self.layer.blueprint_ids[s] = value
        self.seeds[s].blueprint = value

    @rule(s=_ids, value=_strategies)
    def write_strategy(self, s: int, value: int) -> None:
        self.layer.extended_state.grafting_strategies[s] = value
        self.seeds[s].strategy = value

    @rule(s=_ids, epochs=st.one_of(st.integers(0, 120), st.just(model.INT_MAX)), errors=st.integers(0, 9))
    def write_row(self, s: int, epochs: int, errors: int) -> None:
        row = self.layer.state_tensor[s]
        row[2], row[7] = epochs, errors
        self.seeds[s].epochs, self.seeds[s].rest[2] = epochs, errors

    @rule(s=_ids, to=_states)
    def set_state(self, s: int, to: int) -> None:
        """From anywhere to anywhere, as a transition; what was no state counts as DORMANT. Alpha follows, the bank does not."""
        before = self.lives()
        self.layer.extended_state.set_state([s], to)
        seed = self.seeds[s]
        seed.lifecycle = seed.lifecycle if seed.lifecycle in range(model.STATES) else model.DORMANT
        if seed.lifecycle != to:
            seed.move(to)
        self.follow_up(before, neutral=False)

    # ---- moving ----

    @rule(dtype=st.sampled_from(DTYPES))
    def move(self, dtype: torch.dtype) -> None:
        self.layer.to(dtype)
        assert self.layer.blueprint_weights.dtype == dtype

    @rule()
    def copy(self) -> None:
        self.layer = copy.deepcopy(self.layer)

    @rule(to_file=st.booleans())
    def save(self, to_file: bool) -> None:
        states = {name: tensor.clone() for name, tensor in self.layer.state_dict().items()}
        if to_file:
            file = io.BytesIO()
            torch.save(states, file)
            file.seek(0)
            states = torch.load(file, weights_only=True, map_location=self.device)
        self.saved = states, copy.deepcopy(self.seeds), copy.deepcopy(self.bank)

    @precondition(lambda self: self.saved is not None)
    @rule(assign=st.booleans())
    def load(self, assign: bool) -> None:
        states, seeds, bank = self.saved
        states = {name: tensor.clone() for name, tensor in states.items()}
        if any(s.lifecycle not in range(model.STATES) or not -1 <= s.blueprint < BLUEPRINTS for s in seeds):
            with pytest.raises(RuntimeError, match='"state" must be in'):  # then nothing changes
                self.layer.load_state_dict(states, assign=assign)
            return
        self.layer.load_state_dict(states, assign=assign)
        self.seeds, self.bank = copy.deepcopy(seeds), copy.deepcopy(bank)

    # ---- what must hold ----

    @invariant()
    def agree(self) -> None:
        type(self).steps += 1
        layer = self.layer
        tensors = Tensors(layer.state, layer.history, layer.history_count, layer.alpha)
        assert [t.dtype for t in tensors.lived] == [torch.int32] * 3 and tensors.alpha.dtype == torch.float32
        assert model.differences(self.seeds, tensors) == []
        assert layer.blueprint_weights.tolist() == self.bank
        assert layer.get_active_seed_count() == sum(seed.lifecycle > 0 for seed in self.seeds)

    @rule(s=_ids)
    def look_back(self, s: int) -> None:
        seed = self.seeds[s]
        newest_first = [seed.ring[(seed.count - 1 - k) % 10] for k in range(min(seed.count, 10))]
        assert self.layer.extended_state.get_transition_history(s) == newest_first


def machine_on(device: torch.device | str) -> type[LifecycleMachine]:
    """The machine for a device, with counters of its own."""
    return type("LifecycleMachine", (LifecycleMachine,), {"device": torch.device(device), "runs": 0, "steps": 0})


def run_settings(runs: int, **more) -> settings:
    return settings(
        max_examples=runs,
        stateful_step_count=STEPS,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        **more,
    )
