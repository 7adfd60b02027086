"""Columns so long that a thread of a CUDA pass walks many rows: rounds without rare cases, several groups of sums.

What the tables of cases reach are the rounds for few rows. On the CPU the same inputs are cut into blocks of rows.
"""

from __future__ import annotations

import checks
import pytest
import torch
from cases import Case, build

# 264 blocks of 256 threads (an H200's) have ten rows and more each; tiles have edges where rows are no multiple of 16 B.
LONG = [
    Case((1500, 4096), 512, dtype=torch.bfloat16, chunks="balanced", telemetry="fresh"),
    Case((1500, 4095), 100, dtype=torch.float16),
    Case((1501, 2049), 3, dtype=torch.float32, values="special"),
    Case((1500, 4096), 700, dtype=torch.bfloat16, layout="misaligned", grad_layout="misaligned"),
]
DAMAGED = 12


@pytest.mark.parametrize("case", LONG, ids=str)
def test_matches_oracle(case: Case, device: torch.device):
    inputs = build(case, device)
    assert checks.check_forward(inputs, "ops") == []
    assert checks.check_backward(inputs, "ops") == []


@pytest.mark.sanitizer
def test_edges_of_tiles(device: torch.device):
    """Compared with plain PyTorch, which costs the sanitizers little."""
    rows, features = 1501, 2049
    x = torch.randn(rows, features, device=device)
    state = torch.zeros(8, 3, dtype=torch.int32, device=device)
    state[0] = 6
    offsets = torch.tensor([0, 1000, 1000, features], dtype=torch.int32, device=device)
    weights, alpha = torch.randn(2, features, device=device), torch.ones(3, device=device)
    telemetry = torch.zeros(3, 5, dtype=torch.float64, device=device)
    grad_telemetry = torch.zeros(3, 3, dtype=torch.float64, device=device)
    seeds = (offsets, state, alpha, weights)
    y = checks.ops.chunked_forward(x, *seeds, telemetry, grad_telemetry)
    grad_x, grad_weights, _ = checks.ops.chunked_backward(x, x, *seeds, grad_telemetry, True, True, True)
    assert torch.equal(y, weights[0] * x) and torch.equal(grad_x, y)
    squares = x.double().square().sum(0)
    torch.testing.assert_close(grad_weights[0].double(), squares, rtol=2e-6, atol=0)
    owned = (squares[:1000].sum(), squares[1000:].sum())
    of_mean = telemetry[:, 2] + telemetry[:, 0] * telemetry[:, 1].square()
    torch.testing.assert_close(of_mean[[0, 2]], torch.stack(owned), rtol=1e-6, atol=0)
    assert telemetry[:, 0].tolist() == [rows * 1000, 0, rows * (features - 1000)]


def test_a_column_goes_wrong_after_many_rows(device: torch.device):
    """Float32 sums move to float64 every 64 rows of a thread: numbers that it cannot hold may come in any group."""
    rows, features, chunk = (40_000, 4096, 8) if device.type == "cuda" else (2_000, 512, 8)
    x = torch.randn(rows, features, device=device).bfloat16()
    late, later = int(0.6 * rows), int(0.9 * rows)
    x[later, 1] = 3e38  # its square overflows float32
    x[:, 3] = 1e-30 * x[:, 3]  # squares vanish
    x[:late, 10], x[late:, 10] = 0, 1e-25  # zeros, then numbers whose squares vanish
    x[late, 20], x[later, 20], x[late, 21] = torch.inf, -torch.inf, torch.nan
    x[:, 30] = 0
    x[late:, 40] = 2e38  # the sum overflows
    seeds = features // chunk
    offsets = torch.arange(0, features + 1, chunk, dtype=torch.int32, device=device)
    telemetry = torch.zeros(seeds, 5, dtype=torch.float64, device=device)
    checks.ops.telemetry_update(x, offsets, telemetry)

    for seed in [*range(DAMAGED), seeds // 2, seeds - 1]:
        numbers = x[:, seed * chunk : (seed + 1) * chunk].double().flatten()
        finite = numbers[numbers.isfinite()]
        count, mean, m2, batches, nonfinite = telemetry[seed].tolist()
        assert (count, batches, nonfinite) == (len(finite), 1, len(numbers) - len(finite)), seed
        variance = finite.var(correction=0).item()
        assert mean == pytest.approx(finite.mean().item(), rel=1e-6, abs=1e-6 * variance**0.5), seed
        assert m2 == pytest.approx(variance * count, rel=1e-4), seed

    state = torch.zeros(8, seeds, dtype=torch.int32, device=device)
    state[0] = 6
    bank, alpha = torch.ones(2, features, device=device), torch.ones(seeds, device=device)
    grad_telemetry = torch.zeros(seeds, 3, dtype=torch.float64, device=device)
    grad = torch.randn(rows, features, device=device).bfloat16()
    grad[:, 40] = 1
    args = (offsets, state, alpha, bank, grad_telemetry, True, True, True)
    grad_x, grad_weights, _ = checks.ops.chunked_backward(grad, x, *args)
    assert torch.equal(grad_x, grad)
    for columns in x.split(512, dim=1) if device.type == "cpu" else (x[:, :512], x[:, -512:]):
        first = columns.storage_offset()
        u = (grad[:, first : first + 512].double() * columns.double()).sum(0)
        spread = (grad[:, first : first + 512].double() * columns.double()).abs().sum(0)
        got = grad_weights[0, first : first + 512].double()
        fits = u.abs() < 3e38  # the gradient is float32
        assert ((got - u).abs()[fits] <= 4e-6 * spread[fits] + 1e-44).all()
    of_sums = grad_telemetry[:, 2]
    assert of_sums[2].item() == 0 and of_sums[DAMAGED:].eq(1).all(), "only sums that are not finite are left out"


def test_an_outlier_in_the_first_row(device: torch.device):
    """What a thread sees first is what it sums about, and must not be so for all of a long column."""
    rows, features, chunk = (40_000, 4096, 16) if device.type == "cuda" else (4_000, 256, 16)
    x = torch.randn(rows, features, device=device)
    x[0] = 3e7
    offsets = torch.arange(0, features + 1, chunk, dtype=torch.int32, device=device)
    telemetry = torch.zeros(features // chunk, 5, dtype=torch.float64, device=device)
    checks.ops.telemetry_update(x, offsets, telemetry)
    for seed in (0, 7, features // chunk - 1):
        numbers = x[:, seed * chunk : (seed + 1) * chunk].double()
        variance, mean = numbers.var(correction=0).item(), numbers.mean().item()
        assert telemetry[seed, 1].item() == pytest.approx(mean, abs=1e-6 * (abs(mean) + variance**0.5))
        assert telemetry[seed, 2].item() == pytest.approx(variance * numbers.numel(), rel=5e-5)


def test_alignment_changes_no_bit(device: torch.device):
    """Rows of a thread, on an H200 about 66 to 69, end in all ways within a group of 64."""
    features = 128
    for rows in range(140_000, 147_000, 700) if device.type == "cuda" else (1000, 1003):
        numbers = torch.randn(rows * features + 1, device=device)
        offset = numbers[1:].view(rows, features)
        offsets = torch.tensor([0, 30, features], dtype=torch.int32, device=device)
        state = torch.zeros(8, 2, dtype=torch.int32, device=device)
        bank, alpha = torch.ones(2, features, device=device), torch.ones(2, device=device)
        results = []
        for x in (offset, offset.clone()):
            telemetry = torch.zeros(2, 5, dtype=torch.float64, device=device)
            grad_telemetry = torch.zeros(2, 3, dtype=torch.float64, device=device)
            checks.ops.telemetry_update(x, offsets, telemetry)
            checks.ops.chunked_backward(x, x, offsets, state, alpha, bank, grad_telemetry, False, False, False)
            results.append(torch.cat((telemetry, grad_telemetry), 1))
        assert torch.equal(*results), rows
