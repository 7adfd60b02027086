"""The states, the strict rules and the layer's gate, against the specification's table written out here."""

from __future__ import annotations

import copy
import pickle
import time

import pytest

from kasmina_ext.lifecycle import (
    ExtendedLifecycle,
    LifecycleManager,
    StateTransition,
    TransitionContext,
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
