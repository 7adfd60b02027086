"""chunked_forward with telemetry, against a copy of the same bytes and against plain PyTorch."""

from __future__ import annotations

import torch
from timing import Case, eager_time, make_data, run, timed

from kasmina_ext import ops, reference


def bench(case: Case, device: str) -> dict:
    data = make_data(case, device)
    nothing = torch.empty(0, dtype=torch.float64, device=device)
    first = data[0]
    expected = reference.chunked_forward(first.x, *first.seeds, nothing, nothing)
    if not torch.equal(ops.chunked_forward(first.x, *first.seeds, first.telemetry, nothing), expected):
        raise SystemExit(f"{case.name}: y is wrong, so there is nothing to time")
    copy = [d.x.clone for d in data]  # allocates its result, as the operators do
    forward = [lambda d=d: ops.chunked_forward(d.x, *d.seeds, d.telemetry, nothing) for d in data]
    plain = [lambda d=d: reference.chunked_forward(d.x, *d.seeds, d.telemetry, nothing) for d in data]
    result = {"copy": timed(copy, device), "forward": timed(forward, device)}
    result["reference_eager"] = eager_time(plain[0], device, count=3)
    result["forward_eager"] = eager_time(forward[0], device)
    result["times_copy"] = round(result["forward"]["p50"] / result["copy"]["p50"], 2)
    result["GB_per_s"] = round(2 * case.bytes / result["forward"]["p50"] / 1e3, 1)
    return result


if __name__ == "__main__":
    run("bench_chunked_forward", __doc__, bench)
