"""Activation checkpointing: the recomputation inside a backward must not count telemetry again."""

from __future__ import annotations

import threading

import checks
import pytest
import torch
from cases import Case, build
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

CASE = Case((12, 40), 5, states="grafted", telemetry="fresh", dtype=torch.float64)
REENTRANT = pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])


class Layer(torch.nn.Module):
    """One operator with its buffers; counts how often it really runs."""

    def __init__(self, backend: str, device, rng: int = 0):
        super().__init__()
        inputs = build(Case(**{**CASE.__dict__, "rng": rng}), device)
        self.operator = checks.BACKENDS[backend].chunked_forward
        self.inputs, self.calls = inputs, 0
        self.weights = torch.nn.Parameter(inputs.weights)
        self.alpha = torch.nn.Parameter(inputs.alpha)

    def forward(self, x):
        self.calls += 1
        inputs = self.inputs
        buffers = (inputs.telemetry, inputs.grad_telemetry)
        return self.operator(x, inputs.offsets, inputs.state, self.alpha, self.weights, *buffers).tanh()


def layers_and_input(backend: str, device, count: int):
    layers = torch.nn.ModuleList(Layer(backend, device, rng) for rng in range(count))
    x = torch.linspace(-2, 2, 12 * 40, dtype=torch.float64, device=device).view(12, 40).requires_grad_()
    return layers, x


def compare_with_plain(backend: str, device, layers, x) -> None:
    """Telemetry, gradient telemetry and gradients are those of a run without checkpoints."""
    plain, plain_x = layers_and_input(backend, device, len(layers))
    y = plain_x
    for layer in plain:
        y = layer(y)
    y.square().sum().backward()
    assert checks.same_bits(x.grad, plain_x.grad)
    for layer, other in zip(layers, plain, strict=True):
        assert checks.same_bits(layer.inputs.telemetry, other.inputs.telemetry)
        assert checks.same_bits(layer.inputs.grad_telemetry, other.inputs.grad_telemetry)
        assert layer.inputs.telemetry[:, 3].eq(1).all() and layer.inputs.grad_telemetry[:, 2].eq(1).all()
        assert checks.same_bits(layer.weights.grad, other.weights.grad)
        assert checks.same_bits(layer.alpha.grad, other.alpha.grad)


@REENTRANT
@checks.backends
def test_one_layer(backend, device, reentrant):
    layers, x = layers_and_input(backend, device, 1)
    checkpoint(layers[0], x, use_reentrant=reentrant).square().sum().backward()
    assert layers[0].calls == 2
    compare_with_plain(backend, device, layers, x)


@REENTRANT
@checks.backends
def test_sequence(backend, device, reentrant):
    layers, x = layers_and_input(backend, device, 3)
    y = checkpoint_sequential(torch.nn.Sequential(*layers), 2, x, use_reentrant=reentrant)
    y.square().sum().backward()
    assert [layer.calls for layer in layers] == [2, 1, 1]  # the last segment, of two, is not checkpointed
    compare_with_plain(backend, device, layers, x)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("inner", [False, True], ids=["inner non-reentrant", "inner reentrant"])
@pytest.mark.parametrize("outer", [False, True], ids=["outer non-reentrant", "outer reentrant"])
@checks.backends
def test_nested(backend, device, outer, inner):
    layers, x = layers_and_input(backend, device, 2)

    def both(h):
        return checkpoint(layers[1], layers[0](h), use_reentrant=inner)

    checkpoint(both, x, use_reentrant=outer).square().sum().backward()
    assert layers[1].calls >= 2
    compare_with_plain(backend, device, layers, x)


@REENTRANT
@checks.backends
def test_several_steps(backend, device, reentrant):
    layers, x = layers_and_input(backend, device, 1)
    for _ in range(3):
        checkpoint(layers[0], x, use_reentrant=reentrant).sum().backward()
    with torch.no_grad():
        layers[0](x)
    assert layers[0].inputs.telemetry[:, 3].eq(4).all() and layers[0].inputs.grad_telemetry[:, 2].eq(3).all()


@checks.backends
def test_update_operator(backend, device):
    """telemetry_update in a checkpointed function counts once as well."""
    inputs = build(CASE, device)
    x = inputs.x.clone().requires_grad_()

    def function(h):
        checks.BACKENDS[backend].telemetry_update(h, inputs.offsets, inputs.telemetry)
        return h.sin().sin()

    checkpoint(function, x, use_reentrant=False).sum().backward()
    assert inputs.telemetry[:, 3].eq(1).all()
    assert torch.equal(inputs.telemetry[:, 0], 12.0 * inputs.offsets.diff())


@checks.backends
def test_forward_inside_a_backward_is_never_counted(backend, device):
    """Whatever starts it; a forward of another thread at the same time is counted."""
    layers, x = layers_and_input(backend, device, 1)
    layer, elsewhere = layers[0], Layer(backend, device)

    def hook(grad):
        with torch.no_grad():
            layer(x)
            thread = threading.Thread(target=lambda: elsewhere(x.detach()))
            thread.start()
            thread.join()

    y = layer(x)
    y.register_hook(hook)
    y.sum().backward()
    assert layer.calls == 2 and layer.inputs.telemetry[:, 3].eq(1).all()
    assert elsewhere.inputs.telemetry[:, 3].eq(1).all()


@checks.backends
def test_counting_resumes_after_a_failed_backward(backend, device):
    layers, x = layers_and_input(backend, device, 1)

    def fail(grad):
        raise ValueError("on purpose")

    y = layers[0](x)
    y.register_hook(fail)
    with pytest.raises(ValueError, match="on purpose"):
        y.sum().backward()
    layers[0](x)
    assert layers[0].inputs.telemetry[:, 3].eq(2).all()
