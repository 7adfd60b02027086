"""What a CUDA user counts on beyond right numbers: no sync, no stray allocation, streams, graphs, other devices."""

from __future__ import annotations

from collections.abc import Callable

import cases
import checks
import pytest
import torch
from cases import Case, Inputs, build

DEVICE = torch.device("cuda")
USABLE, WHY_NOT = (False, "no CUDA device")
if torch.cuda.is_available():
    USABLE, WHY_NOT = checks.kernel_for(DEVICE)
pytestmark = pytest.mark.skipif(not USABLE, reason=WHY_NOT)

SIZES = [
    Case((2000, 256), 16, dtype=torch.bfloat16, chunks="balanced", telemetry="fresh"),
    Case((8, 4096), 1000, dtype=torch.float32, telemetry="fresh"),
    Case((100_000, 8), 3, dtype=torch.float16, telemetry="fresh"),
    Case((4, 30, 30, 64), 9, dtype=torch.float64, layout="nchw", grad_layout="nchw", telemetry="fresh"),
]


def forward(inputs: Inputs) -> torch.Tensor:
    return checks.ops.chunked_forward(inputs.x, *inputs.seeds, inputs.telemetry, inputs.grad_telemetry)


def backward(inputs: Inputs) -> tuple[torch.Tensor, ...]:
    args = (inputs.grad_y, inputs.x, *inputs.seeds, inputs.grad_telemetry, True, True, True)
    return checks.ops.chunked_backward(*args)


def update(inputs: Inputs) -> None:
    checks.ops.telemetry_update(inputs.x, inputs.offsets, inputs.telemetry)


def reduce(inputs: Inputs) -> torch.Tensor:
    return checks.ops.telemetry_reduce(inputs.telemetry)


def merge(inputs: Inputs) -> None:
    checks.ops.telemetry_merge(inputs.telemetry, inputs.telemetry)


def pairs(inputs: Inputs) -> torch.Tensor:
    moments = torch.zeros(inputs.x.size(-1), 6, dtype=torch.float64, device=inputs.x.device)
    checks.ops.pair_moments(inputs.x, inputs.grad_y, moments)
    return moments


def train(inputs: Inputs) -> None:
    leaves = inputs.requiring_grad()
    forward(leaves).backward(inputs.grad_y)


@pytest.mark.parametrize("call", [forward, backward, update, reduce, merge, pairs, train])
@pytest.mark.parametrize("case", [*SIZES, Case((300, 64), 4, layout="every_other_row", telemetry="fresh")], ids=str)
def test_no_host_sync(case: Case, call: Callable):
    inputs = build(case, DEVICE)
    call(inputs)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()


# Results and one workspace. Gradients and outputs are counted by their number, whatever their size.
ALLOWED = [(forward, 2), (backward, 4), (update, 1), (reduce, 1), (merge, 0), (pairs, 2)]


@pytest.mark.parametrize(("call", "allowed"), ALLOWED)
@pytest.mark.parametrize("case", SIZES, ids=str)
def test_allocations(case: Case, call: Callable, allowed: int):
    inputs = build(case, DEVICE)
    kept = [call(inputs)]
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    kept.append(call(inputs))
    assert torch.cuda.memory_stats()["allocation.all.allocated"] - before <= allowed
    held = torch.cuda.memory_allocated()
    for _ in range(20):
        kept[-1] = call(inputs)
    assert torch.cuda.memory_allocated() <= held, "a workspace outlives its call"


@pytest.mark.stack("devices and threads: side streams", device="cuda")
@pytest.mark.parametrize("case", SIZES, ids=str)
def test_side_stream(case: Case):
    """Work goes to the current stream: it waits for what that stream does before."""
    inputs, other = build(case, DEVICE), build(case, DEVICE)
    want = forward(inputs)
    x = other.x
    right = x.clone()
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        x.zero_()
        torch.cuda._sleep(20_000_000)
        x.copy_(right)
        y = forward(other)
    stream.synchronize()
    assert checks.same_bits(y, want) and checks.same_bits(other.telemetry, inputs.telemetry)


@pytest.mark.parametrize("case", SIZES, ids=str)
def test_side_stream_of_pairs(case: Case):
    """Moments, too, wait for what their stream does before, on either of the two tensors."""
    inputs, other = build(case, DEVICE), build(case, DEVICE)
    want = pairs(inputs)
    right = other.x.clone(), other.grad_y.clone()
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        other.x.zero_(), other.grad_y.zero_()
        torch.cuda._sleep(20_000_000)
        other.x.copy_(right[0]), other.grad_y.copy_(right[1])
        moments = pairs(other)
    stream.synchronize()
    assert checks.same_bits(moments, want)


@pytest.mark.parametrize("case", SIZES, ids=str)
def test_cuda_graph_of_pairs(case: Case):
    """Each replay joins what x is then, with the bits of as many calls."""
    inputs, fresh = build(case, DEVICE), build(case, DEVICE)
    got, want = (torch.zeros(case.shape[-1], 6, dtype=torch.float64, device=DEVICE) for _ in range(2))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        checks.ops.pair_moments(inputs.x, inputs.grad_y, got)
    torch.cuda.synchronize()
    got.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        checks.ops.pair_moments(inputs.x, inputs.grad_y, got)
    for _ in range(3):
        inputs.x.mul_(-1.5), fresh.x.mul_(-1.5)
        graph.replay()
        checks.ops.pair_moments(fresh.x, fresh.grad_y, want)
    assert checks.same_bits(got, want)


@pytest.mark.stack("devices and threads: side streams", device="cuda")
def test_streams_do_not_share_scratch():
    """The same operator on two streams at once; each has a workspace of its own."""
    sides = [(build(case, DEVICE), torch.cuda.Stream()) for case in (SIZES[0], SIZES[1])]
    wanted, moments = [], [pairs(inputs) for inputs, _ in sides]
    for inputs, _ in sides:
        forward(inputs), backward(inputs)
        wanted.append((inputs.telemetry.clone(), inputs.grad_telemetry.clone()))
        inputs.telemetry.zero_(), inputs.grad_telemetry.zero_()
    torch.cuda.synchronize()
    for _ in range(50):
        for inputs, stream in sides:
            with torch.cuda.stream(stream):
                inputs.telemetry.zero_(), inputs.grad_telemetry.zero_()
                forward(inputs), backward(inputs)
        found = []
        for inputs, stream in sides:
            with torch.cuda.stream(stream):
                found.append(pairs(inputs))
    torch.cuda.synchronize()
    for (inputs, _), (telemetry, grad_telemetry) in zip(sides, wanted, strict=True):
        assert checks.same_bits(inputs.telemetry, telemetry)
        assert checks.same_bits(inputs.grad_telemetry, grad_telemetry)
    for got, want in zip(found, moments, strict=True):
        assert checks.same_bits(got, want)


@pytest.mark.parametrize("case", SIZES, ids=str)
def test_cuda_graph(case: Case):
    """One captured graph serves new activations and new states, and counts every replay."""
    inputs = build(case, DEVICE)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        forward(inputs), backward(inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = forward(inputs)
        grads = backward(inputs)
    fresh = build(case, DEVICE)
    for lifecycle in (0, 3, 7):
        for side in (inputs, fresh):
            side.x.mul_(-1.5)
            side.state[0] = lifecycle
            side.telemetry.zero_(), side.grad_telemetry.zero_()
        graph.replay(), graph.replay()
        wanted = [(forward(fresh), *backward(fresh)) for _ in range(2)][0]
        for got, want in zip((y, *grads), wanted, strict=True):
            assert checks.same_bits(got, want)
        assert checks.same_bits(inputs.telemetry, fresh.telemetry)
        assert checks.same_bits(inputs.grad_telemetry, fresh.grad_telemetry)
        assert inputs.telemetry[:, 3].eq(2).all()


@pytest.mark.stack("devices and threads: second GPU, current and not", device="2 x cuda")
@pytest.mark.parametrize("case", cases.CASES[::4], ids=str)
def test_another_device_than_the_current(case: Case):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    with torch.cuda.device(0):
        assert checks.check_case(case, "ops", torch.device("cuda:1")) == []
        assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("case", cases.CASES[::4], ids=str)
def test_cpu_and_cuda_agree(case: Case):
    """y and dx bit for bit; sums are compared with the oracle on each device."""
    results = []
    for device in (torch.device("cpu"), DEVICE):
        inputs = build(case, device)
        results.append((forward(inputs).cpu(), backward(inputs)[0].cpu()))
    for first, second in zip(*results, strict=True):
        assert checks.same_bits(first, second)
