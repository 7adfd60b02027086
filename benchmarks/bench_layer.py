"""What the layer adds to its base layer at small sizes, eager and compiled, in units of a module that computes x * 2.

A training step here is forward and backward (the optimizer is the user's). Host time is what counts at these sizes, so
times are those of many calls in a row. Compiled: the layer and its base are each one graph.
"""

from __future__ import annotations

import torch
from results import Row, run
from timing import eager_times
from torch import Tensor, nn

from kasmina_ext import ExtendedLifecycle, KasminaLayer

CASES = {device: [(32, 64), (64, 512)] for device in ("cpu", "cuda")}


class Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


def make(features: int, device: str) -> tuple[nn.Linear, KasminaLayer]:
    torch.manual_seed(0)
    base = nn.Linear(features, features, device=device)
    wrapped = nn.Linear(features, features, device=device)
    wrapped.load_state_dict(base.state_dict())
    layer = KasminaLayer(wrapped, chunk_size=8)
    layer.state[0], layer.state[1] = int(ExtendedLifecycle.GRAFTING), 0  # and each has the bank's first blueprint
    with torch.no_grad():
        layer.blueprint_weights.uniform_(0.5, 1.5)
    return base, layer


def verify(base: nn.Module, layer: KasminaLayer, x: Tensor) -> None:
    """At its default strategy, y = w base(x) + v, or the mean of both: what the seeds' strategies say."""
    w, v = layer.blueprint_weights[0].double(), layer.blueprint_weights[1].double()
    strategy = layer.state[3].repeat_interleave(8)
    b = base(x).double()
    expected = torch.stack((w * b, b + w, (b + w) / 2, w * b + v))[strategy, :, torch.arange(len(w), device=x.device)].T
    if not torch.allclose(layer(x).double(), expected, rtol=1e-5, atol=1e-5):
        raise SystemExit("the layer's output is wrong, so there is nothing to time")


def step(module: nn.Module, x: Tensor, grad: Tensor):
    def call() -> None:
        module(x).backward(grad)

    return call


def bench(case: tuple[int, int], device: str) -> Row:
    rows, features = case
    base, layer = make(features, device)
    x = torch.randn(rows, features, device=device)
    grad = torch.randn_like(x)
    verify(base, layer, x)
    doubled = nn.Sequential(base, Double())  # the base is in both: what is added is what is compared
    modules = {"base": base, "base, then x * 2": doubled, "layer": layer}
    compiled = {f"{name}, compiled": torch.compile(module, fullgraph=True) for name, module in modules.items()}

    def forward(module: nn.Module):
        def call() -> Tensor:
            with torch.no_grad():
                return module(x)

        return call

    everything = modules | compiled
    forwards = eager_times({name: forward(module) for name, module in everything.items()}, device)
    steps = eager_times({name: step(module, x, grad) for name, module in everything.items()}, device)
    row: Row = {"case": f"Linear {features} x {features}, {rows} rows", "eager": forwards}
    row["eager"] |= {f"{name}: training step": t for name, t in steps.items()}
    row["added, in units of x * 2"] = {"forward": added(forwards), "training step": added(steps)}
    return row


def added(times: dict[str, dict[str, float]]) -> float:
    base = times["base"]["p50"]
    return round((times["layer"]["p50"] - base) / (times["base, then x * 2"]["p50"] - base), 3)


if __name__ == "__main__":
    run("bench_layer", __doc__, CASES, bench)
