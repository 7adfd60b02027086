"""Strategy names, neutral elements and ramps."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kasmina_ext.grafting import AlphaSchedule, GraftingStrategy, ramp

CURVES = {
    "linear": lambda t: t,
    "cosine": lambda t: math.sin(math.pi * t / 2) ** 2,
    # The logistic function of slope 12 about 1/2 is (1 + tanh(6 (t - 1/2))) / 2; scaling it leaves the tanh.
    "sigmoid": lambda t: (1 + math.tanh(6 * (t - 0.5)) / math.tanh(3)) / 2,
}


def test_strategies_have_the_ids_of_the_specification():
    assert {strategy.name: int(strategy) for strategy in GraftingStrategy} == {
        "MULTIPLICATIVE": 0,
        "ADDITIVE": 1,
        "MIXED": 2,
        "AFFINE": 3,
    }


@pytest.mark.parametrize("value", ["affine", "Affine", 3, np.int64(3), GraftingStrategy.AFFINE])
def test_parse(value):
    assert GraftingStrategy.parse(value) is GraftingStrategy.AFFINE


@pytest.mark.parametrize("value", ["conv", 4, -1])
def test_parse_names_the_known_strategies(value):
    with pytest.raises(ValueError, match=r"multiplicative \(0\), additive \(1\), mixed \(2\), affine \(3\)"):
        GraftingStrategy.parse(value)


@pytest.mark.parametrize("value", [None, 1.0, False])
def test_parse_refuses_other_types(value):
    with pytest.raises(TypeError, match="grafting strategy must be"):
        GraftingStrategy.parse(value)


def test_no_schedule_is_none():
    assert AlphaSchedule.parse(None) is AlphaSchedule.NONE
    with pytest.raises(ValueError, match="no ramp"):
        ramp("none", 0.5)


@pytest.mark.parametrize("name", CURVES)
def test_ramp_follows_its_closed_form(name):
    for k in range(101):
        assert ramp(name, k / 100) == pytest.approx(CURVES[name](k / 100), abs=1e-14)


@pytest.mark.parametrize("name", CURVES)
def test_ramp_is_exact_at_its_ends_clipped_outside_and_never_falls(name):
    assert ramp(name, 0) == ramp(name, -3) == 0.0
    assert ramp(name, 1) == ramp(name, 7) == 1.0
    assert ramp(name, 0.5) == pytest.approx(0.5, abs=1e-15)
    values = [ramp(name, k / 1000) for k in range(1001)]
    assert values == sorted(values)
