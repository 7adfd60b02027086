"""Times of contestants that do the same work, taken in turns: what slows the machine down slows all of them down.

On CUDA a graph of many calls is replayed, so that host time is left out; each call has buffers of its own, more of them
than a cache holds, and every result lives until the last call has run. What one call costs with its host side is another
figure: `eager_times`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import torch

Call = Callable[[], object]
Times = dict[str, float]
"""p20, p50 and p80 in microseconds."""

WARM_UP = 3  # rounds whose times are thrown away
patience = 1.0  # seconds that a contestant is timed for on the CPU


def quantiles(seconds: Sequence[float]) -> Times:
    ordered = sorted(seconds)
    return {f"p{q}": round(1e6 * ordered[(len(ordered) - 1) * q // 100], 3) for q in (20, 50, 80)}


def timed(contestants: Mapping[str, Sequence[Call]], device: str, rounds: int = 25) -> dict[str, Times]:
    """The time of one call of each contestant, by name; each call works on its own buffers."""
    if device == "cuda":
        return graph_times(contestants, rounds)
    return wall_times(contestants)


def graph_times(contestants: Mapping[str, Sequence[Call]], rounds: int) -> dict[str, Times]:
    """Of CUDA graphs with all of a contestant's calls, replayed in turns, each time in another order."""
    graphs, kept = {}, []
    for name, calls in contestants.items():
        for call in calls[:2]:
            call()
        torch.cuda.synchronize()
        graphs[name] = graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept.append([call() for call in calls])
    marks: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in graphs}
    names = list(graphs)
    for turn in range(WARM_UP + rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graphs[name].replay()
            end.record()
            if turn >= WARM_UP:
                marks[name].append((begin, end))
        torch.cuda.synchronize()
    return {
        name: quantiles([begin.elapsed_time(end) / 1e3 / len(contestants[name]) for begin, end in pairs])
        for name, pairs in marks.items()
    }


def wall_times(contestants: Mapping[str, Sequence[Call]]) -> dict[str, Times]:
    """Of single calls on the CPU, until each contestant has had its time and at least five calls."""
    results: list[object] = [None] * max(map(len, contestants.values()))
    for calls in contestants.values():
        for i, call in enumerate(calls):
            results[i] = call()  # memory that the timed calls then take over
    times: dict[str, list[float]] = {name: [] for name in contestants}
    started = time.perf_counter()
    while time.perf_counter() - started < patience * len(times) or len(min(times.values(), key=len)) < 5:
        for name, calls in contestants.items():
            for i, call in enumerate(calls):
                results[i] = None
                begin = time.perf_counter()
                results[i] = call()
                times[name].append(time.perf_counter() - begin)
    return {name: quantiles(spent) for name, spent in times.items()}


def eager_times(contestants: Mapping[str, Call], device: str, calls: int = 100, rounds: int = 15) -> dict[str, Times]:
    """What a call costs with its host side: many in a row, then one wait, in turns."""

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    times: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(WARM_UP + rounds):
        for name, call in contestants.items():
            wait()
            begin = time.perf_counter()
            for _ in range(calls):
                call()
            wait()
            if turn >= WARM_UP:
                times[name].append((time.perf_counter() - begin) / calls)
    return {name: quantiles(spent) for name, spent in times.items()}


def event_times(contestants: Mapping[str, Call], rounds: int = 15) -> dict[str, Times]:
    """Of calls too large for host time to matter, on CUDA, without a graph."""
    marks: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in contestants}
    for turn in range(WARM_UP + rounds):
        for name, call in contestants.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            call()
            end.record()
            if turn >= WARM_UP:
                marks[name].append((begin, end))
    torch.cuda.synchronize()
    return {name: quantiles([b.elapsed_time(e) / 1e3 for b, e in pairs]) for name, pairs in marks.items()}
