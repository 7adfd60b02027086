"""torch.library.opcheck: schema, fake function, autograd registration and AOT dispatch of every operator."""

from __future__ import annotations

from pathlib import Path

import cases
import lifecycle_model as model
import numpy as np
import pytest
import torch
from cases import Case, build

from kasmina_ext import ops as _registers_the_operators  # noqa: F401
from kasmina_ext._schema import SCHEMAS

kasmina = torch.ops.kasmina
pytestmark = pytest.mark.stack("introspection: torch.library.opcheck")


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


@pytest.mark.parametrize(("num_seeds", "updates"), [(5, 12), (5, 0), (0, 3)])
def test_state_update(device, num_seeds, updates):
    rng = np.random.default_rng(1)
    tensors = model.random_tensors(num_seeds, rng, device)
    columns = rng.integers(0, 4, (updates, 4)), rng.integers(0, 16, updates), np.zeros((11, 11))
    ids = torch.from_numpy(rng.integers(-1, num_seeds + 1, updates)).int().to(device)
    requests = (torch.from_numpy(column).int().to(device) for column in columns)
    torch.library.opcheck(kasmina.state_update, (*tensors.lived, ids, *requests, 4))


@pytest.mark.parametrize("num_seeds", [5, 0])
@pytest.mark.parametrize("schedule", range(4))
def test_lifecycle_step(device, num_seeds, schedule):
    tensors = model.random_tensors(num_seeds, np.random.default_rng(2), device)
    torch.library.opcheck(kasmina.lifecycle_step, (*tensors.lived, tensors.alpha, schedule, 40, schedule > 1))


RECONSTRUCTED = [
    *[Case((3, 4, 20), 3, dtype=d, layout="swapped_rows", weights_dtype=torch.float32) for d in cases.DTYPES],
    Case((12, 20), 3, grad_layout="transposed", weights_dtype=torch.bfloat16),
    Case((0, 8), 3),
    Case((4, 8), 0),
]


def _in_training(case: Case, device) -> cases.Inputs:
    inputs = build(case, device)
    inputs.state[0] = 2
    return inputs


@pytest.mark.parametrize("case", RECONSTRUCTED, ids=str)
def test_reconstruction_loss(device, case):
    leaves = _in_training(case, device).requiring_grad()
    args = (leaves.x.detach(), leaves.grad_y, leaves.offsets, leaves.state, leaves.weights)
    torch.library.opcheck(kasmina.reconstruction_loss, args)


@pytest.mark.parametrize("case", RECONSTRUCTED, ids=str)
def test_reconstruction_loss_backward(device, case):
    inputs = _in_training(case, device)
    wide = torch.float64 if case.dtype == torch.float64 else torch.float32
    grad_loss = torch.linspace(-1, 1, case.seeds, dtype=wide, device=device)
    args = (grad_loss, inputs.x, inputs.grad_y, inputs.offsets, inputs.state, inputs.weights)
    torch.library.opcheck(kasmina.reconstruction_loss_backward, args)


PAIRED = [
    *[Case((3, 4, 20), 3, dtype=d, layout="swapped_rows") for d in cases.DTYPES],
    Case((2, 3, 4, 5), 3, layout="nchw", grad_layout="channels_last"),
    Case((0, 8), 3),
    Case((4, 0), 3),
]


@pytest.mark.parametrize("case", PAIRED, ids=str)
def test_pair_moments(device, case):
    inputs = build(case, device)
    moments = torch.zeros(case.shape[-1], 6, dtype=torch.float64, device=device)
    moments[::2] = torch.tensor([4.0, 1.0, -1.0, 2.0, 3.0, 0.5], dtype=torch.float64, device=device)
    torch.library.opcheck(kasmina.pair_moments, (inputs.x, inputs.grad_y, moments))


@pytest.mark.parametrize("case", [Case((0, 8), 3), Case((4, 8), 0), Case((4, 8), 3, telemetry="off")], ids=str)
def test_empty(device, case):
    leaves = build(case, device).requiring_grad()
    torch.library.opcheck(kasmina.chunked_forward, (leaves.x, *leaves.seeds, leaves.telemetry, leaves.grad_telemetry))


def test_every_operator_is_checked():
    text = Path(__file__).read_text()
    assert [name for name in SCHEMAS if f"opcheck(kasmina.{name}," not in text] == []
