"""Mixed precision and what goes with it: a layer trains as the same arithmetic written in plain PyTorch does."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import stack_model
import torch
from torch import Tensor, nn

from kasmina_ext import KasminaLayer

ROWS, INPUTS, FEATURES, STEPS = 64, 6, 24, 12


class Textbook(nn.Module):
    """What an affine seed at alpha 1 is: a scale and a shift, computed in float32, rounded to the activations' dtype."""

    def __init__(self, base: nn.Module, bank: Tensor) -> None:
        super().__init__()
        self.base_layer, self.blueprint_weights = base, nn.Parameter(bank)

    def forward(self, x: Tensor) -> Tensor:
        x = self.base_layer(x)
        wide = torch.promote_types(x.dtype, torch.float32)
        return (self.blueprint_weights[0] * x.to(wide) + self.blueprint_weights[1]).to(x.dtype)


def grown(base: nn.Module, bank: Tensor) -> KasminaLayer:
    layer = KasminaLayer(base, num_seeds=8)
    layer.request_state_transitions(None, "stabilization", 0, rules=stack_model.ANY)
    with torch.no_grad():
        layer.blueprint_weights.copy_(bank)
    return layer


def network(kind, device, dtype: torch.dtype) -> nn.Sequential:
    """Cast first, then grown: the bank stays float32 (float64 in a float64 network)."""
    generator = torch.Generator().manual_seed(0)
    base, head = nn.Linear(INPUTS, FEATURES), nn.Linear(FEATURES, 3)
    bank = 1 + 0.3 * torch.randn(2, FEATURES, generator=generator)
    with torch.no_grad():
        for parameter in (*base.parameters(), *head.parameters()):
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    wide = torch.promote_types(dtype, torch.float32)
    middle = kind(base.to(device, dtype), bank.to(device, wide))
    return nn.Sequential(middle, nn.Tanh(), head.to(device, dtype))


def data(device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(ROWS, INPUTS, generator=generator).to(device, dtype)
    wide = torch.promote_types(dtype, torch.float32)
    return x, torch.stack((x.sum(1), x[:, 0] * x[:, 1], x[:, 2].abs()), 1).to(wide)


def train(
    net: nn.Sequential,
    device,
    dtype: torch.dtype,
    *,
    autocast: torch.dtype | None = None,
    optimizer: dict | None = None,
    clip: float | None = None,
    scaler: torch.amp.GradScaler | None = None,
    parts: int = 1,
) -> list[Tensor]:
    """Losses, norms of gradients, then all parameters, in float64 on the CPU."""
    x, target = data(device, dtype)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0.0, **(optimizer or {}))
    scaler = scaler or torch.amp.GradScaler(device.type, enabled=False)
    losses, norms = [], []
    for _ in range(STEPS):
        optimizer.zero_grad()
        total = 0.0
        for rows, wanted in zip(x.chunk(parts), target.chunk(parts), strict=True):
            with torch.autocast(device.type, dtype=autocast) if autocast else nullcontext():
                y = net(rows)
            loss = (y.to(wanted.dtype) - wanted).square().mean() / parts
            scaler.scale(loss).backward()
            total += loss.detach()
        scaler.unscale_(optimizer)
        if clip is not None:
            norms.append(nn.utils.clip_grad_norm_(net.parameters(), clip))
        scaler.step(optimizer)
        scaler.update()
        losses.append(total)
    measured = torch.stack([*losses, *norms]).double().cpu()
    return [measured, *(p.detach().double().cpu() for p in net.parameters())]


def distances(run: list[Tensor], other: list[Tensor]) -> list[float]:
    return [float((a - b).abs().max()) for a, b in zip(run, other, strict=True)]


def compare_with_textbook(device, dtype: torch.dtype, unit: float, **settings) -> nn.Sequential:
    """As far from a float64 run as plain PyTorch in the same precision is: twice, and a rounding for each step."""
    ours, plain = (network(kind, device, dtype) for kind in (grown, Textbook))
    exact = train(network(Textbook, device, torch.float64), device, torch.float64, clip=settings.get("clip"))
    run, theirs = train(ours, device, dtype, **settings), train(plain, device, dtype, **settings)
    assert run[0][STEPS - 1] < 0.95 * run[0][0], "it learns"
    order = [name for name, _ in ours.named_parameters()]
    assert order == [name for name, _ in plain.named_parameters()]
    for name, mine, other in zip(["measured", *order], distances(run, exact), distances(theirs, exact), strict=True):
        assert mine <= 2 * other + STEPS * unit, name
    return ours


@pytest.mark.stack("mixed precision: autocast, bfloat16")
def test_autocast_bfloat16(device):
    net = compare_with_textbook(device, torch.float32, 2.0**-8, autocast=torch.bfloat16)
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in net.parameters())
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert net[0](data(device, torch.float32)[0]).dtype == torch.bfloat16


@pytest.mark.stack(
    "mixed precision: autocast, float16 with GradScaler",
    note="gradient telemetry is that of the scaled loss; a backward that overflowed adds nothing to it",
)
def test_autocast_float16_with_a_scaler(device):
    """From a scale that overflows: those steps are skipped, and leave no trace in bank or gradient telemetry."""
    net = network(grown, device, torch.float32)
    layer, bank = net[0], net[0].blueprint_weights
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**40)
    x, target = data(device, torch.float32)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0.0)
    skipped, before = 0, bank.detach().clone()
    while scaler.get_scale() > 1:
        assert torch.equal(bank, before) and torch.isfinite(layer.grad_telemetry).all()
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype=torch.float16):
            loss = (net(x).float() - target).square().mean()
        scale = scaler.get_scale()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() == scale:
            break
        skipped += 1
    assert skipped >= 10 and not torch.equal(bank, before)
    assert layer.telemetry[:, 3].eq(skipped + 1).all() and layer.grad_telemetry[:, 2].ge(1).all()
    assert layer.grad_telemetry[:, 2].lt(skipped + 1).all(), "backwards that overflowed are not counted"
    compare_with_textbook(
        device,
        torch.float32,
        2.0**-11,
        autocast=torch.float16,
        clip=1.0,
        scaler=torch.amp.GradScaler(device.type, init_scale=2.0**10),
    )


@pytest.mark.stack("mixed precision: .bfloat16() model with a float32 bank")
def test_bfloat16_model(device):
    net = compare_with_textbook(device, torch.bfloat16, 2.0**-8)
    layer = net[0]
    assert layer.blueprint_weights.dtype == torch.float32 and layer.base_layer.weight.dtype == torch.bfloat16
    assert {name: b.dtype for name, b in layer.named_buffers(recurse=False)} == KasminaLayer.BUFFER_DTYPES
    net.bfloat16()  # a cast of the grown network reaches the bank, but no buffer
    assert layer.blueprint_weights.dtype == torch.bfloat16
    assert {name: b.dtype for name, b in layer.named_buffers(recurse=False)} == KasminaLayer.BUFFER_DTYPES


@pytest.mark.stack("mixed precision: gradient clipping")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradient_clipping(device, dtype):
    """A norm over banks and all the rest, of two dtypes in a bfloat16 network, and steps that it limits."""
    unit = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-24
    compare_with_textbook(device, dtype, unit, clip=0.3)


@pytest.mark.stack("mixed precision: fused and foreach optimizers")
@pytest.mark.parametrize("kind", ["fused", "foreach"])
def test_optimizers(device, kind):
    """They do what the plain loop does, with float32 banks beside bfloat16 weights."""
    first, second = (network(grown, device, torch.bfloat16) for _ in range(2))
    run = train(first, device, torch.bfloat16, optimizer={kind: True})
    plain = train(second, device, torch.bfloat16, optimizer={"foreach": False, "fused": False})
    assert max(distances(run, plain)) <= STEPS * 2.0**-8
    assert not torch.equal(run[1], network(grown, device, torch.bfloat16)[0].blueprint_weights.double().cpu())


@pytest.mark.stack("mixed precision: gradient accumulation")
def test_gradient_accumulation(device):
    """Four small batches make the gradients, and the telemetry, of the one that they are parts of."""
    whole, parts = (network(grown, device, torch.float64) for _ in range(2))
    first, second = train(whole, device, torch.float64), train(parts, device, torch.float64, parts=4)
    assert max(distances(first, second)) < 1e-9
    one, four = whole[0].telemetry, parts[0].telemetry
    torch.testing.assert_close(four[:, :3], one[:, :3], rtol=1e-9, atol=1e-9)
    assert four[:, 3].eq(4 * STEPS).all() and one[:, 3].eq(STEPS).all()
    assert parts[0].grad_telemetry[:, 2].eq(4 * STEPS).all()
