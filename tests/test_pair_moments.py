"""pair_moments: moments of pairs of activations per feature, against long double, and what its callers count on."""

from __future__ import annotations

import cases
import checks
import numpy as np
import oracle
import pytest
import torch
from cases import Case, Inputs, build
from lifecycle_checks import function
from oracle import LONG
from threads import call_in_threads, keep_threads

COUNT, MEAN_X, MEAN_T, M2_X, M2_T, C_XT = range(6)
UNIT = LONG(2.0**-53)
LARGEST = 1e150  # squares of numbers beyond are infinite in float64
HALF = torch.bfloat16, torch.float16


def fresh(features: int, device: torch.device | str = "cpu") -> torch.Tensor:
    return torch.zeros(features, 6, dtype=torch.float64, device=device)


def used(features: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """What earlier batches left; a third of the features has had no pair."""
    rng = np.random.default_rng(11)
    moments = rng.standard_normal((features, 6))
    moments[:, COUNT] = rng.integers(1, 50, features)
    moments[:, M2_X:C_XT] = moments[:, M2_X:C_XT] ** 2 * moments[:, :1]
    moments[:, C_XT] = 0.5 * np.sqrt(moments[:, M2_X] * moments[:, M2_T])
    moments[rng.random(features) < 0.3] = 0
    return torch.from_numpy(moments).to(device)


def moments_of(backend: str, x: torch.Tensor, t: torch.Tensor, into: torch.Tensor | None = None) -> torch.Tensor:
    moments = fresh(x.shape[-1], x.device) if into is None else into.clone()
    function(backend, "pair_moments")(x, t, moments)
    return moments


def rows_of(t: torch.Tensor) -> np.ndarray:
    values = oracle.values_of(t)
    return values.reshape(int(np.prod(values.shape[:-1], dtype=np.int64)), values.shape[-1])


def complaints(before: torch.Tensor, x: torch.Tensor, t: torch.Tensor, after: torch.Tensor) -> list[str]:
    """What is wrong with `after`; sums may err as n roundings of their absolute terms about the first pair (or 0) do."""
    with np.errstate(invalid="ignore"):  # signalling NaNs
        before, got, x, t = (
            v.astype(LONG) for v in (before.cpu().numpy(), after.cpu().numpy(), rows_of(x), rows_of(t))
        )
    finite = np.isfinite(x) & np.isfinite(t)
    count = finite.sum(0).astype(LONG)
    bad = [f"count of {f}: {got[f, COUNT]}" for f in np.flatnonzero(got[:, COUNT] != before[:, COUNT] + count)]
    bad += [f"moments {f} without pairs changed" for f in np.flatnonzero((got != before).any(1) & (count == 0))]
    x, t = (np.where(finite, values, 0) for values in (x, t))
    sure = (count > 0) & (abs(x) < LARGEST).all(0) & (abs(t) < LARGEST).all(0)
    f = np.flatnonzero(sure)
    if not len(f):
        return bad
    x, t, finite, n, old = x[:, f], t[:, f], finite[:, f], count[f], before[f]

    def centred(values):
        mean = values.sum(0) / n
        away = np.where(finite, values - mean, 0)
        shift = np.where(finite[0], values[0], 0)
        return mean + away.sum(0) / n, away, abs(shift), np.where(finite, values - shift, 0)

    mean_x, dx, shift_x, away_x = centred(x)
    mean_t, dt, shift_t, away_t = centred(t)
    total = old[:, COUNT] + n
    between = np.where(old[:, COUNT] > 0, old[:, COUNT] * n / total, 0)
    apart_x, apart_t = mean_x - old[:, MEAN_X], mean_t - old[:, MEAN_T]
    join = np.where(old[:, COUNT] > 0, n / total, 1)
    want = np.stack(
        [
            np.where(between > 0, old[:, MEAN_X] + apart_x * join, mean_x),
            np.where(between > 0, old[:, MEAN_T] + apart_t * join, mean_t),
            old[:, M2_X] + (dx * dx).sum(0) + apart_x**2 * between,
            old[:, M2_T] + (dt * dt).sum(0) + apart_t**2 * between,
            old[:, C_XT] + (dx * dt).sum(0) + apart_x * apart_t * between,
        ]
    )
    # n roundings of the sums; some more of the means, which move squares by twice the distance that they were moved by.
    roundings = (8 * n + 64) * UNIT
    size_x, size_t = (away_x**2).sum(0), (away_t**2).sum(0)
    least = (n + 8) * oracle.DENORMAL
    slack_x = roundings * np.sqrt(size_x / n) + 16 * UNIT * (shift_x + abs(mean_x) + abs(old[:, MEAN_X])) + least
    slack_t = roundings * np.sqrt(size_t / n) + 16 * UNIT * (shift_t + abs(mean_t) + abs(old[:, MEAN_T])) + least
    far = 64 * UNIT
    slack = np.stack(
        [
            slack_x,
            slack_t,
            roundings * size_x + 2 * abs(apart_x) * between * slack_x + between * slack_x**2 + far * want[2],
            roundings * size_t + 2 * abs(apart_t) * between * slack_t + between * slack_t**2 + far * want[3],
            roundings * np.sqrt(size_x * size_t)
            + between * (abs(apart_x) * slack_t + abs(apart_t) * slack_x + slack_x * slack_t)
            + far * (abs(old[:, C_XT]) + abs(apart_x * apart_t) * between),
        ]
    )
    slack[2:] += least
    error = abs(got[f, MEAN_X:].T - want)
    for column, at in zip(*np.nonzero(~(error <= slack)), strict=True):
        name = ("mean x", "mean t", "M2 x", "M2 t", "C")[column]
        bad.append(
            f"{name} of {f[at]}: {got[f[at], 1 + column]!r}, expected {want[column, at]!r} +- {slack[column, at]!r}"
        )
    bad += [f"M2 of {f} below 0" for f in np.flatnonzero((got[:, M2_X : M2_T + 1] < 0).any(1))]
    return bad


def check(inputs: Inputs, backend: str) -> list[str]:
    before = used(inputs.x.shape[-1], inputs.x.device)
    return complaints(before, inputs.x, inputs.grad_y, moments_of(backend, inputs.x, inputs.grad_y, before))


# ---------------------------------------------------------------------------------------------------- right numbers


@checks.with_cases
@checks.backends
def test_matches_long_double(case, backend, device):
    assert check(build(case, device), backend) == []


@pytest.mark.sanitizer
@pytest.mark.parametrize("case", cases.SANITIZER_CASES, ids=str)
def test_small_cases(case, device):
    assert check(build(case, device), "ops") == []


@checks.backends
def test_random_cases(backend, device):
    """Any shape, any pair of layouts, NaN and raw bits; scripts/run_oracle.py draws from the same generator."""
    for index in range(150):
        case = cases.draw_case(cases.NumpyDraw(np.random.default_rng([22, index])))
        assert check(build(case, device), backend) == [], f"case {index}: {case!r}"


def test_more_than_two_to_the_31_elements(device):
    checks.needs_memory(device, gib=10 if device.type == "cuda" else 2)
    x = checks._big(device)[0]
    rows, moments = x.shape[0], moments_of("ops", x, x)
    mean, m2 = 2 / rows, 4 - 4 / rows  # one row of 2, all others 0
    want = torch.tensor([rows, mean, mean, m2, m2, m2], dtype=torch.float64, device=device)
    torch.testing.assert_close(moments, want.expand(x.shape[1], 6), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.short)
@checks.backends
def test_a_line_is_found(backend, device, dtype):
    """t = 4 x - 2, exact in every dtype: C = 4 M2 x, M2 t = 16 M2 x, whatever the mean."""
    for mean in (0, 64):
        x = torch.randint(-8, 8, (500, 40), generator=torch.Generator().manual_seed(1)) / 8 + mean
        x = x.round(decimals=0) if dtype == torch.bfloat16 else x
        narrow, target = x.to(dtype).to(device), (4 * x - 2).to(dtype).to(device)
        m = moments_of(backend, narrow, target)
        variance = x.double().var(0, correction=0).to(device) * 500
        torch.testing.assert_close(m[:, M2_X], variance, rtol=1e-12, atol=1e-9)
        torch.testing.assert_close(m[:, C_XT], 4 * m[:, M2_X], rtol=1e-12, atol=1e-9)
        torch.testing.assert_close(m[:, M2_T], 16 * m[:, M2_X], rtol=1e-12, atol=1e-9)
        torch.testing.assert_close(m[:, MEAN_T], 4 * m[:, MEAN_X] - 2, rtol=1e-12, atol=1e-12)


@checks.backends
def test_a_large_mean_costs_no_digits(backend, device):
    """Means a million deviations away, in float64: covariances as those of the deviations alone."""
    rng = np.random.default_rng(2)
    x, t = (torch.from_numpy(rng.standard_normal((20_000, 6))) for _ in range(2))
    t = t + x
    near, far = (moments_of(backend, (x + move).to(device), (t - move).to(device)) for move in (0, 2.0**20))
    torch.testing.assert_close(far[:, M2_X:], near[:, M2_X:], rtol=1e-9, atol=0)


@checks.backends
def test_numpy_agrees(backend, device):
    rng = np.random.default_rng(3)
    x, t = rng.standard_normal((2, 700, 9))
    t += 0.3 * x
    m = moments_of(backend, torch.from_numpy(x).to(device), torch.from_numpy(t).to(device)).cpu().numpy()
    for f in range(9):
        (xx, xt), (_, tt) = np.cov(x[:, f], t[:, f], bias=True) * 700
        np.testing.assert_allclose(m[f], [700, x[:, f].mean(), t[:, f].mean(), xx, tt, xt], rtol=1e-12, atol=1e-12)


@checks.backends
def test_equal_numbers_do_not_vary(backend, device):
    """Not by a rounding: 0.1 has no exact mean, and yet M2 and C are 0, over batches too."""
    for dtype in cases.DTYPES:
        x = torch.full((777, 5), 0.1, dtype=dtype, device=device)
        t = torch.randn(777, 5, generator=torch.Generator().manual_seed(0)).to(device, dtype)
        m = moments_of(backend, x, t)
        m = moments_of(backend, x[:100], t[:100], m)
        assert m[:, [M2_X, C_XT]].eq(0).all() and m[:, M2_T].gt(0).all()
        assert m[:, MEAN_X].eq(x[0].double()).all()


# ---------------------------------------------------------------------------------------------------- pairs left out


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.short)
@checks.backends
def test_pairs_that_are_not_finite_are_left_out(backend, device, dtype):
    """Either number may be at fault; the feature's other pairs and the other features are as if it had not been there."""
    rng = np.random.default_rng(4)
    x, t = (torch.from_numpy(rng.standard_normal((60, 8))).to(dtype) for _ in range(2))
    bad_x, bad_t = x.clone(), t.clone()
    bad_x[::7, 1], bad_t[3::7, 1] = torch.nan, torch.inf
    bad_x[:30, 2] = -torch.inf
    bad_t[:, 3] = torch.nan
    got = moments_of(backend, bad_x.to(device), bad_t.to(device)).cpu()
    keep = torch.ones(60, dtype=torch.bool)
    keep[::7], keep[3::7] = False, False
    alone = moments_of(backend, x[keep, 1:2].to(device), t[keep, 1:2].to(device)).cpu()
    torch.testing.assert_close(got[1:2], alone, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        got[2:3], moments_of(backend, x[30:, 2:3].to(device), t[30:, 2:3].to(device)).cpu(), rtol=1e-12, atol=1e-12
    )
    assert got[3].eq(0).all()
    assert checks.same_bits(
        got[[0, 4, 5, 6, 7]], moments_of(backend, x.to(device), t.to(device)).cpu()[[0, 4, 5, 6, 7]]
    )


@checks.backends
def test_what_is_left_out_costs_no_digits(backend, device):
    """The first pair is not finite on one side and huge on the other: sums must not be taken about it."""
    rng = np.random.default_rng(5)
    x, t = (torch.from_numpy(rng.standard_normal((400, 3))).to(device) for _ in range(2))
    want = moments_of(backend, x[1:], t[1:])
    x[0], t[0] = torch.tensor([1e30, torch.nan, torch.inf]), torch.tensor([torch.nan, -1e30, 1e30])
    torch.testing.assert_close(moments_of(backend, x, t), want, rtol=1e-12, atol=1e-12)


@checks.backends
def test_the_largest_numbers_still_count(backend, device):
    """Finite numbers are never taken for infinite ones because their distance is; sums of squares beyond float64 are inf."""
    big = torch.finfo(torch.float64).max
    x = torch.tensor([[big, 1e300], [-big, -1e300], [1.0, 1.0]], dtype=torch.float64, device=device)
    m = moments_of(backend, x, torch.ones_like(x))
    assert m[:, COUNT].eq(3).all() and m[:, M2_X].eq(torch.inf).all() and m[:, M2_T].eq(0).all()
    narrow = torch.tensor([[3e38], [-3e38]], device=device)
    m = moments_of(backend, narrow, narrow)
    want = 2 * narrow[0].double().square()
    torch.testing.assert_close(m[0, M2_X:], want.expand(3), rtol=1e-14, atol=0)


# ---------------------------------------------------------------------------------------------------- an accumulator


@checks.backends
def test_parts_make_the_whole(backend, device):
    rng = np.random.default_rng(6)
    x, t = (torch.from_numpy(rng.standard_normal((900, 30)) * 3 + 100).to(device) for _ in range(2))
    x[5, 3], t[800, 3] = torch.nan, torch.inf
    whole, parts = moments_of(backend, x, t), fresh(30, device)
    for rows in np.split(np.arange(900), [0, 1, 3, 100, 400, 400]):
        parts = moments_of(backend, x[rows], t[rows], parts)
    assert torch.equal(parts[:, COUNT], whole[:, COUNT]) and parts[3, COUNT] == 898
    torch.testing.assert_close(parts, whole, rtol=1e-11, atol=1e-11 * 9 * 900)
    assert complaints(fresh(30), x, t, parts) == []


@checks.backends
def test_counts_beyond_float32(backend, device):
    for count in (2**24, 2**24 + 1, 2**50 + 1):
        before = torch.tensor([[count, 0.5, 2.0, count / 4, 8.0, 1.0]], dtype=torch.float64, device=device)
        m = moments_of(backend, *(torch.tensor([[v]], device=device) for v in (0.5, 2.0)), before)
        assert m.tolist() == [[count + 1, 0.5, 2.0, count / 4, 8.0, 1.0]]


@checks.backends
def test_a_call_without_pairs_changes_no_bit(backend, device):
    before = torch.randn(4, 6, dtype=torch.float64, device=device)  # not even what could not have come from here
    before[0, 1], before[1, 2] = -0.0, torch.nan
    nan = torch.full((3, 4), torch.nan, device=device)
    assert checks.same_bits(moments_of(backend, nan, torch.zeros_like(nan), before), before)
    for shape in ((0, 4), (2, 0, 4), (0, 0, 4)):
        none = torch.zeros(shape, device=device)
        assert checks.same_bits(moments_of(backend, none, none, before), before)
    for shape in ((5, 0), (0,)):
        none = torch.zeros(shape, device=device)
        assert moments_of(backend, none, none).shape == (0, 6)


@checks.backends
def test_one_pair(backend, device):
    x = torch.tensor([3.0, -0.5], device=device)
    assert moments_of(backend, x, -x).tolist() == [[1, 3.0, -3.0, 0, 0, 0], [1, -0.5, 0.5, 0, 0, 0]]


@checks.backends
def test_threads_lose_nothing(backend):
    """Four Python threads on one accumulator on the CPU."""
    x, t = torch.randn(2, 8, 256, generator=torch.Generator().manual_seed(0))
    call, moments, rounds, workers = function(backend, "pair_moments"), fresh(256), 100, 4
    call_in_threads(lambda: call(x, t, moments), workers, rounds)
    once = moments_of(backend, x, t)
    assert moments[:, COUNT].eq(8 * rounds * workers).all()
    torch.testing.assert_close(moments[:, 1:3], once[:, 1:3], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(moments[:, 3:], once[:, 3:] * rounds * workers, rtol=1e-11, atol=1e-9)


# ---------------------------------------------------------------------------------------------------- the same bits

PLACES = [
    Case((300, 999), 1, dtype=torch.float32),
    Case((5000, 24), 1, dtype=torch.float16),
    Case((12, 24, 24, 32), 1, layout="nchw", grad_layout="nchw"),
    Case((9, 3, 5, 70), 1, layout="nchw", grad_layout="nchw", dtype=torch.bfloat16),
    Case((2, 3000), 1, dtype=torch.float64),
]


@pytest.mark.parametrize("case", PLACES, ids=str)
@checks.backends
def test_the_same_bits_every_time(backend, device, case):
    inputs = build(case, device)
    first = moments_of(backend, inputs.x, inputs.grad_y)
    assert all(checks.same_bits(moments_of(backend, inputs.x, inputs.grad_y), first) for _ in range(3))
    # x and t play the same part.
    swapped = moments_of(backend, inputs.grad_y, inputs.x)
    assert checks.same_bits(swapped[:, [COUNT, MEAN_T, MEAN_X, M2_T, M2_X, C_XT]], first)


@pytest.mark.parametrize("case", PLACES, ids=str)
def test_the_same_bits_on_any_number_of_threads(case):
    inputs, found = build(case), []
    with keep_threads():
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(moments_of("ops", inputs.x, inputs.grad_y))
    assert checks.same_bits(found[0], found[1]) and checks.same_bits(found[0], found[2])


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.short)
@checks.backends
def test_with_itself(backend, device, dtype):
    x = build(Case((50, 40), 1, dtype=dtype, values="special"), device).x
    m = moments_of(backend, x, x)
    assert checks.same_bits(m[:, MEAN_X], m[:, MEAN_T]) and checks.same_bits(m[:, M2_X], m[:, M2_T])
    finite = m[:, M2_X].isfinite()  # of squares beyond float64 nothing is known
    assert torch.equal(m[finite, M2_X], m[finite, C_XT].clamp(min=0)) and finite.sum() > 4


@pytest.mark.parametrize(
    "grad_layout", ["nchw", "channels_last", "swapped_rows", "inner_slice", "misaligned", "contiguous"]
)
@checks.backends
def test_each_layout_with_each_other(backend, device, grad_layout):
    """The features' own pairs, however the two lie in memory: nothing but the order of sums may differ."""
    want = None
    for layout in ("contiguous", "nchw", "channels_last", "every_other_feature", "swapped_rows"):
        inputs = build(Case((3, 9, 11, 20), 1, layout=layout, grad_layout=grad_layout), device)
        m = moments_of(backend, inputs.x, inputs.grad_y)
        want = m if want is None else want
        torch.testing.assert_close(m, want, rtol=1e-11, atol=1e-11)


@checks.backends
def test_one_row_for_all(backend, device):
    """A target of stride 0."""
    x, row = torch.randn(40, 12, device=device), torch.randn(12, device=device)
    m = moments_of(backend, x, row.expand(40, 12))
    assert m[:, [M2_T, C_XT]].eq(0).all() and m[:, MEAN_T].eq(row.double()).all()


# ---------------------------------------------------------------------------------------------------- as an operator


@checks.backends
def test_nothing_else_is_written(backend, device):
    inputs = build(Case((33, 40), 1, values="special"), device)
    before = inputs.x.clone(), inputs.grad_y.clone(), inputs.x._version, inputs.grad_y._version
    moments_of(backend, inputs.x, inputs.grad_y)
    assert checks.same_bits(inputs.x, before[0]) and checks.same_bits(inputs.grad_y, before[1])
    assert (inputs.x._version, inputs.grad_y._version) == before[2:]


@checks.backends
def test_it_takes_no_part_in_gradients(backend, device):
    """Activations within a graph are measured as numbers, and the graph does not notice."""
    w = torch.randn(6, 4, requires_grad=True, device=device)
    x = torch.randn(10, 6, device=device) @ w
    moments = moments_of(backend, x, x.exp())
    assert not moments.requires_grad and moments.grad_fn is None and moments[:, COUNT].eq(10).all()
    x.square().sum().backward()
    assert w.grad is not None
    with torch.inference_mode():
        y = x.detach() + 1
        assert moments_of(backend, y, y)[:, COUNT].eq(10).all()


def test_compiled_without_a_break(device):
    @torch.compile(fullgraph=True, backend="aot_eager")
    def measure(x, t, moments):
        torch.ops.kasmina.pair_moments(x.relu(), t, moments)
        return moments[:, COUNT] + 1

    x, t = torch.randn(2, 7, 5, device=device)
    moments = fresh(5, device)
    assert measure(x, t, moments).eq(8).all()
    assert checks.same_bits(moments, moments_of("ops", x.relu(), t))


def test_vmap_is_refused(device):
    x = torch.randn(3, 7, 5, device=device)
    with pytest.raises(RuntimeError, match="pair_moments cannot be vmapped"):
        torch.vmap(lambda each: torch.ops.kasmina.pair_moments(each, each, fresh(5, device)))(x)
