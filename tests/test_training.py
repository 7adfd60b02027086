"""Models train with the operators as a float64 model in textbook PyTorch does, to rounding."""

from __future__ import annotations

import checks
import pytest
import torch
from torch import Tensor, nn

CHANNELS, SEEDS, STEPS = 20, 6, 25


class Blend(nn.Module):
    """Seeds over the last dimension: the operator, or the same thing said in textbook PyTorch (`backend` None)."""

    def __init__(self, backend: str | None, generator: torch.Generator):
        super().__init__()
        self.backend = backend
        offsets = [0, 3, 3, 7, 12, 16, 18]  # uneven, one empty, two features unowned
        state = torch.zeros(8, SEEDS, dtype=torch.int32)
        state[0] = torch.tensor([3, 4, 5, 6, 7, 1])  # all that blend, a fossil, a dormant one
        state[1] = torch.tensor([0, 0, 1, 1, 2, 0])
        state[3] = torch.tensor([0, 1, 1, 3, 0, 0])
        self.weights = nn.Parameter(1 + 0.2 * torch.randn(3, CHANNELS, generator=generator, dtype=torch.float64))
        self.alpha = nn.Parameter(torch.rand(SEEDS, generator=generator))
        self.register_buffer("offsets", torch.tensor(offsets, dtype=torch.int32))
        self.register_buffer("state", state)
        self.register_buffer("telemetry", torch.zeros(SEEDS, 5, dtype=torch.float64))
        self.register_buffer("grad_telemetry", torch.zeros(SEEDS, 3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        if self.backend is not None:
            args = (self.offsets, self.state, self.alpha, self.weights, self.telemetry, self.grad_telemetry)
            return checks.BACKENDS[self.backend].chunked_forward(x, *args)
        pieces = []
        for s in range(SEEDS):
            own = slice(int(self.offsets[s]), int(self.offsets[s + 1]))
            chunk, w, v = x[..., own], self.weights[self.state[1, s], own], self.weights[2, own]
            if self.state[0, s] == 7:
                w = w.detach()
            grown = {0: w * chunk, 1: chunk + w, 3: w * chunk + v}[int(self.state[3, s])]
            alpha = self.alpha[s] if self.state[0, s] >= 3 else 0.0
            pieces.append((chunk + alpha * (grown - chunk)).to(x.dtype))
        return torch.cat((*pieces, x[..., 18:]), -1)


class Model(nn.Module):
    """Features last in 3-D activations, then a strided view of them, then features in dimension 1 of a convolution."""

    def __init__(self, backend: str | None):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        self.inp = nn.Linear(8, CHANNELS, dtype=torch.float64)
        self.conv = nn.Conv2d(1, CHANNELS, 3, padding=1, dtype=torch.float64)
        self.out = nn.Linear(2 * CHANNELS, 3, dtype=torch.float64)
        self.blends = nn.ModuleList(Blend(backend, generator) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.blends[0](self.inp(x)).tanh()  # [N, T, C]
        h = self.blends[1](h.transpose(0, 1)[::2]).relu()  # [T/2, N, C], neither dense nor in order
        image = self.conv(x[:, None])  # [N, C, T, 8]
        image = self.blends[2](image.movedim(1, -1)).movedim(-1, 1).relu()
        return self.out(torch.cat((h.mean(0), image.mean((2, 3))), -1))


def train(model: nn.Module, device, dtype=torch.float64, autocast: torch.dtype | None = None) -> list[Tensor]:
    """SGD on a fixed task; returns losses, then all parameters, in float64 on the CPU."""
    data = torch.Generator().manual_seed(1)
    x = torch.randn(16, 6, 8, generator=data, dtype=torch.float64)
    target = torch.stack((x.mean((1, 2)), x[:, 0].square().mean(1), x[:, :, 0].amax(1)), 1)
    x, target = x.to(device, dtype), target.to(device)
    model = model.to(device)
    for module in model.modules():  # as a user's .to(dtype) through a layer: integers, alpha, telemetry stay
        for name, parameter in module.named_parameters(recurse=False):
            if name != "alpha":
                parameter.data = parameter.data.to(dtype)
    grown = [p for blend in model.blends for p in blend.parameters()]
    base = [p for p in model.parameters() if all(p is not other for other in grown)]
    optimizer = torch.optim.SGD([{"params": base, "lr": 0.1}, {"params": grown, "lr": 1.0}])
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            y = model(x)
        loss = (y.double() - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    trained = [p.detach().double().cpu() for p in model.parameters()]
    return [torch.stack(losses).cpu(), *trained]


def distances(run: list[Tensor], other: list[Tensor]) -> list[float]:
    """The largest difference in the losses and in each parameter; all are of the size of 1."""
    return [float((a - b).abs().max()) for a, b in zip(run, other, strict=True)]


@pytest.fixture(scope="module")
def textbook() -> list[Tensor]:
    return train(Model(None), torch.device("cpu"))


@checks.backends
def test_float64(backend, device, textbook):
    model = Model(backend)
    run = train(model, device)
    assert run[0][-1] < 0.5 * run[0][0], "it learns"
    # alpha is float32: a rounding of a number below 2 in each step, which descent may amplify tenfold
    assert max(distances(run, textbook)) < 10 * STEPS * 2.0**-24
    for blend, count in zip(model.blends, (16 * 6, 16 * 3, 16 * 6 * 8), strict=True):
        owned = blend.offsets.diff().cpu()
        assert torch.equal(blend.telemetry[:, 0].cpu(), STEPS * count * owned.double())
        assert blend.telemetry[:, 3].eq(STEPS).all() and blend.grad_telemetry[:, 2].eq(STEPS).all()
        assert blend.grad_telemetry[owned.to(device) > 0, :2].gt(0).all(), "idle seeds are measured too"


@pytest.mark.parametrize("mode", ["float32", "bfloat16", "float16", "autocast"])
@checks.backends
def test_lower_precision(backend, device, textbook, mode):
    """Each parameter is no further from the float64 run than textbook PyTorch in the same precision is.

    Twice, and a rounding for each step: both are random walks.
    """
    settings = {"autocast": (torch.float32, torch.bfloat16)}.get(mode) or (getattr(torch, mode), None)
    run = train(Model(backend), device, *settings)
    plain = train(Model(None), device, *settings)
    assert torch.isfinite(run[0]).all() and run[0][-1] < 0.6 * run[0][0]
    unit = torch.finfo(settings[1] or settings[0]).eps / 2
    for ours, theirs in zip(distances(run, textbook), distances(plain, textbook), strict=True):
        assert ours <= 2 * theirs + STEPS * unit


@checks.backends
def test_fossils_are_frozen(backend, device):
    model = Model(backend)
    before = model.blends[2].weights.detach().clone()
    train(model, device)
    after = model.blends[2].weights.detach().cpu()
    assert torch.equal(after[:, 12:16], before[:, 12:16])
    assert not torch.equal(after[:, :3], before[:, :3])


def test_ops_and_reference_train_alike(device):
    """Sums of gradients are taken in another order: a rounding for each step, which descent may amplify tenfold."""
    runs = [train(Model(backend), device, torch.float32) for backend in checks.BACKENDS]
    assert max(distances(*runs)) < 10 * STEPS * 2.0**-24


def test_second_device():
    """The current device is not the tensors'. (The convolution adds in an order of its own, and not twice in the same.)"""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    with torch.cuda.device(0):
        first, second = (train(Model("ops"), torch.device("cuda", index)) for index in (0, 1))
    assert max(distances(first, second)) < 10 * STEPS * 2.0**-24
