"""Policies of ones own, what the default one does when something goes wrong, and bad arguments."""

from __future__ import annotations

import copy
import functools
import io
import warnings

import numpy as np
import pytest
import torch
from growing import STATES, Classifier, Run
from torch.nn.utils import parametrize

from kasmina_ext import (
    GrowthController,
    KasminaLayer,
    TransitionRules,
    TritonChunkedKasminaLayer,
    default_policy,
)
from kasmina_ext.policy import STAY
from kasmina_ext.state_layout import StateVar

# ---- policies --------------------------------------------------------------------------------------------------------


def test_a_policy_of_ones_own():
    asked = []

    def wake_the_last(seeds):
        asked.append((seeds.tick, seeds.measured is not None))
        wanted = torch.full_like(seeds.lifecycle, STAY)
        wanted[-1] = torch.where(seeds.lifecycle[-1] == 0, 1, 2)
        wanted[0] = 7  # which the rules refuse
        return wanted

    run = Run(policy=wake_the_last)
    run.step(2)
    run.evaluate()
    assert asked == [(1, False), (2, False), (2, True)]
    assert run.states() == [0, 0, 0, 0, 0, 0, 2]
    assert [(event["from"], event["to"]) for event in run.events] == [
        ("DORMANT", "GERMINATED"),
        ("GERMINATED", "TRAINING"),
    ]
    assert {"epochs", "potential", "lives", "errors", "loss"} <= run.events[0].keys()


def test_stability_is_there_for_whoever_may_ask_for_it():
    """The default policy itself does not, but in evaluations: without it ticks decide and log alike."""
    seen, banks = [], []

    def watching(seeds):
        if seeds.measured is None:
            seen.append(seeds.stability.clone())
            banks.append(run.model.first.blueprint_weights[0].detach().clone())
        return default_policy(seeds)

    for policy in (functools.partial(default_policy), watching):
        run, plain = Run(policy=policy, stability=0.3), Run(stability=0.3)
        for one in (run, plain):
            one.step(12)
        results = run.evaluate(), plain.evaluate()
        assert results[0].loss == results[1].loss and run.states() == plain.states() and max(run.states()) > 5
        moves = [[(e["tick"], e["layer"], e["seed"], e["to"]) for e in one.events] for one in (run, plain)]
        assert moves[0] == moves[1]
        # A partial is the default policy to the log, with all the numbers that decide.
        assert policy is watching or repr(run.events) == repr(plain.events)
    assert len(seen) == 12 and torch.stack(seen[:3]).isnan().all() and not torch.stack(seen[3:]).isnan().any()
    assert 0 < seen[-1].min() < seen[-1].max() < 1
    for tick in range(4, 13):  # copies of the bank are taken in every second one
        now, then = banks[tick - 1], banks[tick // 2 * 2 - 3]
        shares = [(n - t).norm() / (n - 1).norm() for n, t in zip(now.view(4, 4), then.view(4, 4), strict=True)]
        expected = (1 - torch.stack(shares).double().nan_to_num()).clamp(min=0)  # 0 / 0: a neutral one that stays so
        torch.testing.assert_close(seen[tick - 1][:4], expected, rtol=1e-4, atol=1e-5)


def test_no_policy_exceeds_the_budget():
    def everybody(seeds):
        return torch.where(seeds.lifecycle == 0, 1, STAY)

    run = Run(policy=everybody, budget=3)
    potential = []
    run.step(1, lambda: potential.extend(torch.cat([layer.grad_telemetry for layer in run.model.layers])))
    assert run.alive() == 3
    run.control.rules = TransitionRules.any()
    run.control.policy = lambda seeds: torch.full_like(seeds.lifecycle, STATES.GRAFTING)
    run.step(1)
    assert run.alive() == 3 and run.states().count(STATES.GRAFTING) == 3


def test_scores_of_ones_own_and_random_ones():
    last = functools.partial(default_policy, score=lambda seeds: torch.arange(7, 0, -1).flip(0))
    run = Run(policy=last, budget=2)
    run.step(2)
    assert run.states() == [0, 0, 0, 0, 0, 1, 1]
    assert "reconstruction" not in run.events[0]  # a default policy by another score still logs what decides

    def chosen(seed):
        run = Run(policy=functools.partial(default_policy, score=lambda seeds: seeds.random()), budget=2, seed=seed)
        run.step(2)
        return run.states()

    picked = [chosen(seed) for seed in range(6)]
    assert picked == [chosen(seed) for seed in range(6)] and len(set(map(tuple, picked))) > 2
    assert all(sum(states) == 2 for states in picked)


@pytest.mark.parametrize(
    "wrong",
    [
        None,
        torch.zeros(6, dtype=torch.int32),
        torch.zeros(7),
        torch.zeros(7, dtype=torch.complex64),
        torch.ones(7, dtype=torch.bool),
    ],
    ids=["none", "short", "float", "complex", "mask"],
)
def test_a_policy_that_returns_nonsense(wrong):
    run = Run(policy=lambda seeds: wrong)
    with pytest.raises(TypeError, match=r"a policy must return integers \[7\]"):
        run.step(1)
    assert run.states() == [0] * 7


@pytest.mark.parametrize("state", [2**32 + 1, -(2**32) + 1, 2**63 - 1, 257])
def test_a_policy_that_returns_what_is_no_state(state):
    run = Run(policy=lambda seeds: torch.full((7,), state))
    run.step(1)
    assert run.states() == [0] * 7 and not run.events


def test_a_policy_may_return_any_integers():
    run = Run(policy=lambda seeds: torch.ones(7, dtype=torch.uint8))
    run.step(1)
    assert run.states() == [1] * 7


def test_what_has_not_learnt_to_reconstruct_is_not_grafted_and_given_up():
    run = Run()  # TRAINING lasts 2
    given = [torch.full((4,), 0.005), torch.full((3,), 0.02)]
    for _ in range(12):
        run.control.step(None, given)
        for layer in run.model.layers:
            layer.grad_telemetry += 1
    assert set(run.states()[:4]) == {STATES.EVALUATING}
    assert [event["seed"] for event in run.events if event["to"] == "CANCELLED"] == [0, 1, 2]
    assert all(e["reconstruction"] == pytest.approx(0.02) for e in run.events if e["to"] == "CANCELLED")
    with pytest.raises(ValueError, match=r"one tensor \[S\] for each layer"):
        run.control.step(None, given[:1])


# ---- trouble ---------------------------------------------------------------------------------------------------------


def test_a_blueprint_that_is_not_finite_is_rolled_back():
    run = Run(schedule=None)
    plain = copy.deepcopy(run.model)
    run.step(12)
    assert STATES.EVALUATING in run.states()
    with torch.no_grad():
        run.model.second.blueprint_weights[1, 5] = torch.nan  # seed 1, its shift
    run.control.step()
    assert run.states()[5] == STATES.ROLLED_BACK and run.alive() == 6
    assert [event["nonfinite"] for event in run.events if event["to"] == "ROLLED_BACK"] == [1]
    assert all(bank.isfinite().all() for bank in run.banks)
    assert all(value.isfinite().all() for state in run.optimizer.state.values() for value in state.values())
    for seed in (0, 2):
        run.model.second.state[StateVar.LIFECYCLE_STATE, seed] = 0
    run.model.first.state[StateVar.LIFECYCLE_STATE] = 0
    assert torch.equal(run.model(run.train[0]), plain(run.train[0]))


def test_optimizer_moments_begin_and_end_with_a_blueprint():
    run = Run(z=float("inf"), rest=0)
    run.step(20)
    moments = run.optimizer.state[run.banks[0]]["exp_avg"]
    assert (moments != 0).all()
    run.evaluate()
    assert (moments == 0).all()
    run.step(1)
    moments.fill_(3.0)
    run.control.ticks += run.control.ticks % 2
    run.step(2)
    assert STATES.GERMINATED in run.states()[:4] or STATES.TRAINING in run.states()[:4]
    assert (moments.abs() < 1).all()


def test_an_evaluating_seed_with_errors_is_culled_and_never_comes_back():
    run = Run(rest=0)
    run.step(12)
    assert run.states()[0] == STATES.EVALUATING
    run.model.first.state[StateVar.ERROR_COUNT, 0] = 6
    with torch.no_grad():  # it is worth a lot
        run.model.first.blueprint_weights[0, :4] = 1.0
    run.evaluate()
    assert run.states()[0] == STATES.CULLED
    run.step(10)
    assert run.states()[0] == STATES.DORMANT


def test_a_bank_that_cannot_be_written_is_said_at_once():
    model = Classifier()
    parametrize.register_parametrization(model.second, "blueprint_weights", torch.nn.Identity())
    with pytest.raises(ValueError, match="layer 'second' cannot grow: blueprint_weights is parametrized"):
        GrowthController(model)
    run = Run()
    run.step(3)
    parametrize.register_parametrization(run.model.first, "blueprint_weights", torch.nn.Identity())
    before = [layer.state.clone() for layer in run.model.layers]
    for call in (run.control.step, run.evaluate):
        with pytest.raises(ValueError, match="layer 'first' cannot grow"):
            call()
    assert run.control.ticks == 3
    assert all(torch.equal(layer.state, state) for layer, state in zip(run.model.layers, before, strict=True))


def test_a_warning_where_a_share_is_less_than_a_seed():
    model = Classifier(seeds=(2, 2))
    with pytest.warns(UserWarning, match="nothing can germinate: a budget of 0.1 is none of 4 seeds") as seen:
        assert GrowthController(model).budget == 0
    assert len(seen) == 1 and seen[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for budget in (0, 1, 0.25):
            assert GrowthController(model, budget=budget).budget == min(1, round(4 * budget))
        assert GrowthController(model, budget=0.1, budget_in="parameters").budget > 0


def test_a_warning_where_two_controllers_drive_a_layer():
    model = Classifier()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first, apart = GrowthController(model.first, budget=1), GrowthController(model.second, budget=1)
        GrowthController(Classifier())
    with pytest.warns(UserWarning, match="layer 'second' is driven by another controller") as seen:
        second = GrowthController({"second": model.second}, budget=1)
    assert len(seen) == 1 and seen[0].filename == __file__
    with pytest.warns(UserWarning, match=r"layer 'first' \(and 1 more\) is driven by another controller") as seen:
        both = GrowthController(model)
    assert len(seen) == 1
    del first, second, apart, both
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert GrowthController(model).names == ["first", "second"]


# ---- settings --------------------------------------------------------------------------------------------------------


def test_numbers_from_numpy_become_pythons():
    model = Classifier()
    control = GrowthController(
        model, budget=np.int64(3), tick_every=np.int32(2), wave=np.float32(0.5), until=np.int64(4), z=np.float64(2)
    )
    assert control.budget == 3
    saved = io.BytesIO()
    torch.save(control.state_dict(), saved)
    saved.seek(0)
    config = torch.load(saved, weights_only=True)["config"]
    assert (config["budget"], config["tick_every"], config["wave"], config["until"], config["z"]) == (3, 2, 0.5, 4, 2.0)
    control.budget = np.float32(0.5)
    assert control.budget == 4  # round(3.5)
    control.budget = np.uint8(2)
    assert control.budget == 2


@pytest.mark.parametrize(("features", "seeds", "owning", "owned"), [(64, 1000, 64, 64), (10, 4, 4, 8), (8, 4, 4, 8)])
def test_a_budget_counts_what_there_is(features, seeds, owning, owned):
    layer = TritonChunkedKasminaLayer(torch.nn.Linear(8, features), seeds)
    control = GrowthController(layer, budget=1.0)
    assert control.budget == owning
    del control
    assert GrowthController(layer, budget=1.0, budget_in="parameters").budget == owned
    affine = KasminaLayer(torch.nn.Linear(8, features), num_seeds=seeds, strategy="affine")
    assert GrowthController(affine, budget=0.5, budget_in="parameters").budget == features


def test_seeds_without_features_never_germinate():
    layer = TritonChunkedKasminaLayer(torch.nn.Linear(8, 6), 20)
    policy = functools.partial(default_policy, score=lambda seeds: seeds.random())
    control = GrowthController(layer, budget=1.0, wave=1.0, tick_every=1, watch=1, scale=0.0, policy=policy)
    control.step()
    assert layer.lifecycle_states.tolist() == [1] * 6 + [0] * 14


def test_bad_arguments():
    model = Classifier()
    with pytest.raises(TypeError, match="no setting 'buget'"):
        GrowthController(model, buget=3)
    with pytest.raises(ValueError, match="no KasminaLayer"):
        GrowthController(torch.nn.Linear(2, 2))
    for settings, message in (
        ({"budget": 1.5}, "budget"),
        ({"budget": -1}, "budget"),
        ({"budget": True}, "budget"),
        ({"budget_in": "euros"}, "budget_in"),
        ({"tick_every": 0}, "tick_every"),
        ({"wave": 0.0}, "wave"),
        ({"group": 2.0}, "group"),
        ({"exact": -1}, "exact"),
        ({"z": float("nan")}, "z must"),
        ({"z": "1"}, "z must"),
        ({"scale": -1.0}, "factor"),
        ({"until": "x"}, "until"),
        ({"until": 2.0}, "until"),
        ({"stability": float("nan")}, "stability must"),
        ({"improvement": None}, "improvement must"),
        ({"watch": 2.5}, "watch"),
        ({"budget": "all"}, "budget"),
        ({"budget": float("nan")}, "budget"),
        ({"budget": np.float32(1.5)}, "budget"),
    ):
        with pytest.raises(ValueError, match=message):
            GrowthController(model, **settings)
    for settings in ({"rules": torch.zeros(11, 11, dtype=torch.int32)}, {"rules": "strict"}, {"seed": 0.5}):
        with pytest.raises(TypeError, match="rules must be TransitionRules|seed must be an integer"):
            GrowthController(model, **settings)
    run = Run()
    with pytest.raises(ValueError, match="at least 2 batches"):
        run.control.evaluate(run.held[:1], run.model.loss)
    with pytest.raises(ValueError, match="budget"):
        run.control.budget = 1.1
