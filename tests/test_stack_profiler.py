"""What a profiler shows: every operator under its own name, eager and compiled, on the host, on the GPU and in NVTX."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import stack_model
import torch
from stack_model import Net
from torch.profiler import ProfilerActivity, profile

from kasmina_ext import ops
from kasmina_ext._schema import SCHEMAS

RECORDER = Path(__file__).with_name("nvtx_recorder.c")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def use_every_operator(net: Net) -> None:
    layer = net.grown
    x = torch.randn(5, stack_model.INPUTS, device=layer.device, dtype=torch.float64)
    net(x).sum().backward()
    layer.request_state_transitions(None, "training", rules=stack_model.ANY)
    layer.reconstruction_loss(layer.base_layer(x)).sum().backward()
    layer.step_lifecycle()
    ops.telemetry_update(layer.base_layer(x), layer.seed_offsets, layer.telemetry)
    ops.telemetry_merge(layer.telemetry, layer.telemetry.clone())
    ops.telemetry_reduce(layer.telemetry)
    ops.pair_moments(x, 2 * x, x.new_zeros(stack_model.INPUTS, 6))


def names_in(profiled: profile) -> set[str]:
    return {event.name for event in profiled.events()}


@pytest.mark.stack("introspection: operators by name in torch.profiler")
def test_every_operator_shows_under_its_name(device):
    net = Net(device)
    with profile() as profiled:
        use_every_operator(net)
    names = names_in(profiled)
    assert {f"kasmina::{name}" for name in SCHEMAS} - names == set()
    assert "KasminaBlendBackward" in names, "autograd's node, too"


@pytest.mark.stack("introspection: operators by name in torch.profiler")
def test_operators_of_a_compiled_graph(device):
    torch._dynamo.reset()
    net = Net(device)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, stack_model.INPUTS, device=device, dtype=torch.float64)
    compiled(x).sum().backward()
    with profile() as profiled:
        compiled(x).sum().backward()
    assert {"kasmina::chunked_forward", "kasmina::chunked_backward"} <= names_in(profiled)


@needs_cuda
@pytest.mark.stack("introspection: operators by name in torch.profiler", device="cuda")
def test_kernels_on_the_gpu():
    net = Net(torch.device("cuda"))
    use_every_operator(net)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        use_every_operator(net)
        torch.cuda.synchronize()
    on_gpu = {event.name for event in profiled.events() if event.device_type == torch.autograd.DeviceType.CUDA}
    for kernel in ("forward_kernel", "backward_kernel", "step_seeds", "settle_seeds", "reduce_kernel"):
        assert any(kernel in name for name in on_gpu), f"{kernel} is not among {sorted(on_gpu)}"


SCRIPT = """
import torch
from stack_model import Net
from test_stack_profiler import use_every_operator
net = Net(torch.device("cuda"))
with torch.autograd.profiler.emit_nvtx():
    use_every_operator(net)
"""


@needs_cuda
@pytest.mark.stack(
    "introspection: operators by name in Nsight (NVTX)",
    device="cuda",
    note="within torch.autograd.profiler.emit_nvtx(), or `nsys profile --pytorch=autograd-nvtx`",
)
def test_operators_in_nvtx(tmp_path):
    """Ranges as Nsight is handed them, by a tool of our own in its place."""
    library, record = tmp_path / "recorder.so", tmp_path / "ranges.txt"
    compiler = os.environ.get("CC", "cc")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(RECORDER)], check=True)
    environment = os.environ | {
        "NVTX_INJECTION64_PATH": str(library),
        "NVTX_RECORD": str(record),
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ranges = {line.partition(",")[0] for line in record.read_text().splitlines()}
    assert {f"kasmina::{name}" for name in SCHEMAS} - ranges == set()
