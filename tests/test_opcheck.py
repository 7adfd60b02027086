"""torch.library.opcheck: schema, fake function, autograd registration and AOT dispatch of every operator."""

from __future__ import annotations

import cases
import pytest
import torch
from cases import Case, build

from kasmina_ext import ops as _registers_the_operators  # noqa: F401

kasmina = torch.ops.kasmina


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.short)
def test_chunked_forward(device, dtype):
    inputs = build(Case((3, 4, 20), 3, dtype=dtype, layout="swapped_rows", weights_dtype=torch.float32), device)
    leaves = inputs.requiring_grad()
    args = (leaves.x, *leaves.seeds, leaves.telemetry, leaves.grad_telemetry)
    torch.library.opcheck(kasmina.chunked_forward, args)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.short)
def test_chunked_backward(device, dtype):
    inputs = build(Case((12, 20), 3, dtype=dtype, layout="transposed", weights_dtype=torch.bfloat16), device)
    flags = [(True, True, True), (False, True, False)][dtype == torch.float64]
    args = (inputs.grad_y, inputs.x, *inputs.seeds, inputs.grad_telemetry, *flags)
    torch.library.opcheck(kasmina.chunked_backward, args)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.short)
def test_telemetry_update(device, dtype):
    inputs = build(Case((12, 20), 3, dtype=dtype, layout="every_other_row"), device)
    torch.library.opcheck(kasmina.telemetry_update, (inputs.x, inputs.offsets, inputs.telemetry))


def test_telemetry_reduce(device):
    telemetry = build(Case((4, 20), 3), device).telemetry
    telemetry[:, 0] += 1  # opcheck takes NaN, the answer for a seed without elements, for a difference
    torch.library.opcheck(kasmina.telemetry_reduce, (telemetry,))


def test_telemetry_merge(device):
    first, second = (build(Case((4, 20), 3, rng=rng), device).telemetry for rng in (0, 1))
    torch.library.opcheck(kasmina.telemetry_merge, (first, second))


@pytest.mark.parametrize("case", [Case((0, 8), 3), Case((4, 8), 0), Case((4, 8), 3, telemetry="off")], ids=str)
def test_empty(device, case):
    leaves = build(case, device).requiring_grad()
    torch.library.opcheck(kasmina.chunked_forward, (leaves.x, *leaves.seeds, leaves.telemetry, leaves.grad_telemetry))
