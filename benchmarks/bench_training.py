"""A whole training step of a linear layer (forward, backward of weights and inputs) with seeds, over the plain layer's.

Beside ours, eager and compiled: the best formulation for torch.compile that we found, with the same statistics and
gradients for the blueprints and alpha; and PEFT's IA3, which trains a scale per feature on a frozen base.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import torch
from results import Row, run
from timing import eager_times, event_times
from torch import Tensor, nn
from torch.nn import functional as F

from kasmina_ext import ExtendedLifecycle, KasminaLayer

CHUNK = 16


@dataclass(frozen=True)
class Shape:
    tokens: int
    inputs: int
    features: int
    dtype: torch.dtype


CASES = {
    "cpu": [Shape(256, 128, 256, torch.float32)],
    "cuda": [Shape(65536, 1024, 4096, torch.bfloat16), Shape(65536, 4096, 4096, torch.bfloat16)],
}


class Written(nn.Module):
    """What one would write by hand: a scale and a shift per feature, an alpha per chunk, statistics per chunk."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        features, device = base.out_features, base.weight.device
        self.base = base
        self.scale = nn.Parameter(torch.ones(features, device=device, dtype=base.weight.dtype))
        self.shift = nn.Parameter(torch.zeros(features, device=device, dtype=base.weight.dtype))
        self.alpha = nn.Parameter(torch.ones(features // CHUNK, device=device))
        self.register_buffer("sums", torch.zeros(2, features // CHUNK, device=device))

    def forward(self, x: Tensor) -> Tensor:
        x = self.base(x)
        values = x.detach().float()
        columns = torch.stack((values.sum(0), (values * values).sum(0)))
        self.sums.add_(columns.view(2, -1, CHUNK).sum(2))
        alpha = self.alpha.repeat_interleave(CHUNK)
        a, b = (1 - alpha) + alpha * self.scale.float(), alpha * self.shift.float()
        return (x.float() * a + b).to(x.dtype)


def make(shape: Shape, device: str) -> dict[str, nn.Module]:
    torch.manual_seed(0)

    def base() -> nn.Linear:
        layer = nn.Linear(shape.inputs, shape.features, device=device, dtype=shape.dtype)
        return layer

    plain = base()
    modules: dict[str, nn.Module] = {"plain layer": plain}

    def twin() -> nn.Linear:
        other = base()
        other.load_state_dict(plain.state_dict())
        return other

    for name in ("kasmina_ext", "kasmina_ext, compiled"):
        layer = KasminaLayer(twin(), chunk_size=CHUNK)
        layer.state[0], layer.state[1] = int(ExtendedLifecycle.GRAFTING), 0  # and each has the bank's first blueprint
        modules[name] = torch.compile(layer, fullgraph=True, dynamic=False) if "compiled" in name else layer
    modules["plain layer, compiled"] = torch.compile(twin(), fullgraph=True, dynamic=False)
    modules["torch.compile of it by hand"] = torch.compile(Written(twin()), fullgraph=True, dynamic=False)
    if importlib.util.find_spec("peft"):
        import peft

        wrapped = nn.Sequential(twin())
        config = peft.IA3Config(target_modules=["0"], feedforward_modules=[])
        modules["PEFT IA3 (base frozen)"] = peft.get_peft_model(wrapped, config)
    return modules


def bench(shape: Shape, device: str) -> Row:
    modules = make(shape, device)
    x = torch.randn(shape.tokens, shape.inputs, device=device, dtype=shape.dtype, requires_grad=True)
    grad = torch.randn(shape.tokens, shape.features, device=device, dtype=shape.dtype)
    expected = F.linear(
        x.detach().double(), modules["plain layer"].weight.double(), modules["plain layer"].bias.double()
    )
    room = 64 * torch.finfo(shape.dtype).eps
    for name, module in modules.items():
        y = module(x)
        # All blueprints are neutral before the first step: every one of them computes the plain layer.
        if not torch.allclose(y.double(), expected, rtol=room, atol=room):
            raise SystemExit(f"{name}: its output is wrong, so there is nothing to time")
        del y
    del expected

    def step(module: nn.Module):
        def call() -> None:
            module.zero_grad(set_to_none=True)
            x.grad = None
            module(x).backward(grad)

        return call

    calls = {name: step(module) for name, module in modules.items()}
    times = event_times(calls) if device == "cuda" else eager_times(calls, device, calls=20)
    plain = times["plain layer"]["p50"]
    return {
        "case": f"T = {shape.tokens}, K = {shape.inputs}, H = {shape.features}, {shape.dtype}".replace("torch.", ""),
        "gpu" if device == "cuda" else "cpu": times,
        "above the plain layer": {name: round(t["p50"] / plain - 1, 4) for name, t in times.items()},
    }


if __name__ == "__main__":
    run("bench_training", __doc__, CASES, bench)
