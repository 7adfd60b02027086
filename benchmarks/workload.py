"""What the operators are given in a benchmark, and the float64 statement of what they must answer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import timing
import torch
from torch import Tensor

ROTATED_BYTES = {"cuda": 1 << 30, "cpu": 256 << 20}  # more than caches hold: 60 MB in an H200, 100 and more in CPUs
MOST_COPIES = 512
BLOCK = 1 << 21  # numbers that are compared at once: their float64 copies stay small
GRAFTING = 3
MULTIPLICATIVE, ADDITIVE, MIXED = range(3)


@dataclass(frozen=True)
class Case:
    rows: int
    features: int
    seeds: int
    dtype: torch.dtype
    note: str = ""

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.rows} x {self.features}, {self.seeds} seeds, {dtype}" + (f", {self.note}" if self.note else "")

    @property
    def bytes(self) -> int:
        """Of one activation tensor."""
        return self.rows * self.features * self.dtype.itemsize

    @property
    def chunk(self) -> int:
        """Features of a seed, as the layer cuts them; what is left over is nobody's. 0: more seeds than features."""
        return self.features // self.seeds


@dataclass
class Data:
    """Every seed that owns something is blended in."""

    x: Tensor
    offsets: Tensor
    state: Tensor
    alpha: Tensor
    weights: Tensor
    telemetry: Tensor
    grad_telemetry: Tensor

    @property
    def seeds(self) -> tuple[Tensor, ...]:
        return self.offsets, self.state, self.alpha, self.weights


def make_data(case: Case, device: str, tensors: int = 2) -> list[Data]:
    """Copies to rotate through; ``tensors`` of x's size are moved in a call."""
    generator = torch.Generator(device).manual_seed(0)
    state = torch.zeros(8, case.seeds, dtype=torch.int32, device=device)
    state[0] = GRAFTING
    state[3] = torch.arange(case.seeds, device=device) % 3
    # As the layer does: chunks of H // S features each; with more seeds than features, one each while they last.
    offsets = (torch.arange(case.seeds + 1) * max(1, case.chunk)).clamp(max=case.features)
    data = Data(
        x=torch.randn(case.rows, case.features, device=device, generator=generator).to(case.dtype),
        offsets=offsets.to(torch.int32).to(device),
        state=state,
        alpha=torch.rand(case.seeds, device=device, generator=generator),
        weights=torch.randn(2, case.features, device=device, generator=generator).to(case.dtype),
        telemetry=torch.zeros(case.seeds, 5, dtype=torch.float64, device=device),
        grad_telemetry=torch.zeros(case.seeds, 3, dtype=torch.float64, device=device),
    )
    copies = min(MOST_COPIES, max(2, ROTATED_BYTES[device] // (tensors * case.bytes)))
    if timing.compile_only:
        copies = 1
    return [replace(data, x=data.x.clone()) for _ in range(copies)]


def blocks(x: Tensor) -> Iterator[slice]:
    """Of rows."""
    count = max(1, BLOCK // x.shape[-1])
    return (slice(row, row + count) for row in range(0, len(x), count))


def rounding(dtype: torch.dtype) -> tuple[float, float]:
    """The step between numbers of a type: relative, and where they are subnormal (float16: below 6e-5) absolute."""
    limits = torch.finfo(dtype)
    return limits.eps, limits.smallest_normal * limits.eps


# ---- The truth, in float64: y = a x + b, and its derivatives ----


@dataclass
class Truth:
    """Per feature, float64 [H]; features that nobody owns have a = 1, b = 0 and seed -1."""

    a: Tensor
    b: Tensor
    seed: Tensor
    size: Tensor
    """Of a's terms, |1 - alpha| + |alpha w|: what the rounding of their sum is relative to."""

    @classmethod
    def of(cls, data: Data) -> Truth:
        features = data.x.shape[-1]
        seed = torch.bucketize(torch.arange(features, device=data.x.device), data.offsets[1:].long(), right=True)
        owned = seed < len(data.alpha)
        at = seed.clamp(max=len(data.alpha) - 1)
        alpha, strategy, w = data.alpha.double()[at], data.state[3][at], data.weights[0].double()
        one, nil = torch.ones_like(w), torch.zeros_like(w)
        a = torch.where(
            strategy == MULTIPLICATIVE, 1 + alpha * (w - 1), torch.where(strategy == MIXED, 1 - alpha / 2, one)
        )
        b = torch.where(strategy == ADDITIVE, alpha * w, torch.where(strategy == MIXED, alpha * w / 2, nil))
        a, b = torch.where(owned, a, one), torch.where(owned, b, nil)
        return cls(a, b, torch.where(owned, seed, -1), 1 + alpha * w.abs())

    def check_forward(self, name: str, x: Tensor, y: Tensor) -> None:
        """y within the roundings of x's type."""
        epsilon, least = rounding(x.dtype)
        for rows in blocks(x):
            part = x[rows].double()
            expected = self.a * part + self.b
            room = 2 * epsilon * ((self.size * part).abs() + self.b.abs()) + least
            if not bool(((y[rows].double() - expected).abs() <= room).all()):
                raise SystemExit(f"{name}: y is wrong, so there is nothing to time")

    def check_backward(self, name: str, grad: Tensor, dx: Tensor) -> None:
        epsilon, least = rounding(grad.dtype)
        for rows in blocks(grad):
            part = grad[rows].double()
            room = 2 * epsilon * (self.size * part).abs() + least
            if not bool(((dx[rows].double() - self.a * part).abs() <= room).all()):
                raise SystemExit(f"{name}: dx is wrong, so there is nothing to time")

    def parameter_gradients(self, data: Data, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Of the bank [2, H] and of alpha [S], from the derivatives of a and b, as above."""
        features, seeds = grad.shape[-1], len(data.alpha)
        u, v = (torch.zeros(features, dtype=torch.float64, device=grad.device) for _ in range(2))
        for rows in blocks(grad):
            part = grad[rows].double()
            u += (part * data.x[rows].double()).sum(0)
            v += part.sum(0)
        owned = self.seed >= 0
        at = self.seed.clamp(min=0)
        alpha, strategy, w = data.alpha.double()[at], data.state[3][at], data.weights[0].double()
        zero = torch.zeros_like(w)
        da_dw, db_dw = (
            torch.where(strategy == MULTIPLICATIVE, alpha, zero),
            torch.where(strategy == ADDITIVE, alpha, torch.where(strategy == MIXED, alpha / 2, zero)),
        )
        da = torch.where(strategy == MULTIPLICATIVE, w - 1, torch.where(strategy == MIXED, zero - 0.5, zero))
        db = torch.where(strategy == ADDITIVE, w, torch.where(strategy == MIXED, w / 2, zero))
        dw = torch.zeros_like(data.weights, dtype=torch.float64)
        dw[0] = torch.where(owned, da_dw * u + db_dw * v, zero)
        dalpha = torch.zeros(seeds, dtype=torch.float64, device=grad.device)
        dalpha.index_add_(0, at[owned], (da * u + db * v)[owned])
        return dw, dalpha

    def check_moments(self, name: str, x: Tensor, mean: Tensor, variance: Tensor, tolerance: float = 1e-3) -> None:
        """Of each seed that owns features: mean within the tolerance of a deviation, variance relative to itself."""
        owned = self.seed >= 0
        index = self.seed[owned]
        sums = [torch.zeros(len(mean), dtype=torch.float64, device=x.device) for _ in range(3)]
        for rows in blocks(x):
            part = x[rows].double()[:, owned]
            for total, values in zip(sums, (torch.ones_like(part), part, part * part), strict=True):
                total.index_add_(0, index, values.sum(0))
        count, first, second = sums
        there = count > 0
        true_mean = first / count
        true_variance = second / count - true_mean**2
        wrong = (mean.double() - true_mean).abs() > tolerance * true_variance.sqrt()
        wrong |= (variance.double() - true_variance).abs() > 10 * tolerance * true_variance
        if bool((wrong & there).any()):
            raise SystemExit(f"{name}: its statistics are wrong, so there is nothing to time")
