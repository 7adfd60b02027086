"""What a call takes from torch's allocator: on CUDA its own statistics, on the CPU what the profiler records of each block."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile


class Taken(NamedTuple):
    blocks: int
    """How many, whether or not they were given back within the call."""
    total: int
    """Bytes of all of them."""
    peak: int
    """Bytes at most at any instant, above what was held before the call."""


def taken(device: torch.device, call: Callable[[], Any]) -> Taken:
    return _on_cuda(call) if device.type == "cuda" else _on_cpu(call)


def _on_cuda(call: Callable[[], Any]) -> Taken:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()
    held = torch.cuda.memory_allocated()
    kept = call()
    after = torch.cuda.memory_stats()
    peak = torch.cuda.max_memory_allocated()
    del kept

    def difference(name: str) -> int:
        return after[name] - before[name]

    return Taken(difference("allocation.all.allocated"), difference("allocated_bytes.all.allocated"), peak - held)


def _on_cpu(call: Callable[[], Any]) -> Taken:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        kept = call()
    del kept
    events = [each for each in seen.profiler.kineto_results.events() if each.name() == "[memory]"]
    changes = [each.nbytes() for each in sorted(events, key=lambda each: each.start_ns())]
    grown = [change for change in changes if change > 0]
    return Taken(len(grown), sum(grown), max(accumulate(changes), default=0))
