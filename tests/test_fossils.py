"""Fossils keep their bits, and new blueprints start neutral, whatever optimizer steps next, and for every layer."""

from __future__ import annotations

import copy
import gc
import pickle
import timeit
import weakref

import pytest
import torch
from optimizing import ANY, OPTIMIZERS, backward, network, steps, used
from torch import nn

import kasmina_ext as kx
from kasmina_ext import optim as kasmina_optim

pytestmark = pytest.mark.usefixtures("one_thread")  # thousands of tiny steps


# ---- fossils ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw", "adamw-fused", "sgd", "lion-like"])
def test_a_fossil_keeps_its_bits_for_a_thousand_steps(device, name):
    model, layer = network(device)
    optimizer = OPTIMIZERS[name](kx.param_groups(model, 0.01, 0.1))
    steps(model, optimizer, 30)
    assert not layer.request_state_transitions([0, 2], "fossilized", rules=ANY).any()
    fossils, alive = used(layer, [0, 2]), used(layer, [1, 3])
    before = layer.blueprint_weights.detach().clone()
    steps(model, optimizer, 1000)
    changed = layer.blueprint_weights.detach().view(torch.int32) != before.view(torch.int32)
    assert not changed[fossils].any()
    assert changed[alive].all()
    assert not changed[~fossils & ~alive].any()


def test_without_the_reset_a_fossil_would_move(device, monkeypatch):
    """What the test above would say of a layer that nobody looks after."""
    model, layer = network(device)
    monkeypatch.setattr(kasmina_optim, "_looked_after", weakref.WeakKeyDictionary())
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.0)
    steps(model, optimizer, 30)
    layer.request_state_transitions(0, "fossilized", rules=ANY)
    before = layer.blueprint_weights.detach().clone()
    steps(model, optimizer, 1)
    assert (layer.blueprint_weights != before)[used(layer, [0])].all()


def to_fossils(layer, how):
    if how == "view":
        layer.lifecycle_states[[0, 2]] = 7
    elif how == "state":
        layer.extended_state.set_state([0, 2], "fossilized")
    elif how == "single":
        for seed in (0, 2):
            layer.lifecycle_manager.valid_transitions.add((3, 7))
            assert layer.request_state_transition(seed, "fossilized")
    else:
        assert not layer.request_state_transitions([0, 2], "fossilized", rules=ANY).any()


@pytest.mark.parametrize("name", ["adamw", "adamw-fused", "sgd", "lion-like"])
@pytest.mark.parametrize("how", ["batch", "single", "state", "view"])
@pytest.mark.parametrize("accumulates", [False, True], ids=["between backward and step", "between two backwards"])
def test_a_fossil_keeps_its_bits_whatever_gradient_is_left_of_it(device, name, how, accumulates):
    model, layer = network(device)
    optimizer = OPTIMIZERS[name](kx.param_groups(model, 0.01, 0.1))
    steps(model, optimizer, 5)
    backward(model, optimizer)
    to_fossils(layer, how)
    if accumulates:
        backward(model)
    fossils, alive = used(layer, [0, 2]), used(layer, [1, 3])
    before = layer.blueprint_weights.detach().clone()
    for _ in range(1000 if (how, name) in (("batch", "adamw"), ("batch", "sgd")) else 50):
        optimizer.step()
        backward(model, None if accumulates else optimizer)
    changed = layer.blueprint_weights.detach().view(torch.int32) != before.view(torch.int32)
    assert not changed[fossils].any() and changed[alive].all()


def test_a_fossil_of_an_optimizers_very_first_step_keeps_its_bits():
    model, layer = network("cpu")
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    backward(model)
    layer.lifecycle_states[0] = 7
    before = layer.blueprint_weights.detach().clone()
    optimizer.step()
    changed = layer.blueprint_weights != before
    assert not changed[used(layer, [0])].any() and changed[used(layer, [1, 2, 3])].all()


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion-like"])
@pytest.mark.parametrize("goes_on", [False, True])
def test_a_blueprint_that_begins_between_backward_and_step_stays_neutral(device, name, goes_on):
    model, layer = network(device)
    plain = copy.deepcopy(layer.base_layer)
    optimizer = OPTIMIZERS[name](kx.param_groups(layer, 0.0))
    optimizer.param_groups[0]["lr"] = 0.1
    steps(model, optimizer, 3)
    backward(model, optimizer)
    layer.request_state_transitions(None, "rolled_back", rules=ANY)
    layer.recycle()
    life = ["germinated", "training", "grafting"]
    while life and (goes_on or life[0] == "germinated"):
        layer.request_state_transitions(None, life.pop(0))
    optimizer.step()
    for target in life:
        layer.request_state_transitions(None, target)
    x = torch.randn(4, 6, device=device)
    assert torch.equal(layer(x), plain(x))


def test_gradients_of_other_seeds_and_of_what_goes_on_are_left_alone():
    model, layer = network("cpu")
    backward(model)
    gradient = layer.blueprint_weights.grad
    before, expected = gradient.clone(), gradient.clone()
    layer.request_state_transitions([1], "stabilization")
    layer.extended_state.set_state(3, "fine_tuning")
    assert torch.equal(gradient, before) and gradient.any()
    layer.request_state_transitions([0, 3], "culled", rules=ANY)
    assert torch.equal(gradient, expected.masked_fill_(used(layer, [0, 3]), 0))


def test_the_first_gradient_of_a_blueprint_that_began_before_it_counts():
    """Only what was there at the transition is of another blueprint."""
    model, layer = network("cpu")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    steps(model, optimizer, 1)
    layer.request_state_transitions(None, "rolled_back")
    layer.recycle()
    for target in ("germinated", "training", "grafting"):
        layer.request_state_transitions(None, target)
    before = layer.blueprint_weights.detach().clone()
    steps(model, optimizer, 1)
    assert (layer.blueprint_weights != before)[used(layer, range(4))].all()


# ---- every layer is looked after ---------------------------------------------------------------------------------


def through_pickle(pair):
    return pickle.loads(pickle.dumps(pair))


COPIES = {"itself": lambda pair: pair, "deepcopy": copy.deepcopy, "pickle": through_pickle}


@pytest.mark.parametrize("clone", COPIES)
def test_without_param_groups_and_after_copying(clone):
    model, layer = network("cpu")
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.0)
    steps(model, optimizer, 30)
    model, optimizer = COPIES[clone]((model, optimizer))
    layer = model[0]
    layer.request_state_transitions([0], "fossilized", rules=ANY)
    before = layer.blueprint_weights.detach().clone()
    steps(model, optimizer, 50)
    changed = layer.blueprint_weights != before
    assert not changed[used(layer, [0])].any() and changed[used(layer, [1, 2, 3])].all()


def test_an_optimizer_that_is_given_the_bank_later_and_a_bank_that_is_replaced():
    model, layer = network("cpu")
    optimizer = torch.optim.AdamW(model[2].parameters(), 0.01)
    steps(model, optimizer, 2)
    optimizer.add_param_group({"params": [layer.blueprint_weights], "weight_decay": 0.0})
    for _ in range(2):
        steps(model, optimizer, 5)
        layer.request_state_transitions([0], "fossilized", rules=ANY)
        before = layer.blueprint_weights.detach().clone()
        steps(model, optimizer, 5)
        assert torch.equal(layer.blueprint_weights[used(layer, [0])], before[used(layer, [0])])
        layer.extended_state.set_state(0, "grafting")
        layer.blueprint_weights = nn.Parameter(before)
        optimizer = torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.0)


def test_a_state_that_moves_between_steps(device):
    model, layer = network("cpu")
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    steps(model, optimizer, 2)
    layer.to(device, torch.float64).to(torch.float32)
    model.to(device)
    optimizer.state.clear()
    layer.request_state_transitions([0], "fossilized", rules=ANY)
    before = layer.blueprint_weights.detach().clone()
    steps(model, optimizer, 2)
    assert torch.equal(layer.blueprint_weights[used(layer, [0])], before[used(layer, [0])])


def test_layers_that_no_optimizer_can_train_disturb_none():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with torch.inference_mode():
        inferring = network("cpu")[1]
    with FakeTensorMode():
        fake = kx.KasminaLayer(nn.Linear(6, 16), num_seeds=4)
    with torch.device("meta"):
        meta = kx.KasminaLayer(nn.Linear(6, 16), num_seeds=4)
    model, layer = network("cpu")
    optimizer = torch.optim.Adam([*model.parameters(), meta.blueprint_weights])
    steps(model, optimizer, 2)
    assert all(each in kasmina_optim._looked_after for each in (inferring, fake, meta, layer))


def test_a_bank_that_is_spread_over_ranks(tmp_path):
    """One rank: that moments and gradients are found and zeroed where they are spread."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    model, layer = network("cpu")
    mask, fossil = torch.tensor([True, False, False, False]), used(layer, [0])
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        layer.blueprint_weights = nn.Parameter(distribute_tensor(layer.blueprint_weights.detach(), mesh, [Shard(0)]))
        bank = layer.blueprint_weights
        optimizer = torch.optim.AdamW([bank], 0.1, weight_decay=0.0)
        for step in range(3):
            bank.grad = torch.ones_like(bank)
            if step == 2:
                before = bank.detach().full_tensor().clone()
                assert not layer.request_state_transitions(mask, "fossilized", rules=ANY)[0]
            optimizer.step()
        changed = bank.detach().full_tensor() != before
        assert not changed[fossil].any() and changed[~fossil].all()
    finally:
        torch.distributed.destroy_process_group()


def test_what_a_step_costs_when_nothing_has_changed():
    """A few comparisons for each layer: here of a hundred, half of them another optimizer's."""
    layers = [kx.KasminaLayer(nn.Linear(4, 8), num_seeds=2) for _ in range(100)]
    for half in (layers[:50], layers[50:]):
        optimizer = torch.optim.SGD([layer.blueprint_weights for layer in half], 0.1)
        optimizer.step()
    count = len(kasmina_optim._looked_after)
    best = min(timeit.repeat(lambda: kasmina_optim.settle(optimizer, (), {}), number=20, repeat=20)) / 20
    assert best / count < 4e-6  # 1 microsecond on an idle core


def test_steps_without_a_change_of_state_ask_nothing(monkeypatch):
    model, layer = network("cpu")
    optimizer = torch.optim.AdamW(kx.param_groups(model, 0.01))
    steps(model, optimizer, 1)
    monkeypatch.setattr(kasmina_optim, "_begun_or_ended", lambda *args: pytest.fail("asked"))
    steps(model, optimizer, 3)
    steps(model[2:], torch.optim.SGD(model[2].parameters(), 0.1), 0)
    layer.lifecycle_states[0] = 4
    with pytest.raises(pytest.fail.Exception, match="asked"):
        steps(model, optimizer, 1)


def test_looking_after_layers_keeps_none_of_them_alive():
    model, layer = network("cpu")
    optimizer = torch.optim.Adam(kx.param_groups(model))
    steps(model, optimizer, 1)
    alive = weakref.ref(layer), weakref.ref(optimizer)
    del model, layer, optimizer
    gc.collect()
    assert [ref() for ref in alive] == [None, None]
