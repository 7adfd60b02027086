"""lifecycle_step: one epoch of every seed, with the alpha ramp and the transitions that are due, beside a copy of its bytes."""

from __future__ import annotations

import torch
from accumulators import SEEDS, copies, race
from results import Row, run

from kasmina_ext import ops, reference_lifecycle

SEED = 2 * 32 + 2 * 4  # state and alpha, read and written; history only where something happens
LINEAR, RAMP = 0, 20


def make(seeds: int, device: str) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    state = torch.zeros(8, seeds, dtype=torch.int32)
    state[0] = torch.randint(0, 11, (seeds,), generator=generator)
    state[2] = torch.randint(0, 30, (seeds,), generator=generator)
    made = state, torch.zeros(seeds, 10, 2, dtype=torch.int32), torch.zeros(seeds, dtype=torch.int32), torch.ones(seeds)
    return tuple(t.to(device) for t in made)


def bench(seeds: int, device: str) -> Row:
    made = copies(lambda: make(seeds, device), seeds * SEED, device)
    ours, theirs = [t.clone() for t in made[0]], [t.clone() for t in made[0]]
    ops.lifecycle_step(*ours, LINEAR, RAMP, True)
    reference_lifecycle.lifecycle_step(*theirs, LINEAR, RAMP, True)
    if not all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)):
        raise SystemExit(f"{seeds} seeds: the state is wrong, so there is nothing to time")
    moved = torch.empty(seeds * SEED // 2, dtype=torch.uint8, device=device)
    contestants = {
        "kasmina_ext": [lambda m=m: ops.lifecycle_step(*m, LINEAR, RAMP, True) for m in made],
        "PyTorch": [lambda m=m: reference_lifecycle.lifecycle_step(*m, LINEAR, RAMP, True) for m in made],
        "copy of as many bytes": [moved.clone for _ in made],
    }
    return race(f"{seeds:,} seeds", seeds * SEED, contestants, device)


if __name__ == "__main__":
    run("bench_lifecycle_step", __doc__, SEEDS, bench)
