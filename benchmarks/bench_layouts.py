"""chunked_forward where memory is not as one would like it, against the aligned case of as many numbers.

Convolution outputs (NCHW, channels_last), a number of features that no vector divides, rows that begin at odd addresses,
chunks of one feature, of all features, and of uneven lengths.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from bench_chunked_forward import ours
from results import Row, arguments, keep
from timing import timed
from torch import Tensor
from workload import Case, Data, Truth, make_data

ALIGNED = {
    "cpu": [Case(2048, 1024, 64, torch.float32)],
    "cuda": [Case(16384, 8192, 512, torch.bfloat16), Case(16384, 4096, 512, torch.float32)],
}
PIXELS = 64  # of an image, along one side
CHANNELS = 256


def variants(case: Case, device: str) -> dict[str, list[Data]]:
    aligned, features = make_data(case, device), case.features
    images = case.rows * features // (CHANNELS * PIXELS * PIXELS)
    conv = make_data(replace(case, rows=images * PIXELS * PIXELS, features=CHANNELS, seeds=16), device)
    odd = make_data(replace(case, features=features - 1), device)
    return {
        "aligned": aligned,
        "NCHW": [replace(d, x=nchw(d.x, images)) for d in conv],
        "channels_last": [replace(d, x=d.x.view(images, PIXELS, PIXELS, -1)) for d in conv],
        "one feature less": odd,
        "address off by one element": [replace(d, x=shifted(d.x)) for d in aligned],
        "chunks of 1": make_data(replace(case, seeds=features), device),
        "one chunk of all": make_data(replace(case, seeds=1), device),
        "uneven chunks": [replace(d, offsets=uneven(d.offsets, features)) for d in make_data(case, device)],
    }


def nchw(x: Tensor, images: int) -> Tensor:
    """The same numbers of channels and pixels, pixels adjacent; features come last for the operator, as a view."""
    return x.view(images, -1, x.shape[-1]).transpose(1, 2).contiguous().transpose(1, 2)


def shifted(x: Tensor) -> Tensor:
    room = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)[1:]
    return room.view(x.shape).copy_(x)


def uneven(offsets: Tensor, features: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    cuts = torch.randperm(features - 1, generator=generator)[: len(offsets) - 2] + 1
    return torch.cat((torch.tensor([0]), cuts.sort().values, torch.tensor([features]))).to(offsets)


def bench(case: Case, device: str):
    """One variant at a time, each beside the aligned case in the same run."""
    made = variants(case, device)
    base = made.pop("aligned")
    for name, data in made.items():
        first = data[0]
        y = ours(first)()
        Truth.of(first).check_forward(name, first.x.flatten(0, -2), y.flatten(0, -2))
        if y.stride() != torch.empty_like(first.x).stride():
            raise SystemExit(f"{name}: y was not laid out as x is")
        calls = {"copy": [d.x.clone for d in data], "kasmina_ext": [ours(d) for d in data]}
        times = timed(calls | {"aligned": [ours(d) for d in base], "aligned copy": [d.x.clone for d in base]}, device)
        numbers = first.x.numel() / base[0].x.numel()
        row: Row = {"case": f"{name}: {tuple(first.x.shape)}, {first.x.dtype}".replace("torch.", "")}
        row["gpu" if device == "cuda" else "cpu"] = times
        row["times aligned"] = round(times["kasmina_ext"]["p50"] / times["aligned"]["p50"] / numbers, 4)
        row["times copy"] = round(times["kasmina_ext"]["p50"] / times["copy"]["p50"], 4)
        yield row


if __name__ == "__main__":
    options = arguments(__doc__).parse_args()
    keep("bench_layouts", options, (row for case in ALIGNED[options.device] for row in bench(case, options.device)))
