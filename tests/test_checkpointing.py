"""Activation checkpointing: the recomputation inside a backward must not count telemetry again."""

from __future__ import annotations

import copy
import functools
import threading

import checks
import pytest
import stack_model
import torch
from cases import Case, build
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)

CASE = Case((12, 40), 5, states="grafted", telemetry="fresh", dtype=torch.float64)
NOTE = (
    "seeds that change between forward and backward are not noticed, as weights are not: the recomputation uses what they "
    "are by then, so change them after the backward"
)
MARKS = (
    pytest.mark.stack("activation checkpointing: non-reentrant", note=NOTE),
    pytest.mark.stack("activation checkpointing: reentrant", note=NOTE),
)
REENTRANT = pytest.mark.parametrize(
    "reentrant",
    [pytest.param(False, marks=MARKS[0], id="non-reentrant"), pytest.param(True, marks=MARKS[1], id="reentrant")],
)


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


@pytest.mark.stack("activation checkpointing: nested")
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


# ---- a layer, in other ways to checkpoint ----------------------------------------------------------------------------


class Block(torch.nn.Module):
    """A grown layer with what draws random numbers behind it."""

    def __init__(self, device, dropout: float = 0.0):
        super().__init__()
        self.grown = stack_model.Net(device).grown
        self.dropout = torch.nn.Dropout(dropout)

    def forward(self, x):
        return self.dropout(self.grown(x)).tanh().sin()


def compare_with_unchecked(block: Block, run, exact: bool = True, steps: int = 2) -> None:
    """``run(x)`` has the gradients of the block called without a checkpoint; telemetry counts each batch once."""
    plain, device = copy.deepcopy(block), block.grown.device
    x = torch.linspace(-2, 2, 5 * stack_model.INPUTS, dtype=torch.float64, device=device).view(5, -1)
    leaf, plain_leaf = x.clone().requires_grad_(), x.clone().requires_grad_()
    for step in range(steps):
        for forward, given in ((run, leaf), (plain, plain_leaf)):
            torch.manual_seed(step)
            forward(given).square().sum().backward()
    same = checks.same_bits if exact else functools.partial(torch.allclose, rtol=1e-12, atol=1e-14)
    assert same(leaf.grad, plain_leaf.grad)
    for got, expected in zip(block.parameters(), plain.parameters(), strict=True):
        assert same(got.grad, expected.grad)
    assert same(block.grown.telemetry, plain.grown.telemetry)
    assert same(block.grown.grad_telemetry, plain.grown.grad_telemetry)
    stack_model.assert_counted_once(block.grown, steps, steps)


@REENTRANT
@pytest.mark.stack("activation checkpointing: preserve_rng_state")
def test_random_numbers_are_drawn_again(device, reentrant):
    block = Block(device, dropout=0.4)
    compare_with_unchecked(block, lambda x: checkpoint(block, x, use_reentrant=reentrant, preserve_rng_state=True))


@REENTRANT
@pytest.mark.stack("activation checkpointing: preserve_rng_state")
def test_without_random_numbers(device, reentrant):
    block = Block(device)
    compare_with_unchecked(block, lambda x: checkpoint(block, x, use_reentrant=reentrant, preserve_rng_state=False))


@REENTRANT
def test_a_change_before_the_recomputation(device, reentrant):
    """What the note says."""
    block, twin = Block(device), Block(device)
    x = torch.linspace(-2, 2, 5 * stack_model.INPUTS, dtype=torch.float64, device=device).view(5, -1)
    y = checkpoint(block, x.clone().requires_grad_(), use_reentrant=reentrant)
    for each in (block, twin):
        each.grown.set_alpha(None, 0.75)
        each.grown.step_lifecycle()
    y.sum().backward()
    twin(x).sum().backward()
    for got, expected in zip(block.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.stack("activation checkpointing: selective (create_selective_checkpoint_contexts)")
@pytest.mark.parametrize("traced", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("kept", [False, True], ids=["recomputed", "kept"])
def test_selective(device, traced, kept):
    """The operator among what is recomputed, and among what is kept."""
    torch._dynamo.reset()

    def policy(context, operator, *args, **kwargs):
        keeps = kept and operator is torch.ops.kasmina.chunked_forward.default
        return CheckpointPolicy.MUST_SAVE if keeps else CheckpointPolicy.PREFER_RECOMPUTE

    block = Block(device)
    contexts = functools.partial(create_selective_checkpoint_contexts, policy)

    def run(x):
        return checkpoint(block, x, use_reentrant=False, context_fn=contexts)

    compare_with_unchecked(block, torch.compile(run, backend="aot_eager", fullgraph=True) if traced else run)


@pytest.mark.stack("activation checkpointing: under torch.compile")
@pytest.mark.parametrize("outside", [False, True], ids=["checkpoint compiled", "compiled checkpointed"])
@REENTRANT
def test_compiled(device, outside, reentrant):
    """A compiled function with a checkpoint in it, and a checkpoint around a compiled layer."""
    torch._dynamo.reset()
    block = Block(device)
    # Where a reentrant checkpoint is within what is compiled, torch leaves the graph for it.
    compiled = functools.partial(torch.compile, backend="aot_eager", fullgraph=outside or not reentrant)
    if outside:
        inner = compiled(block)
        run = functools.partial(checkpoint, inner, use_reentrant=reentrant)
    else:
        run = compiled(lambda x: checkpoint(block, x, use_reentrant=reentrant))
    compare_with_unchecked(block, run)
