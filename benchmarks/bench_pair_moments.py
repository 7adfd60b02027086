"""pair_moments, against a copy (two tensors read, where a copy reads one and writes one) and against PyTorch."""

from __future__ import annotations

import torch
from results import Row, run, shares
from timing import timed
from workload import Case, make_data

from kasmina_ext import ops

HALF, SINGLE = torch.bfloat16, torch.float32
CASES = {
    "cpu": [Case(64, 1024, 64, SINGLE), Case(2048, 1024, 128, HALF)],
    "cuda": [Case(8192, 4096, 512, HALF, "64 MiB"), Case(16384, 4096, 1024, SINGLE, "256 MiB")],
}


def plain(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The six sums that a least-squares fit needs, per feature."""
    x, t = x.float(), t.float()
    return torch.stack((x.sum(0), t.sum(0), (x * x).sum(0), (t * t).sum(0), (x * t).sum(0)))


def bench(case: Case, device: str) -> Row:
    data = make_data(case, device)
    targets = [torch.randn_like(d.x) for d in data]
    moments = torch.zeros(case.features, 6, dtype=torch.float64, device=device)
    ops.pair_moments(data[0].x, targets[0], moments)
    x, t = data[0].x.double(), targets[0].double()
    truth = ((x - x.mean(0)) * (t - t.mean(0))).sum(0)
    if not torch.allclose(moments[:, 5], truth, rtol=1e-4, atol=1e-4 * case.rows):
        raise SystemExit(f"{case.name}: the covariance is wrong, so there is nothing to time")
    compiled = torch.compile(plain, fullgraph=True, dynamic=False)
    pairs = list(zip(data, targets, strict=True))
    times = timed(
        {
            "copy": [d.x.clone for d in data],
            "kasmina_ext": [lambda d=d, t=t: ops.pair_moments(d.x, t, moments) for d, t in pairs],
            "PyTorch": [lambda d=d, t=t: plain(d.x, t) for d, t in pairs],
            "torch.compile": [lambda d=d, t=t: compiled(d.x, t) for d, t in pairs],
        },
        device,
    )
    row = {"case": case.name, "bytes": 2 * case.bytes, "gpu" if device == "cuda" else "cpu": times}
    return row | {"share of copy speed": shares(times)}


if __name__ == "__main__":
    run("bench_pair_moments", __doc__, CASES, bench)
