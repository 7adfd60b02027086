"""torch.compile: one graph for a layer's whole life, which does what eager does."""

from __future__ import annotations

import copy

import checks
import pytest
import stack_model
import torch
import torch._dynamo.testing
import torch._inductor.cudagraph_trees as cudagraph_trees
from stack_model import Net, live, twins
from torch import nn
from torch._dynamo.utils import counters

from kasmina_ext import KasminaLayer

NO_RECOMPILATION = torch._dynamo.config.patch(error_on_recompile=True)
ROWS = [2, 3, 5, 4, 8, 2, 7, 64, 3, 9, 6, 5]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()


@pytest.mark.stack("torch.compile: fullgraph training step")
@pytest.mark.stack("torch.compile: dynamic=True, no recompilation from batch 2 up")
@pytest.mark.stack("torch.compile: one graph through all states, strategies, alpha ramps, recycling and step_lifecycle")
@pytest.mark.stack("torch.compile: telemetry counts each batch once")
def test_a_whole_life_in_one_graph(device):
    """Training with batches of any size, while the seeds go through all states; twice, the second time with torch.compile."""
    net, twin = twins(device)
    with NO_RECOMPILATION:
        life = live(net, torch.compile(net, fullgraph=True, dynamic=True), ROWS)
    expected = live(twin, twin, ROWS)
    stack_model.assert_same_life(life, expected)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    assert len(expected.seen) == stack_model.STATES * stack_model.STRATEGIES
    assert len(expected.alphas) > 2, "alpha ramped"
    stack_model.assert_counted_once(net.grown, len(ROWS), len(ROWS))


@pytest.mark.stack("torch.compile: fullgraph forward")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inference_in_one_graph(device, dtype):
    layer = KasminaLayer(nn.Identity(), hidden_dim=88, num_seeds=44, num_blueprints=4, device=device)
    stack_model.grow(layer)
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.randn(5, 88, device=device, dtype=dtype)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert checks.same_bits(compiled(x), layer(x))
    assert not counters["graph_break"]
    stack_model.assert_counted_once(layer, 4, 0)


@pytest.mark.stack("torch.compile: telemetry on and off recompiles at most once")
def test_telemetry_on_and_off(device):
    net = Net(device)
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, backend=graphs, fullgraph=True)
    x = torch.randn(5, stack_model.INPUTS, device=device, dtype=torch.float64)
    for step, on in enumerate((True, False, True, False, True)):
        net.grown.telemetry_enabled = on
        compiled(x + step).sum().backward()
        stack_model.assert_counted_once(net.grown, step // 2 + 1, step // 2 + 1)
    assert graphs.frame_count == 2


@pytest.mark.stack("torch.compile: request_state_transitions and step_lifecycle traced")
def test_lifecycle_in_one_graph(device):
    """Requests, recycling and a step in one graph of the default backend; the seeds are other ones each time."""

    def a_day(layer, ids, targets, blueprints, strategies):
        first = layer.request_state_transitions(ids, targets, blueprints, strategies)
        second = layer.request_state_transitions(None, "grafting", rules=stack_model.ANY)
        layer.step_lifecycle()
        return first, second, layer.recycle(ids)

    layer = Net(device).grown
    layer(torch.randn(9, stack_model.INPUTS, device=device, dtype=torch.float64))  # MIXED germinates at the mean
    twin = copy.deepcopy(layer)
    traced = torch.compile(a_day, fullgraph=True)
    generator = torch.Generator().manual_seed(0)
    with NO_RECOMPILATION:
        for _ in range(5):
            limits = ((-1, stack_model.SEEDS + 1), (0, stack_model.STATES), (-1, 5), (0, stack_model.STRATEGIES))
            requests = [torch.randint(low, high, (30,), generator=generator).to(device) for low, high in limits]
            for got, expected in zip(traced(layer, *requests), a_day(twin, *requests), strict=True):
                assert torch.equal(got, expected)
            for name, tensor in twin.state_dict().items():
                stack_model.compare(name, layer.state_dict()[name], tensor, rtol=1e-12, atol=0)
    assert counters["stats"]["unique_graphs"] == 1


CHANGES = {
    "set_alpha": lambda layer: layer.set_alpha(0, 0.5),
    "request": lambda layer: layer.request_state_transitions(0, "germinated", rules=stack_model.ANY),
    "traced request": torch.compile(
        lambda layer: layer.request_state_transitions(0, "germinated", rules=stack_model.ANY), backend="aot_eager"
    ),
    "step_lifecycle": lambda layer: layer.step_lifecycle(),
    "traced step_lifecycle": torch.compile(lambda layer: layer.step_lifecycle(), backend="aot_eager"),
    "view of the state": lambda layer: layer.lifecycle_states.fill_(3),
    "reset_parameters": lambda layer: layer.reset_parameters(),
}


@pytest.mark.stack(
    "torch.compile: state changed between forward and backward",
    refused="autograd's error that a variable needed for gradient computation has been modified by an inplace operation",
)
def test_state_changed_between_forward_and_backward(device):
    net = Net(device)
    x = torch.randn(5, stack_model.INPUTS, device=device, dtype=torch.float64)
    for forward in (net, torch.compile(net, fullgraph=True, backend="aot_eager")):
        for change in CHANGES.values():
            loss = forward(x).sum()
            change(net.grown)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()
        forward(x).sum().backward()


@pytest.mark.stack("torch.compile: fullgraph training step", note="compiled block by block: equal layers share a graph")
def test_regional_compilation():
    """Each block of a network compiled by itself: blocks that differ in their tensors alone share the graph."""
    torch.manual_seed(0)
    layers = (KasminaLayer(nn.Linear(8, 8), num_seeds=4, num_blueprints=4) for _ in range(4))
    blocks = nn.Sequential(*(nn.Sequential(layer, nn.Tanh()) for layer in layers))
    twin, x = copy.deepcopy(blocks), torch.randn(3, 8, requires_grad=True)
    for number, block in enumerate(blocks):
        stack_model.grow(block[0]), stack_model.grow(twin[number][0])
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    for block in blocks:
        block.compile(backend=graphs, fullgraph=True)
    blocks(x).square().sum().backward()
    twin(x).square().sum().backward()
    for got, expected in zip(blocks.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad)
    assert graphs.frame_count == 1


@pytest.mark.stack("torch.compile: compiled autograd, the whole step in one function")
def test_backward_within_the_compiled_function(device):
    """loss.backward() in what is compiled, through the operator's own derivative."""
    net, twin = twins(device)
    x = torch.randn(5, stack_model.INPUTS, device=device, dtype=torch.float64)

    def step(model):
        model(x).square().mean().backward()

    with torch._dynamo.config.patch(compiled_autograd=True):
        compiled = torch.compile(lambda: step(net), backend="aot_eager")
        for _ in range(2):
            compiled(), step(twin)
    for (name, got), expected in zip(net.named_parameters(), twin.parameters(), strict=True):
        stack_model.compare(name, got.grad, expected.grad, rtol=1e-9, atol=1e-11)
    stack_model.assert_counted_once(net.grown, 2, 2)


@needs_cuda
@pytest.mark.stack("torch.compile: mode='reduce-overhead', CUDA graphs not skipped", device="cuda")
def test_cuda_graph_trees():
    """A whole life replayed from CUDA graphs, forward and backward, telemetry on."""
    device = torch.device("cuda")
    net, twin = twins(device)
    with NO_RECOMPILATION:
        life = live(net, torch.compile(net, fullgraph=True, mode="reduce-overhead"), [8] * 24)
    stack_model.assert_same_life(life, live(twin, twin, [8] * 24))
    stack_model.assert_counted_once(net.grown, 24, 24)
    assert_recorded()


@needs_cuda
@pytest.mark.stack("torch.compile: mode='reduce-overhead', CUDA graphs not skipped", device="cuda")
def test_cuda_graph_trees_in_inference():
    net = Net(torch.device("cuda"), torch.bfloat16)
    compiled = torch.compile(net, fullgraph=True, mode="reduce-overhead")
    for step in range(6):
        x = torch.randn(8, stack_model.INPUTS, device="cuda", dtype=torch.bfloat16)
        with torch.inference_mode():
            got, expected = compiled(x).clone(), net(x)
        torch.testing.assert_close(got, expected)
        stack_model.turn(net.grown, step)
    stack_model.assert_counted_once(net.grown, 12, 0)
    assert_recorded()


def assert_recorded() -> None:
    """CUDA graphs were recorded, of everything: nothing was skipped or left out."""
    assert counters["inductor"]["cudagraph_skips"] == 0
    manager = cudagraph_trees.get_manager(torch.cuda.current_device(), create_if_none_exists=False)
    assert manager is not None and any(manager.roots.values())
