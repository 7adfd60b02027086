"""Optimizers: frozen fossils, banks without decay, and moments that a new blueprint does not inherit."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

import kasmina_ext as kx
from kasmina_ext import optim as kasmina_optim

ANY = kx.TransitionRules.any()


class SignMomentum(torch.optim.Optimizer):
    """Like Lion: one moment, whose sign is the step."""

    def __init__(self, params, lr=1e-3, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                moment = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * (0.9 * moment + 0.1 * p.grad).sign())
                moment.lerp_(p.grad, 0.01)


OPTIMIZERS = {
    "adamw": torch.optim.AdamW,
    "adamw-foreach-amsgrad": lambda groups: torch.optim.AdamW(groups, amsgrad=True, foreach=True),
    "adamw-fused": lambda groups: torch.optim.AdamW(groups, fused=True),
    "sgd": lambda groups: torch.optim.SGD(groups, momentum=0.9),
    "sgd-nesterov": lambda groups: torch.optim.SGD(groups, momentum=0.9, nesterov=True),
    "lion-like": SignMomentum,
}


@pytest.fixture(autouse=True)
def one_thread():
    """Thousands of tiny steps: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def network(device, **arguments):
    torch.manual_seed(0)
    layer = kx.KasminaLayer(nn.Linear(6, 16, device=device), num_seeds=4, num_blueprints=4, **arguments)
    model = nn.Sequential(layer, nn.Tanh(), nn.Linear(16, 3, device=device))
    for name in ("germinated", "training", "grafting"):
        layer.request_state_transitions(None, name, [0, 1, 2, 0] if name == "germinated" else None)
    return model, layer


def steps(model, optimizer, count):
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(32, 6, generator=generator).to(device)
    y = torch.randint(0, 3, (32,), generator=generator).to(device)
    for _ in range(count):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def moments(optimizer, layer):
    values = optimizer.state[layer.blueprint_weights].values()
    found = [v for v in values if isinstance(v, torch.Tensor) and v.shape == layer.blueprint_weights.shape]
    assert found
    return found


def used(layer, seeds):
    """bool [P, H] from the specification: the seeds' rows and features."""
    mask = torch.zeros_like(layer.blueprint_weights, dtype=torch.bool)
    offsets = layer.seed_offsets.tolist()
    for seed in seeds:
        p, rows = int(layer.blueprint_ids[seed]), 2 if int(layer.grafting_strategies[seed]) == 3 else 1
        mask[p : p + rows, offsets[seed] : offsets[seed + 1]] = True
    return mask


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


def test_without_the_reset_a_fossil_would_move(device):
    """What the test above would say of an optimizer that nobody looks after."""
    model, layer = network(device)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.0)
    steps(model, optimizer, 30)
    layer.request_state_transitions(0, "fossilized", rules=ANY)
    before = layer.blueprint_weights.detach().clone()
    steps(model, optimizer, 1)
    assert (layer.blueprint_weights != before)[used(layer, [0])].all()


# ---- moments ---------------------------------------------------------------------------------------------------------


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
    with pytest.raises(ValueError, match="known to train the banks of 0 layers"):
        kx.reset_optimizer_state(stranger, 0)


def test_looking_after_layers_keeps_none_of_them_alive():
    model, layer = network("cpu")
    optimizer = torch.optim.Adam(kx.param_groups(model))
    steps(model, optimizer, 1)
    alive = weakref.ref(layer), weakref.ref(optimizer)
    del model, layer, optimizer
    gc.collect()
    assert [ref() for ref in alive] == [None, None]
