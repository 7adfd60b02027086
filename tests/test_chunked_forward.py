"""chunked_forward: y bit for bit, and what it must leave alone."""

from __future__ import annotations

import cases
import checks
import pytest
import torch
from cases import Case, build
from threads import keep_threads

NOTHING = torch.empty(0, dtype=torch.float64)


@checks.with_cases
@checks.backends
def test_matches_oracle(case, backend, device):
    assert checks.check_forward(build(case, device), backend) == []


@pytest.mark.sanitizer
@pytest.mark.parametrize("case", cases.SANITIZER_CASES, ids=str)
def test_small_cases_of_every_kernel(case, device):
    inputs = build(case, device)
    assert checks.check_forward(inputs, "ops") == []
    assert checks.check_update(inputs, "ops") == []


@checks.with_cases
def test_compiled_and_reference_have_the_same_bits(case, device):
    inputs = build(case, device)
    results = [
        b.chunked_forward(inputs.x, *inputs.seeds, NOTHING.to(device), NOTHING.to(device))
        for b in checks.BACKENDS.values()
    ]
    assert checks.same_bits(*results)


# strategy, alpha, w, w of the next row -> y for x = 8, worked out by hand from the strategies' formulas
BY_HAND = [
    (0, 1.0, 3.0, 0.0, 24.0),
    (0, 0.5, 3.0, 0.0, 16.0),
    (0, 0.0, 3.0, 0.0, 8.0),
    (1, 1.0, 3.0, 0.0, 11.0),
    (1, 0.5, 3.0, 0.0, 9.5),
    (2, 1.0, 3.0, 0.0, 5.5),
    (2, 0.5, 3.0, 0.0, 6.75),
    (3, 1.0, 3.0, -5.0, 19.0),
    (3, 0.5, 3.0, -5.0, 13.5),
]


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.short)
@pytest.mark.parametrize(("strategy", "alpha", "w", "v", "y"), BY_HAND)
@checks.backends
def test_by_hand(backend, device, dtype, strategy, alpha, w, v, y):
    """Seed 0 owns feature 0 and blends; seed 1 (dormant) owns feature 1; nobody owns feature 2."""
    x = torch.full((2, 3), 8.0, dtype=dtype, device=device)
    state = torch.zeros(8, 2, dtype=torch.int32, device=device)
    state[0], state[1], state[3] = torch.tensor([3, 0]), 1, strategy
    weights = torch.tensor([[9.0] * 3, [w] * 3, [v] * 3], dtype=dtype, device=device)
    offsets = torch.tensor([0, 1, 2], dtype=torch.int32, device=device)
    alphas = torch.full((2,), alpha, device=device)
    got = checks.BACKENDS[backend].chunked_forward(
        x, offsets, state, alphas, weights, NOTHING.to(device), NOTHING.to(device)
    )
    assert got.tolist() == [[y, 8.0, 8.0]] * 2


@pytest.mark.parametrize("lifecycle", range(-1, 12))
@checks.backends
def test_lifecycles_that_blend(backend, device, lifecycle):
    inputs = build(Case((4, 6), 2, states="grafted", alphas="one"), device)
    inputs.state[0] = lifecycle
    y = checks.BACKENDS[backend].chunked_forward(inputs.x, *inputs.seeds, NOTHING.to(device), NOTHING.to(device))
    assert torch.equal(y, inputs.x) == (not 3 <= lifecycle <= 7)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.short)
@checks.backends
def test_neutral_seeds_change_no_bit(backend, device, dtype):
    """w = 1 with any alpha (65,536 random ones, a seed each), and alpha = 0 with any finite w: x, negative zeros too."""
    n = 65536
    offsets = torch.arange(n + 1, dtype=torch.int32, device=device)
    state = torch.zeros(8, n, dtype=torch.int32, device=device)
    state[0] = 4
    x = build(Case((3, n), 1, dtype=dtype, values="special"), device).x
    random = torch.rand(n, generator=torch.Generator().manual_seed(0)).to(device)
    weights = torch.randn(2, n, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    runs = [(0, random, torch.ones_like(weights)), (1, random, torch.zeros_like(weights))]
    runs += [(1, random, -torch.zeros_like(weights))]
    neutral = torch.stack((torch.ones_like(weights[0]), torch.zeros_like(weights[0])))
    runs += [(3, random, neutral)]
    runs += [(strategy, torch.zeros_like(random), weights) for strategy in range(4)]
    for strategy, alpha, bank in runs:
        state[3] = strategy
        y = checks.BACKENDS[backend].chunked_forward(
            x, offsets, state, alpha, bank, NOTHING.to(device), NOTHING.to(device)
        )
        assert checks.same_bits(y, x), f"strategy {strategy}"


@checks.backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("columns", [37, 64])
def test_a_nan_of_any_payload_stays_one(backend, device, dtype, columns):
    """Rounded like a number, the largest payload of a float32 would overflow into the sign."""
    weights = torch.full((1, columns), 0x7FFFFFFF, dtype=torch.int32, device=device).view(torch.float32)
    state = torch.zeros(8, 1, dtype=torch.int32, device=device)
    state[0] = 3
    x, nothing = torch.ones(9, columns, dtype=dtype, device=device), NOTHING.to(device)
    offsets, alpha = torch.tensor([0, columns], dtype=torch.int32, device=device), torch.ones(1, device=device)
    seeds = (offsets, state, alpha, weights)
    ops = checks.BACKENDS[backend]
    assert ops.chunked_forward(x, *seeds, nothing, nothing).isnan().all()
    assert ops.chunked_backward(x, x, *seeds, nothing, True, False, False)[0].isnan().all()


@checks.backends
def test_alpha_one_is_the_weight_itself(backend, device):
    inputs = build(Case((40, 64), 8, states="mul", alphas="one", chunks="balanced"), device)
    inputs.state[1] = 2
    y = checks.BACKENDS[backend].chunked_forward(inputs.x, *inputs.seeds, NOTHING.to(device), NOTHING.to(device))
    assert torch.equal(y, inputs.x * inputs.weights[2])


@checks.backends
def test_inputs_are_left_alone_and_never_aliased(backend, device):
    for states in ("idle", "grafted"):
        inputs = build(Case((9, 40), 5, states=states), device)
        before = {
            name: getattr(inputs, name).clone()
            for name in ("x", "offsets", "state", "alpha", "weights", "grad_telemetry")
        }
        y = checks.BACKENDS[backend].chunked_forward(inputs.x, *inputs.seeds, inputs.telemetry, inputs.grad_telemetry)
        assert y.untyped_storage().data_ptr() != inputs.x.untyped_storage().data_ptr()
        for name, value in before.items():
            assert torch.equal(getattr(inputs, name), value), name


@checks.backends
def test_telemetry_does_not_touch_the_output(backend, device):
    for case in cases.CASES[::5]:
        inputs = build(case, device)
        backend_ = checks.BACKENDS[backend]
        without = backend_.chunked_forward(inputs.x, *inputs.seeds, NOTHING.to(device), NOTHING.to(device))
        with_it = backend_.chunked_forward(inputs.x, *inputs.seeds, inputs.telemetry, inputs.grad_telemetry)
        assert checks.same_bits(with_it, without), str(case)


@checks.backends
def test_seeds_of_any_strides(backend, device):
    """Views of state, alpha, offsets and the bank that are not contiguous."""
    inputs = build(Case((9, 40), 5, states="grafted"), device)
    want = checks.BACKENDS[backend].chunked_forward(inputs.x, *inputs.seeds, NOTHING.to(device), NOTHING.to(device))
    offsets = torch.stack((inputs.offsets, inputs.offsets + 1), 1)[:, 0]
    state = inputs.state.t().contiguous().t()
    alpha = torch.stack((inputs.alpha, inputs.alpha + 1), 1)[:, 0]
    for weights in (inputs.weights.t().contiguous().t(), torch.cat((inputs.weights, inputs.weights), 1)[:, :40]):
        assert not (weights.is_contiguous() or state.is_contiguous() or alpha.is_contiguous())
        telemetry = inputs.telemetry.clone()
        got = checks.BACKENDS[backend].chunked_forward(
            inputs.x, offsets, state, alpha, weights, telemetry, NOTHING.to(device)
        )
        assert checks.same_bits(got, want)


@checks.backends
def test_negated_views(backend, device):
    """A tensor whose negative bit is set holds the opposite of its memory."""
    inputs = build(Case((9, 40), 5, states="grafted"), device)
    lazy = torch.complex(torch.zeros_like(inputs.x), -inputs.x).conj().imag
    assert lazy.is_neg() and torch.equal(lazy, inputs.x)
    seen, got = [], []
    for x in (inputs.x, lazy):
        seen.append(inputs.telemetry.clone())
        got.append(checks.BACKENDS[backend].chunked_forward(x, *inputs.seeds, seen[-1], NOTHING.to(device)))
    assert torch.equal(*got) and torch.equal(*seen)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.short)
@checks.backends
def test_two_runs_have_the_same_bits(backend, device, dtype):
    inputs = build(Case((2000, 250), 30, dtype=dtype, values="special", telemetry="fresh"), device)
    runs = []
    for _ in range(2):
        telemetry = inputs.telemetry.clone()
        y = checks.BACKENDS[backend].chunked_forward(inputs.x, *inputs.seeds, telemetry, NOTHING.to(device))
        runs.append((y, telemetry))
    assert all(checks.same_bits(*pair) for pair in zip(*runs, strict=True))


def test_number_of_threads_changes_no_bit():
    """CPU partials are cut by shape and dtype alone."""
    inputs = build(Case((3000, 200), 30, dtype=torch.bfloat16, values="special", telemetry="fresh"))
    results = []
    with keep_threads():
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            telemetry, grad_telemetry = inputs.telemetry.clone(), inputs.grad_telemetry.clone()
            y = checks.ops.chunked_forward(inputs.x, *inputs.seeds, telemetry, grad_telemetry)
            grads = checks.ops.chunked_backward(
                inputs.grad_y, inputs.x, *inputs.seeds, grad_telemetry, True, True, True
            )
            results.append((y, telemetry, grad_telemetry, *grads))
    for other in results[1:]:
        assert all(checks.same_bits(*pair) for pair in zip(results[0], other, strict=True))


def test_ids_outside_the_bank_never_reach_memory(device):
    """A bank in a far smaller allocation than the ids would index; poisoned neighbours must not show either."""
    inputs = build(Case((6, 32), 4, chunks="balanced", states="grafted", blueprints=3), device)
    room = torch.full((9, 32), torch.nan, device=device)
    room[3:6] = inputs.weights[:3]
    for blueprint in (-1, 3, 2**31 - 1, -(2**31), 10**7):
        for strategy in range(4):
            inputs.state[1], inputs.state[3] = blueprint, strategy
            y = checks.ops.chunked_forward(
                inputs.x, *inputs.seeds[:3], room[3:6], NOTHING.to(device), NOTHING.to(device)
            )
            assert torch.equal(y, inputs.x)


def test_a_million_seeds(device):
    """A feature each, in both directions; the reference is the yardstick, being compared with the oracle elsewhere."""
    case = Case((2, 10**6), 10**6, chunks="uniform", dtype=torch.bfloat16, telemetry="fresh")
    runs = []
    for backend in checks.BACKENDS.values():
        inputs = build(case, device)
        y = backend.chunked_forward(inputs.x, *inputs.seeds, inputs.telemetry, inputs.grad_telemetry)
        args = (inputs.grad_y, inputs.x, *inputs.seeds, inputs.grad_telemetry, True, True, True)
        runs.append((y, *backend.chunked_backward(*args), inputs.telemetry, inputs.grad_telemetry))
    for got, want in zip(*(run[:2] for run in runs), strict=True):
        assert checks.same_bits(got, want)
    for got, want in zip(*(run[2:] for run in runs), strict=True):
        # sums of two terms: float32 rounds once or twice, and a difference of means loses what it cancels
        torch.testing.assert_close(got, want, rtol=1e-2 if got.dtype == torch.bfloat16 else 1e-5, atol=1e-6)
    assert runs[0][4][:, 0].eq(2).all()


def test_more_than_two_to_the_31_elements(device):
    """On the CPU telemetry alone: y would take up to a minute of page faults there (scripts/run_oracle.py does it)."""
    if device.type == "cuda":
        checks.needs_memory(device, gib=10)
        assert checks.check_big_forward(device) == []
    else:
        checks.needs_memory(device, gib=2)
        assert checks.check_big_update(device) == []
