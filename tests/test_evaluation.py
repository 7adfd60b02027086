"""Evaluations: losses of any sign, losses that are not finite and whose fault that is, and budgets that shrink."""

from __future__ import annotations

import copy
import math

import growing
import pytest
import torch
from growing import STATES, Classifier, Run, graft
from torch import nn

from kasmina_ext import GrowthController, KasminaLayer
from kasmina_ext.evaluation import share_removed
from kasmina_ext.policy import STAY, youngest
from kasmina_ext.ranks import Ranks
from kasmina_ext.state_layout import StateVar


def judged(model, data, loss=None, state=STATES.EVALUATING, **settings):
    """An evaluation of all seeds in ``state``; the controller's settings let the rules and stability pass."""
    for layer in model.layers:
        if state is not None:
            graft(layer, state)
    control = GrowthController(model, **{"budget": 1.0, "scale": 0.0, "stability": 0.0, "points": 1} | settings)
    return control, control.evaluate(data, loss or model.loss)


def states(model):
    return torch.cat([layer.lifecycle_states for layer in model.layers]).tolist()


def culled_by_hand(model, seeds):
    """A copy in which the seeds (numbered through) were culled before anybody judged."""
    twin = copy.deepcopy(model)
    for seed in seeds:
        layer = twin.layers[seed > 3]
        layer.state[StateVar.LIFECYCLE_STATE, seed - 4 * (seed > 3)] = int(STATES.CULLED)
    return twin


def judged_without(model, data, seeds):
    """States and loss of the others when the seeds are not there: what must come out of an evaluation with them."""
    for layer in model.layers:
        graft(layer, STATES.EVALUATING)
    twin = culled_by_hand(model, seeds)
    _, evaluation = judged(twin, data, state=None)
    return states(twin), evaluation


@pytest.fixture
def model():
    return Classifier().grown(0.6)


# ---- losses below zero -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "without", "expected"),
    [
        (0.5, 1.0, 0.5),
        (-9.5, -9.0, 0.5 / 9),
        (-9.0, -9.5, -0.5 / 9.5),
        (-1.0, 1.0, 2.0),
        (2.0, 1.0, -1.0),
        (0.0, 0.0, 0.0),
        (-1.0, 0.0, math.inf),
        (1.0, 0.0, -math.inf),
    ],
)
def test_the_share_that_seeds_take_away(loss, without, expected):
    assert share_removed(loss, without) == pytest.approx(expected)


@pytest.mark.parametrize("shift", [0.0, 10.0])
def test_seeds_fossilize_under_a_loss_below_zero_as_under_any(shift):
    run = Run(improvement=1e-3)
    run.step(60)
    run.evaluate()
    run.step(20)
    run.optimizer.param_groups[0]["lr"] = 1e-4
    run.step(20)
    last = run.control.evaluate(run.held, lambda batch: run.model.loss(batch) - shift)
    assert (last.loss < 0) == (shift > 0) and last.fossilized > 0
    improvements = {event["improvement"] for event in run.events if event["to"] == "FOSSILIZED"}
    assert improvements == {(last.loss_without - last.loss) / abs(last.loss_without)}


# ---- losses that are not finite whatever the seeds -------------------------------------------------------------------


def spoilt(batch, rows=slice(None)):
    x, y = batch
    x = x.clone()
    x[rows] = torch.nan
    return x, y


def test_batches_that_are_not_finite_without_seeds_are_left_out(model):
    data, twin = growing.batches(6), copy.deepcopy(model)
    _, clean = judged(twin, data)
    _, found = judged(model, [spoilt(data[0]), *data, spoilt(data[1])])
    assert (found.left_out, clean.left_out) == (40, 0) and found.judged
    assert states(model) == states(twin) and 0 < clean.culled
    assert (found.loss, found.loss_before, found.loss_without) == (clean.loss, clean.loss_before, clean.loss_without)
    assert torch.equal(torch.cat(found.credit.mean), torch.cat(clean.credit.mean))
    assert "40 losses left out" in str(found) and "left out" not in str(clean)


def test_samples_that_are_not_finite_are_left_out_of_their_batch(model):
    data, twin = growing.batches(6), copy.deepcopy(model)
    some = [spoilt(batch, slice(3, 5)) for batch in data]
    kept = [(torch.arange(20) < 3) | (torch.arange(20) >= 5)] * 6
    _, clean = judged(twin, [(x[rows], y[rows]) for (x, y), rows in zip(data, kept, strict=True)], points=0)
    _, found = judged(model, some, points=0)
    assert found.left_out == 12
    assert (found.loss_before, found.loss_without) == pytest.approx((clean.loss_before, clean.loss_without), rel=1e-6)
    # Every batch's derivative is spoilt: what is measured one by one decides.
    assert found.culled + found.advanced > 3 and found.loss <= found.loss_before


def test_where_no_loss_is_finite_nothing_is_judged(model):
    control, found = judged(model, [spoilt(batch) for batch in growing.batches(3)])
    assert not found.judged and math.isnan(found.loss) and found.left_out == 60 and found.credit is None
    assert str(found).startswith("nothing could be judged: none of 60 losses is finite without seeds; 0 advanced")
    assert states(model) == [STATES.EVALUATING] * 7
    assert control.evaluate(growing.batches(3), model.loss).judged


def test_a_fossil_at_fault_cannot_be_culled_and_nothing_is_judged(model):
    for layer in model.layers:
        graft(layer, STATES.EVALUATING)
    model.first.state[StateVar.LIFECYCLE_STATE, 0] = int(STATES.FOSSILIZED)
    with torch.no_grad():
        model.first.blueprint_weights[0, :4] = torch.nan
    _, found = judged(model, growing.batches(3), state=None)
    assert not found.judged and found.left_out == 60
    assert states(model) == [STATES.FOSSILIZED] + [STATES.EVALUATING] * 6


# ---- losses that are not finite because of a seed --------------------------------------------------------------------


@pytest.mark.parametrize("at_fault", [[0], [2], [5], [1, 3], [0, 4, 6], list(range(7))], ids=str)
@pytest.mark.parametrize("weight", [3e38, torch.inf, torch.nan], ids=str)
def test_a_seed_with_which_the_loss_is_not_finite_goes_and_the_others_are_judged(model, at_fault, weight):
    data = growing.batches(6)
    with torch.no_grad():
        for seed in at_fault:
            layer, seed = model.layers[seed > 3], seed - 4 * (seed > 3)
            layer.blueprint_weights[:, 4 * seed : 4 * seed + 4] = weight
    expected, without = judged_without(model, data, at_fault)
    control, found = judged(model, data)
    got = states(model)
    # A blueprint that is not finite is rolled back; one that only makes the loss so is culled.
    end = STATES.CULLED if weight == 3e38 else STATES.ROLLED_BACK
    assert [got[seed] for seed in at_fault] == [end] * len(at_fault)
    others = [seed for seed in range(7) if seed not in at_fault]
    assert [got[seed] for seed in others] == [expected[seed] for seed in others]
    assert found.loss == pytest.approx(without.loss) and not math.isfinite(found.loss_before)
    assert found.judged and found.left_out == 0


@pytest.mark.parametrize("state", [STATES.GRAFTING, STATES.STABILIZATION, STATES.EVALUATING, STATES.FINE_TUNING])
def test_whatever_their_state(model, state):
    with torch.no_grad():
        model.first.blueprint_weights[0, :4] = 3e38
    for layer in model.layers:
        graft(layer, state)
    data, events = growing.batches(4), []
    with_it = culled_by_hand(model, range(1, 7))
    harmed = [not growing.loss_by_hand(with_it, [batch]).isfinite().all() for batch in data]
    # The rules let nobody go from EVALUATING or FINE_TUNING to CULLED before their time: rolled back, then.
    judged(model, data, state=state, scale=1000.0, z=-math.inf, log=events.append)
    assert states(model) == [STATES.ROLLED_BACK] + [state] * 6
    [event] = [event for event in events if event["to"] == "ROLLED_BACK"]
    assert event["error_rate"] == sum(harmed) / 4 > 0


def test_of_two_that_are_at_fault_together_the_younger_goes():
    model = Classifier()
    for layer in model.layers:
        graft(layer, STATES.DORMANT)
    with torch.no_grad():
        model.first.blueprint_weights[0] = 1e25
        model.second.blueprint_weights[0] = 1e25  # each alone is finite
    for older, younger in ((0, 1), (1, 0)):
        for layer, state in zip(
            (model.layers[older], model.layers[younger]), (STATES.FINE_TUNING, STATES.GRAFTING), strict=True
        ):
            graft(layer, STATES.DORMANT)
            layer.extended_state.update_state(0, {"lifecycle": state, "epochs": 100})
        control, found = judged(model, growing.batches(3), state=None, z=-math.inf)
        del control
        assert model.layers[older].lifecycle_states[0] == STATES.FINE_TUNING
        assert model.layers[younger].lifecycle_states[0] == STATES.ROLLED_BACK
        assert math.isfinite(found.loss) and not math.isfinite(found.loss_before)


def test_nothing_is_touched_when_somebody_is_at_fault(model):
    with torch.no_grad():
        model.first.blueprint_weights[0, :4] = torch.inf
        model.second.blueprint_weights[:, :4] = 3e38
    for layer in model.layers:
        graft(layer, STATES.EVALUATING)
    control = GrowthController(model, points=1, policy=lambda seeds: torch.full_like(seeds.lifecycle, STAY))
    data = growing.batches(3)
    before = growing.snapshot(model)
    assert not math.isfinite(control.evaluate(data, model.loss).loss_before)
    changed = growing.same(before, growing.snapshot(model))
    # The requests, all of nobody, go through the operator, which counts as a write.
    assert not {name for name in changed if not name.endswith(("state.version", "history.version", "count.version"))}


# ---- a budget that has shrunk ----------------------------------------------------------------------------------------


def young(count=16, alive=10, state=STATES.GERMINATED):
    layer = KasminaLayer(nn.Linear(8, 4 * count), num_seeds=count, num_blueprints=1, strategy="multiplicative")
    layer.extended_state.update_state(list(range(alive)), {"lifecycle": state, "blueprint": 0})
    return layer


@pytest.mark.parametrize("budget", [9, 6, 0])
def test_of_those_that_wait_the_youngest_go_and_no_more(budget):
    layer = young()
    layer.extended_state.update_state([2, 3, 7], {"lifecycle": STATES.TRAINING})
    layer.extended_state.update_state(range(10), {"epochs": [4, 4, 0, 1, 2, 4, 4, 0, 9, 4]})
    layer.grad_telemetry[:, 0] = torch.tensor([5.0, 3.0, 1.0, 1.0, 1.0, 4.0, 6.0, 2.0, 1.0, 2.0] + [0.0] * 6)
    layer.grad_telemetry[:, 2] = 1
    control = GrowthController(layer, budget=10, scale=0.0)
    control._watched[0].zero_()
    control.budget = budget
    data = list(torch.randn(4, 8, 8))
    found = control.evaluate(data, lambda x: layer(x).square().mean(1))
    # GERMINATED of 2 ticks, of 4 by potential, of 9; TRAINING of none by potential, of 1.
    order = [4, 9, 1, 5, 0, 6, 8, 2, 7, 3]
    gone = layer.extended_state.get_seeds_in_state("cancelled").tolist()
    assert sorted(gone) == sorted(order[: 10 - budget]) and found.alive == budget


@pytest.mark.parametrize("budget", [8, 7, 3, 0])
def test_of_those_that_may_not_be_judged_yet_only_the_surplus_goes(budget):
    """Their removal costs nothing: they are neutral."""
    layer = young(alive=8, state=STATES.GRAFTING)
    control = GrowthController(layer, budget=8, points=0)
    control.budget = budget
    found = control.evaluate(list(torch.randn(4, 8, 8)), lambda x: layer(x).square().mean(1))
    assert found.alive == budget and layer.extended_state.get_state_summary()["ROLLED_BACK"] == 8 - budget


def test_those_that_wait_stay_where_enough_are_culled_anyway():
    layer = young()
    layer.extended_state.update_state(range(5), {"lifecycle": STATES.EVALUATING, "epochs": 100})
    control = GrowthController(layer, budget=10, points=0)
    control.budget = 6
    found = control.evaluate(list(torch.randn(4, 8, 8)), lambda x: layer(x).square().mean(1))
    assert found.culled == 5 and found.alive == 5 and layer.lifecycle_states[5:10].tolist() == [2] * 5


def test_no_seed_goes_that_is_not_needed_whatever_the_prices():
    generator = torch.Generator().manual_seed(3)
    run = Run()
    seeds = run.control._seeds(Ranks(False), germinates=False, stability=True)
    for _ in range(300):
        price = torch.randint(0, 9, (7,), generator=generator)
        among = torch.rand(7, generator=generator) < 0.7
        object.__setattr__(seeds, "price", price)
        object.__setattr__(seeds, "epochs", torch.randint(0, 3, (7,), generator=generator))
        due = int(torch.randint(-3, 25, (), generator=generator))
        chosen = youngest(seeds, among, due)
        assert not (chosen & ~among).any()
        freed = int(price[chosen].sum())
        assert freed >= min(due, int(price[among].sum()))
        assert all(freed - int(price[one]) < due for one in chosen.nonzero().flatten())
