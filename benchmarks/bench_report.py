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
CASES = {device: [Case(*size, torch.float32) for size in SIZES] for device in ("cpu", "cuda")}


def bench(case: Case, device: str) -> Row:
    data = make_data(case, device)
    first, truth = data[0], Truth.of(data[0])
    truth.check_forward(case.name, first.x, forward.ours(first)())
    compiled = peers.compiled(case, first, "by column")
    truth.check_forward("torch.compile", first.x, compiled.forward(first.x))
    calls = {
        "copy": [d.x.clone for d in data],
        "kasmina_ext": [forward.ours(d) for d in data],
        "torch.compile, by column": [lambda d=d: compiled.forward(d.x) for d in data],
    }
    if device == "cuda" and importlib.util.find_spec("triton"):
        import triton_peers

        fused, package = triton_peers.fused(case, first), triton_peers.one_program_each(case, first)
        truth.check_forward("Triton", first.x, fused.forward(first.x))
        package.forward(first.x)
        calls["Triton"] = [lambda d=d: fused.forward(d.x) for d in data]
        calls["Triton package's scheme, no statistics"] = [lambda d=d: package.forward(d.x) for d in data]
    times = timed(calls, device)
    row = {"case": case.name, "bytes": 2 * case.bytes, "gpu" if device == "cuda" else "cpu": times}
    if device == "cuda":
        row["eager"] = eager_times({name: made[0] for name, made in calls.items()}, device)
    row["times best"] = forward.best(times)
    if package_time := times.get("Triton package's scheme, no statistics"):
        row["times package"] = round(times["kasmina_ext"]["p50"] / package_time["p50"], 4)
    return row


if __name__ == "__main__":
    run("bench_report", __doc__, CASES, bench)
