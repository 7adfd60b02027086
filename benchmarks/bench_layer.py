"""What the layer adds to its base layer at small sizes, eager and compiled, in units of a module that computes x * 2.

A training step here is forward and backward (the optimizer is the user's). Host time is what counts at these sizes, so
times are those of many calls in a row. Compiled: the layer and its base are each one graph. The operator of no rows is what
a call costs that launches nothing.
"""

from __future__ import annotations

import statistics
from dataclasses import replace

import torch
from bench_chunked_forward import ours
from results import Row, run
from timing import Call, eager_rounds, quantiles
from torch import Tensor, nn
from workload import Case, make_data

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


def forward(module: nn.Module, x: Tensor) -> Call:
    def call() -> Tensor:
        with torch.no_grad():
            return module(x)

    return call


def step(module: nn.Module, x: Tensor, grad: Tensor) -> Call:
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
    modules |= {f"{name}, compiled": torch.compile(module, fullgraph=True) for name, module in modules.items()}
    row: Row = {"case": f"Linear {features} x {features}, {rows} rows", "eager": {}, "added, in units of x * 2": {}}
    data = make_data(Case(rows, features, features // 8, torch.float32), device)[0]
    operator = {"operator alone": ours(data), "operator alone, of no rows": ours(replace(data, x=data.x[:0]))}
    for what, calls in (
        ("forward", {name: forward(module, x) for name, module in modules.items()} | operator),
        ("training step", {name: step(module, x, grad) for name, module in modules.items()}),
    ):
        rounds = eager_rounds(calls, device, calls=50, rounds=25)
        row["eager"] |= {f"{name}: {what}": quantiles(spent) for name, spent in rounds.items()}
        row["added, in units of x * 2"][what] = added(rounds)
    return row


def added(rounds: dict[str, list[float]]) -> float:
    """The median over rounds of what the layer adds, over the median of what x * 2 adds."""
    ours, unit = (
        statistics.median(more - base for more, base in zip(rounds[name], rounds["base"], strict=True))
        for name in ("layer", "base, then x * 2")
    )
    return round(ours / unit, 3)


if __name__ == "__main__":
    run("bench_layer", __doc__, CASES, bench)
