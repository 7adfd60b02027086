"""Where a handle on the seeds of a model stands for the model, or for its layers."""

from __future__ import annotations

import copy

import pytest
import torch
from growing import Classifier, Run, batches
from growing import graft as put

from kasmina_ext import (
    ExtendedLifecycle,
    GrowthController,
    Seeds,
    absorb,
    calibrate_,
    credit,
    fold_,
    fold_report,
    param_groups,
    removal_cost,
    reset_optimizer_state,
    unfold_,
)
from kasmina_ext.handle import model_of

S = ExtendedLifecycle


def grown():
    torch.manual_seed(1)
    model = Classifier().grown()
    return model, Seeds(model)


def test_measurements_take_a_handle():
    model, seeds = grown()
    data = batches()
    for one, two in (
        (credit(model, data, model.loss), credit(seeds, data, model.loss)),
        (credit(model, data, model.loss), seeds.credit(data, model.loss)),
        (removal_cost(model, data, model.loss, 2), removal_cost(seeds, data, model.loss, 2)),
    ):
        assert one.names == two.names == list(seeds.layers)
        assert all(map(torch.equal, one.mean, two.mean))
    assert seeds.credit(data, model.loss, points=2, tolerance=1e-3).points > 2


def test_a_controller_takes_a_handle_and_decides_alike():
    one, two = Run(), Run()
    with pytest.warns(UserWarning, match="driven by another controller"):
        two.control = GrowthController(Seeds(two.model), two.optimizer, one.control.config)
    for run in (one, two):
        run.step(30)
    result = one.evaluate(), two.evaluate()
    assert result[0].loss == result[1].loss and one.states() == two.states() and any(one.states())
    assert one.control.names == two.control.names


def test_optimizers_take_a_handle():
    model, seeds = grown()
    model.last.requires_grad_(True)
    (banks, rest), (own, others) = param_groups(model, lr=0.1), param_groups(seeds, lr=0.1)
    assert own["params"] == banks["params"] and others["params"] == rest["params"]
    assert [group["params"] for group in param_groups(Seeds(model.layers))] == [banks["params"]]
    optimizer = torch.optim.Adam(banks["params"])
    model.loss(batches(1)[0]).mean().backward()
    optimizer.step()
    twin, moments = (
        copy.deepcopy(optimizer.state_dict()),
        [optimizer.state[bank]["exp_avg"] for bank in banks["params"]],
    )
    reset_optimizer_state(optimizer, [1, 5], seeds)  # seed 1 of the first layer, 1 of the second
    expected = [moment.clone() for moment in moments]
    optimizer.load_state_dict(twin)
    for layer in model.layers:
        layer.reset_optimizer_state(optimizer, 1)
    for bank, after in zip(banks["params"], expected, strict=True):
        assert torch.equal(optimizer.state[bank]["exp_avg"], after) and 0 < (after == 0).sum() < after.numel()
    seeds.reset_optimizer_state(optimizer)
    assert not any(optimizer.state[bank]["exp_avg"].any() for bank in banks["params"])


def test_folding_takes_a_handle():
    model, seeds = grown()
    x = torch.randn(9, 6)
    y = model(x)
    assert fold_(seeds) is model and fold_report(model)
    torch.testing.assert_close(model(x), y)
    with pytest.raises(ValueError, match="no KasminaLayer"):
        len(seeds)
    assert unfold_(seeds) is model and torch.equal(model(x), y) and len(seeds) == 7
    for layer in model.layers:
        put(layer, S.FOSSILIZED)
    absorb(seeds, seeds[[0, 6]])
    assert seeds.states().tolist() == [0, 7, 7, 7, 7, 7, 0]
    with pytest.raises(ValueError, match="only FOSSILIZED seeds can be absorbed"):
        absorb(seeds, seeds[:2])
    absorb(seeds)
    assert not seeds.states().any()
    torch.testing.assert_close(model(x), y)


def test_calibration_takes_a_handle():
    torch.manual_seed(1)
    reference = Classifier()
    model = copy.deepcopy(reference)
    with torch.no_grad():
        model.first.base_layer.weight *= torch.rand(16, 1) + 0.5
    twin, x = copy.deepcopy(model), torch.randn(40, 6)
    y = model(x)
    one, two = calibrate_(Seeds(model), reference, [x]), calibrate_(twin, reference, [x])
    assert one == two and torch.equal(model(x), twin(x)) and not torch.equal(model(x), y)


def test_several_modules_are_no_model():
    model, seeds = grown()
    some = Seeds(model.layers)
    for call in (fold_, unfold_, fold_report, absorb, lambda given: calibrate_(given, model, []), model_of):
        with pytest.raises(ValueError, match="of several modules, not of one model: give the model itself"):
            call(some)
    assert model_of(seeds) is model_of(model) is model
