"""telemetry_merge: Chan's formula on accumulators, against exact fractions."""

from __future__ import annotations

from fractions import Fraction

import checks
import numpy as np
import pytest
import torch
from test_telemetry_reduce import accumulator

UNIT = 2.0**-53


def exactly_merged(a: list[float], b: list[float]) -> list[Fraction]:
    a, b = [Fraction(v) for v in a], [Fraction(v) for v in b]
    count = a[0] + b[0]
    if count == 0:
        mean = m2 = Fraction(0)
    else:
        mean = (a[0] * a[1] + b[0] * b[1]) / count
        m2 = a[2] + b[2] + (b[1] - a[1]) ** 2 * a[0] * b[0] / count
    return [count, mean, m2, a[3] + b[3], a[4] + b[4]]


def check(a: torch.Tensor, b: torch.Tensor, merged: torch.Tensor) -> None:
    """Counts exact; mean and M2 within eight roundings of the largest number on the way."""
    for row_a, row_b, got in zip(a.tolist(), b.tolist(), merged.tolist(), strict=True):
        want = exactly_merged(row_a, row_b)
        assert [got[i] for i in (0, 3, 4)] == [want[i] for i in (0, 3, 4)]
        size = abs(row_a[1]) + abs(row_b[1])
        assert abs(Fraction(got[1]) - want[1]) <= 8 * UNIT * size
        # All terms of M2 are positive: what cancels is only the difference of the means.
        count_a, count_b = Fraction(row_a[0]), Fraction(row_b[0])
        joint = count_a * count_b / (count_a + count_b) if count_a + count_b else Fraction(0)
        delta = abs(Fraction(row_b[1]) - Fraction(row_a[1]))
        slack = 8 * Fraction(UNIT) * want[2] + 2 * joint * delta * Fraction(UNIT) * Fraction(size)
        assert abs(Fraction(got[2]) - want[2]) <= slack


@pytest.mark.sanitizer
@pytest.mark.parametrize("seeds", [0, 1, 7, 1000])
@checks.backends
def test_matches_fractions(backend, device, seeds):
    a, b = accumulator(seeds), accumulator(seeds, np.random.default_rng(99)).roll(1, 0)
    a[a[:, 0] > 0, 1] += 1000  # means that nearly cancel, too
    b[: seeds // 2][b[: seeds // 2, 0] > 0, 1] += 1000
    merged = a.clone().to(device)
    other = b.to(device)
    checks.BACKENDS[backend].telemetry_merge(merged, other)
    assert torch.equal(other.cpu(), b)
    check(a, b, merged.cpu())


@checks.backends
def test_an_empty_side_changes_no_bit(backend, device):
    full, empty = accumulator(9)[1::3].to(device), torch.zeros(3, 5, dtype=torch.float64, device=device)
    full[:, 1] = 0.1
    for first, second in ((full, empty), (empty, full)):
        merged = first.clone()
        checks.BACKENDS[backend].telemetry_merge(merged, second)
        assert checks.same_bits(merged, full)
    checks.BACKENDS[backend].telemetry_merge(nothing := empty.clone(), empty)
    assert checks.same_bits(nothing, empty)


@checks.backends
def test_nonfinite_and_batches_of_an_unmeasured_side_still_add(backend, device):
    a = torch.tensor([[0.0, 0, 0, 3, 40]], dtype=torch.float64, device=device)
    b = torch.tensor([[2.0, 5, 8, 1, 2]], dtype=torch.float64, device=device)
    checks.BACKENDS[backend].telemetry_merge(a, b)
    assert a.tolist() == [[2, 5, 8, 4, 42]]


@checks.backends
def test_with_itself(backend, device):
    """`other` may be `telemetry`: every count doubles, the mean stays."""
    a = accumulator(30).to(device)
    before = a.clone()
    checks.BACKENDS[backend].telemetry_merge(a, a)
    assert torch.equal(a[:, [0, 2, 3, 4]], 2 * before[:, [0, 2, 3, 4]])
    assert torch.equal(a[:, 1], before[:, 1])


@checks.backends
def test_other_of_any_strides(backend, device):
    a, b = accumulator(20).to(device), accumulator(20, np.random.default_rng(1)).to(device)
    want = a.clone()
    checks.BACKENDS[backend].telemetry_merge(want, b)
    for view in (b.t().contiguous().t(), torch.cat((b, b), 1)[:, :5], b[:1].expand(20, 5)):
        got = a.clone()
        checks.BACKENDS[backend].telemetry_merge(got, view)
        if view.stride(0):
            assert checks.same_bits(got, want)
        else:
            check(a.cpu(), view.cpu(), got.cpu())


@checks.backends
def test_order_does_not_matter_but_for_rounding(backend, device):
    """(a b) c, a (b c) and (c a) b describe the same activations."""
    parts = [accumulator(50, np.random.default_rng(seed)).to(device) for seed in range(3)]
    results = []
    for order in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):
        merged = parts[order[0]].clone()
        for i in order[1:]:
            checks.BACKENDS[backend].telemetry_merge(merged, parts[i])
        results.append(merged)
    for other in results[1:]:
        assert torch.equal(results[0][:, [0, 3, 4]], other[:, [0, 3, 4]])
        # twice the bound of `check`, with means of the size of 1 and positive terms in M2
        torch.testing.assert_close(results[0], other, rtol=32 * UNIT, atol=32 * UNIT * 8)


@checks.backends
def test_counts_stay_exact_while_doubling(backend, device):
    """48 merges of an accumulator with itself: 3 * 2^48 elements, far beyond float32 and int32."""
    telemetry = torch.tensor([[3.0, 1.5, 2.0, 1, 1]], dtype=torch.float64, device=device)
    for _ in range(48):
        checks.BACKENDS[backend].telemetry_merge(telemetry, telemetry.clone())
    assert telemetry.tolist() == [[3 * 2.0**48, 1.5, 2 * 2.0**48, 2.0**48, 2.0**48]]


@checks.backends
def test_ranks_add_up_to_the_whole(backend, device):
    """Shards measured apart and merged are the whole batch measured at once."""
    ops = checks.BACKENDS[backend]
    x = torch.randn(600, 24, generator=torch.Generator().manual_seed(4)).to(device) + 50
    offsets = torch.tensor([0, 9, 9, 24], dtype=torch.int32, device=device)
    whole = torch.zeros(3, 5, dtype=torch.float64, device=device)
    ops.telemetry_update(x, offsets, whole)
    merged = torch.zeros_like(whole)
    for shard in x.split([200, 1, 399]):
        alone = torch.zeros_like(whole)
        ops.telemetry_update(shard, offsets, alone)
        ops.telemetry_merge(merged, alone)
    assert torch.equal(merged[:, [0, 4]], whole[:, [0, 4]]) and merged[:, 3].eq(3).all()
    # the bound of the specification, once for each of the two ways
    torch.testing.assert_close(merged[:, 1], whole[:, 1], rtol=2e-6, atol=0)
    torch.testing.assert_close(merged[:, 2], whole[:, 2], rtol=2e-4, atol=0)
