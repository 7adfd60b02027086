"""chunked_backward: dx bit for bit, the sums within the error of any order of summation, gradient telemetry."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

import cases
import checks
import oracle
import pytest
import torch
from cases import Case, build

NOTHING = torch.empty(0, dtype=torch.float64)
ALL = (True, True, True)


@checks.with_cases
@checks.backends
def test_matches_oracle(case, backend, device):
    assert checks.check_backward(build(case, device), backend) == []


@pytest.mark.sanitizer
@pytest.mark.parametrize("case", cases.SANITIZER_CASES, ids=str)
def test_small_cases_of_every_kernel(case, device):
    assert checks.check_backward(build(case, device), "ops") == []


@checks.with_cases
def test_compiled_and_reference_have_the_same_bits(case, device):
    inputs = build(case, device)
    results = [
        b.chunked_backward(inputs.grad_y, inputs.x, *inputs.seeds, NOTHING.to(device), True, False, False)[0]
        for b in checks.BACKENDS.values()
    ]
    assert checks.same_bits(*results)


@pytest.mark.parametrize("wanted", list(itertools.product((False, True), repeat=3)), ids=str)
@checks.backends
def test_what_was_not_asked_for_is_empty(backend, device, wanted):
    """And changes neither the rest nor the gradient telemetry."""
    for case in (
        Case((50, 40), 6, weights_dtype=torch.bfloat16),
        Case((0, 40), 6, dtype=torch.float16),
        Case((4, 8), 0),
    ):
        inputs = build(case, device)
        runs = []
        for flags in (ALL, wanted):
            grad_telemetry = inputs.grad_telemetry.clone()
            grads = checks.BACKENDS[backend].chunked_backward(
                inputs.grad_y, inputs.x, *inputs.seeds, grad_telemetry, *flags
            )
            runs.append((grads, grad_telemetry))
        (whole, first), (some, second) = runs
        assert checks.same_bits(first, second)
        for asked, full, got, like in zip(wanted, whole, some, (inputs.x, inputs.weights, inputs.alpha), strict=True):
            assert got.dtype == full.dtype == like.dtype and full.shape == like.shape
            assert checks.same_bits(got, full) if asked else got.shape == (0,)


# strategy, alpha, w, w of the next row -> dx, dw, dw of the next row, dalpha for G = 1, 2 and x = 8, 4 (u = 16, v = 3)
BY_HAND = [
    (0, 0.5, 3.0, 0.0, 2.0, 8.0, 0.0, 32.0),
    (1, 0.5, 3.0, 0.0, 1.0, 1.5, 0.0, 9.0),
    (2, 0.5, 3.0, 0.0, 0.75, 0.75, 0.0, -3.5),
    (3, 0.5, 3.0, -5.0, 2.0, 8.0, 1.5, 17.0),
]


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.short)
@pytest.mark.parametrize(("strategy", "alpha", "w", "v", "dx", "dw", "dv", "dalpha"), BY_HAND)
@checks.backends
def test_by_hand(backend, device, dtype, strategy, alpha, w, v, dx, dw, dv, dalpha):
    """Seed 0 blends, seed 1 is a fossil, seed 2 dormant; nobody owns feature 3."""
    x = torch.tensor([[8.0] * 4, [4.0] * 4], dtype=dtype, device=device)
    grad_y = torch.tensor([[1.0] * 4, [2.0] * 4], dtype=dtype, device=device)
    state = torch.zeros(8, 3, dtype=torch.int32, device=device)
    state[0], state[1], state[3] = torch.tensor([3, 7, 2]), 1, strategy
    weights = torch.tensor([[9.0] * 4, [w] * 4, [v] * 4], dtype=dtype, device=device)
    offsets = torch.tensor([0, 1, 2, 3], dtype=torch.int32, device=device)
    alphas = torch.full((3,), alpha, device=device)
    grad_telemetry = torch.ones(3, 3, dtype=torch.float64, device=device)
    grads = checks.BACKENDS[backend].chunked_backward(grad_y, x, offsets, state, alphas, weights, grad_telemetry, *ALL)
    assert grads[0].tolist() == [[dx, dx, 1.0, 1.0], [2 * dx, 2 * dx, 2.0, 2.0]]
    assert grads[1].tolist() == [[0.0] * 4, [dw, 0.0, 0.0, 0.0], [dv, 0.0, 0.0, 0.0]]
    assert grads[2].tolist() == [dalpha, dalpha, 0.0]
    assert grad_telemetry.tolist() == [[257.0, 10.0, 2.0]] * 3


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@checks.backends
def test_autograd_gives_what_the_operator_gives(backend, device, layout):
    rank = max(cases.LAYOUTS[layout], 2)
    inputs = build(
        Case((3, 2, 5, 24)[-rank:], 4, layout=layout, grad_layout="contiguous", weights_dtype=torch.float64), device
    )
    grad_telemetry = inputs.grad_telemetry.clone()
    wanted = checks.BACKENDS[backend].chunked_backward(inputs.grad_y, inputs.x, *inputs.seeds, grad_telemetry, *ALL)
    leaves = inputs.requiring_grad()
    y = checks.BACKENDS[backend].chunked_forward(leaves.x, *leaves.seeds, leaves.telemetry, leaves.grad_telemetry)
    dx, dw, dalpha = torch.autograd.grad(y, (leaves.x, leaves.weights, leaves.alpha), inputs.grad_y)
    for got, want in zip((dx, dw, dalpha, leaves.grad_telemetry), (*wanted, grad_telemetry), strict=True):
        assert checks.same_bits(got, want)


@checks.backends
def test_gradient_of_a_sum(backend, device):
    """autograd hands over a gradient whose strides are all 0."""
    leaves = build(Case((6, 5, 40), 6, states="grafted"), device).requiring_grad()
    y = checks.BACKENDS[backend].chunked_forward(leaves.x, *leaves.seeds, leaves.telemetry, leaves.grad_telemetry)
    y.sum().backward()
    ones = checks.BACKENDS[backend].chunked_backward(
        torch.ones_like(y), leaves.x, *leaves.seeds, NOTHING.to(device), *ALL
    )
    for got, want in zip((leaves.x.grad, leaves.weights.grad, leaves.alpha.grad), ones, strict=True):
        assert checks.same_bits(got, want.detach())


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.short)
@checks.backends
def test_two_runs_have_the_same_bits(backend, device, dtype):
    inputs = build(Case((2000, 250), 30, dtype=dtype, telemetry="fresh"), device)
    runs = []
    for _ in range(2):
        grad_telemetry = inputs.grad_telemetry.clone()
        grads = checks.BACKENDS[backend].chunked_backward(inputs.grad_y, inputs.x, *inputs.seeds, grad_telemetry, *ALL)
        runs.append((*grads, grad_telemetry))
    assert all(checks.same_bits(*pair) for pair in zip(*runs, strict=True))


@checks.backends
def test_overflowed_backward_adds_nothing_to_its_seed(backend, device):
    inputs = build(Case((20, 40), 4, chunks="balanced", states="mixed"), device)
    clean = inputs.grad_telemetry.clone()
    checks.BACKENDS[backend].chunked_backward(inputs.grad_y, inputs.x, *inputs.seeds, clean, *ALL)
    for bad in (torch.inf, -torch.inf, torch.nan):
        for poisoned in (inputs.grad_y, inputs.x):
            kept = poisoned[7, 13].clone()
            poisoned[7, 13] = bad  # seed 1 owns features 10 to 19
            telemetry = inputs.grad_telemetry.clone()
            checks.BACKENDS[backend].chunked_backward(inputs.grad_y, inputs.x, *inputs.seeds, telemetry, *ALL)
            poisoned[7, 13] = kept
            assert torch.equal(telemetry[1], inputs.grad_telemetry[1])
            assert torch.equal(telemetry[[0, 2, 3]], clean[[0, 2, 3]])


@checks.backends
def test_idle_seeds_stay_out_of_a_poisoned_batch(backend, device):
    """0 times infinity must not reach the gradients of what is not grafted."""
    inputs = build(Case((20, 40), 4, chunks="balanced", states="idle", values="special", weights="special"), device)
    _, dw, dalpha = checks.BACKENDS[backend].chunked_backward(
        inputs.grad_y, inputs.x, *inputs.seeds, inputs.grad_telemetry, *ALL
    )
    assert not dw.any() and not dalpha.any()


@checks.backends
def test_gradient_telemetry_measures_what_a_neutral_blueprint_would_receive(backend, device):
    """Idle seeds' columns are the squared gradients of grafted neutral ones."""
    inputs = build(Case((60, 40), 5, states="idle", telemetry="fresh"), device)
    ops, neutral = checks.BACKENDS[backend], torch.ones_like(inputs.weights)
    ops.chunked_backward(inputs.grad_y, inputs.x, *inputs.seeds, inputs.grad_telemetry, *ALL)
    state, alpha = inputs.state.clone(), torch.ones_like(inputs.alpha)
    state[0], state[1] = 3, 0
    for strategy, bank, column in ((0, neutral, 0), (1, 0 * neutral, 1)):
        state[3] = strategy
        _, dw, _ = ops.chunked_backward(
            inputs.grad_y, inputs.x, inputs.offsets, state, alpha, bank, NOTHING.to(device), *ALL
        )
        squares = dw[0].double().square().split(inputs.offsets.diff().tolist())
        expected = torch.stack([chunk.sum() for chunk in squares])
        # dw is u rounded to float32 once: each square within 2^-22
        torch.testing.assert_close(inputs.grad_telemetry[:, column], expected, rtol=2**-22, atol=0)
    assert inputs.grad_telemetry[:, 2].eq(1).all()


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.short)
@checks.backends
def test_sums_over_many_rows_stay_accurate(backend, device, dtype):
    """2^18 equal terms of the size of 1: a float32 sum taken one by one would drift off by up to 2^18 roundings.

    Allowed are 2^9 roundings, the length of either stage of a two-stage sum of 2^18 terms.
    """
    rows, features = 2**18, 8
    x = torch.full((rows, features), 1.1, dtype=dtype, device=device)
    grad_y = torch.full((rows, features), 0.7, dtype=dtype, device=device)
    offsets = torch.tensor([0, 3, 8], dtype=torch.int32, device=device)
    state = torch.zeros(8, 2, dtype=torch.int32, device=device)
    state[0] = 3
    weights = torch.full((1, features), 2.0, dtype=torch.float64, device=device)
    telemetry = torch.zeros(2, 3, dtype=torch.float64, device=device)
    _, dw, dalpha = checks.BACKENDS[backend].chunked_backward(
        grad_y, x, offsets, state, torch.ones(2, device=device), weights, telemetry, *ALL
    )
    unit = 2.0**-53 if dtype == torch.float64 else 2.0**-24
    g, u = grad_y[0, 0].double(), x[0, 0].double() * grad_y[0, 0].double() * rows
    torch.testing.assert_close(dw, u.expand_as(dw), rtol=2**9 * unit, atol=0)
    torch.testing.assert_close(
        dalpha.double(), u * torch.tensor([3.0, 5.0], device=device).double(), rtol=2**9 * unit + 2**-24, atol=0
    )
    torch.testing.assert_close(
        telemetry[:, 1], (g * rows) ** 2 * torch.tensor([3.0, 5.0], device=device).double(), rtol=2**10 * unit, atol=0
    )


@checks.backends
def test_threads_lose_nothing(backend):
    """Four Python threads on one accumulator on the CPU; whole numbers, so that the order of additions is all one."""
    inputs = build(Case((6, 64), 16, chunks="balanced", telemetry="fresh"))
    x, grad_y = (t.mul(2).round().clamp(-8, 8) for t in (inputs.x, inputs.grad_y))
    once = inputs.grad_telemetry.clone()
    checks.BACKENDS[backend].chunked_backward(grad_y, x, *inputs.seeds, once, *ALL)
    rounds, workers = 100, 4

    def work(_):
        for _ in range(rounds):
            checks.BACKENDS[backend].chunked_backward(grad_y, x, *inputs.seeds, inputs.grad_telemetry, *ALL)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(work, range(workers)))
    assert once[:, 2].eq(1).all() and torch.equal(inputs.grad_telemetry, rounds * workers * once)


def test_more_than_two_to_the_31_elements(device):
    """On the CPU without dx: see test_chunked_forward.py."""
    checks.needs_memory(device, gib=10 if device.type == "cuda" else 2)
    assert checks.check_big_backward(device, grad_x=device.type == "cuda") == []


def test_oracle_case_is_not_empty():
    """The table has cases in which every kind of gradient is non-zero, so that the comparisons compare something."""
    seen = set()
    for case in cases.CASES:
        problem = build(case).problem()
        for s in range(len(problem.blend.chunks)):
            lo, hi = problem.blend.chunks[s]
            if hi > lo and problem.rows and oracle.is_grafted(problem.state, s, problem.weights.shape[0]):
                seen.add((case.dtype, int(problem.state[3, s]), problem.state[0, s] == 7))
    assert len(seen) == 4 * 4 * 2
