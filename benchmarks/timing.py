"""Shared by the benchmarks: cases, verified calls, times, and the record that a run leaves.

Buffers are rotated so that no call finds its data in a cache; on CUDA a graph of many calls is replayed, so that host
time is left out, and the eager time of one call is given beside it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "scripts"))
import evidence  # noqa: E402

# More than any cache holds: 60 MB in an H200, 100 and more in servers' CPUs.
ROTATED_BYTES = {"cuda": 1 << 30, "cpu": 256 << 20}
GRAFTING = 3

Call = Callable[[], object]


@dataclass(frozen=True)
class Case:
    rows: int
    features: int
    seeds: int
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return f"{self.rows} x {self.features}, {self.seeds} seeds, {str(self.dtype).removeprefix('torch.')}"

    @property
    def bytes(self) -> int:
        """Of one activation tensor."""
        return self.rows * self.features * self.dtype.itemsize


CASES = {
    "cpu": [
        Case(64, 1024, 64, torch.float32),
        Case(2048, 1024, 128, torch.float32),
        Case(2048, 1024, 128, torch.bfloat16),
        Case(8192, 4096, 512, torch.float32),
    ],
    "cuda": [
        Case(32, 1024, 64, torch.float32),
        Case(8192, 4096, 512, torch.bfloat16),
        Case(16384, 8192, 1024, torch.bfloat16),
        Case(16384, 4096, 1024, torch.float32),
    ],
}


@dataclass
class Data:
    """What the operators are given; every seed is blended in."""

    x: torch.Tensor
    offsets: torch.Tensor
    state: torch.Tensor
    alpha: torch.Tensor
    weights: torch.Tensor
    telemetry: torch.Tensor
    grad_telemetry: torch.Tensor

    @property
    def seeds(self) -> tuple[torch.Tensor, ...]:
        return self.offsets, self.state, self.alpha, self.weights


def make_data(case: Case, device: str) -> list[Data]:
    """Copies to rotate through."""
    generator = torch.Generator(device).manual_seed(0)
    state = torch.zeros(8, case.seeds, dtype=torch.int32, device=device)
    state[0] = GRAFTING
    state[3] = torch.arange(case.seeds, device=device) % 3
    shared = {
        "offsets": torch.linspace(0, case.features, case.seeds + 1).to(torch.int32).to(device),
        "state": state,
        "alpha": torch.rand(case.seeds, device=device, generator=generator),
        "weights": torch.randn(2, case.features, device=device, generator=generator).to(case.dtype),
        "telemetry": torch.zeros(case.seeds, 5, dtype=torch.float64, device=device),
        "grad_telemetry": torch.zeros(case.seeds, 3, dtype=torch.float64, device=device),
    }
    x = torch.randn(case.rows, case.features, device=device, generator=generator).to(case.dtype)
    copies = min(1024, max(2, ROTATED_BYTES[device] // (2 * case.bytes)))
    return [Data(x.clone(), **shared) for _ in range(copies)]


def quantiles(seconds: Sequence[float]) -> dict[str, float]:
    """p20, p50 and p80 in microseconds."""
    ordered = sorted(seconds)
    return {f"p{q}": round(1e6 * ordered[(len(ordered) - 1) * q // 100], 2) for q in (20, 50, 80)}


def timed(calls: Sequence[Call], device: str) -> dict[str, float]:
    """The time of one call. Each works on its own buffers, and its result lives until all have run."""
    return quantiles(graph_times(calls) if device == "cuda" else wall_times(calls))


def wall_times(calls: Sequence[Call], seconds: float = 1.0) -> list[float]:
    times, spent = [], 0.0
    results: list[object] = [None] * len(calls)
    for i in range(len(calls)):
        results[i] = calls[i]()  # memory that the timed calls then take over
    while spent < seconds or len(times) < 5:
        for i, call in enumerate(calls):
            results[i] = None
            started = time.perf_counter()
            results[i] = call()
            times.append(time.perf_counter() - started)
            spent += times[-1]
    return times


def graph_times(calls: Sequence[Call], replays: int = 30) -> list[float]:
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]
    times = []
    for _ in range(replays):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / len(calls))
    del kept
    return times[3:]


def eager_time(call: Call, device: str, count: int = 200) -> float:
    """Microseconds that a call costs with its host side, many in a row."""
    for _ in range(10):
        call()
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(count):
        call()
    if device == "cuda":
        torch.cuda.synchronize()
    return round(1e6 * (time.perf_counter() - started) / count, 2)


def commit() -> str:
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return described.stdout.strip()


def run(name: str, description: str, bench: Callable[[Case, str], dict]) -> None:
    """Runs ``bench`` for each case; a table on screen, and benchmarks/results/<name>_<device>.json."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    device = parser.parse_args().device
    console = Console()
    rows = []
    for case in CASES[device]:
        with console.status(case.name):
            rows.append({"case": case.name} | bench(case, device))
    record = evidence.machine() | {"commit": commit(), "source_sha256": evidence.source_hash()}
    if device == "cpu":
        record["device"] = f"cpu, {torch.get_num_threads()} threads"
    evidence.write_json(ROOT / f"benchmarks/results/{name}_{device}.json", record | {"microseconds": rows})
    table = Table(title=f"{name}, {record['device']}, torch {record['torch']}: microseconds p20 / p50 / p80")
    for column in rows[0]:
        table.add_column(column.replace("_", " "))
    for row in rows:
        table.add_row(*(_text(value) for value in row.values()))
    console.print(table)


def _text(value: object) -> str:
    return " / ".join(f"{number:g}" for number in value.values()) if isinstance(value, dict) else str(value)
