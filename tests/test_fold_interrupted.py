"""Folding that fails while it writes, for want of memory or by Ctrl-C: what becomes of the weights."""

from __future__ import annotations

import pytest
import torch
from folding import bits, grow, same
from torch import nn

from kasmina_ext import fold
from kasmina_ext.fold import absorb, fold_, unfold_
from kasmina_ext.layer import KasminaLayer
from kasmina_ext.lifecycle import ExtendedLifecycle


def model_of_every_change(device):
    """Weights that change, a bias that is added, a norm that becomes affine."""
    torch.manual_seed(0)
    bases = (nn.Linear(6, 8), nn.Linear(8, 8, bias=False), nn.LayerNorm(8, elementwise_affine=False), nn.Linear(8, 4))
    layers = [KasminaLayer(base, chunk_size=2, num_blueprints=4, telemetry=False) for base in bases]
    return nn.Sequential(*(grow(layer, seed) for seed, layer in enumerate(layers))).eval().to(device)


def interrupt(monkeypatch, call, error):
    """The ``call``-th module gets half of what it should, then ``error``."""
    original, calls = fold.apply_changes, []

    def apply(module, changes):
        calls.append(module)
        if len(calls) < call:
            return original(module, changes)
        original(module, changes[: (len(changes) + 1) // 2])
        raise error

    monkeypatch.setattr(fold, "apply_changes", apply)


@pytest.mark.parametrize("call", [1, 2, 3, 4])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), torch.cuda.OutOfMemoryError("no memory")], ids=repr)
def test_folding_puts_the_weights_back(monkeypatch, device, call, error):
    model = model_of_every_change(device)
    before = bits(model)
    with monkeypatch.context() as patch:
        interrupt(patch, call, error)
        with pytest.raises(type(error)):
            fold_(model)
    assert same(bits(model), before) and model[1].base_layer.bias is None
    with pytest.raises(ValueError, match="nothing to unfold"):
        unfold_(model)
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(1)).to(device)
    with torch.no_grad():
        y = model(x)
        torch.testing.assert_close(fold_(model)(x), y)
    assert same(bits(unfold_(model)), before)


@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_absorbing_is_whole_module_by_module(monkeypatch, device, call):
    model = model_of_every_change(device)
    for layer in model:
        layer.lifecycle_states = int(ExtendedLifecycle.FOSSILIZED)
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(1)).to(device)
    with torch.no_grad():
        y = model(x)
        before = bits(model)
        with monkeypatch.context() as patch:
            interrupt(patch, call, KeyboardInterrupt())
            with pytest.raises(KeyboardInterrupt):
                absorb(model)
        done = [bool((layer.lifecycle_states == int(ExtendedLifecycle.DORMANT)).all()) for layer in model]
        assert sum(done) == call - 1 and (call > 1 or same(bits(model), before))
        torch.testing.assert_close(model(x), y)
        absorb(model)
        torch.testing.assert_close(model(x), y)
    assert all((layer.lifecycle_states == int(ExtendedLifecycle.DORMANT)).all() for layer in model)
