"""Alpha for one seed at a time: closed forms where the network is calm, and what each strategy does when it is not."""

from __future__ import annotations

import dataclasses
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kasmina_ext import (
    GRAFTING_STRATEGIES,
    GraftingConfig,
    GraftingContext,
    GraftingStrategyFactory,
    KasminaLayer,
    create_grafting_strategy,
)

NAMES = ["linear", "drift_controlled", "momentum", "adaptive", "stability"]
NAN = float("nan")


def at(epoch, alpha=0.0, **metrics):
    return GraftingContext(0, epoch, 100, alpha, metrics)


def run(strategy, epochs, metrics_of=lambda epoch: {}, **more):
    """Alphas, epoch by epoch, each fed back as the current one."""
    alpha, alphas = strategy.config.min_alpha, []
    for epoch in epochs:
        context = GraftingContext(3, epoch, 100, alpha, metrics_of(epoch), **more)
        alpha = strategy.compute_alpha(context)
        strategy.on_epoch_end(context)
        alphas.append(alpha)
    return alphas


def straight(epochs, config=None):
    """What time alone gives."""
    config = config or GraftingConfig()
    low, high = config.min_alpha, config.max_alpha
    return [low + (high - low) * min(1.0, epoch / config.ramp_duration) for epoch in epochs]


# ---- names, defaults, errors -----------------------------------------------------------------------------------------


def test_the_five_names():
    assert sorted(GRAFTING_STRATEGIES) == sorted(NAMES) == sorted(GraftingStrategyFactory.available())
    for name in NAMES:
        strategy = create_grafting_strategy(name, GraftingConfig(ramp_duration=7))
        assert type(strategy) is GRAFTING_STRATEGIES[name] and strategy.config.ramp_duration == 7
        assert type(GraftingStrategyFactory.create(name.upper(), {"ramp_duration": 3})) is type(strategy)
        assert type(GraftingStrategyFactory().create(name)) is type(strategy)
        assert create_grafting_strategy(name).config == GraftingConfig()


def test_the_table_of_names_is_a_plain_dict():
    assert isinstance(GRAFTING_STRATEGIES, dict)
    assert pickle.loads(pickle.dumps(GRAFTING_STRATEGIES)) == GRAFTING_STRATEGIES


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("rate", "aborts"), [(0.5, False), (0.51, True), (NAN, True), (math.inf, True), (None, False), (-1.0, False)]
)
@pytest.mark.parametrize("kind", [float, torch.tensor, np.float32])
def test_an_error_rate_that_aborts(name, rate, aborts, kind):
    strategy = create_grafting_strategy(name)
    found = strategy.should_abort(at(3, error_rate=rate if rate is None else kind(rate)))
    assert found is aborts and strategy.should_abort(at(3)) is False


@pytest.mark.parametrize("name", ["cosine", "", None, 3])
def test_an_unknown_name(name):
    with pytest.raises(ValueError, match=r"unknown grafting strategy .*known are linear, drift_controlled, momentum"):
        create_grafting_strategy(name, GraftingConfig())


def test_a_layer_has_the_factory():
    layer = KasminaLayer(torch.nn.Linear(2, 4), num_seeds=1)
    strategy = layer.grafting_factory.create("linear", GraftingConfig(ramp_duration=4))
    layer.set_alpha(0, strategy.compute_alpha(at(1)))
    assert layer.alpha.tolist() == [0.25]


def test_defaults_of_the_config():
    assert dataclasses.astuple(GraftingConfig()) == (50, 0.01, 10, 0.1, 5, 0.0, 1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ramp_duration": -1}, "ramp_duration must be at least 0, got -1"),
        ({"drift_threshold": NAN}, "drift_threshold"),
        ({"pause_duration": -2}, "pause_duration"),
        ({"stability_window": 0}, "stability_window must be at least 1"),
        ({"momentum_factor": 1.5}, r"momentum_factor must be in \[0, 1\], got 1.5"),
        ({"min_alpha": 0.6, "max_alpha": 0.5}, "min_alpha <= max_alpha"),
        ({"max_alpha": 1.1}, "max_alpha 1.1"),
        ({"min_alpha": -0.1}, "min_alpha -0.1"),
    ],
)
def test_a_config_that_makes_no_sense(arguments, message):
    with pytest.raises(ValueError, match=message):
        GraftingConfig(**arguments)


def test_context_has_no_weights_unless_given():
    context = GraftingContext(1, 2, 3, 0.5, None)
    assert context.metrics == {} and context.model_weights is None and context.blueprint_weights is None


# ---- what all of them do ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bounds", [(0.0, 1.0), (0.2, 0.7), (0.5, 0.5)])
def test_a_calm_network_gets_a_straight_ramp(name, bounds):
    config = GraftingConfig(ramp_duration=8, min_alpha=bounds[0], max_alpha=bounds[1])
    alphas = run(create_grafting_strategy(name, config), range(12))
    assert alphas == pytest.approx(straight(range(12), config), abs=1e-12)
    assert alphas[0] == bounds[0] and alphas[8:] == [bounds[1]] * 4
    steady = run(create_grafting_strategy(name, config), range(12), lambda epoch: {"loss": 0.5, "drift": 0.0})
    assert steady == pytest.approx(alphas, abs=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_no_ramp_at_all_is_over_at_once(name):
    strategy = create_grafting_strategy(name, GraftingConfig(ramp_duration=0, max_alpha=0.75))
    assert strategy.compute_alpha(at(0)) == 0.75


@pytest.mark.parametrize("name", NAMES)
def test_asking_twice_in_an_epoch_changes_nothing(name):
    once, twice = create_grafting_strategy(name), create_grafting_strategy(name)
    for epoch in range(20):
        metrics = {"loss": 1.0 / (1 + epoch), "accuracy": epoch / 20}
        alpha = once.compute_alpha(at(epoch, **metrics))
        assert twice.compute_alpha(at(epoch, **metrics)) == twice.compute_alpha(at(epoch, **metrics)) == alpha


@pytest.mark.parametrize("name", NAMES)
def test_reset_forgets_the_graft(name):
    strategy = create_grafting_strategy(name)
    run(strategy, range(30), lambda epoch: {"loss": (-1.0) ** epoch, "drift": epoch % 3, "accuracy": -epoch})
    strategy.reset()
    assert run(strategy, range(60)) == run(create_grafting_strategy(name), range(60))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("metrics", "expected"),
    [({}, False), ({"error_rate": 0.5}, False), ({"error_rate": 0.51}, True), ({"error_rate": 0.0}, False)],
)
def test_abort(name, metrics, expected):
    assert create_grafting_strategy(name).should_abort(at(3, **metrics)) is expected


values = st.floats(-10, 10) | st.sampled_from([NAN, math.inf, -math.inf, 0.0, 1e300])
metrics = st.dictionaries(
    st.sampled_from(["loss", "accuracy", "performance_delta", "stability_score", "drift", "error_rate"]), values
)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(NAMES),
    st.lists(st.tuples(st.integers(0, 5), metrics, st.floats(-1, 2)), max_size=30),
    st.integers(0, 20),
    st.integers(0, 5),
)
def test_alpha_stays_within_its_bounds_whatever_is_measured(name, epochs, duration, pause):
    config = GraftingConfig(duration, 0.01, pause, 0.3, 3, 0.1, 0.8)
    strategy, epoch = create_grafting_strategy(name, config), 0
    for passed, measured, current in epochs:
        epoch += passed
        context = GraftingContext(0, epoch, 50, current, measured)
        assert 0.1 <= strategy.compute_alpha(context) <= 0.8
        assert isinstance(strategy.should_abort(context), bool)
        strategy.on_epoch_end(context)


# ---- what each of them does ------------------------------------------------------------------------------------------


def test_linear_depends_on_the_epoch_alone():
    strategy = create_grafting_strategy("linear", GraftingConfig(ramp_duration=10))
    for epoch in (7, 2, 7, 30, 0):
        assert strategy.compute_alpha(at(epoch, 0.33, loss=NAN, drift=9.0)) == pytest.approx(min(1, epoch / 10))


@pytest.mark.parametrize("source", ["metric", "weights", "weights, told at the end of the epoch"])
def test_drift_stops_the_ramp_for_a_while_and_then_it_goes_on(source):
    config = GraftingConfig(ramp_duration=20, drift_threshold=0.05, pause_duration=4)
    strategy, weights, alpha, alphas = create_grafting_strategy("drift_controlled", config), torch.ones(50), 0.0, []
    for epoch in range(30):
        drifts = 0.06 if epoch == 6 else 0.04
        context = GraftingContext(0, epoch, 30, alpha, {})
        if source == "metric":
            context.metrics = {"drift": drifts}
        elif source == "weights":
            weights = weights * (1 + drifts)
            context.model_weights = {"a": weights[:20], "b": weights[20:]}
        alpha = strategy.compute_alpha(context)
        if source.startswith("weights,"):
            weights = weights * (1 + drifts)
            context.model_weights = [weights]
            strategy.on_epoch_end(context)
        alphas.append(alpha)
    begin = 7 if source.startswith("weights,") else 6  # then the drift of epoch 6 is known when alpha is already out
    end = 6 + 4
    expected = [min(epoch, max(begin - 1, epoch - (end - begin))) for epoch in range(30)]
    assert alphas == pytest.approx([min(1, e / 20) for e in expected], abs=1e-12)


def test_drift_that_is_not_a_number_or_of_other_weights_stops_too():
    strategy = create_grafting_strategy("drift_controlled")
    assert strategy.compute_alpha(at(10, 0.2)) == 0.2
    assert strategy.compute_alpha(at(11, 0.2, drift=NAN)) == 0.2
    strategy.reset()
    for epoch, shape in ((0, 3), (1, 4)):
        alpha = strategy.compute_alpha(GraftingContext(0, epoch, 9, 0.0, {}, torch.zeros(shape)))
    assert alpha == 0.0


def test_a_pause_holds_what_the_caller_has():
    strategy = create_grafting_strategy("drift_controlled", GraftingConfig(ramp_duration=10, pause_duration=2))
    assert strategy.compute_alpha(at(3, 0.25, drift=1.0)) == 0.25
    assert strategy.compute_alpha(at(4, 0.25)) == 0.25
    assert strategy.compute_alpha(at(5, 0.25)) == pytest.approx(0.35)


@pytest.mark.parametrize(
    "better", [lambda e: {"performance_delta": 0.1}, lambda e: {"accuracy": e}, lambda e: {"loss": -e}]
)
def test_momentum_gathers_pace_while_things_improve(better):
    config = GraftingConfig(ramp_duration=40, momentum_factor=0.25)
    alphas = run(create_grafting_strategy("momentum", config), range(20), better)
    velocity, ramped, expected = 0.0, 0.0, []
    for epoch in range(20):
        knows = epoch > 0 or "performance_delta" in better(0)
        velocity += 0.25 * (1 - velocity) if knows else 0
        ramped += (1 + velocity) if epoch else 0
        expected.append(min(1, ramped / 40))
    assert alphas == pytest.approx(expected, abs=1e-12)
    slow = run(create_grafting_strategy("momentum", config), range(20), lambda e: {"performance_delta": -0.1})
    assert slow[-1] < straight(range(20), config)[-1] < alphas[-1]
    assert slow == sorted(slow)


def test_stability_waits_for_steady_losses():
    config = GraftingConfig(ramp_duration=20, stability_window=3)
    losses = [1.0, 1.0, 3.0, 1.0, 1.0, 1.0, 1.0]
    alphas = run(create_grafting_strategy("stability", config), range(7), lambda e: {"loss": losses[e]})
    assert alphas == pytest.approx([0, 1 / 20, 1 / 20, 1 / 20, 1 / 20, 2 / 20, 3 / 20])
    scores = [0.9, 0.8, 0.79, NAN, 0.8]
    alphas = run(create_grafting_strategy("stability", config), range(5), lambda e: {"stability_score": scores[e]})
    assert alphas == pytest.approx([0, 1 / 20, 1 / 20, 1 / 20, 2 / 20])


def test_adaptive_heeds_drift_stability_and_momentum():
    config = GraftingConfig(ramp_duration=20, pause_duration=2, stability_window=2, momentum_factor=1.0)

    def measured(epoch):
        drift = {"drift": 1.0} if epoch == 2 else {}
        loss = {"loss": 5.0} if epoch == 6 else {"loss": 1.0}
        return {**drift, **loss, "performance_delta": 1.0 if epoch < 9 else -1.0}

    alphas = run(create_grafting_strategy("adaptive", config), range(12), measured)
    pace = [0, 2, 0, 0, 2, 2, 0, 0, 2, 0, 0, 0]  # paused in 2 and 3, unsteady in 6 and 7, getting worse from 9 on
    assert alphas == pytest.approx([sum(pace[: epoch + 1]) / 20 for epoch in range(12)])
