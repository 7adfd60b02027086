"""state_update: as many validated requests as there are seeds, with duplicates and refusals, applied in order.

There is no peer that does this without a host in the loop: beside it stands a copy of as many bytes.
"""

from __future__ import annotations

import torch
from accumulators import SEEDS, copies, race
from results import Row, run

from kasmina_ext import TransitionRules, ops, reference_lifecycle

REQUEST = 4 + 16 + 4 + 4  # id, values, mask, verdict
SEED = 5 * 4 + 8 * 10 + 4  # of state what a request may write; history; its count


def make(seeds: int, device: str) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)

    def numbers(low: int, high: int, *size: int) -> torch.Tensor:
        return torch.randint(low, high, size, generator=generator, dtype=torch.int32).to(device)

    state = torch.zeros(8, seeds, dtype=torch.int32, device=device)
    state[0] = numbers(0, 11, seeds)
    history = torch.zeros(seeds, 10, 2, dtype=torch.int32, device=device)
    count = torch.zeros(seeds, dtype=torch.int32, device=device)
    # A third of the seeds is named more than once; one request in a hundred names a seed that is not there.
    ids = numbers(0, seeds + seeds // 100, seeds)
    values = torch.stack((numbers(0, 11, seeds), numbers(0, 4, seeds), numbers(0, 9, seeds), numbers(0, 4, seeds)), 1)
    return state, history, count, ids, values, numbers(1, 16, seeds)


def bench(seeds: int, device: str) -> Row:
    rules = TransitionRules.strict().tensor.to(device)
    made = copies(lambda: make(seeds, device), seeds * (REQUEST + SEED), device)
    ours, theirs = [t.clone() for t in made[0]], [t.clone() for t in made[0]]
    verdicts = ops.state_update(*ours, rules, 4)
    if not torch.equal(verdicts, reference_lifecycle.state_update(*theirs, rules, 4)):
        raise SystemExit(f"{seeds} seeds: verdicts are wrong, so there is nothing to time")
    if not all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)):
        raise SystemExit(f"{seeds} seeds: the state is wrong, so there is nothing to time")
    moved = torch.empty(seeds * (REQUEST + SEED) // 2, dtype=torch.uint8, device=device)
    contestants = {
        "kasmina_ext": [lambda m=m: ops.state_update(*m, rules, 4) for m in made],
        "copy of as many bytes": [moved.clone for _ in made],
    }
    row = race(f"{seeds:,} requests for {seeds:,} seeds", seeds * (REQUEST + SEED), contestants, device)
    return row | {"accepted": round(int((verdicts == 0).sum()) / seeds, 3)}


if __name__ == "__main__":
    run("bench_state_update", __doc__, SEEDS, bench)
