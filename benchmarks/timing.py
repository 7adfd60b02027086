"""Times of contestants that do the same work, taken in turns: what slows the machine down slows all of them down.

On CUDA a graph of many calls is replayed, so that host time is left out; each call has buffers of its own, more of them
than a cache holds, and every result has memory of its own. What one call costs with its host side is another figure:
`eager_times`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence

import torch

Call = Callable[[], object]
Times = dict[str, float]
"""p20, p50 and p80 in microseconds."""

WARM_UP = 3  # rounds whose times are thrown away
GRAPH_SECONDS = 1e-3  # the least that a graph should take: to start one takes microseconds
MOST_REPEATS = 8  # of all calls in a graph
HEAD_START = 2_000_000  # cycles that the GPU is kept busy for while the host fills its queue

patience = 0.5  # seconds that a contestant is timed for on the CPU
compile_only = False
"""Every contestant is called once, as whoever compiles ahead wants it; times are made up."""


def quantiles(seconds: Sequence[float]) -> Times:
    ordered = sorted(seconds)
    return {f"p{q}": round(1e6 * ordered[(len(ordered) - 1) * q // 100], 3) for q in (20, 50, 80)}


def called_once(contestants: Mapping[str, Call]) -> dict[str, Times]:
    for call in contestants.values():
        call()
    return {name: dict.fromkeys(("p20", "p50", "p80"), 1.0 + i) for i, name in enumerate(contestants)}


def timed(contestants: Mapping[str, Sequence[Call]], device: str, rounds: int = 25) -> dict[str, Times]:
    """The time of one call of each contestant, by name; each call works on its own buffers."""
    if compile_only:
        return called_once({name: calls[0] for name, calls in contestants.items()})
    if device == "cuda":
        return graph_times(contestants, rounds)
    return wall_times(contestants)


def turns(names: Sequence[str], rounds: int):
    """(is it timed, names in another order) for each round."""
    for turn in range(WARM_UP + rounds):
        first = turn % len(names)
        yield turn >= WARM_UP, [*names[first:], *names[:first]]


def graph_times(contestants: Mapping[str, Sequence[Call]], rounds: int) -> dict[str, Times]:
    """Of CUDA graphs with all of a contestant's calls, replayed in turns, each time in another order."""
    graphs, counts = {}, {}
    for name, calls in contestants.items():
        for call in calls[:2]:
            call()
        torch.cuda.synchronize()
        graph = captured(calls)
        graph.replay()
        [seconds] = event_seconds([graph.replay])
        repeats = min(MOST_REPEATS, math.ceil(GRAPH_SECONDS / max(seconds, 1e-6)))
        graphs[name] = captured(calls, repeats) if repeats > 1 else graph
        counts[name] = len(calls) * repeats
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for counted, names in turns(list(graphs), rounds):
        spent = event_seconds([graphs[name].replay for name in names])
        for name, seconds in zip(names, spent, strict=True):
            if counted:
                times[name].append(seconds / counts[name])
    return {name: quantiles(spent) for name, spent in times.items()}


def captured(calls: Sequence[Call], repeats: int = 1) -> torch.cuda.CUDAGraph:
    """A graph of all calls, one after the other; no result takes memory that another one had."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for _ in range(repeats) for call in calls]
    del kept
    return graph


def event_seconds(calls: Sequence[Call]) -> list[float]:
    """Of each call on the GPU. It is busy until all are in its queue: the host's pauses between them do not count."""
    marks = []
    torch.cuda._sleep(HEAD_START)
    for call in calls:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        marks.append((begin, end))
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) / 1e3 for begin, end in marks]


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


def eager_rounds(contestants: Mapping[str, Call], device: str, calls: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of a call with its host side, one figure for each round: many in a row, then one wait, in turns."""

    if compile_only:
        return {name: [spent["p50"] / 1e6] for name, spent in called_once(contestants).items()}

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    times: dict[str, list[float]] = {name: [] for name in contestants}
    for counted, names in turns(list(contestants), rounds):
        for name in names:
            call = contestants[name]
            wait()
            begin = time.perf_counter()
            for _ in range(calls):
                call()
            wait()
            if counted:
                times[name].append((time.perf_counter() - begin) / calls)
    return times


def eager_times(contestants: Mapping[str, Call], device: str, calls: int = 100, rounds: int = 15) -> dict[str, Times]:
    """What a call costs with its host side."""
    return {name: quantiles(spent) for name, spent in eager_rounds(contestants, device, calls, rounds).items()}


def event_times(contestants: Mapping[str, Call], rounds: int = 15) -> dict[str, Times]:
    """Of calls too large for host time to matter, on CUDA, without a graph."""
    if compile_only:
        return called_once(contestants)
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for counted, names in turns(list(contestants), rounds):
        for name, seconds in zip(names, event_seconds([contestants[name] for name in names]), strict=True):
            if counted:
                times[name].append(seconds)
    return {name: quantiles(spent) for name, spent in times.items()}
