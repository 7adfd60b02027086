"""Credit and removal costs against closed forms and brute force; measuring leaves no trace."""

from __future__ import annotations

import itertools
import math
import warnings

import growing
import numpy as np
import pytest
import torch
from growing import Classifier, same, snapshot
from torch import nn
from torch.nn import functional as F

from kasmina_ext import KasminaLayer, credit, removal_cost
from kasmina_ext.lifecycle import ExtendedLifecycle
from kasmina_ext.measure import Moments, seed_layers


def joined(tensors):
    return torch.cat(list(tensors))


# ---- closed forms ----------------------------------------------------------------------------------------------------


@pytest.fixture
def quadratic():
    """L = mean over samples of |x + alpha w - t|^2 / 2: what each seed brings is known in closed form."""
    values = torch.randn(9, dtype=torch.float64)
    layer = growing.shifts(9, 3, values)
    layer.set_alpha(None, [1.0, 0.5, 0.25])
    data = [(torch.randn(n, 9, dtype=torch.float64), torch.randn(n, 9, dtype=torch.float64)) for n in (7, 4, 11)]

    def loss(batch):
        return (layer(batch[0]) - batch[1]).square().sum(1) / 2

    return layer, data, loss, values


def per_seed(values):
    return values.unflatten(-1, (3, 3)).sum(-1)


@pytest.mark.parametrize("points", [1, 4])
def test_credit_of_a_quadratic(quadratic, points):
    layer, data, loss, w = quadratic
    account = credit(layer, data, loss, points)
    alpha = torch.tensor([1.0, 0.5, 0.25]).repeat_interleave(3).double()
    # The slope is linear in c, so that midpoints are exact: its value at c = 1/2.
    of_batch = torch.stack([per_seed(-alpha * w * ((x - t).mean(0) + alpha * w / 2)) for x, t in data])
    size = torch.tensor([7.0, 4.0, 11.0]).double()[:, None]
    mean = (of_batch * size).sum(0) / 22
    error = ((size * (of_batch - mean) ** 2).sum(0) / (22 * 2)).sqrt()
    torch.testing.assert_close(account.mean[0], mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(account.error[0], error, rtol=1e-5, atol=1e-6)

    samples = torch.cat([((x - t).square() - (x + alpha * w - t).square()).sum(1) / 2 for x, t in data])
    assert account.gain == pytest.approx(samples.mean().item())
    assert account.gain_error == pytest.approx(samples.std().item() / math.sqrt(22))
    assert account.total == pytest.approx(account.gain, rel=1e-5)
    assert account.deviation < 1e-5 and f"{account.deviation:.2%}" in str(account)
    assert (account.points, account.batches) == (points, 3)


def test_a_loss_for_each_batch_weighs_all_batches_alike(quadratic):
    layer, data, loss, w = quadratic
    account = credit(layer, data, lambda batch: loss(batch).mean())
    alpha = torch.tensor([1.0, 0.5, 0.25]).repeat_interleave(3).double()
    of_batch = torch.stack([per_seed(-alpha * w * ((x - t).mean(0) + alpha * w / 2)) for x, t in data])
    torch.testing.assert_close(account.mean[0], of_batch.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(account.error[0], of_batch.std(0) / math.sqrt(3), rtol=1e-5, atol=1e-6)
    assert math.isnan(credit(layer, data[:1], lambda batch: loss(batch).mean()).gain_error)
    assert credit(layer, data[:1], loss).error[0].isnan().all()


def test_removal_cost_of_a_quadratic(quadratic):
    layer, data, loss, w = quadratic
    found = removal_cost(layer, data, loss)
    alpha = torch.tensor([1.0, 0.5, 0.25]).repeat_interleave(3).double()
    slope = torch.stack([per_seed(w * ((x - t).mean(0) + alpha * w)) for x, t in data])
    reach = slope * torch.tensor([1.0, 0.5, 0.25]).double()
    size = torch.tensor([7.0, 4.0, 11.0]).double()[:, None]
    mean = (size * (reach**2 / 2 - reach)).sum(0) / 22
    torch.testing.assert_close(found.mean[0], mean, rtol=1e-5, atol=1e-6)
    assert not found.exact[0].any()

    exactly = removal_cost(layer, data, loss, exact=3)
    shift = alpha * w
    change = torch.cat([((x - t).square() - (x + shift - t).square()) / 2 for x, t in data])
    torch.testing.assert_close(exactly.mean[0], per_seed(change).mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(exactly.error[0], per_seed(change).std(0) / math.sqrt(22), rtol=1e-5, atol=1e-6)
    assert exactly.exact[0].all()


def test_moments_against_numpy_formulas():
    values, weights = torch.randn(6, 4).double() + 1e3, torch.tensor([1.0, 3.0, 2.0, 2.0, 5.0, 1.0]).double()
    moments = Moments(values[0])
    for value, weight in zip(values, weights, strict=True):
        moments.add(value, weight.item())
    mean = (values * weights[:, None]).sum(0) / 14
    torch.testing.assert_close(moments.mean, mean)
    torch.testing.assert_close(moments.error, ((weights[:, None] * (values - mean) ** 2).sum(0) / (14 * 5)).sqrt())
    moments.add(torch.tensor([torch.nan, torch.inf, 0.0, 0.0]), 4.0)
    torch.testing.assert_close(moments.mean[:2], mean[:2])


# ---- networks --------------------------------------------------------------------------------------------------------


def test_credits_of_all_layers_sum_to_the_gain_the_better_the_more_points():
    model, data = Classifier().grown(0.8), growing.batches()
    by_hand = growing.loss_by_hand(model, data, [(0, s) for s in range(4)] + [(1, s) for s in range(3)])
    gain = (by_hand - growing.loss_by_hand(model, data)).mean().item()
    coarse, fine = credit(model, data, model.loss, 1), credit(model, data, model.loss, 64)
    assert coarse.gain == fine.gain == pytest.approx(gain, abs=1e-9)
    assert fine.deviation < 1e-2 and fine.deviation < coarse.deviation
    assert coarse.names == ["first", "second"] and [len(mean) for mean in coarse.mean] == [4, 3]

    wanted = 0.5 * coarse.deviation
    enough = credit(model, data, model.loss, 1, tolerance=wanted)
    assert enough.points > 1 and abs(enough.total - enough.gain) <= wanted * max(abs(gain), enough.gain_error)


def test_credit_agrees_with_shapley_values():
    model, data = Classifier().grown(0.4), growing.batches(4, 40)
    places = [(0, s) for s in range(4)] + [(1, s) for s in range(3)]
    value = {}
    for chosen in itertools.chain.from_iterable(itertools.combinations(range(7), k) for k in range(8)):
        out = [places[i] for i in range(7) if i not in chosen]
        value[frozenset(chosen)] = -growing.loss_by_hand(model, data, out).mean().item()
    shapley = torch.zeros(7, dtype=torch.float64)
    for i in range(7):
        for others in (set(s) for s in value if i not in s):
            weight = math.factorial(len(others)) * math.factorial(6 - len(others)) / math.factorial(7)
            shapley[i] += weight * (value[frozenset(others | {i})] - value[frozenset(others)])
    found = joined(credit(model, data, model.loss, 32).mean)
    assert torch.corrcoef(torch.stack((found, shapley)))[0, 1] > 0.95


def test_exact_removal_costs_are_those_of_culling_each_seed():
    model, data = Classifier().grown(), growing.batches()
    base = growing.loss_by_hand(model, data)
    change = torch.stack(
        [growing.loss_by_hand(model, data, [(i, s)]) - base for i, n in ((0, 4), (1, 3)) for s in range(n)]
    )
    found = removal_cost(model, data, model.loss, exact=100)
    torch.testing.assert_close(joined(found.mean), change.mean(1), rtol=0, atol=1e-9)
    torch.testing.assert_close(joined(found.error), change.std(1) / 10, rtol=0, atol=1e-9)
    assert found.loss == pytest.approx(base.mean().item())

    estimate, some = removal_cost(model, data, model.loss), removal_cost(model, data, model.loss, exact=3)
    least = joined(estimate.mean).argsort()[:3]
    exact = joined(some.exact)
    assert exact.nonzero().flatten().tolist() == sorted(least.tolist())
    expected = torch.where(exact, joined(found.mean), joined(estimate.mean))
    torch.testing.assert_close(joined(some.mean), expected)


def test_seeds_that_are_not_in_the_output_have_none_and_fossils_do():
    model, data = Classifier().grown(), growing.batches()
    for seed, state in enumerate(("DORMANT", "TRAINING", "CULLED", "FOSSILIZED")):
        model.first.state[0, seed] = ExtendedLifecycle[state]
    account, cost = credit(model, data, model.loss), removal_cost(model, data, model.loss, exact=2)
    assert (account.mean[0] != 0).tolist() == (cost.mean[0] != 0).tolist() == [False, False, False, True]
    assert not cost.exact[0][:3].any() and int(joined(cost.exact).sum()) == 2


def test_features_in_dimension_1():
    conv = KasminaLayer(nn.Conv2d(2, 6, 3), num_seeds=3, num_blueprints=1, strategy="multiplicative")
    growing.graft(conv)
    with torch.no_grad():
        conv.blueprint_weights += 0.5 * torch.randn(1, 6)
    data = [torch.randn(4, 2, 5, 5) for _ in range(3)]
    account = credit(conv, data, lambda x: conv(x).square().mean(), 2)
    assert account.total == pytest.approx(account.gain, rel=1e-4) and account.gain != 0


# ---- no trace --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["model", "layers", "one layer"])
def test_nothing_is_touched(given):
    model = Classifier(noisy=True).grown()
    other = KasminaLayer(nn.Linear(6, 6))  # measured by nobody, but it runs
    dataset = torch.utils.data.TensorDataset(torch.randn(60, 6), torch.randint(3, (60,)))
    data = torch.utils.data.DataLoader(dataset, batch_size=12, shuffle=True)
    whole = nn.ModuleList([model, other])
    model.loss((other(torch.randn(9, 6)), torch.randint(3, (9,)))).sum().backward()
    before = snapshot(whole)
    alphas = [layer.alpha for layer in model.layers]
    layers = {"model": model, "layers": model.layers, "one layer": model.second}[given]

    def loss(batch):
        found = model.loss((F.dropout(other(batch[0]), 0.5), batch[1]))  # functional dropout is never off
        assert not model.drop.training and not model.norm.training and not other.telemetry_enabled
        return found

    first = credit(layers, data, loss), removal_cost(layers, data, loss, exact=2)
    assert same(before, snapshot(whole)) == []
    assert all(layer.alpha is alpha for layer, alpha in zip(model.layers, alphas, strict=True))

    def failing(batch):
        loss(batch)
        raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        credit(layers, data, failing)
    assert same(before, snapshot(whole)) == []
    again = credit(layers, data, loss), removal_cost(layers, data, loss, exact=2)
    for one, two in zip(first, again, strict=True):
        assert torch.equal(joined(one.mean), joined(two.mean)) and torch.equal(joined(one.error), joined(two.error))


def test_within_no_grad_and_inference_mode():
    model, data = Classifier().grown(), growing.batches()
    expected = joined(credit(model, data, model.loss).mean)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(joined(credit(model, data, model.loss).mean), expected)
            assert torch.is_grad_enabled() is False


def test_batches_that_were_made_in_inference_mode():
    model, data = Classifier().grown(), growing.batches()
    expected = credit(model, data, model.loss), removal_cost(model, data, model.loss, exact=3)
    with torch.inference_mode():
        made = [[x.clone(), {"y": y.clone()}] for x, y in data]

        def loss(batch):
            return model.loss((batch[0], batch[1]["y"]))

        found = credit(model, made, loss), removal_cost(model, iter(made), loss, exact=3)
    assert all(batch[0].is_inference() for batch in made)
    for one, two in zip(found, expected, strict=True):
        assert torch.equal(joined(one.mean), joined(two.mean))


def test_a_seed_without_which_the_loss_is_not_finite_costs_infinitely_much(quadratic):
    layer, data, loss, w = quadratic

    def needs_the_first(batch):
        y = layer(batch[0])
        return loss(batch) / torch.any(y[:, 0] != batch[0][:, 0])  # 1, or 0 without the seed

    found = removal_cost(layer, data, needs_the_first, exact=3)
    assert found.mean[0][0] == math.inf and found.error[0][0] == 0 and found.mean[0][1:].isfinite().all()


def test_numbers_from_numpy():
    model, data = Classifier().grown(), growing.batches(2)
    assert credit(model, data, model.loss, np.int64(2)).points == 2
    assert sum(joined(removal_cost(model, data, model.loss, np.int32(2)).exact)) == 2


def test_a_compiled_model():
    model, data = Classifier(noisy=True).grown(), growing.batches()
    model(data[0][0])
    compiled = torch.compile(model, backend="eager")
    compiled(data[0][0])
    before = snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        account = credit(compiled, data, lambda batch: F.cross_entropy(compiled(batch[0]), batch[1], reduction="none"))
    assert same(before, snapshot(model)) == []
    plain = credit(model, data, model.loss)
    torch.testing.assert_close(joined(account.mean), joined(plain.mean))
    assert account.names == ["first", "second"]


def test_passes_are_four_whatever_the_number_of_seeds():
    for seeds in ((1, 1), (16, 12)):
        model, data, calls = Classifier(seeds=seeds).grown(), growing.batches(3), []

        def loss(batch, model=model, calls=calls):
            calls.append(torch.is_grad_enabled())
            return model.loss(batch)

        credit(model, data, loss)
        assert (sum(calls), len(calls)) == (4 * 3, 6 * 3)


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [credit, removal_cost])
def test_bad_input(function):
    model, data, plain = Classifier().grown(), growing.batches(), nn.Linear(3, 3)
    before = snapshot(model)
    with pytest.raises(ValueError, match="no KasminaLayer"):
        function(plain, data, model.loss)
    with pytest.raises(TypeError, match="must be a module or several, got int"):
        function(3, data, model.loss)
    with pytest.raises(TypeError, match="must be modules, got str"):
        function(["first"], data, model.loss)
    with pytest.raises(ValueError, match="no batches"):
        function(model, [], model.loss)
    with pytest.raises(TypeError, match="floating tensor.*got float"):
        function(model, data, lambda batch: 1.0)
    with pytest.raises(TypeError, match="got torch.int64"):
        function(model, data, lambda batch: batch[1])
    with pytest.raises(ValueError, match="depends on none of the layers"):
        function(model, data, lambda batch: batch[0].sum())
    with pytest.raises(ValueError, match="depends on none of the layers"):
        function(model, data, torch.no_grad()(model.loss))
    for wrong in (-1, 1.5, True):
        with pytest.raises(ValueError, match="must be an integer of at least"):
            function(model, data, model.loss, wrong)
    assert same(before, snapshot(model)) == []


def test_layers_are_found_once_with_their_names():
    model = Classifier()
    assert list(seed_layers(model)) == ["first", "second"]
    assert list(seed_layers([model, model.first, model.second])) == ["0.first", "0.second"]
    assert list(seed_layers(model.layers)) == ["0", "1"]
    assert list(seed_layers(model.first)) == [""]
    assert list(seed_layers({"a": model.second})) == ["a"]
    assert list(seed_layers(torch.compile(nn.Sequential(model), backend="eager"))) == ["0.first", "0.second"]
