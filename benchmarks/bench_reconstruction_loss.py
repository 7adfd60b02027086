"""reconstruction_loss of all seeds and its derivative, against a copy (two tensors read) and against torch.compile."""

from __future__ import annotations

import torch
from results import Row, run, shares
from timing import timed
from workload import Case, make_data

from kasmina_ext import ops

TRAINING = 2
HALF, SINGLE = torch.bfloat16, torch.float32
CASES = {
    "cpu": [Case(64, 1024, 64, SINGLE), Case(2048, 1024, 128, HALF)],
    "cuda": [Case(8192, 4096, 512, HALF, "64 MiB"), Case(16384, 4096, 1024, SINGLE, "256 MiB")],
}


def bench(case: Case, device: str) -> Row:
    data = make_data(case, device)
    targets = [torch.randn_like(d.x) for d in data]
    data[0].state[0], data[0].state[3] = TRAINING, 0  # shared by all copies; MULTIPLICATIVE
    offsets, state, _, weights = data[0].seeds
    grad = torch.ones(case.seeds, dtype=SINGLE, device=device)
    row_of_bank, chunk = weights[0].float(), case.chunk

    def plain(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return ((row_of_bank * x.float() - t.float()) ** 2).mean(0).view(case.seeds, chunk).mean(1)

    compiled = torch.compile(plain, fullgraph=True, dynamic=False)
    truth = (
        ((weights[0].double() * data[0].x.double() - targets[0].double()) ** 2).mean(0).view(case.seeds, chunk).mean(1)
    )
    for name, loss in (
        ("kasmina_ext", ops.reconstruction_loss(data[0].x, targets[0], offsets, state, weights)),
        ("torch.compile", compiled(data[0].x, targets[0])),
    ):
        if not torch.allclose(loss.double(), truth, rtol=1e-3):
            raise SystemExit(f"{case.name}: the loss of {name} is wrong, so there is nothing to time")
    pairs = list(zip(data, targets, strict=True))
    backward = torch.ops.kasmina.reconstruction_loss_backward
    times = timed(
        {
            "copy": [d.x.clone for d in data],
            "kasmina_ext": [
                lambda d=d, t=t: ops.reconstruction_loss(d.x, t, offsets, state, weights) for d, t in pairs
            ],
            "kasmina_ext, backward": [
                lambda d=d, t=t: backward(grad, d.x, t, offsets, state, weights) for d, t in pairs
            ],
            "torch.compile": [lambda d=d, t=t: compiled(d.x, t) for d, t in pairs],
        },
        device,
    )
    row = {"case": case.name, "bytes": 2 * case.bytes, "gpu" if device == "cuda" else "cpu": times}
    return row | {"share of copy speed": shares(times)}


if __name__ == "__main__":
    run("bench_reconstruction_loss", __doc__, CASES, bench)
