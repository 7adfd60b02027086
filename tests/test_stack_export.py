"""torch.export and AOTInductor: the operator is in the graph, its buffers are the program's, and can be changed there."""

from __future__ import annotations

import copy
import io
import os
import subprocess
import sys
from pathlib import Path

import checks
import pytest
import stack_model
import torch
from stack_model import Net
from torch import Tensor, nn

from kasmina_ext import KasminaLayer

FORWARD = torch.ops.kasmina.chunked_forward.default
BUFFERS = ["seed_offsets", "state", "alpha", "telemetry", "grad_telemetry"]
BATCH = torch.export.Dim("batch", min=2, max=64)

# torch's own, of exporting modules at all.
pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec")


def exported(net: Net, device, strict: bool = False) -> torch.export.ExportedProgram:
    return torch.export.export(net, (batch(4, device),), strict=strict, dynamic_shapes=({0: BATCH},))


def batch(rows: int, device, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, stack_model.INPUTS, device=device, dtype=dtype)


def scramble(state: Tensor, alpha: Tensor, bank: Tensor, step: int) -> None:
    """Other states, strategies, blueprints, alphas and weights, written into the tensors that a program was given."""
    seeds = torch.arange(state.shape[1], dtype=torch.int32, device=state.device)
    state[0], state[1], state[3] = (seeds + step) % stack_model.STATES, (seeds + step) % 3, (seeds // 7 + step) % 4
    with torch.no_grad():
        alpha.fill_(0.25 * step)
        bank.mul_(1.5)


def tensors_of(module: torch.nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """State, alpha and bank of a program or a network, by their names there."""
    named = {**dict(module.named_buffers()), **dict(module.named_parameters())}
    return tuple(named[f"grown.{name}"] for name in ("state", "alpha", "blueprint_weights"))


@pytest.mark.stack("export: torch.export, strict")
@pytest.mark.stack("export: torch.export, non-strict")
@pytest.mark.stack("export: state changed afterwards through buffers")
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
def test_an_exported_program(device, strict):
    net = Net(device, torch.float32)
    net(batch(3, device))
    before = net.grown.telemetry.clone()
    program = exported(net, device, strict)
    assert torch.equal(net.grown.telemetry, before), "tracing counts nothing"

    [call] = (node for node in program.graph.nodes if node.target is FORWARD)
    assert "autograd" not in program.graph_module.code, "the operator itself, whatever its derivative is made of"
    signature = program.graph_signature
    given = [signature.inputs_to_buffers.get(argument.name) for argument in call.args]
    assert [given[1], given[2], given[3], given[5], given[6]] == [f"grown.{name}" for name in BUFFERS]
    assert signature.inputs_to_parameters[call.args[4].name] == "grown.blueprint_weights"

    twin, module = copy.deepcopy(net), program.module()  # which has the network's own tensors
    for step, rows in enumerate((2, 3, 17)):
        x = batch(rows, device)
        assert checks.same_bits(module(x), twin(x))
        for side in (module, twin):
            scramble(*tensors_of(side), step)
    telemetry = dict(module.named_buffers())["grown.telemetry"]
    assert checks.same_bits(telemetry, twin.grown.telemetry) and telemetry[:, 3].eq(4).all()


@pytest.mark.stack(
    "export: torch.export, non-strict",
    note="a layer that is exported by itself takes *args: dynamic_shapes=(({0: batch},),)",
)
def test_a_layer_by_itself(device):
    """Of a convolution, features in the second dimension."""
    layer = KasminaLayer(nn.Conv2d(3, 10, 3), num_seeds=4, num_blueprints=4).to(device)
    stack_model.grow(layer)
    sample = torch.randn(4, 3, 6, 6, device=device)
    module = torch.export.export(layer, (sample,), dynamic_shapes=(({0: BATCH},),)).module()
    for count in (2, 5):
        images = torch.randn(count, 3, 6, 6, device=device)
        torch.testing.assert_close(module(images), layer(images))


@pytest.mark.stack("export: training an exported program")
@pytest.mark.parametrize("decomposed", [False, True], ids=["as exported", "decomposed"])
def test_training_an_exported_program(device, decomposed):
    """The operator keeps its derivative, and gradient telemetry is gathered."""
    program, twin, x = exported(Net(device, torch.float32), device), Net(device, torch.float32), batch(5, device)
    module = (program.run_decompositions() if decomposed else program).module()
    module(x).square().sum().backward()
    twin(x).square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad)
    buffers = dict(module.named_buffers())
    assert buffers["grown.telemetry"][:, 3].eq(1).all() and buffers["grown.grad_telemetry"][:, 2].eq(1).all()


@pytest.mark.stack("export: ExportedProgram saved and loaded", note="import kasmina_ext before torch.export.load")
@pytest.mark.stack("export: state changed afterwards through buffers")
def test_saved_and_loaded(device):
    net, file = Net(device, torch.float32), io.BytesIO()
    torch.export.save(exported(net, device), file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for step, rows in enumerate((2, 9)):
        x = batch(rows, device)
        assert checks.same_bits(loaded(x), net(x))
        for side in (loaded, net):
            scramble(*tensors_of(side), step)
    assert checks.same_bits(dict(loaded.named_buffers())["grown.telemetry"], net.grown.telemetry)


def test_a_layer_without_kernels_can_be_exported():
    device = torch.device("cpu")
    net = Net(device, torch.float32, enable_kernels=False)
    program = exported(net, device)
    assert all(node.target is not FORWARD for node in program.graph.nodes)
    x, twin = batch(6, device), copy.deepcopy(net)
    torch.testing.assert_close(program.module()(x), twin(x))
    torch.testing.assert_close(net.grown.telemetry, twin.grown.telemetry, rtol=1e-5, atol=1e-6)


# The process's C++ library, linked by name. With a compiler that links its own copy statically, packages of any model
# die as they are loaded: they compile a std::regex, and the two copies disagree on the numbers of a locale's facets.
SHARED_LIBSTDCXX = {"aot_inductor.custom_op_libs": [":libstdc++.so.6"]} if sys.platform == "linux" else {}


@pytest.mark.stack(
    "export: AOTInductor package",
    note="import kasmina_ext before the package is loaded; inductor_configs={'always_keep_tensor_constants': True} keeps "
    "buffers of up to 8 elements (seed_offsets, alpha of small layers) changeable; 'aot_inductor.custom_op_libs': "
    "[':libstdc++.so.6'] where the C++ compiler links libstdc++ statically: packages of any model crash there without it",
)
@pytest.mark.stack("export: state changed afterwards through buffers")
def test_aotinductor_package(device, tmp_path):
    """In a process of its own: where compiled code crashes, its output says so and the other tests go on."""
    program = f"import test_stack_export; test_stack_export.use_a_package({str(device)!r}, {str(tmp_path)!r})"
    command = [sys.executable, "-X", "faulthandler", "-c", program]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, cwd=Path(__file__).parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"


def use_a_package(device: str, folder: str) -> None:
    """Built, loaded and run from Python; afterwards the program is given buffers that are changed from outside."""
    net = Net(torch.device(device), torch.float32).eval()
    configs = {
        "always_keep_tensor_constants": True,
        "aot_inductor.compile_wrapper_opt_level": "O0",
        **SHARED_LIBSTDCXX,
    }
    with torch.no_grad():
        path = torch._inductor.aoti_compile_and_package(
            exported(net, device), package_path=f"{folder}/net.pt2", inductor_configs=configs
        )
        package = torch._inductor.aoti_load_package(path)
        for rows in (2, 9):
            x = batch(rows, device)
            torch.testing.assert_close(package(x), net(x))
        mine = copy.deepcopy(net)
        given = {**dict(mine.named_buffers()), **dict(mine.named_parameters())}
        names = package.get_constant_fqns()
        assert {f"grown.{name}" for name in [*BUFFERS, "blueprint_weights"]} <= set(names)
        package.load_constants(
            {name: given[name].detach() for name in names}, check_full_update=True, user_managed=True
        )
        counted = mine.grown.telemetry[0, 3].item()
        for step in range(4):
            x = batch(5, device)
            scramble(*tensors_of(mine), step)
            scramble(*tensors_of(net), step)
            torch.testing.assert_close(package(x), net(x))
        assert mine.grown.telemetry[:, 3].eq(counted + 4).all(), "counted in the buffer that it was given, once a batch"
