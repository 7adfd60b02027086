"""Fits from moments, against numpy's least squares on the numbers themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kasmina_ext import ops
from kasmina_ext.least_squares import FITTED, explained, fit

MULTIPLICATIVE, ADDITIVE, MIXED, AFFINE = range(4)
FEATURES = 12


def pairs(seed: int = 0, rows: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Features of all kinds of means, gains and noise."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, FEATURES)) * np.logspace(-2, 2, FEATURES) + rng.standard_normal(FEATURES) * 5
    t = x * rng.standard_normal(FEATURES) * 3 + rng.standard_normal(FEATURES)
    return x, t + rng.standard_normal((rows, FEATURES)) * x.std(0) * rng.random(FEATURES)


def moments(x: np.ndarray, t: np.ndarray) -> torch.Tensor:
    found = torch.zeros(x.shape[1], 6, dtype=torch.float64)
    ops.pair_moments(torch.from_numpy(x), torch.from_numpy(t), found)
    return found


def fitted(x, t, strategy: int, ridge: float = 0.0, least_pairs: int = 2, dtype=torch.float64):
    return fit(moments(x, t), torch.full((x.shape[1],), strategy), ridge, least_pairs, dtype)


def ridge_row(values: np.ndarray, ridge: float) -> float:
    """Ridge regression is least squares with one more row: sqrt(penalty) in the column of the slope, target 0."""
    return np.sqrt(ridge * (values**2).sum())


@pytest.mark.parametrize("ridge", [0.0, 1e-4, 0.03])
def test_affine_is_numpys_line(ridge):
    x, t = pairs()
    got = fitted(x, t, AFFINE, ridge)
    for f in range(FEATURES):
        # The intercept is not penalized: slopes of centred numbers, then the means.
        centred_x, centred_t = x[:, f] - x[:, f].mean(), t[:, f] - t[:, f].mean()
        rows = np.append(centred_x, ridge_row(centred_t, ridge))[:, None]
        (slope,), *_ = np.linalg.lstsq(rows, np.append(centred_t, 0), rcond=None)
        np.testing.assert_allclose(got.scale[f], slope, rtol=1e-9)
        np.testing.assert_allclose(got.shift[f], t[:, f].mean() - slope * x[:, f].mean(), rtol=1e-9, atol=1e-10)
        if ridge == 0:
            line, *_ = np.linalg.lstsq(np.stack([x[:, f], np.ones(len(x))], 1), t[:, f], rcond=None)
            np.testing.assert_allclose([got.scale[f], got.shift[f]], line, rtol=1e-8, atol=1e-9)
    assert not got.neutral.any()


@pytest.mark.parametrize("ridge", [0.0, 1e-4, 0.03])
def test_multiplicative_is_numpys_line_through_the_origin(ridge):
    x, t = pairs(1)
    got = fitted(x, t, MULTIPLICATIVE, ridge)
    for f in range(FEATURES):
        rows = np.append(x[:, f], ridge_row(t[:, f], ridge))[:, None]
        (scale,), *_ = np.linalg.lstsq(rows, np.append(t[:, f], 0), rcond=None)
        np.testing.assert_allclose(got.scale[f], scale, rtol=1e-9)
    assert got.shift.eq(0).all()


def test_additive_is_the_difference_of_means():
    x, t = pairs(2)
    got = fitted(x, t, ADDITIVE, 0.5)
    np.testing.assert_allclose(got.shift, (t - x).mean(0), rtol=1e-10, atol=1e-12)
    assert got.scale.eq(1).all()


@pytest.mark.parametrize("strategy", FITTED)
def test_nothing_near_by_is_better(strategy):
    """At a least-squares fit, a step in any direction that the strategy has makes the residual larger."""
    x, t = pairs(3)
    got = fitted(x, t, strategy)
    scale, shift = got.scale.numpy(), got.shift.numpy()

    def residual(a, b):
        return ((t - a * x - b) ** 2).sum(0)

    steps = {MULTIPLICATIVE: [(1, 0)], ADDITIVE: [(0, 1)], AFFINE: [(1, 0), (0, 1), (1, -1)]}[strategy]
    for da, db in steps:
        for sign in (-1e-3, 1e-3):
            assert (residual(scale + sign * da, shift + sign * db * t.std(0)) > residual(scale, shift)).all()


def test_each_feature_has_its_own_strategy():
    x, t = pairs(4)
    strategy = torch.tensor([MULTIPLICATIVE, ADDITIVE, AFFINE] * 4)
    together = fit(moments(x, t), strategy, 1e-3, 2, torch.float64)
    for kind in FITTED:
        alone = fitted(x, t, kind, 1e-3)
        mine = strategy == kind
        assert torch.equal(together.scale[mine], alone.scale[mine])
        assert torch.equal(together.shift[mine], alone.shift[mine])


def test_the_ridge_bounds_the_scale():
    """By 1 / (2 sqrt(ridge)), which a next to constant x comes up to; where x fits well it hardly shows."""
    rng = np.random.default_rng(5)
    t = rng.standard_normal((100, 1))
    for size in np.logspace(-6, 2, 60):
        for strategy in (AFFINE, MULTIPLICATIVE):
            got = fitted(size * t + 1e-3 * size * rng.standard_normal((100, 1)), t, strategy, 1e-4)
            assert 0 <= got.scale.item() <= 50
    assert abs(fitted(t / 2, t, AFFINE, 1e-4).scale.item() - 2) < 1e-3
    assert 49.9 < fitted(t / 100, t, AFFINE, 1e-4).scale.item() <= 50 * (1 + 1e-12)


def test_what_does_not_vary():
    rng = np.random.default_rng(6)
    varies = rng.standard_normal(30)
    still = np.full(30, 0.1)
    almost = still.astype(np.float32) + np.float32(1.5e-8) * rng.integers(0, 2, 30).astype(np.float32)
    x = np.stack([still, still, varies, still * 0, almost.astype(np.float64)], 1)
    t = np.stack([varies, still * 3, still * 3, still * 0, varies], 1)
    got = fitted(x, t, AFFINE, 1e-4)
    np.testing.assert_allclose(
        got.scale, [1, 1, 0, 1, 1], atol=1e-12
    )  # shifted only, but for x that varies about a constant
    np.testing.assert_allclose(got.shift, [varies.mean() - 0.1, 0.2, 0.3, 0, varies.mean() - 0.1], atol=1e-7)
    got = fitted(x, t, MULTIPLICATIVE)
    np.testing.assert_allclose(got.scale, [varies.mean() / 0.1, 3, 0.3 * varies.sum() / (varies**2).sum(), 1, 10 * varies.mean()], rtol=1e-5)  # fmt: skip
    assert not got.neutral.any()


@pytest.mark.parametrize("strategy", FITTED)
def test_too_few_pairs_stay_neutral(strategy):
    x, t = pairs(7, rows=9)
    x[4:, 0], t[:6, 1], t[:, 2] = np.nan, np.inf, np.nan
    got = fitted(x, t, strategy, 1e-4, least_pairs=8)
    assert got.neutral.tolist() == [True] * 3 + [False] * (FEATURES - 3)
    assert got.scale[:3].eq(1).all() and got.shift[:3].eq(0).all()
    enough = fitted(x, t, strategy, 1e-4, least_pairs=3)
    assert enough.neutral.tolist() == [False, False, True] + [False] * (FEATURES - 3)
    assert fitted(x[:0], t[:0], strategy).neutral.all()


def test_moments_that_are_not_finite_stay_neutral():
    x, t = pairs(8)
    x[0, 0], x[1, 0] = 1e300, -1e300
    got = fitted(x, t, AFFINE)
    assert got.neutral.tolist() == [True] + [False] * (FEATURES - 1)
    assert got.scale[0] == 1 and got.shift[0] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_shift_makes_up_for_a_rounded_scale(dtype):
    """The means agree to a rounding of the shift alone; what does not fit into the bank stays neutral."""
    x, t = pairs(9)
    x[:, 0] += 2000
    got = fitted(x, t, AFFINE, dtype=dtype)
    assert torch.equal(got.scale, got.scale.to(dtype).double()) and torch.equal(got.shift, got.shift.to(dtype).double())
    off = abs(t.mean(0) - got.scale.numpy() * x.mean(0) - got.shift.numpy())
    assert (off <= torch.finfo(dtype).eps * abs(got.shift.numpy()) + 1e-9).all()
    far = fitted(x, t + 1e39, AFFINE, dtype=dtype)
    assert far.neutral.all() and far.shift.eq(0).all()


def test_explained_variance_is_what_it_is():
    x, t = pairs(10)
    for y in (x, t, t + 3, 0 * t + t.mean(0), 0.5 * t):
        want = 1 - ((t - y) ** 2).sum() / ((t - t.mean(0)) ** 2).sum()
        np.testing.assert_allclose(explained(moments(y, t)).item(), want, rtol=1e-9, atol=1e-9)
    x[:, 0], t[3, 1] = np.nan, np.inf  # nothing is known of feature 0, of feature 1 a pair less
    rest = [(np.delete(x[:, 1], 3), np.delete(t[:, 1], 3)), *((x[:, f], t[:, f]) for f in range(2, FEATURES))]
    squares = sum(((b - a) ** 2).sum() for a, b in rest)
    np.testing.assert_allclose(
        explained(moments(x, t)).item(), 1 - squares / sum(((b - b.mean()) ** 2).sum() for _, b in rest), rtol=1e-9
    )
    assert explained(moments(x, np.ones_like(t))).isnan() and explained(moments(x[:0], t[:0])).isnan()
