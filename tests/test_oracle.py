"""The yardstick measured: the oracle's roundings are exact, and it objects to results that are off by one bit."""

from __future__ import annotations

from fractions import Fraction

import cases
import checks
import numpy as np
import oracle
import pytest
import torch

FORMATS = {torch.bfloat16: (8, -133), torch.float16: (11, -24), torch.float32: (24, -149)}  # digits, least exponent


def exactly_rounded(value: Fraction, dtype: torch.dtype) -> Fraction:
    """To nearest even, by rational arithmetic; for values inside the range."""
    digits, least = FORMATS[dtype]
    if value == 0:
        return value
    exponent = 0
    while abs(value) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    while abs(value) < Fraction(2) ** exponent:
        exponent -= 1
    unit = Fraction(2) ** max(exponent - digits + 1, least)
    return round(value / unit) * unit  # round() of a Fraction ties to even


@pytest.mark.parametrize("dtype", FORMATS, ids=cases.short)
def test_rounding_is_exact(dtype):
    rng = np.random.default_rng(0)
    info = torch.finfo(dtype)
    exponents = rng.uniform(np.log2(info.smallest_normal) - 6, np.log2(info.max) - 1, 400)
    values = (rng.choice([-1, 1], 400) * 2.0**exponents).astype(np.float32)
    ties = np.arange(1, 60, dtype=np.float32) * np.float32(2.0 ** (1 - FORMATS[dtype][0])) / 2 + 1
    values = np.concatenate((values, ties))
    rounded = oracle.round_to(values, dtype)
    for value, got in zip(values, rounded, strict=True):
        assert Fraction(float(got)) == exactly_rounded(Fraction(float(value)), dtype)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.short)
def test_bits_survive_a_round_trip(dtype):
    every_pattern = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    t = every_pattern.view(dtype) if dtype.itemsize == 2 else torch.randn(1000, dtype=dtype)
    values, bits = oracle.values_of(t), oracle.bits_of(t)
    numbers = ~np.isnan(values)
    assert (oracle.round_to_bits(values, dtype)[numbers] == bits[numbers]).all()
    assert np.isnan(oracle.round_to(values, dtype)[~numbers]).all()


def test_gradients_are_those_of_autograd():
    """The oracle's formulas against automatic differentiation of y = x + alpha (g(x, w) - x)."""
    case = cases.Case((9, 40), 10, dtype=torch.float64, states="grafted", chunks="balanced", rng=5)
    inputs = cases.build(case)
    x, w, alpha = (t.clone().requires_grad_() for t in (inputs.x, inputs.weights, inputs.alpha.double()))
    columns = []
    for s in range(case.seeds):
        own = slice(int(inputs.offsets[s]), int(inputs.offsets[s + 1]))
        p, strategy = int(inputs.state[1, s]), int(inputs.state[3, s])
        chunk, row = x[:, own], w[p, own]
        grown = [row * chunk, chunk + row, (chunk + row) / 2, row * chunk + w[p + 1, own]][strategy]
        columns.append(chunk + alpha[s] * (grown - chunk))
    torch.cat(columns, 1).backward(inputs.grad_y)
    problem = inputs.problem()
    sums = oracle.sums_of(problem)
    fossil = inputs.state[0] == oracle.FOSSILIZED
    for s in torch.nonzero(fossil).flatten().tolist():
        w.grad[:, inputs.offsets[s] : inputs.offsets[s + 1]] = 0
    assert fossil.any() and not fossil.all()
    assert oracle.check_grad_weights(problem, sums, w.grad) == []
    assert oracle.check_grad_alpha(problem, sums, alpha.grad.float()) == []
    np.testing.assert_allclose(oracle.widen(problem.grad_x_bits(), x.dtype), x.grad.numpy(), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.short)
def test_objects_to_one_wrong_bit(dtype):
    inputs = cases.build(cases.Case((5, 24), 6, dtype=dtype, states="grafted"))
    problem = inputs.problem()
    y = torch.from_numpy(problem.forward_bits().view(f"i{dtype.itemsize}")).view(dtype)
    assert oracle.check_forward(problem, inputs.x, y, payload=True) == []
    y.view(oracle.INT_VIEW[dtype.itemsize])[3, 7] += 1
    assert oracle.check_forward(problem, inputs.x, y, payload=False) != []
    assert oracle.check_grad_x(problem, inputs.x, y, payload=False) != []


def test_objects_to_wrong_strides_and_payloads():
    inputs = cases.build(cases.Case((5, 24), 2, states="idle", layout="transposed"))
    problem = inputs.problem()
    assert oracle.check_forward(problem, inputs.x, inputs.x.contiguous(), payload=True) != []
    assert oracle.check_forward(problem, inputs.x, inputs.x.clone(), payload=True) == []
    inputs = cases.build(cases.Case((5, 24), 2, states="idle", values="bits"))
    inputs.x.view(torch.int32)[2, 3] = 0x7FC00001
    other = inputs.x.clone()
    other.view(torch.int32)[2, 3] = 0x7FC00002
    assert oracle.check_forward(inputs.problem(), inputs.x, other, payload=True) != []
    assert oracle.check_forward(inputs.problem(), inputs.x, other, payload=False) == []


def test_objects_to_wrong_sums():
    """Ten times the allowed error is too much, a tenth is not, for each kind of sum."""
    inputs = cases.build(cases.Case((50, 30), 3, states="grafted", chunks="balanced", alphas="one"))
    problem = inputs.problem()
    sums = oracle.sums_of(problem)
    _, dw, dalpha = checks.reference.chunked_backward(
        inputs.grad_y, inputs.x, *inputs.seeds, inputs.grad_telemetry.clone(), True, True, True
    )
    at = divmod(int(dw.abs().argmax()), 30)
    size = float(max(sums.u_size[at[1]], sums.v_size[at[1]]))
    for factor, complains in ((0.1, False), (10, True)):
        wrong = dw.clone()
        wrong[at] += factor * 52 * 2**-24 * size
        assert bool(oracle.check_grad_weights(problem, sums, wrong)) == complains
    wrong = dalpha.clone()
    wrong[1] *= 1.01
    assert oracle.check_grad_alpha(problem, sums, wrong) != []
    telemetry = inputs.grad_telemetry.clone()
    assert oracle.check_grad_telemetry(problem, sums, inputs.grad_telemetry, telemetry) != []


def test_objects_to_wrong_telemetry():
    inputs = cases.build(cases.Case((500, 30), 3, values="mean1000", chunks="balanced", telemetry="fresh"))
    problem = inputs.problem()
    expected = oracle.telemetry_after(inputs.telemetry.numpy(), problem.x, problem.blend.chunks, 500)
    telemetry = torch.tensor(
        [[m.count, float(m.mean), float(m.m2), m.batches, m.nonfinite] for m in expected], dtype=torch.float64
    )
    assert oracle.check_telemetry(expected, telemetry) == []
    for column, change in ((0, 1), (1, 0.002), (2, telemetry[0, 2] * 2e-4), (3, 1), (4, 1)):
        wrong = telemetry.clone()
        wrong[0, column] += change
        assert oracle.check_telemetry(expected, wrong) != []
