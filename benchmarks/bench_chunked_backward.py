"""chunked_backward with every gradient and the gradient telemetry, against copies of as many bytes (two reads, one write)."""

from __future__ import annotations

import torch
from timing import Case, eager_time, make_data, run, timed

from kasmina_ext import ops, reference


def bench(case: Case, device: str) -> dict:
    data = make_data(case, device)
    grads = [torch.randn_like(d.x) for d in data]
    first = data[0]
    expected = reference.chunked_backward(grads[0], first.x, *first.seeds, first.grad_telemetry, True, True, True)
    got = ops.chunked_backward(grads[0], first.x, *first.seeds, first.grad_telemetry, True, True, True)
    if not torch.equal(got[0], expected[0]):
        raise SystemExit(f"{case.name}: dx is wrong, so there is nothing to time")

    def backward(backend, d, g):
        return lambda: backend.chunked_backward(g, d.x, *d.seeds, d.grad_telemetry, True, True, True)

    copy = [d.x.clone for d in data]  # allocates its result, as the operators do
    compiled = [backward(ops, d, g) for d, g in zip(data, grads, strict=True)]
    result = {"copy": timed(copy, device), "backward": timed(compiled, device)}
    result["reference_eager"] = eager_time(backward(reference, first, grads[0]), device, count=3)
    result["backward_eager"] = eager_time(compiled[0], device)
    # A copy moves two tensors, the backward three.
    result["times_copy_of_its_bytes"] = round(result["backward"]["p50"] / (1.5 * result["copy"]["p50"]), 2)
    result["GB_per_s"] = round(3 * case.bytes / result["backward"]["p50"] / 1e3, 1)
    return result


if __name__ == "__main__":
    run("bench_chunked_backward", __doc__, bench)
