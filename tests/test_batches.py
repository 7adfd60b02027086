"""Batches that are passed again and again: what a network does to them, and what cannot be one."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from test_calibrate import banks, damaged, inputs, network, same, state
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import kasmina_ext as kx


class InPlace(nn.Module):
    """Shifts its input before anything else: ``at_once`` in its own memory."""

    def __init__(self, net: nn.Module, at_once: bool):
        super().__init__()
        self.net, self.at_once = net, at_once

    def forward(self, x):
        x = x.mul_(2).sub_(1) if self.at_once else 2 * x - 1
        return self.net(x)


@pytest.mark.parametrize("kind", ["tensors", "tuples", "lists", "dicts", "by hand"])
def test_networks_that_work_in_place_on_their_input(kind, device):
    xs = inputs(device)
    kinds = {"tuples": lambda x: (x,), "lists": lambda x: [x], "dicts": lambda x: {"x": x}}
    forward = (lambda model, batch: model(batch[0])) if kind == "by hand" else None
    pack = kinds.get(kind, (lambda x: (x,)) if kind == "by hand" else lambda x: x)
    found = []
    for at_once in (False, True):
        healthy = InPlace(network(device=device), at_once)
        model, batches = damaged(healthy), [pack(x.clone()) for x in xs]
        recorded = kx.record_activations(healthy, "net.[024]", batches, forward=forward)
        report = kx.calibrate_(model, healthy, batches, forward=forward)
        again = damaged(healthy)
        kx.calibrate_(again, recorded, batches, forward=forward)
        left = [batch if kind == "tensors" else next(iter(dict(batch).values() if kind == "dicts" else batch)) for batch in batches]  # fmt: skip
        assert all(map(torch.equal, left, xs)), "the user's own"
        found.append((banks(model), banks(again), dict(report)))
    (a, b, rows), (c, d, rows_at_once) = found
    assert all(map(torch.equal, a + b, c + d)) and all(map(torch.equal, a, b)) and rows == rows_at_once


def test_measuring_networks_that_work_in_place(device):
    found = []
    for at_once in (False, True):
        healthy = InPlace(network(device=device), at_once)
        model, batches = damaged(healthy), [x.clone() for x in inputs(device)]
        kx.calibrate_(model, healthy, inputs(device))
        found.append(kx.credit(model, batches, lambda x, model=model: model(x).square().mean()))
        assert all(map(torch.equal, batches, inputs(device)))
        asked = [x.clone().requires_grad_(x is not batches[0]) for x in batches]
        seen = []
        kx.credit(
            model, asked, lambda x, model=model, seen=seen: seen.append(x) or model(x * 1).square().mean(), points=1
        )
        assert [x.requires_grad for x in seen[:3]] == [False, True, True] and all(x.is_leaf for x in seen)
    assert all(map(torch.equal, found[0].mean, found[1].mean)) and found[0].gain == found[1].gain != 0


def test_batches_with_labels():
    healthy, xs = network(), inputs()
    loader = DataLoader(TensorDataset(torch.cat(xs), torch.zeros(sum(map(len, xs)))), batch_size=20)
    model = damaged(healthy)
    before = state(model)
    for batches in (loader, [{"input": xs[0], "label": 3}]):
        with pytest.raises(
            TypeError, match=r"does not fit Sequential's forward \(.*\): pass forward=.*batches have labels"
        ):
            kx.calibrate_(model, healthy, batches)
    assert same(before, state(model))
    kx.calibrate_(model, healthy, loader, forward=lambda net, batch: net(batch[0]))
    want = damaged(healthy)
    kx.calibrate_(want, healthy, torch.cat(xs).split(20))
    assert all(map(torch.equal, banks(model), banks(want)))


def test_a_type_error_of_the_network_itself_stays_as_it_is():
    healthy = network()
    model = damaged(healthy)
    model[1].register_forward_hook(lambda *arguments: 1 + "one")
    with pytest.raises(TypeError, match=r"^unsupported operand"):
        kx.calibrate_(model, healthy, inputs())


def test_what_is_no_batches_and_other_arguments():
    healthy, xs = network(), inputs()
    model = damaged(healthy)
    before = state(model)
    for batches, settings, error, words in (
        (xs[0], {}, TypeError, r"a single one is \[batch\], got a Tensor"),
        ({"x": xs[0]}, {}, TypeError, r"a single one is \[batch\], got a dict"),
        (xs, {"optimizer": "adam"}, TypeError, "optimizer must be a torch.optim.Optimizer, got str"),
        (xs, {"ridge": "1"}, TypeError, "ridge must be a number, got str"),
        (xs, {"memory": -1}, ValueError, "memory must be a number of bytes, at least 0, got -1"),
        (xs, {"memory": None}, ValueError, "memory must be a number of bytes"),
    ):
        with pytest.raises(error, match=words):
            kx.calibrate_(model, healthy, batches, **settings)
        assert same(before, state(model)), words
    kx.calibrate_(model, healthy, xs, memory=float("inf"))


def test_a_handle_on_a_reference():
    healthy = damaged(network(), share=0.0)
    model, other = (damaged(network()) for _ in range(2))
    kx.calibrate_(model, healthy, inputs())
    kx.calibrate_(other, kx.Seeds(copy.deepcopy(healthy)), inputs())
    assert all(map(torch.equal, banks(model), banks(other)))


def test_a_bar_needs_rich(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    healthy = network()
    kx.calibrate_(damaged(healthy), healthy, inputs())  # None: it goes without
    with pytest.raises(ImportError, match=r"a progress bar needs rich: pip install kasmina_ext\[demo\]"):
        kx.calibrate_(damaged(healthy), healthy, inputs(), progress=True)


class Named(nn.Module):
    """Returns a dict, as models of transformers do, and has a part that returns none at first."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
        self.odd = Odd()

    def forward(self, x):
        return {"y": self.odd(self.inner(x))}


class Odd(nn.Module):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return x if self.calls == 1 else [x]


def test_modules_that_return_no_tensor_are_recorded_only_if_named():
    model, xs = Named(), [torch.ones(1, 2), torch.zeros(1, 2), torch.ones(1, 2)]
    recorded = kx.record_activations(model, "*", xs)
    assert list(recorded) == ["inner", "inner.0", "inner.1"] and {len(calls) for calls in recorded.values()} == {3}
    for name in ("", ["inner", "odd"]):
        with pytest.raises(TypeError, match="returned (dict|list); expected a tensor"):
            kx.record_activations(Named(), name, xs)


def test_names_that_look_like_patterns_are_recorded():
    model = nn.ModuleDict({"a[b]": nn.Linear(2, 2), "ab": nn.Linear(2, 3)})
    x = torch.ones(1, 2)
    recorded = kx.record_activations(model, "a[b]", [x], forward=lambda net, x: [each(x) for each in net.values()])
    assert list(recorded) == ["a[b]", "ab"] and torch.equal(recorded["a[b]"][0], model["a[b]"](x))
