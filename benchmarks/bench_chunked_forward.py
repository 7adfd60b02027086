"""chunked_forward with telemetry, against a copy of the same bytes and against what one might write instead."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import peers
import torch
from results import Row, run, shares
from timing import Call, eager_times, timed
from workload import Case, Data, Truth, make_data

from kasmina_ext import ops
from kasmina_ext.telemetry import reduce

HALF, SINGLE = torch.bfloat16, torch.float32
CASES = {
    "cpu": [
        Case(64, 1024, 64, SINGLE),
        Case(2048, 1024, 128, SINGLE),
        Case(2048, 1024, 128, HALF),
        Case(8192, 4096, 512, SINGLE),
    ],
    "cuda": [
        Case(8192, 4096, 512, HALF, "64 MiB"),  # first: here the compiler's formulations are chosen
        Case(512, 1024, 64, HALF, "1 MiB"),
        Case(4096, 1024, 128, HALF, "8 MiB"),
        Case(4096, 4096, 512, HALF, "32 MiB"),
        Case(4096, 4096, 512, SINGLE, "64 MiB"),
        Case(16384, 8192, 1024, HALF, "256 MiB"),
        Case(16384, 8192, 1024, torch.float16, "256 MiB"),
        Case(16384, 4096, 1024, SINGLE, "256 MiB"),
        Case(16384, 8192, 1, HALF, "256 MiB"),
        Case(16384, 8192, 8192, HALF, "256 MiB"),
        Case(65536, 4096, 128, HALF, "512 MiB"),
    ],
}

_chosen: list[str] = []
"""The formulations for torch.compile that later cases are given: the two that were fastest in the first."""


def ours(data: Data) -> Call:
    nothing = data.grad_telemetry[:0].view(-1)
    return lambda: ops.chunked_forward(data.x, *data.seeds, data.telemetry, nothing)


def contestants(case: Case, data: Sequence[Data], formulations: Sequence[str]) -> dict[str, list[Call]]:
    """All of them verified."""
    first, truth = data[0], Truth.of(data[0])
    truth.check_forward(case.name, first.x, ours(first)())
    moments = reduce(first.telemetry)
    truth.check_moments(case.name, first.x, moments[:, 0], moments[:, 1])
    made = {"PyTorch": peers.eager(case, first)}
    made |= {f"torch.compile, {name}": peers.compiled(case, first, name) for name in formulations}
    if first.x.is_cuda and importlib.util.find_spec("triton"):
        import triton_peers

        made["Triton"] = triton_peers.fused(case, first)
    calls = {"copy": [d.x.clone for d in data], "kasmina_ext": [ours(d) for d in data]}
    for name, peer in made.items():
        peer.sums.zero_()
        y = peer.forward(first.x)  # tunes and compiles, and so may run more than once
        peer.sums.zero_()
        y = peer.forward(first.x)
        truth.check_forward(name, first.x, y)
        truth.check_moments(name, first.x, *peer.moments(case), tolerance=1e-2)
        calls[name] = [lambda d=d, peer=peer: peer.forward(d.x) for d in data]
    return calls


def bench(case: Case, device: str) -> Row:
    data = make_data(case, device)
    calls = contestants(case, data, _chosen or (peers.FORMULATIONS if device == "cuda" else peers.FORMULATIONS[:1]))
    times = timed(calls, device)
    if not _chosen:
        compiled = sorted((t["p50"], name.split(", ", 1)[1]) for name, t in times.items() if "compile" in name)
        _chosen.extend(name for _, name in compiled[:2])
    host = {name: calls[name][0] for name in ("copy", "kasmina_ext", f"torch.compile, {_chosen[0]}")}
    row = {"case": case.name, "bytes": 2 * case.bytes, "gpu" if device == "cuda" else "cpu": times}
    if device == "cuda":
        row["eager"] = eager_times(host, device)
    return row | {"share of copy speed": shares(times), "times copy": ratio(times, "copy"), "times best": best(times)}


def ratio(times: dict[str, dict[str, float]], peer: str) -> float:
    return round(times["kasmina_ext"]["p50"] / times[peer]["p50"], 4)


def best(times: dict[str, dict[str, float]]) -> float:
    """Of our time, as a share of the fastest peer's that does the same work."""
    peers_of_work = [t["p50"] for name, t in times.items() if name not in ("copy", "kasmina_ext")]
    return round(times["kasmina_ext"]["p50"] / min(peers_of_work), 4)


if __name__ == "__main__":
    run("bench_chunked_forward", __doc__, CASES, bench)
