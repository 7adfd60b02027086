"""The states, the strict rules and the layer's gate, against the specification's table written out here."""

from __future__ import annotations

import copy
import math
import pickle
import time
from fractions import Fraction

import pytest
import torch

from kasmina_ext.lifecycle import (
    ExtendedLifecycle,
    LifecycleManager,
    StateTransition,
    TransitionContext,
    TransitionRules,
    Verdict,
)

NAMES = [
    "DORMANT",
    "GERMINATED",
    "TRAINING",
    "GRAFTING",
    "STABILIZATION",
    "EVALUATING",
    "FINE_TUNING",
    "FOSSILIZED",
    "CULLED",
    "CANCELLED",
    "ROLLED_BACK",
]
# from: (may go to, least epochs in the state)
TABLE = {
    0: ({1}, 0),
    1: ({2, 9}, 0),
    2: ({3, 8, 9}, 100),
    3: ({4, 10}, 50),
    4: ({5, 10}, 20),
    5: ({6, 8, 10}, 30),
    6: ({7, 8, 10}, 50),
    7: (set(), 0),
    8: (set(), 0),
    9: (set(), 0),
    10: (set(), 0),
}
# Metrics that satisfy every rule of an edge that has one.
GOOD = {
    (2, 3): {"reconstruction_loss": 0.01},
    (5, 6): {"performance_delta": 0.001, "stability_score": 0.8},
    (5, 8): {"performance_delta": -0.06},
    (6, 7): {"total_improvement": 0.01, "final_stability": 0.95},
}
NAN = float("nan")


def context(source, target, epochs=1000, metrics=None, errors=0, metadata=None):
    return TransitionContext(0, source, target, epochs, metrics or {}, errors, None, metadata or {})


def test_states_have_the_numbers_of_the_specification():
    assert [state.name for state in ExtendedLifecycle] == NAMES
    assert [int(state) for state in ExtendedLifecycle] == list(range(11))


@pytest.mark.parametrize(
    ("attribute", "members"),
    [("is_terminal", {7, 8, 9, 10}), ("is_active", {2, 3, 6}), ("requires_blueprint", {2, 3, 4, 5, 6})],
)
def test_properties_of_states(attribute, members):
    assert {int(state) for state in ExtendedLifecycle if getattr(state, attribute)} == members


@pytest.mark.parametrize("value", ["training", "TRAINING", 2, ExtendedLifecycle.TRAINING])
def test_parse_takes_names_numbers_and_members(value):
    assert ExtendedLifecycle.parse(value) is ExtendedLifecycle.TRAINING


@pytest.mark.parametrize("value", ["asleep", "", 11, -1, 2**70])
def test_parse_names_the_known_states(value):
    with pytest.raises(ValueError, match=r"unknown lifecycle state .*dormant \(0\).*rolled_back \(10\)"):
        ExtendedLifecycle.parse(value)


@pytest.mark.parametrize("value", [2.0, True, None, [2]])
def test_parse_refuses_what_is_no_number(value):
    with pytest.raises(TypeError, match="lifecycle state must be a name or a number"):
        ExtendedLifecycle.parse(value)


@pytest.mark.parametrize("source", range(11))
@pytest.mark.parametrize("target", range(11))
def test_every_pair_around_its_least_epochs(source, target):
    allowed, least = TABLE[source]
    for epochs in (0, least - 1, least, least + 1):
        needed = 0 if target == 10 else least
        expected = target in allowed and epochs >= needed
        metrics = GOOD.get((source, target))
        ok, message = StateTransition.validate_transition(source, target, context(source, target, epochs, metrics))
        assert ok is expected, (NAMES[source], NAMES[target], epochs, message)
        if not ok:
            assert NAMES[source] in message


def test_class_attributes_are_the_table():
    for source, (targets, least) in TABLE.items():
        state = ExtendedLifecycle(source)
        assert StateTransition.VALID_TRANSITIONS[state] == targets
        assert StateTransition.MIN_EPOCHS_IN_STATE.get(state, 0) == least


@pytest.mark.parametrize(
    ("edge", "metrics", "errors", "metadata", "expected"),
    [
        ((2, 3), {}, 0, {}, False),
        ((2, 3), {"reconstruction_loss": 0.01}, 0, {}, True),
        ((2, 3), {"reconstruction_loss": 0.0101}, 0, {}, False),
        ((2, 3), {"reconstruction_loss": 0.5}, 0, {"reconstruction_threshold": 0.5}, True),
        ((2, 3), {"reconstruction_loss": NAN}, 0, {}, False),
        ((5, 6), {}, 0, {}, False),
        ((5, 6), {"performance_delta": 0.0, "stability_score": 1.0}, 0, {}, False),
        ((5, 6), {"performance_delta": 0.1, "stability_score": 0.79}, 0, {}, False),
        ((5, 6), {"performance_delta": 0.1, "stability_score": 0.8}, 0, {}, True),
        ((5, 6), {"performance_delta": NAN, "stability_score": 0.9}, 0, {}, False),
        ((5, 6), {"performance_delta": 0.1, "stability_score": NAN}, 0, {}, False),
        ((5, 8), {}, 0, {}, False),
        ((5, 8), {"performance_delta": -0.05}, 0, {}, False),
        ((5, 8), {"performance_delta": -0.051}, 0, {}, True),
        ((5, 8), {"error_rate": 0.1}, 0, {}, False),
        ((5, 8), {"error_rate": 0.11}, 0, {}, True),
        ((5, 8), {}, 5, {}, False),
        ((5, 8), {}, 6, {}, True),
        ((5, 8), {"performance_delta": NAN, "error_rate": NAN}, 0, {}, False),
        ((6, 7), {}, 0, {}, False),
        ((6, 7), {"total_improvement": 0.0099, "final_stability": 1.0}, 0, {}, False),
        ((6, 7), {"total_improvement": 0.01, "final_stability": 0.949}, 0, {}, False),
        ((6, 7), {"total_improvement": 0.01, "final_stability": 0.95}, 0, {}, True),
        ((6, 8), {}, 0, {}, True),
        ((2, 8), {}, 0, {}, True),
    ],
)
def test_metric_rules(edge, metrics, errors, metadata, expected):
    ok, message = StateTransition.validate_transition(
        *edge, context(*edge, metrics=metrics, errors=errors, metadata=metadata)
    )
    assert ok is expected, message
    assert isinstance(message, str) and message


def test_context_fills_in_what_is_not_given():
    before = time.time()
    made = TransitionContext(3, "dormant", 1)
    assert before <= made.timestamp <= time.time()
    assert made.current_state is ExtendedLifecycle.DORMANT
    assert (made.epochs_in_state, made.performance_metrics, made.error_count, made.metadata) == (0, {}, 0, {})
    assert TransitionContext(3, 0, 1, 0, {}, 0, 12.5, {}).timestamp == 12.5
    assert TransitionContext(3, 0, 1).metadata is not made.metadata


# ---- the layer's gate --------------------------------------------------------------------------------


@pytest.mark.parametrize("source", range(11))
@pytest.mark.parametrize("target", range(11))
def test_gate_has_the_same_graph_and_one_limit(source, target):
    manager = LifecycleManager()
    legal = target in TABLE[source][0]
    assert manager.can_transition(source, target) is legal
    assert ((source, target) in manager.valid_transitions) is legal
    for epochs in (0, 4, 5):
        expected = legal and (target != 5 or epochs >= 5)
        assert manager.request_transition(context(source, target, epochs)) is expected


@pytest.mark.parametrize(
    ("edge", "metrics", "expected"),
    [
        ((2, 3), {"training_loss": 0.99}, True),
        ((2, 3), {"training_loss": 1.0}, False),
        ((2, 3), {"training_loss": NAN}, False),
        ((6, 7), {"accuracy": 0.9}, False),
        ((6, 7), {"accuracy": 0.901}, True),
        ((6, 7), {"accuracy": NAN}, False),
    ],
)
@pytest.mark.parametrize("where", ["metrics", "metadata"])
def test_gate_looks_at_metrics_that_are_given(edge, metrics, expected, where):
    made = context(*edge, epochs=0, **{where: metrics})
    assert LifecycleManager().request_transition(made) is expected


@pytest.mark.parametrize(
    ("source", "target", "epochs", "metric"),
    [
        (2, 3, 100, "reconstruction_loss"),
        (5, 6, 30, "performance_delta"),
        (5, 8, 30, "error_rate"),
        (6, 7, 50, "total_improvement"),
    ],
)
def test_a_metric_that_is_none_is_missing(source, target, epochs, metric):
    def judged(metrics, **metadata):
        context = TransitionContext(0, source, target, epochs, metrics, metadata=metadata)
        return StateTransition.validate_transition(source, target, context)

    assert judged({metric: None}, reconstruction_threshold=None) == judged({})
    assert judged({})[0] is False


def test_gate_belongs_to_the_user():
    manager = LifecycleManager()
    manager.valid_transitions.add((ExtendedLifecycle.CULLED, ExtendedLifecycle.DORMANT))
    manager.validators[ExtendedLifecycle.DORMANT] = lambda made: made.error_count == 0
    assert manager.request_transition(context(8, 0))
    assert not manager.request_transition(context(8, 0, errors=1))
    assert not LifecycleManager().can_transition(8, 0)


def test_gate_can_be_copied_and_pickled():
    manager = LifecycleManager()
    for clone in (copy.deepcopy(manager), pickle.loads(pickle.dumps(manager))):
        assert clone.valid_transitions == manager.valid_transitions
        assert not clone.request_transition(context(4, 5, epochs=4))


# ---- policy as data ----------------------------------------------------------------------------------


def rules_of(kind):
    """{(from, to): least epochs}, from the tables above."""
    edges = {(a, b): 0 if b == 10 else least for a, (targets, least) in TABLE.items() for b in targets}
    return {
        "strict": edges,
        "gate": {(a, b): 5 if b == 5 else 0 for a, b in edges},
        "any": {(a, b): 0 for a in range(11) for b in range(11)},
        "recycling": {(8, 0): 0, (9, 0): 0, (10, 0): 0},
    }[kind]


@pytest.mark.parametrize("kind", ["strict", "gate", "any", "recycling"])
def test_rules_are_the_tables(kind):
    rules, expected = getattr(TransitionRules, kind)(), rules_of(kind)
    assert rules.tensor.dtype == torch.int32 and rules.tensor.device.type == "cpu"
    assert rules.tensor.tolist() == [[expected.get((a, b), -1) for b in range(11)] for a in range(11)]
    for a in range(11):
        for b in range(11):
            assert rules.least_epochs(a, ExtendedLifecycle(b)) == expected.get((a, b))


def test_the_gate_asks_what_a_fresh_manager_asks():
    rules, manager = TransitionRules.gate(), LifecycleManager()
    for a in range(11):
        for b in range(11):
            for epochs in (0, 4, 5):
                least = rules.least_epochs(a, b)
                allowed = least is not None and epochs >= least
                assert manager.request_transition(context(a, b, epochs)) is allowed


@pytest.mark.parametrize("factor", [0, 0.004, 0.01, 0.1, 1 / 3, 0.7, 1, 2.5, 1e12])
def test_scaled_rules_round_up_and_keep_what_is_illegal(factor):
    scaled = TransitionRules.strict().scaled(factor)
    exact = Fraction(factor).limit_denominator(10**6)
    for (a, b), least in rules_of("strict").items():
        assert scaled.least_epochs(a, b) == min(2**31 - 1, math.ceil(least * exact))
    assert (scaled.tensor >= 0).equal(TransitionRules.strict().tensor >= 0)
    assert TransitionRules.strict().scaled(1) == TransitionRules.strict()


@pytest.mark.parametrize("factor", [-0.1, NAN, float("inf")])
def test_rules_cannot_be_scaled_by_anything(factor):
    with pytest.raises(ValueError, match="factor must be a finite number of at least 0"):
        TransitionRules.strict().scaled(factor)


@pytest.mark.parametrize("tensor", [torch.zeros(11, 10), torch.zeros(11, 11), torch.zeros(10, 11, dtype=torch.int32)])
def test_rules_of_another_shape_or_kind(tensor):
    with pytest.raises(ValueError, match=r"rules must be integers of shape \[11, 11\]"):
        TransitionRules(tensor)


def test_rules_are_values():
    mine = torch.full((11, 11), -1)
    mine[0, 7] = 3
    rules = TransitionRules(mine)
    mine[0, 7] = 9
    assert rules.least_epochs("dormant", "fossilized") == 3
    assert rules == TransitionRules(rules.tensor) != TransitionRules.any()
    assert hash(rules) == hash(TransitionRules(rules.tensor))
    assert repr(rules) == "TransitionRules(DORMANT -> FOSSILIZED: 3)"
    assert pickle.loads(pickle.dumps(rules)) == rules == copy.deepcopy(rules)
    assert TransitionRules(rules.tensor.tolist()) == rules


def test_rules_go_to_a_device_once(device):
    rules = TransitionRules.strict()
    there = rules.on(device)
    assert there.device.type == device.type and torch.equal(there.cpu(), rules.tensor)
    assert rules.on(device) is there


def test_verdicts_have_the_numbers_of_the_specification():
    assert [verdict.name for verdict in Verdict] == [
        "APPLIED",
        "SEED_OUT_OF_RANGE",
        "ILLEGAL_TRANSITION",
        "TOO_FEW_EPOCHS",
        "BLUEPRINT_OUT_OF_RANGE",
        "STRATEGY_OUT_OF_RANGE",
        "SUPERSEDED",
        "EPOCHS_OUT_OF_RANGE",
    ]
    assert all(verdict.message for verdict in Verdict) and list(map(int, Verdict)) == list(range(8))
