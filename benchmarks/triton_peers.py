"""Peers written in Triton: a kernel with fused statistics, and the launch scheme of the package that came before.

Imported only where Triton is installed, which is with CUDA builds of torch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from peers import Peer, coefficients
from torch import Tensor
from workload import Case, Data

PROGRAMS = 2048
"""About as many as keep the machine full: 132 multiprocessors, 8 to 16 programs each."""


def _configs() -> list[triton.Config]:
    return [
        triton.Config({"ROWS": rows, "COLUMNS": columns}, num_warps=warps)
        for rows, columns, warps in ((2, 1024, 4), (4, 512, 4), (8, 256, 4), (16, 128, 4))
    ]


def _bench(kernel, quantiles):
    return triton.testing.do_bench(kernel, warmup=5, rep=20, quantiles=quantiles)


@triton.autotune(_configs(), key=["rows", "features"], do_bench=_bench)
@triton.jit
def _blend_and_sum(x, y, a, b, partial, rows, features, split, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    there = column < features
    scale = tl.load(a + column, mask=there, other=0.0)[None, :]
    shift = tl.load(b + column, mask=there, other=0.0)[None, :]
    first = tl.zeros([ROWS, COLUMNS], tl.float32)
    second = tl.zeros([ROWS, COLUMNS], tl.float32)
    start = tl.program_id(1) * split
    for offset in range(0, split, ROWS):
        row = start + offset + tl.arange(0, ROWS)
        at = row.to(tl.int64)[:, None] * features + column[None, :]
        mask = (row < rows)[:, None] & there[None, :]
        value = tl.load(x + at, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        tl.store(y + at, (value * scale + shift).to(y.dtype.element_ty), mask=mask)
        first += value
        second += value * value
    into = partial + tl.program_id(1) * 2 * features + column
    tl.store(into, tl.sum(first, 0), mask=there)
    tl.store(into + features, tl.sum(second, 0), mask=there)


@triton.jit
def _merge(
    partial, sums, splits, features, seeds, chunk, SPLITS: tl.constexpr, SEEDS: tl.constexpr, CHUNK: tl.constexpr
):
    seed = tl.program_id(0) * SEEDS + tl.arange(0, SEEDS)
    inside = tl.arange(0, CHUNK)
    mask = (seed < seeds)[:, None] & (inside < chunk)[None, :]
    column = tl.reshape(seed[:, None] * chunk + inside[None, :], [SEEDS * CHUNK])
    owned = tl.reshape(mask, [SEEDS * CHUNK])
    which = tl.program_id(1)
    total = tl.zeros([SPLITS, SEEDS * CHUNK], tl.float32)
    for start in range(0, splits, SPLITS):
        split = start + tl.arange(0, SPLITS)
        at = (2 * split + which)[:, None] * features + column[None, :]
        total += tl.load(partial + at, mask=(split < splits)[:, None] & owned[None, :], other=0.0)
    by_seed = tl.sum(tl.reshape(tl.sum(total, 0), [SEEDS, CHUNK]), 1)
    into = sums + which * seeds + seed
    tl.store(into, tl.load(into, mask=seed < seeds, other=0.0) + by_seed, mask=seed < seeds)


def fused(case: Case, data: Data) -> Peer:
    """One pass over x, then a small merge of its partial sums."""
    a, b = coefficients(data)
    rows, features, seeds = case.rows, case.features, case.seeds
    split = min(256, max(16, triton.next_power_of_2(rows * triton.cdiv(features, 512) // PROGRAMS)))
    splits = triton.cdiv(rows, split)
    sums = torch.zeros(2, seeds, device=data.x.device)
    partial = torch.empty(splits, 2, features, device=data.x.device)
    block = triton.next_power_of_2(case.chunk)
    together = max(1, 64 // block)
    at_once = max(1, min(triton.next_power_of_2(splits), 4096 // (together * block)))

    def forward(x: Tensor) -> Tensor:
        y = torch.empty_like(x)
        _blend_and_sum[lambda meta: (triton.cdiv(features, meta["COLUMNS"]), splits)](
            x, y, a, b, partial, rows, features, split
        )
        _merge[(triton.cdiv(seeds, together), 2)](
            partial, sums, splits, features, seeds, case.chunk, SPLITS=at_once, SEEDS=together, CHUNK=block
        )
        return y

    return Peer(forward, sums)


@triton.jit
def _row_and_seed(
    x, y, lifecycle, blueprint, strategy, bank, features, seeds, chunk: tl.constexpr, BLOCK: tl.constexpr
):
    program = tl.program_id(0)
    row = (program // seeds).to(tl.int64)
    seed = program % seeds
    inside = tl.arange(0, BLOCK)
    column = seed * chunk + inside
    mask = (inside < chunk) & (column < features)
    value = tl.load(x + row * features + column, mask=mask)
    state = tl.load(lifecycle + seed)
    if (state >= 3) & (state <= 7):
        weight = tl.load(bank + tl.load(blueprint + seed) * features + column, mask=mask)
        kind = tl.load(strategy + seed)
        if kind == 0:
            value = value * weight
        elif kind == 1:
            value = value + weight
        else:
            value = (value + weight) * 0.5
    tl.store(y + row * features + column, value, mask=mask)


def one_program_each(case: Case, data: Data) -> Peer:
    """One program for each row and seed: no alpha, no statistics, and features that nobody owns are not written."""
    nothing = torch.empty(0, device=data.x.device)

    def forward(x: Tensor) -> Tensor:
        y = torch.empty_like(x)
        _row_and_seed[(case.rows * case.seeds,)](
            x, y, data.state[0], data.state[1], data.state[3], data.weights,
            case.features, case.seeds, case.chunk, BLOCK=triton.next_power_of_2(case.chunk),
        )  # fmt: skip
        return y

    return Peer(forward, nothing)
