"""chunked_forward with telemetry, against a copy of the same bytes and against what one might write instead.

Every size, type and number of seeds stands beside a copy; the peers, which take long to compile, beside those marked so.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import peers
import torch
from results import Row, run, shares
from timing import Call, Times, eager_times, timed
from workload import Case, Data, Truth, make_data

from kasmina_ext import ops
from kasmina_ext.telemetry import reduce

HALF, FLOAT16, SINGLE = torch.bfloat16, torch.float16, torch.float32
KERNEL = "copy by a kernel"
"""Of PyTorch's, element by element. Here and there it beats the device's own copy, which all shares are of."""


def sized(mib: int, features: int, seeds: int, dtype: torch.dtype) -> Case:
    """As many rows as x needs to have this size."""
    return Case((mib << 20) // (features * dtype.itemsize), features, seeds, dtype, f"{mib} MiB")


RACES = {
    "cpu": [
        Case(64, 1024, 64, SINGLE),
        Case(2048, 1024, 128, SINGLE),
        Case(2048, 1024, 128, HALF),
        Case(8192, 4096, 512, SINGLE),
    ],
    "cuda": [
        sized(64, 4096, 512, HALF),
        sized(256, 8192, 1024, HALF),
        sized(256, 4096, 1024, SINGLE),
        sized(1, 1024, 64, HALF),
        sized(8, 1024, 128, HALF),
        sized(32, 4096, 512, HALF),
    ],
}
"""With every peer."""

LARGE = [
    *(sized(256, 8192, seeds, HALF) for seeds in (1, 8192)),
    *(sized(256, 8192, seeds, FLOAT16) for seeds in (1, 1024, 8192)),
    *(sized(256, 4096, seeds, SINGLE) for seeds in (1, 4096)),
    sized(512, 4096, 128, HALF),
]
SMALLER = [
    *(sized(mib, 4096, 1, HALF) for mib in (64, 4)),
    *(sized(64, 4096, 512, dtype) for dtype in (FLOAT16, SINGLE)),
    *(sized(16, 2048, 256, dtype) for dtype in (HALF, SINGLE)),
    *(sized(mib, 1024, 128, dtype) for mib in (4, 1) for dtype in (HALF, FLOAT16, SINGLE)),
]
COPIES = {"cpu": [], "cuda": LARGE + SMALLER}
"""Beside a copy alone."""

CASES = {
    device: [(case, True) for case in RACES[device]] + [(case, False) for case in COPIES[device]] for device in RACES
}


def ours(data: Data) -> Call:
    nothing = data.grad_telemetry[:0].view(-1)
    return lambda: ops.chunked_forward(data.x, *data.seeds, data.telemetry, nothing)


def copies(data: Sequence[Data]) -> dict[str, list[Call]]:
    return {"copy": [d.x.clone for d in data], KERNEL: [d.x.abs for d in data]}


def verified(case: Case, data: Sequence[Data]) -> list[Call]:
    """Our calls, of which the first has been compared with the truth."""
    first, truth = data[0], Truth.of(data[0])
    truth.check_forward(case.name, first.x, ours(first)())
    moments = reduce(first.telemetry)
    truth.check_moments(case.name, first.x, moments[:, 0], moments[:, 1])
    return [ours(d) for d in data]


def contestants(case: Case, data: Sequence[Data], formulations: Sequence[str]) -> dict[str, list[Call]]:
    """The peers, all of them verified."""
    first, truth = data[0], Truth.of(data[0])
    made = {"PyTorch": peers.eager(case, first)}
    made |= {f"torch.compile, {name}": peers.compiled(case, first, name) for name in formulations}
    if first.x.is_cuda and importlib.util.find_spec("triton"):
        import triton_peers

        made["Triton"] = triton_peers.fused(case, first)
    calls = {}
    for name, peer in made.items():
        peer.forward(first.x)  # tunes and compiles, and so may run more than once
        peer.sums.zero_()
        y = peer.forward(first.x)
        truth.check_forward(name, first.x, y)
        truth.check_moments(name, first.x, *peer.moments(case), tolerance=1e-2)
        calls[name] = [lambda d=d, peer=peer: peer.forward(d.x) for d in data]
    return calls


def bench(case_and_peers: tuple[Case, bool], device: str) -> Row:
    case, with_peers = case_and_peers
    data = make_data(case, device)
    calls = copies(data) | {"kasmina_ext": verified(case, data)}
    if with_peers:
        calls |= contestants(case, data, peers.FORMULATIONS if device == "cuda" else ["by column"])
    times = timed(calls, device)
    row = {"case": case.name, "bytes": 2 * case.bytes, "gpu" if device == "cuda" else "cpu": times}
    if with_peers and device == "cuda":
        host = ["copy", "kasmina_ext", best_peer(times)]
        row["eager"] = eager_times({name: calls[name][0] for name in host}, device, calls=50, rounds=10)
    row |= {"share of copy speed": shares(times), "times copy": ratio(times, "copy")}
    row["times copy by a kernel"] = ratio(times, KERNEL)
    return row | ({"times best": ratio(times, best_peer(times))} if with_peers else {})


def ratio(times: dict[str, Times], peer: str) -> float:
    return round(times["kasmina_ext"]["p50"] / times[peer]["p50"], 4)


def best_peer(times: dict[str, Times]) -> str:
    """The fastest of those that do the same work; the package's scheme does less."""
    others = [name for name in times if not name.startswith(("copy", "kasmina_ext", "Triton package"))]
    return min(others, key=lambda name: times[name]["p50"])


if __name__ == "__main__":
    run("bench_chunked_forward", __doc__, CASES, bench)
