"""What a good engineer would write instead, in PyTorch: y = a x + b by feature, sums and squares by seed.

The peers have it easier than the operator: a and b are ready in float32 (the operator works them out of state, strategy,
alpha and weights at every call), and sums are float32 without a shift, so that large means cost them digits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from workload import Case, Data, Truth

Forward = Callable[[Tensor], Tensor]


@dataclass
class Peer:
    """y = forward(x), which adds to ``sums``: float32 [2, S], of x and of its squares."""

    forward: Forward
    sums: Tensor

    def moments(self, case: Case) -> tuple[Tensor, Tensor]:
        """Mean and variance of each seed after one call."""
        count = case.rows * case.chunk
        mean = self.sums[0].double() / count
        return mean, self.sums[1].double() / count - mean**2


def coefficients(data: Data) -> tuple[Tensor, Tensor]:
    truth = Truth.of(data)
    return truth.a.float(), truth.b.float()


def blend(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return (x.float() * a + b).to(x.dtype)


def sums_by_chunk(x: Tensor, seeds: int, chunk: int) -> Tensor:
    """Both sums in one reduction over rows and features of a chunk."""
    values = x[:, : seeds * chunk].float().view(len(x), seeds, chunk)
    return torch.stack((values.sum((0, 2)), (values * values).sum((0, 2))))


def sums_by_column(x: Tensor, seeds: int, chunk: int) -> Tensor:
    """First over the rows, which a compiler does best, then over the few features of a chunk."""
    values = x[:, : seeds * chunk].float()
    columns = torch.stack((values.sum(0), (values * values).sum(0)))
    return columns.view(2, seeds, chunk).sum(2)


def eager(case: Case, data: Data) -> Peer:
    """As PyTorch runs it, operator by operator."""
    a, b = coefficients(data)
    sums = torch.zeros(2, case.seeds, device=data.x.device)

    def forward(x: Tensor) -> Tensor:
        sums.add_(sums_by_column(x, case.seeds, case.chunk))
        return blend(x, a, b)

    return Peer(forward, sums)


def compiled(case: Case, data: Data, formulation: str) -> Peer:
    a, b = coefficients(data)
    sums = torch.zeros(2, case.seeds, device=data.x.device)
    options = {"mode": "max-autotune-no-cudagraphs"} if formulation == "by column, max-autotune" else {}
    reduce = sums_by_chunk if formulation == "by chunk" else sums_by_column

    def one(x: Tensor) -> Tensor:
        sums.add_(reduce(x, case.seeds, case.chunk))
        return blend(x, a, b)

    if formulation != "two graphs":
        return Peer(torch.compile(one, fullgraph=True, dynamic=False, **options), sums)
    affine = torch.compile(lambda x: blend(x, a, b), fullgraph=True, dynamic=False)
    statistics = torch.compile(lambda x: sums.add_(reduce(x, case.seeds, case.chunk)), fullgraph=True, dynamic=False)

    def two(x: Tensor) -> Tensor:
        statistics(x)
        return affine(x)

    return Peer(two, sums)


FORMULATIONS = ("by chunk", "two graphs", "by column, max-autotune")
"""What torch.compile is given: the fastest of them is the peer, in each case anew."""


def compiled_backward(case: Case, data: Data) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """(G, x) -> dx, dw and dalpha, for the strategies of the workload; no gradient telemetry."""
    truth, seeds, chunk = Truth.of(data), case.seeds, case.chunk
    a, owned = truth.a.float(), seeds * chunk
    alpha = data.alpha[truth.seed.clamp(min=0)]
    strategy = data.state[3][truth.seed.clamp(min=0)]
    w = data.weights[0].float()

    def backward(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        values = grad.float()
        u, v = (values * x.float()).sum(0), values.sum(0)
        dw = torch.where(strategy == 0, alpha * u, torch.where(strategy == 1, alpha * v, alpha * v / 2))
        by_feature = torch.where(strategy == 0, (w - 1) * u, torch.where(strategy == 1, w * v, (w * v - u) / 2))
        dalpha = by_feature[:owned].view(seeds, chunk).sum(1)
        return (values * a).to(grad.dtype), F.pad(dw[:owned], (0, case.features - owned)).to(data.weights.dtype), dalpha

    return torch.compile(backward, fullgraph=True, dynamic=False)
