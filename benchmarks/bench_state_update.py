"""state_update: as many validated requests as there are seeds, with duplicates and refusals, applied in order.

Two batches of requests alternate, of which each moves seeds to states that the other one does not know: every request
that is applied is a change, with its entry in the history. There is no peer that does this without a host in the loop:
beside it stands a copy of as many bytes.
"""

from __future__ import annotations

import torch
from accumulators import SEEDS, copies, race
from results import Row, run
from torch import Tensor

from kasmina_ext import TransitionRules, ops, reference_lifecycle

REQUEST = 4 + 16 + 4 + 4  # id, values, mask, verdict
SEED = 5 * 4 + 8 * 10 + 4  # of state what a request may write; history; its count
BLUEPRINTS = 4
STATES = ((0, 5), (5, 11))  # that each of the batches moves seeds to

Tensors = tuple[Tensor, ...]


def make(seeds: int, device: str) -> tuple[Tensors, list[Tensors]]:
    """Seeds that lived (state, history, count), and two batches of requests (ids, values, mask)."""
    generator = torch.Generator().manual_seed(0)

    def numbers(low: int, high: int, *size: int) -> Tensor:
        return torch.randint(low, high, size or (seeds,), generator=generator, dtype=torch.int32)

    state = torch.zeros(8, seeds, dtype=torch.int32)
    state[0] = numbers(*STATES[1])
    lived = state, torch.zeros(seeds, 10, 2, dtype=torch.int32), torch.zeros(seeds, dtype=torch.int32)
    # A quarter of the seeds is named more than once; one request in a hundred names a seed that is not there, and one in
    # a hundred a blueprint that is not.
    ids, refused = numbers(0, seeds + seeds // 100), numbers(0, 100) == 0
    batches = []
    for states in STATES:
        blueprints = torch.where(refused, BLUEPRINTS, numbers(0, BLUEPRINTS))
        values = torch.stack((numbers(*states), blueprints, numbers(0, 9), numbers(0, 4)), 1)
        batches.append((ids, values, torch.where(refused, 15, numbers(1, 16) | 1)))
    return tuple(t.to(device) for t in lived), [tuple(t.to(device) for t in batch) for batch in batches]


def bench(seeds: int, device: str) -> Row:
    rules = TransitionRules.any().tensor.to(device)
    made = copies(lambda: make(seeds, device), seeds * (REQUEST + SEED), device)
    lived, batches = made[0]
    ours, theirs = [t.clone() for t in lived], [t.clone() for t in lived]
    applied = 0
    for batch in batches:
        verdicts = ops.state_update(*ours, *batch, rules, BLUEPRINTS)
        if not torch.equal(verdicts, reference_lifecycle.state_update(*theirs, *batch, rules, BLUEPRINTS)):
            raise SystemExit(f"{seeds} seeds: verdicts are wrong, so there is nothing to time")
        applied += int((verdicts == 0).sum())
    if not all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)):
        raise SystemExit(f"{seeds} seeds: the state is wrong, so there is nothing to time")
    if int(ours[2].sum()) != applied:
        raise SystemExit(f"{seeds} seeds: not every request that was applied is a change")
    moved = torch.empty(seeds * (REQUEST + SEED) // 2, dtype=torch.uint8, device=device)
    contestants = {
        "kasmina_ext": [
            lambda lived=lived, batch=batches[turn]: ops.state_update(*lived, *batch, rules, BLUEPRINTS)
            for turn in range(len(STATES))
            for lived, batches in made
        ],
        "copy of as many bytes": [moved.clone for _ in made],
    }
    row = race(f"{seeds:,} requests for {seeds:,} seeds", seeds * (REQUEST + SEED), contestants, device)
    return row | {"accepted": round(applied / len(batches) / seeds, 3)}


if __name__ == "__main__":
    run("bench_state_update", __doc__, SEEDS, bench)
