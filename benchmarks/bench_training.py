"""A whole training step of a linear layer (forward, backward of weights and inputs) with seeds, over the plain layer's.

Beside ours, eager and compiled: the same by hand for torch.compile, with the same statistics and gradients for the
blueprints and alpha, in several formulations; and PEFT's IA3, which trains a scale per feature on a frozen base.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import partial

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


def statistics(x: Tensor, sums: Tensor) -> None:
    values = x.detach().float()
    columns = torch.stack((values.sum(0), (values * values).sum(0)))
    sums.add_(columns.view(2, -1, CHUNK).sum(2))


def blend(x: Tensor, alpha: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    alpha = alpha.repeat_interleave(CHUNK)
    a, b = (1 - alpha) + alpha * scale.float(), alpha * shift.float()
    return (x.float() * a + b).to(x.dtype)


class Written(nn.Module):
    """What one would write by hand: a scale and a shift per feature, an alpha per chunk, statistics per chunk."""

    def __init__(self, base: nn.Linear, compiler=None):
        """``compiler``: for statistics and blend, each a graph of its own; else all of it is for one graph."""
        super().__init__()
        features, device = base.out_features, base.weight.device
        self.base = base
        self.scale = nn.Parameter(torch.ones(features, device=device, dtype=base.weight.dtype))
        self.shift = nn.Parameter(torch.zeros(features, device=device, dtype=base.weight.dtype))
        self.alpha = nn.Parameter(torch.ones(features // CHUNK, device=device))
        self.register_buffer("sums", torch.zeros(2, features // CHUNK, device=device))
        self.statistics, self.blend = (compiler(statistics), compiler(blend)) if compiler else (statistics, blend)

    def forward(self, x: Tensor) -> Tensor:
        x = self.base(x)
        self.statistics(x, self.sums)
        return self.blend(x, self.alpha, self.scale, self.shift)


BY_HAND = "by hand, torch.compile"


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
    whole = partial(torch.compile, fullgraph=True, dynamic=False)
    modules[f"{BY_HAND}, one graph"] = whole(Written(twin()))
    modules[f"{BY_HAND}, two graphs"] = Written(twin(), whole)
    if device == "cuda":
        tuned = partial(whole, options={"max_autotune_pointwise": True})
        modules[f"{BY_HAND}, two graphs, tuned"] = Written(twin(), tuned)
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
    weight, bias = modules["plain layer"].weight.double(), modules["plain layer"].bias.double()
    # All blueprints are neutral before the first step: every one of them computes the plain layer, and its derivative.
    truth = {"output": F.linear(x.detach().double(), weight, bias), "gradient": grad.double() @ weight}
    for name, module in modules.items():
        x.grad = None
        y = module(x)
        y.backward(grad)
        for what, got in (("output", y.detach()), ("gradient", x.grad)):
            if not (got.double() - truth[what]).norm() <= 2 * torch.finfo(shape.dtype).eps * truth[what].norm():
                raise SystemExit(f"{name}: its {what} is wrong, so there is nothing to time")
        module.zero_grad(set_to_none=True)
        del y, got
    del truth

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
