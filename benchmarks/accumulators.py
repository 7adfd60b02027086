"""Cases of the operators whose work is seeds, not activations."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from results import Row
from timing import eager_times, timed

SEEDS = {"cpu": [1000, 1_000_000], "cuda": [1000, 100_000, 1_000_000]}


def copies(made: Callable[[], object], size: int, device: str) -> list:
    """As many as fill more than a cache, at most 64."""
    count = max(2, min(64, ((1 << 28) if device == "cuda" else (1 << 26)) // size))
    return [made() for _ in range(count)]


def race(case: str, size: int, contestants: dict[str, Sequence[Callable[[], object]]], device: str) -> Row:
    """``size``: the bytes that a call must at least move."""
    times = timed(contestants, device)
    row = {"case": case, "bytes": size, "gpu" if device == "cuda" else "cpu": times}
    if device == "cuda":
        in_turn = {name: itertools.cycle(calls) for name, calls in contestants.items()}
        host = {name: lambda turn=turn: next(turn)() for name, turn in in_turn.items()}
        row["eager"] = eager_times(host, device, calls=30, rounds=10)
    return row
