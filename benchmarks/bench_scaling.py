"""chunked_forward with telemetry against the number of rows, of features and of seeds; one of them varies at a time.

A million seeds have 104 MB of state, telemetry, alpha and offsets themselves; that traffic is in the times.
"""

from __future__ import annotations

import torch
from bench_chunked_forward import KERNEL, copies, ours, ratio
from results import Row, run, shares
from timing import timed
from workload import Case, Truth, make_data

HALF = torch.bfloat16
CASES = {
    "cpu": [Case(2048, 1024, seeds, torch.float32) for seeds in (16, 1024)],
    "cuda": [
        *(Case(16384, 8192, seeds, HALF, "by seeds") for seeds in (100, 1, 8192)),
        *(Case(2048, 65536, seeds, HALF, "by seeds") for seeds in (10_000, 65_536)),
        *(Case(128, 1 << 20, seeds, HALF, "by seeds") for seeds in (100, 1_000_000)),
        Case(32768, 4096, 1_000_000, HALF, "more seeds than features"),
        *(Case(rows, 4096, 512, HALF, "by rows") for rows in (16, 128, 1024, 65536)),
        *(Case((1 << 27) // features, features, 64, HALF, "by features") for features in (64, 512, 65536)),
    ],
}


_hundred: dict[int, float] = {}
"""By the number of elements: the time with 100 seeds, which a million seeds are compared with."""


def bench(case: Case, device: str) -> Row:
    data = make_data(case, device)
    first = data[0]
    Truth.of(first).check_forward(case.name, first.x, ours(first)())
    times = timed(copies(data) | {"kasmina_ext": [ours(d) for d in data]}, device, rounds=15)
    row = {"case": case.name, "bytes": 2 * case.bytes, "gpu" if device == "cuda" else "cpu": times}
    row |= {
        "share of copy speed": shares(times),
        "times copy": ratio(times, "copy"),
        "times copy by a kernel": ratio(times, KERNEL),
    }
    if "seeds" in case.note:
        time = times["kasmina_ext"]["p50"]
        row["times 100 seeds"] = round(time / _hundred.setdefault(case.rows * case.features, time), 4)
    return row


if __name__ == "__main__":
    run("bench_scaling", __doc__, CASES, bench)
