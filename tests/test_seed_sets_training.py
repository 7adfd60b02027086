"""What becomes of a set while it is active, by training and by whatever else: kept or forgotten, and never another's."""

from __future__ import annotations

import copy

import pytest
import torch
from seed_file_cases import NAMES, bits, everything, expected, grow_, inputs, layers_of, network, owned_bits, saved
from torch import nn

import kasmina_ext as kx


@pytest.fixture
def files(tmp_path):
    return saved(tmp_path)


# ---- what becomes of the active set --------------------------------------------------------------


def changed(layer: kx.KasminaLayer) -> None:
    """What training, requests and forwards do."""
    layer.request_state_transitions([0], "GERMINATED", rules=kx.TransitionRules.any())
    layer.set_alpha([1], 0.125)
    with torch.no_grad():
        layer.blueprint_weights.mul_(1.5)
    layer.telemetry.add_(1)


def test_kept_or_forgotten(files):
    model = network()
    sets = kx.load_seed_sets(model, files)
    sets.switch("anna")
    original = everything(model)
    for layer in layers_of(model):
        changed(layer)
    become = everything(model)
    assert become != original
    sets.switch("anna")
    assert everything(model) == become
    sets.switch("bert")
    sets.switch("anna")
    assert everything(model) == become
    for layer in layers_of(model):
        changed(layer)
    sets.switch("bert", keep=False)
    sets.switch("anna")
    assert everything(model) == become
    for layer in layers_of(model):
        changed(layer)
    sets.switch("anna", keep=False)
    assert everything(model) == become


def test_off_forgets(files):
    model = network()
    sets = kx.load_seed_sets(model, files)
    sets.off()
    asleep = everything(model)
    for layer in layers_of(model):
        changed(layer)
    sets.switch("bert")
    sets.off()
    assert everything(model) == asleep


def test_use(files):
    model, x, outputs = network(), inputs(), expected()
    sets = kx.load_seed_sets(model, files)
    sets.switch("anna")
    with torch.no_grad():
        layers_of(model)[0].blueprint_weights.mul_(1.5)
    before, own = everything(model), owned_bits(layers_of(model)[0])
    with sets.use("bert") as same:
        assert same is sets and sets.active == "bert" and torch.equal(model(x), outputs["bert"])
        with sets.use(None):
            assert sets.active is None and torch.equal(model(x), outputs[None])
        assert sets.active == "bert"
    assert sets.active == "anna" and everything(model) == before and owned_bits(layers_of(model)[0]) == own
    with pytest.raises(ZeroDivisionError), sets.use("bert", keep=False):
        changed(layers_of(model)[0])
        raise ZeroDivisionError
    assert sets.active == "anna" and everything(model) == before
    sets.switch("bert")
    layer, untouched = layers_of(model)[0], grow_(network(), 2)[0]
    assert bits(layer.blueprint_weights) == bits(untouched.blueprint_weights)
    assert layer.alpha.tolist() == untouched.alpha.tolist()
    with sets.use("anna"):
        sets.off()
        sets.remove("bert")
    assert sets.active is None and torch.equal(model(x), outputs[None])
    with pytest.raises(KeyError, match="known are 'anna'"), sets.use("bert"):
        pass


def test_each_set_sees_its_own(files):
    """Telemetry of a set is of its own forwards."""
    model, x = network(), inputs()
    sets = kx.load_seed_sets(model, files)
    for name, times in (("anna", 1), ("bert", 2), ("anna", 3)):
        sets.switch(name)
        for _ in range(times):
            model(x)
    assert layers_of(model)[1].telemetry[:, 3].eq(4).all()
    sets.switch("bert")
    assert layers_of(model)[1].telemetry[:, 3].eq(2).all()
    sets.off()
    assert layers_of(model)[1].telemetry.eq(0).all()


# ---- training ------------------------------------------------------------------------------------


def test_training_one_set_after_the_other(files):
    """As training models of one's own: no moment and no gradient of one gets into the other."""
    model, x = network(), inputs()
    sets = kx.load_seed_sets(model, files)
    optimizer = torch.optim.SGD(kx.param_groups(model, lr=0.1), momentum=0.9)

    def steps(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for _ in range(3):
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
        model(x).square().mean().backward()  # a gradient that is never used

    twins = {}
    for name, number in NAMES.items():
        model.load_state_dict({k: v for k, v in network().state_dict().items() if "base_layer" in k}, strict=False)
        sets.switch(name)
        steps(model, optimizer)
        for parameter in model.parameters():
            if parameter.grad is not None and not any(
                parameter is layer.blueprint_weights for layer in layers_of(model)
            ):
                optimizer.state.pop(parameter, None)
                parameter.grad = None
        twin = twins[name] = grow_(network(), number)
        steps(twin, torch.optim.SGD(kx.param_groups(twin, lr=0.1), momentum=0.9))
    for name, twin in twins.items():
        sets.switch(name)
        for ours, theirs in zip(layers_of(model), layers_of(twin), strict=True):
            assert bits(ours.blueprint_weights) == bits(theirs.blueprint_weights)


def test_moments_that_are_loaded_after_a_switch_stay(files):
    """Seeds that lived before the switch are no news to the optimizer."""
    model, x = network(), inputs()
    sets = kx.load_seed_sets(model, files)
    optimizer = torch.optim.SGD(kx.param_groups(model, lr=0.1), momentum=0.9)
    sets.switch("anna")
    layer, anything = layers_of(model)[0], kx.TransitionRules.any()
    asleep = layer.lifecycle_states.eq(0).nonzero()[0]
    layer.request_state_transitions(asleep, "GERMINATED", rules=anything)
    layer.request_state_transitions(asleep, "GRAFTING", rules=anything)
    for _ in range(2):  # the first step forgets what was before germination
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()
    state, bank = copy.deepcopy(optimizer.state_dict()), layers_of(model)[0].blueprint_weights
    before = optimizer.state[bank]["momentum_buffer"].clone()
    sets.switch("bert")
    assert before.any() and not optimizer.state[bank]["momentum_buffer"].any() and not bank.grad.any()
    optimizer.step()
    sets.switch("anna")
    optimizer.load_state_dict(state)
    optimizer.step()
    mask = torch.zeros(layer.num_seeds, dtype=torch.bool).index_fill(0, asleep, True)
    assert torch.equal(optimizer.state[bank]["momentum_buffer"], 0.9 * before)
    assert before[layer.blueprint_mask(mask)].all()


def test_a_controller_of_one_set(files):
    """Goes on after a switch and back; its seeds are those of the set."""
    model, x = network(), inputs()
    sets = kx.load_seed_sets(model, files)
    sets.switch("anna")
    grow = kx.GrowthController(model, budget=1.0, tick_every=1, watch=1)
    for _ in range(4):
        model(x).square().mean().backward()
        grow.step()
    layer = layers_of(model)[0]
    states = layer.lifecycle_states.clone()
    assert grow.state_dict()["watched"][0].any()
    sets.switch("bert")
    assert not torch.equal(layer.lifecycle_states, states)
    assert not grow.state_dict()["watched"][0].any()  # what it has seen before is of another set
    sets.switch("anna")
    assert torch.equal(layer.lifecycle_states, states)
    model(x).square().mean().backward()
    assert grow.step()
    grow.flush()
