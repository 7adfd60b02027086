"""Devices, streams, threads, forks, and everything that torch.func, hooks and parametrizations do to a layer."""

from __future__ import annotations

import copy
import multiprocessing
import threading
from collections.abc import Callable

import pytest
import torch
from layer_checks import blended, check_telemetry, scatter
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.data import DataLoader, Dataset

from kasmina_ext import KasminaLayer, TritonChunkedKasminaLayer, param_groups

BOTH = pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "reference"])


def grown(device="cpu", dtype=torch.float64, **arguments) -> KasminaLayer:
    torch.manual_seed(1)
    base = nn.Linear(6, 20, dtype=dtype).to(device)
    return scatter(KasminaLayer(base, num_seeds=5, num_blueprints=3, **arguments))


def train(layer: KasminaLayer, batches: Tensor, optimizer: torch.optim.Optimizer | None = None) -> Tensor:
    """Some steps through a life of the seeds: transitions, epochs, forgetting, recycling; returns the losses."""
    optimizer = optimizer or torch.optim.AdamW(param_groups(layer, lr=0.01))
    losses = []
    for step, x in enumerate(batches):
        loss = layer(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        layer.step_lifecycle()
        verdicts = layer.request_state_transitions(None, ("CULLED", "GERMINATED", "TRAINING", "GRAFTING")[step % 4])
        layer.reset_optimizer_state(optimizer, verdicts == 0)
        layer.recycle()
    return torch.stack(losses)


def everything(layer: KasminaLayer) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in layer.state_dict().items()}


def assert_same(layer: KasminaLayer, other: KasminaLayer) -> None:
    for (name, one), two in zip(everything(layer).items(), everything(other).values(), strict=True):
        assert one.dtype == two.dtype and torch.equal(one, two), name


# ---- several GPUs, streams ---------------------------------------------------------------------------


@pytest.mark.stack("devices and threads: second GPU, current and not", device="2 x cuda")
@pytest.mark.parametrize("current", [0, 1])
def test_training_on_the_second_gpu(current):
    """Everything stays there and has the bits of the first one, whichever is current."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    batches = torch.randn(8, 32, 6, dtype=torch.float64)
    layers, losses = [], []
    for place in ("cuda:0", "cuda:1"):
        with torch.cuda.device(current):
            layers.append(grown(place, alpha_schedule="cosine", ramp_epochs=3))
            losses.append(train(layers[-1], batches.to(place)).cpu())
            assert torch.cuda.current_device() == current
    assert {tensor.device for tensor in layers[1].state_dict().values()} == {torch.device("cuda:1")}
    assert torch.equal(*losses)
    assert_same(*layers)
    moved = layers[1].to("cuda:0")
    assert torch.equal(moved(batches[0].to("cuda:0")), layers[0](batches[0].to("cuda:0")))


@pytest.mark.stack("devices and threads: side streams", device="cuda")
def test_training_on_a_side_stream():
    """Each kernel waits for what its stream did before: inputs that come late, and the step before."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    batches = torch.randn(8, 500, 6, dtype=torch.float64, device="cuda")
    usual, aside = grown("cuda"), grown("cuda")
    losses = train(usual, batches)
    late, stream = torch.zeros_like(batches), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(batches)
        other = train(aside, late)
    stream.synchronize()
    assert torch.equal(losses, other)
    assert_same(usual, aside)


# ---- threads and forks -------------------------------------------------------------------------------


@pytest.mark.stack("devices and threads: inference from 8 threads")
@BOTH
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_eight_threads_on_one_layer(device, kernels, mode):
    """Right results, and telemetry that counts every batch of every thread; gradients too where they are asked for."""
    layer = grown(device, enable_kernels=kernels)
    batches = [torch.randn(1 + i, 6, dtype=torch.float64, device=device) for i in range(8)]
    wanted = [blended(layer, layer.base_layer(x), -1).detach() for x in batches]
    start, wrong, repeats = threading.Barrier(8), [], 40

    def work(number: int) -> None:
        try:
            start.wait()
            for _ in range(repeats):
                with mode():
                    y = layer(batches[number])
                    torch.testing.assert_close(y, wanted[number])
                    if y.requires_grad:
                        torch.autograd.grad(y.sum(), layer.blueprint_weights)
        except BaseException as error:  # else it would end in the thread, unseen
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong
    check_telemetry(layer, [layer.base_layer(x) for x in batches] * repeats, -1)
    assert layer.grad_telemetry[:, 2].eq(8 * repeats if mode is torch.enable_grad else 0).all()


class Activations(Dataset):
    """Samples that have gone through a layer, in whichever process asks."""

    def __init__(self, layer: KasminaLayer, inputs: Tensor) -> None:
        self.layer, self.inputs = layer, inputs

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, float]:
        with torch.no_grad():
            y = self.layer(self.inputs[index])
        return y, self.layer.telemetry[0, 3].item()


@pytest.mark.stack("devices and threads: fork after import, DataLoader workers")
@BOTH
def test_workers_of_a_data_loader(kernels):
    """Forked after this process has used all of its threads; what a worker counts stays there."""
    layer = grown(enable_kernels=kernels)
    layer(torch.randn(100_000, 6, dtype=torch.float64)).sum().backward()
    counted = layer.telemetry.clone()
    inputs = torch.randn(12, 50, 6, dtype=torch.float64)
    loader = DataLoader(Activations(layer, inputs), batch_size=3, num_workers=2, multiprocessing_context="fork")
    results = list(loader)
    y, batches = (torch.cat(parts) for parts in zip(*results, strict=True))
    torch.testing.assert_close(y, blended(layer, layer.base_layer(inputs), -1))
    assert sorted(batches.tolist()) == sorted([2 + i for i in range(6)] * 2)
    assert torch.equal(layer.telemetry, counted)


def in_a_fork(function: Callable[[], str], seconds: float = 60) -> str:
    """What ``function`` returns or raises in a child of this process; "" where it does not end."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)

    def child() -> None:
        try:
            there.send(function())
        except Exception as error:
            there.send(f"{type(error).__name__}: {error}")

    process = context.Process(target=child)
    process.start()
    there.close()
    try:
        return here.recv() if here.poll(seconds) else ""
    except EOFError:
        return "died"
    finally:
        process.kill()
        process.join()


@pytest.mark.stack("devices and threads: fork after import, DataLoader workers")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
@BOTH
def test_a_fork_in_the_middle_of_a_merge(kernels):
    """Other threads hold the lock of the telemetry most of the time: a child must not inherit it locked."""
    layer, x, done = grown(enable_kernels=kernels), torch.randn(1, 6, dtype=torch.float64), threading.Event()
    differentiates = not torch.cuda.is_available()  # else torch refuses, as below

    def busy() -> None:
        mine = torch.zeros(20_000, 5, dtype=torch.float64)
        while not done.is_set():
            if kernels:
                torch.ops.kasmina.telemetry_merge(mine, mine.clone())
            else:
                layer(x)

    def work() -> str:
        torch.set_num_threads(1)  # as a DataLoader's worker does
        before = layer.telemetry[0, 3].item()
        with torch.set_grad_enabled(differentiates):
            y = layer(x).sum()
        if differentiates:
            y.backward()
        return "fine" if layer.telemetry[0, 3] == before + 1 else "not counted"

    threads = [threading.Thread(target=busy) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        assert [in_a_fork(work) for _ in range(8)] == ["fine"] * 8
    finally:
        done.set()
        for thread in threads:
            thread.join()


@pytest.mark.stack(
    "devices and threads: fork after CUDA was initialised",
    device="cuda",
    refused="torch's own RuntimeError: Cannot re-initialize CUDA in forked subprocess, use the 'spawn' start method; of a "
    "backward pass: Unable to handle autograd's threading in combination with fork-based multiprocessing",
)
@pytest.mark.stack(
    "devices and threads: fork after import, DataLoader workers", device="cuda", note="on the CPU, without gradients"
)
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_a_fork_after_cuda_was_initialised():
    """No hang, no crash, torch's words; a layer on the CPU works."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    layer, x = grown("cuda"), torch.randn(3, 6, dtype=torch.float64, device="cuda")
    layer(x).sum().backward()
    torch.cuda.synchronize()
    here, y = grown(), x.cpu()

    def on_the_cpu() -> str:
        torch.set_num_threads(1)
        with torch.no_grad():
            here(y)
        return "fine" if here.telemetry[:, 3].eq(1).all() else "not counted"

    assert in_a_fork(on_the_cpu) == "fine"
    # The parent's autograd has had threads for its GPUs, which a child does not inherit.
    assert "fork-based multiprocessing" in in_a_fork(lambda: str(here(y).sum().backward()))
    assert "Cannot re-initialize CUDA in forked subprocess" in in_a_fork(lambda: str(grown("cuda")))
    inherited = in_a_fork(lambda: str(layer(x)))
    assert "CUDA" in inherited and "Error" in inherited, inherited


# ---- moving ------------------------------------------------------------------------------------------


@pytest.mark.stack("devices and threads: moving between devices while training")
def test_moving_in_the_middle_of_training(device):
    """There and back, with the optimizer's moments: the losses of training in one place."""
    batches = torch.randn(12, 32, 6, dtype=torch.float64)
    stays, moves = grown(alpha_schedule="linear", ramp_epochs=3), grown(alpha_schedule="linear", ramp_epochs=3)
    wanted = train(stays, batches)
    optimizer, losses = torch.optim.AdamW(param_groups(moves, lr=0.01)), []
    bank = moves.blueprint_weights
    for place, part in zip(("cpu", device, "cpu"), batches.split(4), strict=True):
        moves.to(place)
        optimizer.load_state_dict(optimizer.state_dict())  # which brings the moments to where the parameters are
        losses.append(train(moves, part.to(place), optimizer).cpu())
    assert moves.blueprint_weights is bank
    torch.testing.assert_close(torch.cat(losses), wanted, rtol=1e-9, atol=1e-12)
    assert torch.equal(stays.state, moves.state) and torch.equal(stays.history, moves.history)
    torch.testing.assert_close(stays.blueprint_weights, moves.blueprint_weights, rtol=1e-9, atol=1e-12)


@pytest.mark.stack("devices and threads: meta device, skip_init, deferred init and to_empty")
@pytest.mark.parametrize("kind", [KasminaLayer, TritonChunkedKasminaLayer])
def test_a_model_made_without_memory(device, kind):
    """What a deferred initialisation does: the model on meta, memory, then reset_parameters of whoever has it."""

    def make() -> nn.Sequential:
        return nn.Sequential(kind(nn.Conv2d(3, 8, 3)), nn.Flatten(), nn.LazyLinear(7), kind(nn.LayerNorm(7)))

    x = torch.randn(2, 3, 5, 5, device=device)
    with torch.device("meta"):
        model = make()
        assert model(x.to("meta")).shape == (2, 7)
    model.to_empty(device=device)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(77)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    layer = model[0]
    assert torch.equal(layer(x), layer.base_layer(x)) and model(x).isfinite().all()
    fresh = kind(nn.Conv2d(3, 8, 3))
    layer.reset_telemetry()
    for name in kind.BUFFER_DTYPES:
        assert torch.equal(getattr(layer, name).cpu(), getattr(fresh, name)), name


# ---- torch.func --------------------------------------------------------------------------------------


def swapped(layer: KasminaLayer, x: Tensor) -> Callable[[dict[str, Tensor]], Tensor]:
    return lambda parameters: torch.func.functional_call(layer, parameters, (x,)).square().sum()


@pytest.mark.stack("devices and threads: functional_call")
@pytest.mark.stack("devices and threads: torch.func.grad")
@BOTH
def test_functional_gradients(device, kernels):
    layer, x = grown(device, enable_kernels=kernels), torch.randn(4, 6, dtype=torch.float64, device=device)
    parameters = dict(layer.named_parameters())
    right = torch.autograd.grad(blended(layer, layer.base_layer(x), -1).square().sum(), list(parameters.values()))
    got = torch.func.grad(swapped(layer, x))({name: p.detach() for name, p in parameters.items()})
    for name, truth in zip(parameters, right, strict=True):
        torch.testing.assert_close(got[name], truth)
    assert layer.telemetry[:, 3].eq(1).all() and layer.grad_telemetry[:, 2].eq(1).all()
    gradients, loss = torch.func.grad_and_value(swapped(layer, x))(parameters)
    torch.testing.assert_close(loss, swapped(layer, x)(parameters))


@pytest.mark.stack(
    "devices and threads: vmap",
    refused="RuntimeError: cannot be vmapped; the reference can (enable_kernels=False, telemetry=False)",
)
def test_vmap_of_a_layer(device):
    """Batches and per-sample gradients: an error, or the reference."""
    layer, x = grown(device), torch.randn(3, 4, 6, dtype=torch.float64, device=device)
    with pytest.raises(RuntimeError, match="cannot be vmapped.*enable_kernels=False.*telemetry=False"):
        torch.vmap(layer)(x)
    plain = grown(device, enable_kernels=False, telemetry=False)
    torch.testing.assert_close(torch.vmap(plain)(x), layer(x))
    parameters = {name: p.detach() for name, p in plain.named_parameters()}
    each = torch.vmap(lambda sample: torch.func.grad(swapped(plain, sample))(parameters))(x)
    for sample, gradient in zip(x, each["blueprint_weights"], strict=True):
        torch.testing.assert_close(gradient, torch.func.grad(swapped(layer, sample))(parameters)["blueprint_weights"])


# ---- hooks, parametrizations, sharing ----------------------------------------------------------------


@pytest.mark.stack("devices and threads: forward hooks")
def test_hooks(device):
    """Before and after, with keywords, backward, and on the base layer, whose output is not transformed yet."""
    layer, x = grown(device), torch.randn(4, 6, dtype=torch.float64, device=device, requires_grad=True)
    plain, want = layer.base_layer(2 * x), blended(layer, layer.base_layer(2 * x), -1)
    seen = {}
    layer.register_forward_pre_hook(lambda module, args, kwargs: ((2 * kwargs.pop("x"),), kwargs), with_kwargs=True)
    layer.register_forward_hook(lambda module, args, kwargs, out: seen.update(out=out, args=args), with_kwargs=True)
    layer.register_full_backward_hook(lambda module, before, after: seen.update(gradient=after[0]))
    layer.base_layer.register_forward_hook(lambda module, args, out: seen.update(base=out))
    y = layer(x=x)
    torch.testing.assert_close(y, want)
    assert torch.equal(seen["base"], plain) and torch.equal(seen["args"][0], 2 * x)
    assert torch.equal(seen["out"], y)
    (3 * y).sum().backward()
    assert seen["gradient"].eq(3).all()
    torch.testing.assert_close(x.grad, torch.autograd.grad((3 * want).sum(), x)[0])


@pytest.mark.stack("devices and threads: parametrizations")
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "orthogonal"])
def test_a_parametrized_base_layer(device, kind, when):
    """Parametrized before or after it is wrapped; the layer's ``weight`` is the one that is computed."""
    base = nn.Linear(6, 20, dtype=torch.float64, device=device)
    parametrize = getattr(parametrizations, kind)
    if when == "before":
        parametrize(base)
    layer = scatter(KasminaLayer(base, num_seeds=5, num_blueprints=3))
    if when == "after":
        parametrize(layer.base_layer)
    layer.eval()
    x = torch.randn(4, 6, dtype=torch.float64, device=device)
    want = blended(layer, nn.functional.linear(x, base.weight, base.bias), -1)
    torch.testing.assert_close(layer(x), want)
    assert torch.equal(layer.weight, base.weight)
    originals = [p for name, p in layer.named_parameters() if "original" in name]
    got = torch.autograd.grad(layer(x).square().sum(), [*originals, layer.blueprint_weights])
    right = torch.autograd.grad(want.square().sum(), [*originals, layer.blueprint_weights])
    assert originals
    for gradient, truth in zip(got, right, strict=True):
        torch.testing.assert_close(gradient, truth)


@pytest.mark.stack("devices and threads: weight sharing")
def test_two_layers_with_one_bank(device):
    """Each with seeds of its own: the gradient of the bank is the sum."""
    first, second = grown(device), scatter(grown(device), seed=5)
    second.blueprint_weights = first.blueprint_weights
    model, x = nn.ModuleList([first, second]), torch.randn(4, 6, dtype=torch.float64, device=device)
    assert len(list(model.parameters())) == 5
    got = torch.autograd.grad((first(x) * second(x)).sum(), first.blueprint_weights)
    want = [blended(layer, layer.base_layer(x), -1) for layer in model]
    torch.testing.assert_close(got, torch.autograd.grad((want[0] * want[1]).sum(), first.blueprint_weights))
    twins = copy.deepcopy(model)
    assert twins[0].blueprint_weights is twins[1].blueprint_weights is not first.blueprint_weights
