"""chunked_backward with every gradient and the gradient telemetry, against copies of as many bytes (two reads, one write)."""

from __future__ import annotations

import peers
import torch
from results import Row, run
from timing import timed
from workload import Case, Truth, make_data

from kasmina_ext import ops

HALF, SINGLE = torch.bfloat16, torch.float32
CASES = {
    "cpu": [Case(64, 1024, 64, SINGLE), Case(2048, 1024, 128, HALF), Case(8192, 4096, 512, SINGLE)],
    "cuda": [
        Case(8192, 4096, 512, HALF, "64 MiB"),
        Case(16384, 8192, 1024, HALF, "256 MiB"),
        Case(16384, 4096, 1024, SINGLE, "256 MiB"),
    ],
}


def bench(case: Case, device: str) -> Row:
    data = make_data(case, device, tensors=3)
    grads = [torch.randn_like(d.x) for d in data]
    first, truth = data[0], Truth.of(data[0])

    def ours(d, grad):
        return lambda: ops.chunked_backward(grad, d.x, *d.seeds, d.grad_telemetry, True, True, True)

    got = ours(first, grads[0])()
    truth.check_backward("kasmina_ext", grads[0], got[0])
    peer = peers.compiled_backward(case, first)
    answer = peer(grads[0], first.x)
    truth.check_backward("torch.compile", grads[0], answer[0])
    if not torch.allclose(got[2].float(), answer[2], rtol=1e-2, atol=1e-2 * answer[2].abs().max().item()):
        raise SystemExit(f"{case.name}: dalpha differs from the peer's, so there is nothing to time")
    times = timed(
        {
            "copy": [d.x.clone for d in data],
            "kasmina_ext": [ours(d, g) for d, g in zip(data, grads, strict=True)],
            "torch.compile": [lambda d=d, g=g: peer(g, d.x) for d, g in zip(data, grads, strict=True)],
        },
        device,
    )
    ours_of_copy = times["kasmina_ext"]["p50"] / times["copy"]["p50"]
    return {
        "case": case.name,
        "bytes": 3 * case.bytes,
        "gpu" if device == "cuda" else "cpu": times,
        "share of copy speed": {
            name: round((1 if name == "copy" else 1.5) * times["copy"]["p50"] / t["p50"], 4)
            for name, t in times.items()
        },
        "times copy of its bytes": round(ours_of_copy / 1.5, 4),
        "times best": round(times["kasmina_ext"]["p50"] / times["torch.compile"]["p50"], 4),
    }


if __name__ == "__main__":
    run("bench_chunked_backward", __doc__, CASES, bench)
