"""telemetry_merge and telemetry_reduce of many seeds, beside the same in PyTorch and a copy of as many bytes."""

from __future__ import annotations

import torch
from accumulators import SEEDS, copies, race
from results import Row, run

from kasmina_ext import ops, reference

SEED = 3 * 5 * 8  # two accumulators read, one written


def make(seeds: int, device: str) -> torch.Tensor:
    telemetry = torch.rand(seeds, 5, dtype=torch.float64, device=device)
    telemetry[:, 0] = torch.randint(1, 1000, (seeds,), device=device).double()
    return telemetry


def bench(seeds: int, device: str) -> Row:
    made = copies(lambda: make(seeds, device), seeds * SEED, device)
    other = make(seeds, device)
    ours, theirs = made[0].clone(), made[0].clone()
    ops.telemetry_merge(ours, other)
    reference.telemetry_merge(theirs, other)
    if not torch.allclose(ours, theirs, rtol=1e-12):
        raise SystemExit(f"{seeds} seeds: the merge is wrong, so there is nothing to time")
    moved = torch.empty(seeds * SEED // 2, dtype=torch.uint8, device=device)
    contestants = {
        "kasmina_ext, merge": [lambda m=m: ops.telemetry_merge(m, other) for m in made],
        "PyTorch, merge": [lambda m=m: reference.telemetry_merge(m, other) for m in made],
        "kasmina_ext, reduce": [lambda m=m: ops.telemetry_reduce(m) for m in made],
        "PyTorch, reduce": [lambda m=m: reference.telemetry_reduce(m) for m in made],
        "copy of as many bytes": [moved.clone for _ in made],
    }
    return race(f"{seeds:,} seeds", seeds * SEED, contestants, device)


if __name__ == "__main__":
    run("bench_telemetry_merge", __doc__, SEEDS, bench)
