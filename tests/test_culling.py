"""The search for expendable seeds: proposals, measured comparisons, undoing, and what a smaller budget forces."""

from __future__ import annotations

import growing
import pytest
import torch
from growing import Classifier, same, snapshot
from torch import Tensor

from kasmina_ext.credit import removal_cost
from kasmina_ext.culling import Expendable, find_at_fault, find_expendable
from kasmina_ext.measure import Measurement


def search(layers, data, loss, *, candidates=None, **how) -> Expendable:
    with Measurement(layers, data, loss) as measurement:
        alive = torch.ones_like(measurement.alpha, dtype=torch.bool)
        settings = {"z": 1.0, "share": 0.05, "exact": 8, "prices": torch.ones_like(alive, dtype=torch.long)} | how
        return find_expendable(measurement, alive, alive if candidates is None else candidates, **settings)


class Shifts:
    """Seeds of one feature each, whose removal changes the loss by known amounts that add up.

    Sample ``n`` loses ``sum_s |y_ns - t_ns|^2 / 2`` with ``y = x + w``: without seed s it loses ``w_s (t - x)_ns - w_s^2 / 2``
    more.
    """

    def __init__(self, cost: Tensor, spread: Tensor, samples: int = 60) -> None:
        """``cost [S]`` is what each removal costs on average, ``spread [S]`` its standard deviation over the samples."""
        seeds = len(cost)
        noise = torch.randn(samples, seeds, dtype=torch.float64)
        noise = (noise - noise.mean(0)) / noise.std(0)
        weights = torch.full((seeds,), 0.1, dtype=torch.float64)
        self.x = torch.randn(samples, seeds, dtype=torch.float64)
        self.t = self.x + (cost + spread * noise) / weights + weights / 2
        self.cost, self.layer = cost, growing.shifts(seeds, seeds, weights)
        self.data = list(zip(self.x.split(10), self.t.split(10), strict=True))

    def loss(self, batch):
        return (self.layer(batch[0]) - batch[1]).square().sum(1) / 2

    def search(self, **how) -> Expendable:
        return search(self.layer, self.data, self.loss, **how)


def test_what_does_not_hurt_goes_and_what_is_missed_stays():
    cost = torch.tensor([0.5, -0.2, 0.3, 0.0, 0.01, 0.4, -0.1, 0.02]).double()
    shifts = Shifts(cost, torch.full((8,), 0.5).double())  # standard error 0.5 / sqrt(60) = 0.065
    found = shifts.search(exact=8)
    assert found.removed.tolist() == [False, True, False, True, True, False, True, True]
    torch.testing.assert_close(found.cost, cost, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.error, torch.full((8,), 0.5 / 60**0.5).double(), rtol=1e-4, atol=0)
    assert found.group_cost.isnan().tolist() == (~found.removed).tolist()
    before = (shifts.x + 0.1 - shifts.t).square().sum(1) / 2
    assert found.losses.mean().item() == pytest.approx(before.mean().item() + cost[found.removed].sum().item())
    assert shifts.search(z=10.0).removed.all() and not shifts.search(z=-10.0).removed[cost > 0].any()
    assert shifts.search(z=float("inf")).removed.all()


def test_a_removal_without_any_effect_never_hurts():
    shifts = Shifts(torch.full((3,), 0.5).double(), torch.ones(3).double())
    with torch.no_grad():
        shifts.layer.blueprint_weights[0, 1] = 0.0
    for z in (0.0, 1.0, float("inf")):
        assert shifts.search(z=z).removed[1]


def test_only_candidates_go():
    shifts = Shifts(torch.full((4,), -1.0).double(), torch.ones(4).double())
    candidates = torch.tensor([True, False, True, False])
    assert torch.equal(shifts.search(candidates=candidates).removed, candidates)
    assert not shifts.search(candidates=candidates & False).removed.any()


def test_groups_are_at_most_the_share_of_what_is_alive_and_halved_when_they_hurt():
    cost = torch.cat((torch.full((30,), -0.1), torch.full((10,), 1.0))).double()
    shifts = Shifts(cost, torch.full((40,), 0.1).double())
    sizes = []
    original = Measurement.losses

    def counting(self, alpha):
        sizes.append(int((alpha == 0).sum()))
        return original(self, alpha)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Measurement, "losses", counting)
        found = shifts.search(exact=0, share=0.2)
    assert torch.equal(found.removed, cost < 0)
    # 8 of 40, 6 of 32, 5 of 26, 4 of 21, 3 of 17, 2 of 14 and of 12: then 20 % of 10 is 2, which hurt, as each alone does.
    assert sizes[:7] == [8, 14, 19, 23, 26, 28, 30]
    assert sizes[7:] == [32, 31, 31, 31]


def test_of_two_that_replace_each_other_one_stays():
    """Each alone costs nothing, both together a lot: only fresh measurements after each removal show it."""
    layer = growing.shifts(2, 2, torch.tensor([1.0, 1.0]).double())
    data = list(torch.randn(60, 2, dtype=torch.float64).split(10))

    def loss(x):
        y = layer(x) - x
        return (1 - y.amax(1)).square() + 1e-3 * x[:, 0].abs()

    found = search(layer, data, loss, share=1.0)
    assert found.removed.sum() == 1 and not found.removed.all()
    assert found.losses.mean() < 0.1


def test_a_smaller_budget_is_met_at_the_least_cost():
    cost = torch.tensor([0.9, 0.3, 0.8, 0.2, 0.7, 0.4]).double()
    shifts = Shifts(cost, torch.full((6,), 0.1).double())
    assert not shifts.search().removed.any()
    found = shifts.search(surplus=2)
    assert found.removed.nonzero().flatten().tolist() == [1, 3]
    assert found.group_cost[[1, 3]].tolist() == pytest.approx([0.3, 0.2], abs=1e-6)
    prices = torch.tensor([5, 5, 5, 5, 5, 1])
    assert shifts.search(surplus=6, prices=prices).removed.nonzero().flatten().tolist() == [1, 3]
    assert shifts.search(surplus=100, share=1.0).removed.all()
    # With an estimate alone, and in one group, no more than is due.
    assert shifts.search(surplus=3, share=1.0, exact=0).removed.sum() == 3


def test_once_a_surplus_is_paid_only_what_is_judged_goes():
    """Seeds 0 to 3 may go for the surplus only, 4 and 5 also when nobody misses them; 6 and 7 not at all."""
    cost = torch.tensor([0.0, -0.1, 0.2, 0.3, -0.3, 0.6, -1.0, -1.0]).double()
    shifts = Shifts(cost, torch.full((8,), 0.01).double())
    judged = torch.tensor([False] * 4 + [True] * 2 + [False] * 2)
    spare = judged | (torch.arange(8) < 4)
    for surplus, gone in ((0, [4]), (1, [4]), (2, [1, 4]), (3, [0, 1, 4]), (4, [0, 1, 2, 4]), (99, [0, 1, 2, 3, 4, 5])):
        found = shifts.search(candidates=judged, spare=spare, surplus=surplus)
        assert found.removed.nonzero().flatten().tolist() == gone, surplus


def test_what_turns_out_not_to_be_needed_for_a_surplus_comes_back():
    cost = torch.tensor([0.2, 0.5, 0.4, 0.9]).double()
    shifts = Shifts(cost, torch.full((4,), 0.01).double())
    prices = torch.tensor([1, 5, 2, 5])
    found = shifts.search(surplus=5, prices=prices)  # 0, 2 and 1 are 8: without 2 and 0 it is still 5
    assert found.removed.tolist() == [False, True, False, False]
    assert found.group_cost.isnan().tolist() == [True, False, True, True]
    assert found.losses.mean().item() == pytest.approx(shifts.search().losses.mean().item() + 0.5, abs=1e-6)
    assert found.exact[1] and found.cost[found.exact].tolist() == pytest.approx(cost[found.exact].tolist(), abs=1e-5)


def test_a_surplus_is_paid_even_by_seeds_that_nothing_is_known_of():
    shifts = Shifts(torch.full((3,), 0.5).double(), torch.ones(3).double())

    def jagged(batch):  # no derivative is finite
        y = shifts.layer(batch[0])
        return shifts.loss(batch) + (y - y.detach()).abs().sum(1).sqrt()

    found = search(shifts.layer, shifts.data, jagged, surplus=2, exact=0)
    assert found.removed.sum() == 2


def test_batches_that_are_not_finite():
    """For a batch's loss no seed is to blame; for a derivative beside a finite loss, the seed whose it is."""
    shifts = Shifts(torch.full((3,), 0.5).double(), torch.ones(3).double())
    x, t = shifts.data[2]
    shifts.data[2] = (x, torch.where(torch.arange(3) == 1, torch.inf, t))
    found = shifts.search()
    assert not found.nonfinite.any() and not found.removed.any() and found.losses.isinf().any()

    steep = Shifts(torch.full((3,), 0.5).double(), torch.ones(3).double())
    x, t = steep.data[4]
    steep.data[4] = (torch.where(torch.arange(3) == 2, -0.1, x), t)
    found = search(steep.layer, steep.data, lambda part: steep.loss(part) + steep.layer(part[0])[:, 2].abs().sqrt())
    assert found.nonfinite.tolist() == [0, 0, 1]


def at_fault(layer, data, loss, among, trust):
    with Measurement(layer, data, loss) as measurement:
        found = find_at_fault(measurement, measurement.alpha.double(), among, trust)
        return found, measurement.num_batches, len(measurement.losses(measurement.alpha))


@pytest.mark.parametrize("guilty", [[], [3], [0, 7], [1, 2, 3, 4], list(range(8))], ids=str)
def test_who_is_at_fault(guilty):
    shifts = Shifts(torch.zeros(8).double(), torch.ones(8).double())
    with torch.no_grad():
        shifts.layer.blueprint_weights[0, guilty] = 1e200  # its square is infinite
    every, trust = torch.ones(8, dtype=torch.bool), torch.zeros(8)
    found, batches, left = at_fault(shifts.layer, shifts.data, shifts.loss, every, trust)
    assert found.seeds.nonzero().flatten().tolist() == guilty and found.kept.all() and (batches, left) == (6, 60)
    assert found.batches.tolist() == [6.0 * (seed in guilty) for seed in range(8)]


def test_at_fault_on_some_batches_only_and_not_to_be_asked_about():
    shifts = Shifts(torch.zeros(8).double(), torch.ones(8).double())
    with torch.no_grad():
        shifts.layer.blueprint_weights[0, [2, 5]] = 1e200
    rows = torch.arange(60).split(10)

    def loss(part):  # seed 5 does harm in the first 15 rows only, seed 2 in the last 5
        x, n = part
        y = shifts.layer(x) - x
        return torch.where(n < 15, y[:, 5], 0).square() + torch.where(n >= 55, y[:, 2], 0).square() + y[:, 0].square()

    data = [(x, n) for (x, _), n in zip(shifts.data, rows, strict=True)]
    every, trust = torch.ones(8, dtype=torch.bool), torch.zeros(8)
    found, batches, left = at_fault(shifts.layer, data, loss, every, trust)
    assert found.batches.tolist() == [0, 0, 1, 0, 0, 2, 0, 0] and (batches, left) == (6, 60)
    found, batches, left = at_fault(shifts.layer, data, loss, every & (torch.arange(8) != 5), trust)
    assert found.seeds.nonzero().flatten().tolist() == [2] and (batches, left) == (5, 45)
    assert found.kept.tolist() == [False] * 15 + [True] * 45


def test_nothing_is_written_and_the_costs_are_those_of_what_is_left():
    model, data = Classifier().grown(), growing.batches()
    before = snapshot(model)
    found = search(model, data, model.loss, share=0.2)
    assert same(before, snapshot(model)) == []
    gone = [(0, s) if s < 4 else (1, s - 4) for s in found.removed.nonzero().flatten().tolist()]
    assert 0 < len(gone) < 7
    torch.testing.assert_close(found.losses, growing.loss_by_hand(model, data, gone), rtol=0, atol=1e-9)
    for layer, seed in gone:
        model.layers[layer].state[0, seed] = 8
    left = removal_cost(model, data, model.loss, exact=100)
    stays = ~found.removed & found.exact
    assert stays.any()
    torch.testing.assert_close(found.cost[stays], torch.cat(left.mean)[stays], rtol=0, atol=1e-9)
