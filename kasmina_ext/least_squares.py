"""From the moments of pairs (x, t), feature by feature: the line, scale or shift that fits best, and what it explains."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kasmina_ext.grafting import GraftingStrategy

_MULTIPLICATIVE, _ADDITIVE, _AFFINE = map(
    int, (GraftingStrategy.MULTIPLICATIVE, GraftingStrategy.ADDITIVE, GraftingStrategy.AFFINE)
)
FITTED = (_MULTIPLICATIVE, _ADDITIVE, _AFFINE)
"""Strategies that a fit is known for. MIXED is none: at alpha 1 it halves x, however good its weight."""

# A deviation of a ten-millionth of the mean is what float32 leaves of a constant.
_CONSTANT = 1e-14


class Fit(NamedTuple):
    """``y = scale x + shift``, each float64 ``[H]``; rounded to the dtype of the bank that will hold it."""

    scale: Tensor
    shift: Tensor
    neutral: Tensor
    """bool: too few pairs, or moments that are not finite: 1 and 0."""


def fit(moments: Tensor, strategy: Tensor, ridge: float, least_pairs: int, dtype: torch.dtype) -> Fit:
    """Least squares for features of these strategies (``[H]``; see :data:`FITTED`) from ``moments [H, 6]``.

    AFFINE: scale = C / (M2_x + ridge M2_t), shift = mean_t - scale mean_x. A ridge r bounds the
    scale by 1 / (2 sqrt(r)), since C^2 <= M2_x M2_t. An x that does not vary is shifted only.
    MULTIPLICATIVE: the same through the origin, with sums of squares and products about 0 (which
    are M2 + count mean^2, and so on). ADDITIVE: shift = mean_t - mean_x.

    Hoerl and Kennard (1970) for the ridge.
    """
    count, mean_x, mean_t, m2_x, m2_t, c_xt = moments.unbind(1)
    scales, shifts = strategy == _MULTIPLICATIVE, strategy == _ADDITIVE
    squares_x = torch.where(scales, m2_x + count * mean_x**2, m2_x)
    squares_t = torch.where(scales, m2_t + count * mean_t**2, m2_t)
    products = torch.where(scales, c_xt + count * mean_x * mean_t, c_xt)
    still = squares_x <= torch.where(scales, 0.0, _CONSTANT * count * mean_x**2)
    scale = torch.where(still | shifts, 1.0, products / (squares_x + ridge * squares_t))
    scale = scale.to(dtype).double()  # before the shift, which then makes up for the rounding
    shift = torch.where(scales, 0.0, mean_t - scale * mean_x).to(dtype).double()
    usable = (count >= least_pairs) & moments.isfinite().all(1) & scale.isfinite() & shift.isfinite()
    return Fit(torch.where(usable, scale, 1.0), torch.where(usable, shift, 0.0), ~usable)


def explained(moments: Tensor) -> Tensor:
    """How much of t's variance x explains as it is, over all features: 1 - sum (t - x)^2 / sum M2_t; a float64 scalar.

    1 is all of it, 0 no more than a constant, below 0 less than that. NaN where nothing was
    measured or t does not vary. Features whose moments are not finite are left out.
    """
    moments = torch.where(moments.isfinite().all(1, keepdim=True), moments, 0.0)
    count, mean_x, mean_t, m2_x, m2_t, c_xt = moments.unbind(1)
    squares = m2_x + m2_t - 2 * c_xt + count * (mean_x - mean_t) ** 2
    return torch.where(m2_t.sum() > 0, 1 - squares.sum() / m2_t.sum(), torch.nan)
