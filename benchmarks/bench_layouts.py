"""chunked_forward and chunked_backward where memory is not as one would like it, against the aligned case of as many numbers.

Convolution outputs (NCHW, channels_last), a number of features that no vector divides, rows that begin at odd addresses,
chunks of one feature, of all features, and of uneven lengths.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from bench_chunked_backward import backward
from bench_chunked_forward import ours, ratio
from results import Row, run
from timing import timed
from torch import Tensor
from workload import Case, Data, Truth, make_data

PIXELS = 64  # of an image, along one side
CHANNELS = 256


def channels_last(case: Case, device: str) -> list[Data]:
    """As many numbers, as images; the operator's features come last."""
    images = case.rows * case.features // (CHANNELS * PIXELS * PIXELS)
    data = make_data(replace(case, rows=images * PIXELS * PIXELS, features=CHANNELS, seeds=16), device)
    return [replace(d, x=d.x.view(images, PIXELS, PIXELS, CHANNELS)) for d in data]


def nchw(case: Case, device: str) -> list[Data]:
    """The same with pixels adjacent in memory: features still come last, as a view."""

    def planes(x: Tensor) -> Tensor:
        return x.flatten(1, 2).transpose(1, 2).contiguous().transpose(1, 2)

    return [replace(d, x=planes(d.x)) for d in channels_last(case, device)]


def shifted(x: Tensor) -> Tensor:
    room = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)[1:]
    return room.view(x.shape).copy_(x)


def uneven(offsets: Tensor, features: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    cuts = torch.randperm(features - 1, generator=generator)[: len(offsets) - 2] + 1
    return torch.cat((torch.tensor([0]), cuts.sort().values, torch.tensor([features]))).to(offsets)


def unaligned(case: Case, device: str) -> list[Data]:
    return [replace(d, x=shifted(d.x)) for d in make_data(case, device)]


def in_uneven_chunks(case: Case, device: str) -> list[Data]:
    return [replace(d, offsets=uneven(d.offsets, case.features)) for d in make_data(case, device)]


VARIANTS: dict[str, Callable[[Case, str], list[Data]]] = {
    "NCHW": nchw,
    "channels_last": channels_last,
    "one feature less": lambda case, device: make_data(replace(case, features=case.features - 1), device),
    "address off by one element": unaligned,
    "chunks of 1": lambda case, device: make_data(replace(case, seeds=case.features), device),
    "one chunk of all": lambda case, device: make_data(replace(case, seeds=1), device),
    "uneven chunks": in_uneven_chunks,
}
ALIGNED = {
    "cpu": [Case(2048, 1024, 64, torch.float32)],
    "cuda": [
        Case(16384, 8192, 512, torch.bfloat16),
        Case(16384, 4096, 512, torch.float32),
    ],
}
CASES = {device: [(case, name) for case in aligned for name in VARIANTS] for device, aligned in ALIGNED.items()}


def bench(case_and_variant: tuple[Case, str], device: str) -> Row:
    """A variant beside the aligned case."""
    case, name = case_and_variant
    base, data = make_data(case, device), VARIANTS[name](case, device)
    first = data[0]
    y = ours(first)()
    Truth.of(first).check_forward(name, first.x.flatten(0, -2), y.flatten(0, -2))
    if y.stride() != torch.empty_like(first.x).stride():
        raise SystemExit(f"{name}: y was not laid out as x is")
    grad = torch.randn_like(first.x)
    dx = backward(first, grad)()[0]
    Truth.of(first).check_backward(name, grad.flatten(0, -2), dx.flatten(0, -2))
    grads, aligned_grads = [grad, *(torch.randn_like(d.x) for d in data[1:])], [torch.randn_like(d.x) for d in base]
    calls = {
        "copy": [d.x.clone for d in data],
        "kasmina_ext": [ours(d) for d in data],
        "kasmina_ext, backward": [backward(d, g) for d, g in zip(data, grads, strict=True)],
        "aligned copy": [d.x.clone for d in base],
        "aligned": [ours(d) for d in base],
        "aligned, backward": [backward(d, g) for d, g in zip(base, aligned_grads, strict=True)],
    }
    times = timed(calls, device)
    numbers = first.x.numel() / base[0].x.numel()
    row: Row = {"case": f"{name}: {tuple(first.x.shape)}, {first.x.dtype}".replace("torch.", "")}
    row |= {"bytes": 2 * first.x.numel() * first.x.itemsize, "gpu" if device == "cuda" else "cpu": times}
    for way in ("", ", backward"):
        times_aligned = times[f"kasmina_ext{way}"]["p50"] / times[f"aligned{way}"]["p50"]
        row[f"times aligned{way}"] = round(times_aligned / numbers, 4)
    row["times copy"] = ratio(times, "copy")
    return row


if __name__ == "__main__":
    run("bench_layouts", __doc__, CASES, bench)
