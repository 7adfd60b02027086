"""chunked_backward with every gradient and the gradient telemetry, against copies of as many bytes (two reads, one write)."""

from __future__ import annotations

import peers
import torch
from bench_chunked_forward import FLOAT16, HALF, SINGLE, ratio, sized
from results import Row, run, shares
from timing import Call, timed
from torch import Tensor
from workload import Case, Data, Truth, make_data

from kasmina_ext import ops

RACES = {
    "cpu": [Case(64, 1024, 64, SINGLE), Case(2048, 1024, 128, HALF), Case(8192, 4096, 512, SINGLE)],
    "cuda": [sized(64, 4096, 512, HALF), sized(256, 8192, 1024, HALF), sized(256, 4096, 1024, SINGLE)],
}
"""With the peer."""

COPIES = {
    "cpu": [],
    "cuda": [
        sized(mib, features, seeds, dtype)
        for mib, features, dtype in (
            (256, 8192, HALF), (256, 8192, FLOAT16), (256, 4096, SINGLE), (64, 4096, FLOAT16), (64, 4096, SINGLE),
            (8, 1024, HALF), (1, 1024, HALF),
        )
        for seeds in ((1, features) if mib == 256 else (features // 8,))
    ],
}  # fmt: skip
"""Beside a copy alone."""

CASES = {
    device: [(case, True) for case in RACES[device]] + [(case, False) for case in COPIES[device]] for device in RACES
}


def backward(data: Data, grad: Tensor) -> Call:
    return lambda: ops.chunked_backward(grad, data.x, *data.seeds, data.grad_telemetry, True, True, True)


def bench(case_and_peer: tuple[Case, bool], device: str) -> Row:
    case, with_peer = case_and_peer
    data = make_data(case, device, tensors=3)
    grads = [torch.randn_like(d.x) for d in data]
    first, truth = data[0], Truth.of(data[0])
    got = backward(first, grads[0])()
    truth.check_backward("kasmina_ext", grads[0], got[0])
    dw, dalpha = truth.parameter_gradients(first, grads[0])
    check("dw", got[1], dw)
    check("dalpha", got[2], dalpha)
    calls = {
        "copy": [d.x.clone for d in data],
        "kasmina_ext": [backward(d, g) for d, g in zip(data, grads, strict=True)],
    }
    if with_peer:
        peer = peers.compiled_backward(case, first)
        answer = peer(grads[0], first.x)
        truth.check_backward("torch.compile", grads[0], answer[0])
        check("dw of torch.compile", answer[1], dw[0])
        check("dalpha of torch.compile", answer[2], dalpha)
        calls["torch.compile"] = [lambda d=d, g=g: peer(g, d.x) for d, g in zip(data, grads, strict=True)]
    times = timed(calls, device)
    row = {"case": case.name, "bytes": 3 * case.bytes, "gpu" if device == "cuda" else "cpu": times}
    row["share of copy speed"] = shares(times, tensors=3)
    row["times copy of its bytes"] = round(times["kasmina_ext"]["p50"] / times["copy"]["p50"] / 1.5, 4)
    return row | ({"times best": ratio(times, "torch.compile")} if with_peer else {})


def check(name: str, got: Tensor, truth: Tensor) -> None:
    """By norm: the sums of peers are float32, and weights' gradients are rounded to the weights' type."""
    room = 4 * torch.finfo(got.dtype).eps + 1e-4
    if not bool((got.double() - truth).norm() <= room * truth.norm()):
        raise SystemExit(f"{name} is wrong, so there is nothing to time")


if __name__ == "__main__":
    run("bench_chunked_backward", __doc__, CASES, bench)
