"""Optimizers: banks without decay, and moments that a new blueprint does not inherit."""

from __future__ import annotations

import copy
from collections import deque

import pytest
import torch
from optimizing import ANY, OPTIMIZERS, moments, network, steps, used
from torch import nn

import kasmina_ext as kx

pytestmark = pytest.mark.usefixtures("one_thread")  # thousands of tiny steps


# ---- groups ----------------------------------------------------------------------------------------------------------


def test_groups():
    model, layer = network("cpu")
    model[2].bias.requires_grad_(False)
    banks, rest = kx.param_groups(model, 0.01, 0.1)
    assert banks == {"params": [layer.blueprint_weights], "lr": 0.01, "weight_decay": 0.0}
    assert [id(p) for p in rest["params"]] == [id(p) for p in (layer.weight, layer.bias, model[2].weight)]
    assert (rest["lr"], rest["weight_decay"]) == (0.01, 0.1)
    banks, rest = kx.param_groups(model)
    assert banks.keys() == {"params", "weight_decay"} and rest.keys() == {"params"}


def test_groups_that_would_be_empty_are_left_out():
    model, layer = network("cpu")
    model.requires_grad_(False)
    assert kx.param_groups(model, 0.1) == []
    layer.blueprint_weights.requires_grad_(True)
    [banks] = kx.param_groups(model, lr=0.1, weight_decay=1.0)
    assert banks["weight_decay"] == 0.0
    [rest] = kx.param_groups(nn.Linear(2, 2), lr=0.1, weight_decay=1.0)
    assert rest["weight_decay"] == 1.0 and len(rest["params"]) == 2


def test_each_parameter_is_in_one_group():
    layer = network("cpu")[1]
    shared = nn.Sequential(layer, nn.ModuleList([layer]), nn.Linear(16, 6))
    shared[2].weight = nn.Parameter(shared[2].weight)
    groups = kx.param_groups(nn.ModuleList([shared, kx.KasminaLayer(layer)]))
    every = [id(p) for group in groups for p in group["params"]]
    assert len(every) == len(set(every)) == 6
    assert len(groups[0]["params"]) == 2


@pytest.mark.parametrize("model", [None, "model", [nn.Linear(2, 2)], nn.Linear(2, 2).parameters()])
def test_groups_of_what_is_no_model(model):
    with pytest.raises(TypeError, match="model must be a torch.nn.Module or a handle on seeds, got"):
        kx.param_groups(model, lr=0.1)


# ---- moments ---------------------------------------------------------------------------------------------------------


def test_late_seeds_take_long_first_steps_with_adams_betas_and_not_with_the_others():
    """What param_groups says of them."""
    longest = {}
    for betas in ((0.9, 0.999), (0.9, 0.95)):
        weight = nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.Adam([weight], 1e-3, betas)
        lengths = []
        for step in range(1300):
            before = weight.detach().clone()
            weight.grad = torch.full_like(weight, 1e-2 if step >= 1000 else 0.0)
            optimizer.step()
            lengths.append((weight - before).abs().item() / 1e-3)
        longest[betas] = max(lengths)
    assert 4 < longest[0.9, 0.999] < 7 and longest[0.9, 0.95] < 1.2


class Nested(torch.optim.Optimizer):
    """Keeps what it remembers in lists and dicts."""

    def __init__(self, params):
        super().__init__(params, {})

    def step(self, closure=None):
        pass


def test_moments_in_lists_and_dicts_are_reset_too():
    model, layer = network("cpu")
    bank = layer.blueprint_weights
    optimizer = Nested([bank])
    moments = [torch.ones_like(bank) for _ in range(4)]
    others = [torch.ones(bank.numel()), torch.ones(3)]
    optimizer.state[bank] = {
        "list": [moments[0], 3, others[0]],
        "deep": {"a": {"b": (moments[1], "name")}, "c": others[1], "d": None},
        "queue": deque([moments[2]]),
        "plain": moments[3],
    }
    layer.reset_optimizer_state(optimizer, [1, 2])
    expected = torch.where(used(layer, [1, 2]), 0.0, 1.0)
    assert all(torch.equal(moment, expected) for moment in moments)
    assert all(other.all() for other in others)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("call", ["function", "method", "without layer"])
def test_reset_zeroes_the_seeds_moments_and_no_others(device, name, call):
    model, layer = network(device)
    optimizer = OPTIMIZERS[name](kx.param_groups(model, 0.01))
    steps(model, optimizer, 5)
    before = copy.deepcopy(optimizer.state_dict())
    expected = [torch.where(used(layer, [1, 2]), 0.0, moment) for moment in moments(optimizer, layer)]
    {
        "function": lambda: kx.reset_optimizer_state(optimizer, [1, 2], layer),
        "method": lambda: layer.reset_optimizer_state(optimizer, torch.tensor([False, True, True, False])),
        "without layer": lambda: kx.reset_optimizer_state(optimizer, torch.tensor([2, 1])),
    }[call]()
    for moment, wanted in zip(moments(optimizer, layer), expected, strict=True):
        assert torch.equal(moment, wanted) and moment.any()
    after = optimizer.state_dict()
    for index in (1, 2, 3, 4):  # the other parameters, and every counter of steps
        for key, value in before["state"][index].items():
            assert torch.equal(torch.as_tensor(after["state"][index][key]), torch.as_tensor(value)), key
    assert torch.equal(
        torch.as_tensor(after["state"][0].get("step", 0)), torch.as_tensor(before["state"][0].get("step", 0))
    )


@pytest.mark.parametrize("change", ["germinated", "fossilized", "culled"])
@pytest.mark.parametrize("how", ["single", "batch", "state"])
def test_moments_are_reset_at_the_step_after_a_blueprint_begins_or_ends(change, how):
    model, layer = network("cpu")
    optimizer = torch.optim.AdamW(kx.param_groups(model, 0.01))
    twin_model, twin = copy.deepcopy((model, layer))
    other = torch.optim.AdamW(twin_model.parameters(), 0.01, weight_decay=0.0)
    for group, decay in zip(optimizer.param_groups, (0.0, 0.0), strict=True):
        group["weight_decay"] = decay
    steps(model, optimizer, 4)
    steps(twin_model, other, 4)
    for one in (layer, twin):
        if how == "single":
            one.lifecycle_manager.valid_transitions.add((3, kx.ExtendedLifecycle.parse(change)))
            assert one.request_state_transition(1, change)
        elif how == "batch":
            assert not one.request_state_transitions(1, change, rules=ANY).any()
        else:
            one.extended_state.set_state(1, change)
    twin.reset_optimizer_state(other, 1)
    for _ in range(3):
        steps(model, optimizer, 1)
        steps(twin_model, other, 1)
        assert torch.equal(layer.blueprint_weights, twin.blueprint_weights)
    assert not moments(optimizer, layer)[0][used(layer, [1])].any()


def test_a_blueprint_that_began_and_went_on_between_two_steps_starts_afresh(device):
    model, layer = network(device)
    optimizer = torch.optim.SGD(kx.param_groups(model, 0.0), momentum=0.9)
    steps(model, optimizer, 3)
    before = moments(optimizer, layer)[0].clone()
    layer.request_state_transitions([0, 1], "rolled_back")
    layer.recycle()
    for name in ("germinated", "training"):
        layer.request_state_transitions([0, 1], name)
    layer.step_lifecycle()
    steps(model, optimizer, 1)
    assert not moments(optimizer, layer)[0][used(layer, [0, 1])].any()
    assert moments(optimizer, layer)[0][used(layer, [2, 3])].all() and before[used(layer, [0])].all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_nothing_waits_for_a_gpu():
    model, layer = network("cuda")
    optimizer = torch.optim.AdamW(kx.param_groups(model, 0.01))
    steps(model, optimizer, 2)
    mask = layer.lifecycle_states == 3
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer.request_state_transitions(mask, "culled", rules=ANY)
        optimizer.step()
        layer.reset_optimizer_state(optimizer, mask)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not moments(optimizer, layer)[0][used(layer, range(4))].any()


def test_nothing_to_forget(device):
    model, layer = network(device)
    stranger = torch.optim.Adam(model[2].parameters())
    fresh = torch.optim.Adam(kx.param_groups(model))
    plain = torch.optim.SGD(model.parameters(), 0.1)
    steps(model, plain, 1)
    for optimizer in (stranger, fresh, plain):
        kx.reset_optimizer_state(optimizer, None, layer)


def test_bad_arguments():
    model, layer = network("cpu")
    optimizer = torch.optim.Adam(kx.param_groups(model))
    steps(model, optimizer, 1)
    for seeds, error in ((4, ValueError), ([0, -1], ValueError), ([0.5], TypeError), ([True], ValueError)):
        before = moments(optimizer, layer)[0].clone()
        with pytest.raises(error):
            kx.reset_optimizer_state(optimizer, seeds, layer)
        assert torch.equal(moments(optimizer, layer)[0], before)
    stranger = torch.optim.Adam(nn.Linear(2, 2).parameters())
    with pytest.raises(ValueError, match="trains the banks of 0 layers"):
        kx.reset_optimizer_state(stranger, 0)
