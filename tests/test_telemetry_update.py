"""telemetry_update and the telemetry of chunked_forward: accuracy, exact counts, threads."""

from __future__ import annotations

import cases
import checks
import numpy as np
import oracle
import pytest
import torch
from cases import Case, build
from oracle import Moments
from threads import call_in_threads


@checks.with_cases
@checks.backends
def test_matches_oracle(case, backend, device):
    assert checks.check_update(build(case, device), backend) == []


def _normal(rng, n):
    return rng.standard_normal(n)


def _outlier_first(rng, n):
    values = rng.standard_normal(n)
    values[0] = 3e4
    return values


def _outlier_last(rng, n):
    return _outlier_first(rng, n)[::-1].copy()


def _huge_outlier(rng, n):
    values = rng.standard_normal(n)
    values[0] = 1e8  # becomes infinite in float16: counted apart there
    return values


def _mixed_nonfinite(rng, n):
    values = rng.standard_normal(n) + 5
    values[rng.random(n) < 0.01] = np.inf
    values[rng.random(n) < 0.01] = np.nan
    values[0] = -np.inf
    return values


def _drifting(rng, n):
    return np.linspace(-50, 1000, n)


DATA = {
    "normal": _normal,
    "mean is 1000 std": lambda rng, n: rng.standard_normal(n) + 1000,
    "mean is -1000 std, small": lambda rng, n: 1e-3 * rng.standard_normal(n) - 1,
    "outlier first": _outlier_first,
    "outlier last": _outlier_last,
    "huge outlier first": _huge_outlier,
    "constant": lambda rng, n: np.full(n, 0.1),
    "0 and 0.1": lambda rng, n: rng.choice([0, 0.1], n),
    "relu": lambda rng, n: np.maximum(rng.standard_normal(n), 0),
    "mixed with NaN and Inf": _mixed_nonfinite,
    "only NaN": lambda rng, n: np.full(n, np.nan),
    "one finite": lambda rng, n: np.r_[np.full(n - 1, np.inf), 3.0],
    "drifting": _drifting,
    "squares overflow float32": lambda rng, n: 1e30 * rng.standard_normal(n),
    "sums overflow float32": lambda rng, n: 1e38 * (1 + rng.random(n)),
    "squares underflow float32": lambda rng, n: 1e-30 * rng.standard_normal(n),
    "denormals of float32": lambda rng, n: 1e-40 * rng.standard_normal(n),
}


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.short)
@pytest.mark.parametrize("kind", DATA)
@checks.backends
def test_accuracy(backend, device, dtype, kind):
    """Three seeds over 40,000 rows: |mean error| <= 1e-6 (|mean| + std), M2 within 1e-4 up to |mean| = 1000 std."""
    rng = np.random.default_rng(3)
    values = np.stack([DATA[kind](rng, 40_000) for _ in range(6)], 1)
    with np.errstate(over="ignore"):
        bits = oracle.round_to_bits(values, dtype)
    x = torch.from_numpy(bits.view(f"i{dtype.itemsize}")).view(dtype).to(device)
    offsets = torch.tensor([0, 1, 4, 6], dtype=torch.int32, device=device)
    chunks = [(0, 1), (1, 4), (4, 6)]
    expected = oracle.telemetry_after(np.zeros((3, 5)), oracle.widen(bits, dtype), chunks, len(bits))
    seeds = build(Case((2, 6), 3), device)
    for run in ("telemetry_update", "chunked_forward"):
        telemetry = torch.zeros(3, 5, dtype=torch.float64, device=device)
        if run == "telemetry_update":
            checks.BACKENDS[backend].telemetry_update(x, offsets, telemetry)
        else:
            args = (offsets, seeds.state, seeds.alpha, seeds.weights.to(dtype), telemetry, telemetry.new_empty(0))
            checks.BACKENDS[backend].chunked_forward(x, *args)
        assert oracle.check_telemetry(expected, telemetry) == [], run
        if kind == "constant":
            assert telemetry[:, 2].eq(0).all(), "equal values do not vary"


@checks.backends
def test_ten_million_elements(backend, device):
    rng = np.random.default_rng(5)
    values = (rng.standard_normal((10**6, 10), dtype=np.float32) + np.float32(300)) * np.float32(0.01)
    telemetry = torch.zeros(1, 5, dtype=torch.float64, device=device)
    offsets = torch.tensor([0, 10], dtype=torch.int32, device=device)
    checks.BACKENDS[backend].telemetry_update(torch.from_numpy(values).to(device), offsets, telemetry)
    expected = oracle.telemetry_after(np.zeros((1, 5)), values, [(0, 10)], len(values))
    assert oracle.check_telemetry(expected, telemetry) == []


@checks.backends
def test_counts_beyond_float32(backend, device):
    """After 2^24 (and 2^50) elements one more still counts."""
    for count in (2**24, 2**24 + 1, 2**50 + 1):
        telemetry = torch.tensor([[count, 0.5, count / 4, 2**24 + 1, 2**24 + 1]], dtype=torch.float64, device=device)
        x = torch.tensor([[1.0], [torch.nan], [0.0]], device=device)
        checks.BACKENDS[backend].telemetry_update(x, torch.tensor([0, 1], dtype=torch.int32, device=device), telemetry)
        assert telemetry[0, [0, 3, 4]].tolist() == [count + 2, 2**24 + 2, 2**24 + 2]
        assert telemetry[0, 1].item() == 0.5


@checks.backends
def test_many_batches_equal_one(backend, device):
    rng = np.random.default_rng(7)
    values = torch.from_numpy(rng.standard_normal((900, 12)) * 3 + 100).float()
    values[5, 3], values[800, 3] = torch.nan, torch.inf
    offsets = torch.tensor([0, 5, 5, 11], dtype=torch.int32, device=device)
    telemetry = torch.zeros(3, 5, dtype=torch.float64, device=device)
    sizes = [0, 1, 2, 97, 300, 0, 500]
    for batch in values.split(sizes):
        checks.BACKENDS[backend].telemetry_update(batch.to(device), offsets, telemetry)
    expected = oracle.telemetry_after(np.zeros((3, 5)), values.numpy(), [(0, 5), (5, 5), (5, 11)], 900)
    for moments in expected:
        moments.batches = sum(size > 0 for size in sizes)
    assert expected[1].count == 0 and expected[0].nonfinite == 2
    assert oracle.check_telemetry(expected, telemetry) == []


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.short)
@checks.backends
def test_update_has_the_bits_of_forward(backend, device, dtype):
    inputs = build(Case((700, 90), 11, dtype=dtype, values="special"), device)
    first, second = inputs.telemetry.clone(), inputs.telemetry.clone()
    checks.BACKENDS[backend].telemetry_update(inputs.x, inputs.offsets, first)
    checks.BACKENDS[backend].chunked_forward(inputs.x, *inputs.seeds, second, inputs.grad_telemetry)
    assert checks.same_bits(first, second)


@checks.backends
def test_statistics_are_of_the_input(backend, device):
    """Pre-graft: what the seed does to its chunk does not show."""
    inputs = build(Case((50, 40), 4, states="grafted", telemetry="fresh", weights="special"), device)
    idle, telemetry = inputs.telemetry.clone(), inputs.telemetry.clone()
    checks.BACKENDS[backend].chunked_forward(inputs.x, *inputs.seeds, telemetry, inputs.grad_telemetry)
    inputs.state[0] = 0
    checks.BACKENDS[backend].chunked_forward(inputs.x, *inputs.seeds, idle, inputs.grad_telemetry)
    assert checks.same_bits(telemetry, idle)


@checks.backends
def test_threads_lose_nothing(backend):
    """Four Python threads on one accumulator on the CPU."""
    x = torch.randn(8, 256, generator=torch.Generator().manual_seed(0))
    offsets = torch.arange(0, 257, 8, dtype=torch.int32)
    telemetry = torch.zeros(32, 5, dtype=torch.float64)
    rounds, workers = 150, 4
    call_in_threads(lambda: checks.BACKENDS[backend].telemetry_update(x, offsets, telemetry), workers, rounds)
    total = rounds * workers
    expected = oracle.telemetry_after(np.zeros((32, 5)), x.numpy(), [(8 * s, 8 * s + 8) for s in range(32)], 8)
    repeated = [Moments(total * m.count, m.mean, total * m.m2, total, 0) for m in expected]
    assert oracle.check_telemetry(repeated, telemetry) == []
