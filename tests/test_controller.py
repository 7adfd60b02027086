"""The controller: lives of seeds from germination to their verdict, and the budget."""

from __future__ import annotations

import copy

import pytest
import torch
from growing import STATES, Run

# ---- lives -----------------------------------------------------------------------------------------------------------


def test_seeds_live_their_whole_life_and_the_network_gets_better():
    run = Run()
    before = run.evaluate()
    assert (before.alive, before.credit.gain) == (0, 0.0) and before.loss == before.loss_without
    run.step(60)
    run.evaluate()
    run.step(20)
    run.optimizer.param_groups[0]["lr"] = 1e-4
    run.step(20)
    last = run.evaluate()
    assert last.loss < before.loss - 0.05 and last.loss_without == pytest.approx(before.loss)
    assert last.fossilized > 0 and STATES.FOSSILIZED in run.states()
    assert f"{last.fossilized} fossilized" in str(last) and "they differ by" in str(last)
    for layer in run.model.layers:
        history = [layer.extended_state.get_transition_history(s)[::-1] for s in range(layer.num_seeds)]
        for life in history:
            assert all(a == b for (_, a), (b, _) in zip(life, life[1:], strict=False))
            for source, target in life:
                assert run.control.rules.least_epochs(source, target) is not None


def test_seeds_germinate_by_their_potential():
    run = Run(budget=3)
    run.step(1)
    seen = torch.cat([layer.grad_telemetry for layer in run.model.layers])
    affine = torch.arange(7) >= 4
    expected = torch.where(affine, seen[:, :2].sum(1), seen[:, 0])
    run.step(1)
    seen = torch.cat([layer.grad_telemetry for layer in run.model.layers])
    expected = torch.where(affine, seen[:, :2].sum(1), seen[:, 0]) / seen[:, 2]
    assert {i for i, state in enumerate(run.states()) if state} == set(expected.topk(3).indices.tolist())
    assert [event["potential"] for event in run.events] == pytest.approx(
        [expected[i].item() for i, state in enumerate(run.states()) if state]
    )


def test_a_wave_goes_by_the_gradients_since_the_one_before():
    run = Run(budget=2, wave=0.5)
    run.step(2)
    first = torch.cat([layer.grad_telemetry for layer in run.model.layers])
    telemetry = [layer.telemetry.clone() for layer in run.model.layers]
    run.step(2)
    since = torch.cat([layer.grad_telemetry for layer in run.model.layers]) - first
    event = run.events[-1] if run.events[-1]["to"] == "GERMINATED" else run.events[-2]
    seed = event["seed"] + (4 if event["layer"] == "second" else 0)
    total = since[seed, :2].sum() if seed >= 4 else since[seed, 0]
    assert event["tick"] == 4 and event["potential"] == pytest.approx((total / 2).item())
    # The user's telemetry is only read.
    for layer, before in zip(run.model.layers, telemetry, strict=True):
        assert (layer.telemetry[:, 3] == before[:, 3] + 2).all() and (layer.grad_telemetry[:, 2] == 4).all()


@pytest.mark.parametrize("schedule", [None, "cosine"])
def test_growth_begins_without_a_jump(schedule):
    run = Run(schedule=schedule)
    plain = copy.deepcopy(run.model)
    run.step(2)
    assert run.alive() == 7
    x = run.train[0]
    assert torch.equal(run.model(x), plain(x))
    while STATES.GRAFTING not in run.states():
        run.step()
    assert torch.equal(run.model(x), plain(x))


def test_alpha_ramps_over_the_scaled_time_of_grafting():
    run = Run(scale=0.1)  # GRAFTING lasts 5
    alphas = []
    run.step(22, lambda: alphas.append((run.states()[0], run.model.first.alpha[0].item())))
    begun = next(i for i, (state, _) in enumerate(alphas) if state == STATES.GRAFTING)
    assert [alpha for _, alpha in alphas[begun : begun + 6]] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert [state for state, _ in alphas[begun : begun + 6]] == [STATES.GRAFTING] * 5 + [STATES.STABILIZATION]


def test_nothing_germinates_without_telemetry_after_until_or_without_a_gradient():
    for settings in ({"until": 0}, {"budget": 0}, {"budget": 0.0}):
        run = Run(**settings)
        run.step(6)
        assert set(run.states()) == {0} and not run.events
    run = Run()
    for layer in run.model.layers:
        layer.telemetry_enabled = False
    run.step(6)
    assert set(run.states()) == {0}


def test_all_culled_it_ends_where_it_began_bit_for_bit():
    run = Run(z=float("inf"), lives=1)
    plain = copy.deepcopy(run.model)
    run.step(30)
    assert run.alive() == 7 and not torch.equal(run.model(run.train[0]), plain(run.train[0]))
    evaluation = run.evaluate()
    assert (evaluation.culled, evaluation.alive) == (7, 0) and set(run.states()) == {STATES.CULLED}
    assert torch.equal(run.model(run.train[0]), plain(run.train[0]))
    run.step(6)  # recycled, and with one life only for good
    assert set(run.states()) == {STATES.DORMANT}
    assert torch.equal(run.model(run.train[0]), plain(run.train[0]))


def test_a_culled_seed_rests_and_lives_again_twice_at_most():
    run = Run(z=float("inf"), rest=4, lives=2)
    for _ in range(4):
        run.step(20)
        run.evaluate()
    born = [event for event in run.events if event["to"] == "GERMINATED"]
    culled = [event for event in run.events if event["to"] == "CULLED"]
    slept = [event for event in run.events if event["to"] == "DORMANT"]
    assert len(born) == len(culled) == len(slept) == 14
    assert {event["tick"] for event in slept} == {event["tick"] + 4 for event in culled}
    assert {event["lives"] for event in born} == {0, 1}


def test_verdicts_follow_the_measurements():
    run = Run()
    run.step(40)
    run.evaluate()
    judged = {(event["layer"], event["seed"]): event for event in run.events if "z" in event}
    assert judged
    for event in judged.values():
        if event["to"] == "FINE_TUNING":
            assert event["cost"] > event["z"] * event["error"] and event["stability"] >= 0.8
        else:
            assert event["to"] == "CULLED" and event["group_cost"] <= event["z"] * event["group_error"]
    stays = [i for i, state in enumerate(run.states()) if state == STATES.EVALUATING]
    assert all((("second", i - 4) if i >= 4 else ("first", i)) not in judged for i in stays)


# ---- budget ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [1, 3, 0.5, 1.0])
@pytest.mark.parametrize("wave", [0.3, 1.0])
def test_the_budget_is_never_exceeded(budget, wave):
    run = Run(budget=budget, wave=wave, z=2.0, rest=0)
    limit = budget if isinstance(budget, int) else round(budget * 7)
    assert run.control.budget == limit
    peak = []
    for _ in range(4):
        run.step(12, lambda: peak.append(run.alive()))
        run.evaluate()
        peak.append(run.alive())
    assert max(peak) == limit


def test_a_budget_of_parameters():
    run = Run(budget=20, budget_in="parameters")  # seeds of 4, and of 4 twice
    peak = []
    run.step(30, lambda: peak.append(run.states()))
    sizes = [4] * 4 + [8] * 3
    spent = [sum(size for size, state in zip(sizes, states, strict=True) if state) for states in peak]
    assert 12 < max(spent) <= 20
    run.control.budget = 0.5
    assert run.control.budget == 20
    run.control.budget = 1.0
    assert run.control.budget == 40


def test_a_smaller_budget_is_met_by_the_next_evaluation():
    run = Run(scale=0.04, watch=4)
    run.step(8, lambda: None)
    states = run.states()
    assert run.alive() == 7 and STATES.TRAINING in states
    run.step(3)
    run.control.budget = 2
    run.step(2)
    assert run.alive() == 7  # only a measured comparison removes
    while STATES.TRAINING in run.states():
        run.step()
    run.evaluate()
    assert run.alive() == 2
    gone = [event for event in run.events if event["to"] in ("ROLLED_BACK", "CULLED")]
    assert len(gone) == 5 and all("group_cost" in event for event in gone)
