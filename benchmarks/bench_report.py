"""chunked_forward at the sizes of the Triton package's own report (batch x hidden x seeds), against that package's launch scheme.

The package's scheme has no statistics and no alpha, and leaves the features that no seed owns unwritten. It is timed as it
is. Its report counted seeds x chunk_size where the kernel touched H features: bandwidth is
not given here, since nothing this small is a matter of bandwidth.
"""

from __future__ import annotations

import importlib.util

import bench_chunked_forward as forward
import peers
import torch
from results import Row, run
from timing import eager_times, timed
from workload import Case, Truth, make_data

SIZES = (
    (32, 512, 100),
    (64, 512, 200),
    (32, 1024, 500),
    (64, 1024, 500),
    (16, 2048, 1000),
    (32, 2048, 1000),
    (8, 4096, 2000),
)
PACKAGE = "Triton package's scheme, no statistics"
CASES = {device: [Case(*size, torch.float32) for size in SIZES] for device in ("cpu", "cuda")}


def bench(case: Case, device: str) -> Row:
    data = make_data(case, device)
    first, truth = data[0], Truth.of(data[0])
    calls = forward.copies(data) | {"kasmina_ext": forward.verified(case, data)}
    compiled = {name: peers.compiled(case, first, name) for name in ("by column",)}
    for name, peer in compiled.items():
        truth.check_forward(name, first.x, peer.forward(first.x))
        calls[f"torch.compile, {name}"] = [lambda d=d, peer=peer: peer.forward(d.x) for d in data]
    if device == "cuda" and importlib.util.find_spec("triton"):
        import triton_peers

        fused, package = triton_peers.fused(case, first), triton_peers.one_program_each(case, first)
        truth.check_forward("Triton", first.x, fused.forward(first.x))
        package.forward(first.x)
        calls["Triton"] = [lambda d=d: fused.forward(d.x) for d in data]
        calls[PACKAGE] = [lambda d=d: package.forward(d.x) for d in data]
    times = timed(calls, device)
    row = {"case": case.name, "bytes": 2 * case.bytes, "gpu" if device == "cuda" else "cpu": times}
    if device == "cuda":
        row["eager"] = eager_times({name: made[0] for name, made in calls.items()}, device, calls=50, rounds=10)
    row["times best"] = forward.ratio(times, forward.best_peer(times))
    if package_time := times.get(PACKAGE):
        row["times package"] = round(times["kasmina_ext"]["p50"] / package_time["p50"], 4)
        row["times package, eager"] = forward.ratio(row["eager"], PACKAGE)
    return row


if __name__ == "__main__":
    run("bench_report", __doc__, CASES, bench)
