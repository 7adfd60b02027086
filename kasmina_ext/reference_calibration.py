"""The operator of calibration in plain PyTorch: the fallback, and the documentation.

===========  =======  ===================================================================================
argument     dtype    shape and meaning
===========  =======  ===================================================================================
``x``        float    ``(..., H)``: a network's activations; float32, float64, bfloat16 or float16
``t``        float    like ``x``: what they should be
``moments``  float64  ``[H, 6]``: count, mean of x, mean of t, M2 of x, M2 of t, C = sum of products of deviations
===========  =======  ===================================================================================

``RuntimeError`` for a wrong dtype, device, rank or length, before anything is written.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kasmina_ext import _validate
from kasmina_ext.reference import _merging

_LARGEST_ORIGIN = 1e300  # as in telemetry_math.h


def pair_moments(x: Tensor, t: Tensor, moments: Tensor) -> None:
    """Join the pairs (x, t) of each feature into ``moments``; pairs that are not finite are left out.

    Chan, Golub and LeVeque (1979), for covariances as well. ``moments`` of zeros are those of no pair.
    Sums are float64; of float64 numbers beyond 1e150 the squares are infinite, and so is M2.
    """
    _validate.pair_moments(x, t, moments)
    if x.numel() == 0:
        return
    features = x.size(-1)
    wide_x, wide_t = (each.detach().double().reshape(-1, features) for each in (x, t))
    finite = torch.isfinite(wide_x) & torch.isfinite(wide_t)
    count = finite.sum(0).double()
    each = count.clamp(min=1)

    def centred(values: Tensor) -> tuple[Tensor, Tensor]:
        # About the feature's first number, so that equal ones do not vary at all.
        first = torch.where(finite[0] & (values[0].abs() < _LARGEST_ORIGIN), values[0], 0.0)
        away = torch.where(finite, values - first, 0.0)
        move = away.sum(0) / each
        return first + move, torch.where(finite, away - move, 0.0)

    mean_x, dx = centred(wide_x)
    mean_t, dt = centred(wide_t)
    # The means are only known to rounding: what is left of the deviations' sums corrects all moments.
    rest_x, rest_t = dx.sum(0) / each, dt.sum(0) / each
    batch = (
        count,
        mean_x + rest_x,
        mean_t + rest_t,
        _square((dx * dx).sum(0), rest_x * rest_x * count),
        _square((dt * dt).sum(0), rest_t * rest_t * count),
        (dx * dt).sum(0) - rest_x * rest_t * count,
    )
    with _merging:
        moments.copy_(_joined(moments, batch))


def _square(squares: Tensor, correction: Tensor) -> Tensor:
    """Not below 0, where rounding would leave it; inf - inf is a sum of squares beyond float64."""
    m2 = squares - correction
    return torch.where(m2.isnan(), torch.inf, m2.clamp(min=0))


def _joined(moments: Tensor, batch: tuple[Tensor, ...]) -> Tensor:
    old, mean_x, mean_t, m2_x, m2_t, c_xt = moments.unbind(1)
    count, batch_x, batch_t, batch_m2_x, batch_m2_t, batch_c = batch
    total = old + count
    share = torch.where(total > 0, count / total, 0.0)
    dx, dt = (torch.where(old > 0, later - mean, 0.0) for later, mean in ((batch_x, mean_x), (batch_t, mean_t)))
    joined = (
        total,
        torch.where(old > 0, mean_x + dx * share, batch_x),
        torch.where(old > 0, mean_t + dt * share, batch_t),
        m2_x + batch_m2_x + dx * dx * old * share,
        m2_t + batch_m2_t + dt * dt * old * share,
        c_xt + batch_c + dx * dt * old * share,
    )
    # A batch without pairs leaves a feature's bits alone.
    return torch.where((count > 0)[:, None], torch.stack(joined, 1), moments)
