"""telemetry_reduce: mean, variance and standard deviation of an accumulator."""

from __future__ import annotations

import checks
import numpy as np
import pytest
import torch


def accumulator(seeds: int, rng=None) -> torch.Tensor:
    """Random rows; every third seed has seen nothing."""
    rng = rng or np.random.default_rng(seeds)
    rows = np.stack([rng.integers(1, 2**40, seeds), rng.standard_normal(seeds), rng.random(seeds) * 1e6,
                     rng.integers(0, 99, seeds), rng.integers(0, 99, seeds)], 1).astype(np.float64)  # fmt: skip
    rows[::3, :3] = 0
    return torch.from_numpy(rows)


@pytest.mark.sanitizer
@pytest.mark.parametrize("seeds", [0, 1, 7, 1000, 70_001])
@checks.backends
def test_values(backend, device, seeds):
    telemetry = accumulator(seeds)
    reduced = checks.BACKENDS[backend].telemetry_reduce(telemetry.to(device))
    assert reduced.dtype == torch.float64 and reduced.shape == (seeds, 3) and reduced.device.type == device.type
    rows = telemetry.numpy()
    with np.errstate(invalid="ignore"):
        variance = rows[:, 2] / rows[:, 0]
    unmeasured = rows[:, 0] == 0
    expected = np.stack((np.where(unmeasured, np.nan, rows[:, 1]), variance, np.sqrt(variance)), 1)
    got = reduced.cpu().numpy()
    np.testing.assert_array_equal(got[:, :2], expected[:, :2])
    # PyTorch's vectorised square root may be a unit in the last place off, the kernels' is correctly rounded.
    ulp = 0 if checks.compiled(backend, device) else 2.0**-52
    np.testing.assert_allclose(got[:, 2], expected[:, 2], rtol=ulp)
    assert np.isnan(expected[::3]).all()


@checks.backends
def test_leaves_the_accumulator_alone(backend, device):
    telemetry = accumulator(20).to(device)
    before = telemetry.clone()
    reduced = checks.BACKENDS[backend].telemetry_reduce(telemetry)
    assert torch.equal(telemetry, before)
    assert reduced.untyped_storage().data_ptr() != telemetry.untyped_storage().data_ptr()


@checks.backends
def test_accepts_any_strides(backend, device):
    telemetry = accumulator(20).to(device)
    want = checks.BACKENDS[backend].telemetry_reduce(telemetry)
    for view in (telemetry.t().contiguous().t(), torch.cat((telemetry, telemetry), 1)[:, :5]):
        assert not view.is_contiguous()
        assert checks.same_bits(checks.BACKENDS[backend].telemetry_reduce(view), want)


@checks.backends
def test_of_real_data(backend, device):
    """The biased variance of the activations."""
    x = torch.randn(500, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 2
    telemetry = torch.zeros(2, 5, dtype=torch.float64, device=device)
    offsets = torch.tensor([0, 2, 8], dtype=torch.int32, device=device)
    checks.BACKENDS[backend].telemetry_update(x.to(device), offsets, telemetry)
    reduced = checks.BACKENDS[backend].telemetry_reduce(telemetry).cpu()
    for s, chunk in enumerate((x[:, :2], x[:, 2:])):
        variance = chunk.var(correction=0)
        # float64 data: no digits lost but to rounding
        torch.testing.assert_close(
            reduced[s], torch.stack((chunk.mean(), variance, variance.sqrt())), rtol=1e-12, atol=1e-13
        )
