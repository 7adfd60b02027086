"""The operators in plain PyTorch: the fallback on every device without a compiled kernel, and the documentation.

========================  =======  ==============================================================================
argument                  dtype    shape and meaning
========================  =======  ==============================================================================
``x``, ``grad_y``         float    ``(..., H)``: float32, float64, bfloat16 or float16, any strides
``seed_offsets``          int32    ``[S + 1]``: seed ``s`` owns the features ``[offsets[s], offsets[s + 1])``
``state``                 int32    ``[8, S]``: one row per variable, see :class:`kasmina_ext.state.StateVar`
``alpha``                 float32  ``[S]``: blend factor in [0, 1]
``blueprint_weights``     float    ``[P, H]``: the bank, of any of the four dtypes
``telemetry``             float64  ``[S, 5]``: count, mean, M2, batches, nonfinite; of size 0: do not collect
``grad_telemetry``        float64  ``[S, 3]``: sum of u^2, sum of v^2, backwards; of size 0: do not collect
========================  =======  ==============================================================================

Every function raises ``RuntimeError`` for a wrong dtype, device, rank or length before anything is written. ``y`` and
``dx`` have the bits that the compiled kernels give (in eager mode: a compiler may fuse and contract).
"""

from __future__ import annotations

import os
import threading
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from kasmina_ext import _autograd, _validate

TRAINING, GRAFTING, FOSSILIZED = 2, 3, 7
MULTIPLICATIVE, ADDITIVE, MIXED, AFFINE = range(4)

# A merge reads and writes: two threads on one accumulator would lose a batch.
_merging = threading.Lock()
if hasattr(os, "register_at_fork"):  # a fork in the middle of a merge would leave it locked for ever in the child
    os.register_at_fork(before=_merging.acquire, after_in_parent=_merging.release, after_in_child=_merging.release)


class Features(NamedTuple):
    """What each feature's seed says of it, every field of shape ``[H]``."""

    owner: Tensor  # int64: the owning seed, 0 where there is none
    owned: Tensor  # bool: a seed owns the feature
    grafted: Tensor  # bool: its seed is blended in
    trains: Tensor  # bool: grafted, and its blueprint is not frozen
    strategy: Tensor
    blueprint: Tensor  # int64 row of the bank, 0 where not grafted
    alpha: Tensor  # accumulation type
    w: Tensor  # blueprint weight, 1 where not grafted
    v: Tensor  # weight of the next row, 0 where the strategy is not AFFINE


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for the other three."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def feature_owner(seed_offsets: Tensor, features: int) -> tuple[Tensor, Tensor]:
    """``(owner int64 [H], owned bool [H])``; the owner is 0 where there is none."""
    seeds = seed_offsets.size(0) - 1
    index = torch.arange(features, device=seed_offsets.device)
    # Over all offsets, not a slice: torch 2.11's compiler reads a slice of boundaries from its storage's start.
    owner = torch.searchsorted(seed_offsets.contiguous(), index, right=True) - 1
    owned = (owner >= 0) & (owner < seeds)
    return torch.where(owned, owner, 0), owned


def _features(
    seed_offsets: Tensor,
    state: Tensor,
    alpha: Tensor,
    weights: Tensor,
    accumulate: torch.dtype,
    first: int = GRAFTING,
    last: int = FOSSILIZED,
) -> Features:
    """Seeds take part (`grafted`) in the states from ``first`` to ``last``."""
    num_blueprints, features = weights.shape
    owner, owned = feature_owner(seed_offsets, features)
    lifecycle, blueprint, _, strategy = (row[owner] for row in state[:4])
    final = blueprint.long() + (strategy == AFFINE)
    grafted = owned & (lifecycle >= first) & (lifecycle <= last)
    grafted &= (strategy >= MULTIPLICATIVE) & (strategy <= AFFINE)
    grafted &= (blueprint >= 0) & (final < num_blueprints)
    row = torch.where(grafted, blueprint.long(), 0)
    following = torch.where(grafted, final, 0)
    if num_blueprints == 0:
        w = v = torch.ones(features, dtype=accumulate, device=weights.device)
    else:
        # Indexed, not gathered: the derivative of a gather adds atomically, which loses what is denormal on a GPU.
        column = torch.arange(features, device=weights.device)
        w = weights[row, column].to(accumulate)
        v = weights[following, column].to(accumulate)
    trains = grafted & (lifecycle != FOSSILIZED)
    return Features(
        owner=owner,
        owned=owned,
        grafted=grafted,
        trains=trains,
        strategy=strategy,
        blueprint=row,
        alpha=alpha[owner].to(accumulate),
        w=torch.where(grafted, torch.where(trains, w, w.detach()), 1.0),
        v=torch.where(grafted & (strategy == AFFINE), torch.where(trains, v, v.detach()), 0.0),
    )


def _slope(f: Features) -> Tensor:
    """``a`` of ``y = a x + b``, operation by operation as the kernels compute it."""
    scaled = (1 - f.alpha) + f.alpha * f.w
    a = torch.where(f.strategy == MIXED, 1 - f.alpha / 2, scaled)
    return torch.where(f.strategy == ADDITIVE, 1.0, a)


def _intercept(f: Features) -> Tensor:
    """``b`` of ``y = a x + b``, a zero of either sign."""
    b = torch.where(f.strategy == ADDITIVE, f.alpha * f.w, -0.0)
    b = torch.where(f.strategy == MIXED, f.alpha * f.w / 2, b)
    return torch.where(f.strategy == AFFINE, f.alpha * f.v, b)


def coefficients(
    seed_offsets: Tensor, state: Tensor, alpha: Tensor, blueprint_weights: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """``a [H]`` and ``b [H]`` of ``y = a x + b``, with the bits that the forward uses for an ``x`` of ``dtype``.

    Of the accumulation type. a = 1 and b = -0.0 where no seed is grafted; a zero b is always -0.0.
    """
    f = _features(seed_offsets, state, alpha, blueprint_weights, accumulation_dtype(dtype))
    b = torch.where(f.grafted, _intercept(f), -0.0)
    return torch.where(f.grafted, _slope(f), 1.0), torch.where(b == 0, -0.0, b)


def _like(values: Tensor, x: Tensor) -> Tensor:
    """``values`` with the strides of ``torch.empty_like(x)``."""
    result = torch.empty_like(x)
    return values if values.stride() == result.stride() else result.copy_(values)


# ---- chunked_forward -------------------------------------------------------------------------------------------------


def chunked_forward(
    x: Tensor,
    seed_offsets: Tensor,
    state: Tensor,
    alpha: Tensor,
    blueprint_weights: Tensor,
    telemetry: Tensor,
    grad_telemetry: Tensor,
) -> Tensor:
    """``y = a x + b`` per feature; see the table above. Differentiable, twice too, in x, alpha and the bank.

    Merges the statistics of ``x`` into ``telemetry`` unless this is a recomputation inside a backward; the backward
    adds to ``grad_telemetry``. Returns a tensor like ``torch.empty_like(x)``.
    """
    _validate.chunked_forward(x, seed_offsets, state, alpha, blueprint_weights, telemetry, grad_telemetry)
    _collect(x.detach(), seed_offsets, telemetry)
    return _autograd.blend(_REFERENCE, x, seed_offsets, state, alpha, blueprint_weights, telemetry, grad_telemetry)


def _collect(x: Tensor, seed_offsets: Tensor, telemetry: Tensor) -> None:
    if telemetry.numel() == 0:
        return
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        # The gate against counting a recomputation cannot be traced, and a transform forbids writing to what it did
        # not make: the operator carries both through.
        torch.ops.kasmina.telemetry_update(x, seed_offsets, telemetry)
    elif not _autograd.recomputing(x):
        _update(x, seed_offsets, telemetry)


def _blend(x, seed_offsets, state, alpha, blueprint_weights, telemetry, grad_telemetry) -> Tensor:
    """The output alone: telemetry is collected by the caller, gradient telemetry by the backward."""
    if seed_offsets.size(0) == 1 or x.numel() == 0:
        return _like(x.clone(), x)
    f = _features(seed_offsets, state, alpha, blueprint_weights, accumulation_dtype(x.dtype))
    scaled, b = _slope(f) * x.to(f.w.dtype), _intercept(f)
    # A zero b must change no bit, so it counts as -0.0. Subtracting +0.0 is the same, and keeps the derivative in b.
    y = torch.where(b == 0, scaled - (b.detach() - b), scaled + b)
    return _like(torch.where(f.grafted, y.to(x.dtype), x), x)


def forward_op(x, seed_offsets, state, alpha, blueprint_weights, telemetry, grad_telemetry) -> Tensor:
    """The operator below autograd: no gate, no graph."""
    _validate.chunked_forward(x, seed_offsets, state, alpha, blueprint_weights, telemetry, grad_telemetry)
    if telemetry.numel():
        _update(x, seed_offsets, telemetry)
    return _blend(x, seed_offsets, state, alpha, blueprint_weights, telemetry, grad_telemetry)


# ---- chunked_backward ------------------------------------------------------------------------------------------------


def chunked_backward(
    grad_y: Tensor,
    x: Tensor,
    seed_offsets: Tensor,
    state: Tensor,
    alpha: Tensor,
    blueprint_weights: Tensor,
    grad_telemetry: Tensor,
    grad_x: bool,
    grad_weights: bool,
    grad_alpha: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(dx, dw, dalpha)`` for ``grad_y = dL/dy``; one that is not asked for is a tensor of size 0.

    With ``G = grad_y``, ``u = sum G x`` and ``v = sum G`` over the rows: ``dx = a G``; ``dw [P, H]`` is alpha u, alpha v,
    alpha v / 2 or (alpha u, alpha v) for MULTIPLICATIVE, ADDITIVE, MIXED, AFFINE, zero for fossils and seeds that are
    not grafted; ``dalpha [S]`` float32 sums (w - 1)u, w v, (w v - u)/2 or (w - 1)u + w'v over a grafted seed's features.
    Adds ``sum u^2, sum v^2, 1`` per seed to ``grad_telemetry`` where these sums are finite.
    """
    inputs = (grad_y, x, seed_offsets, state, alpha, blueprint_weights, grad_telemetry)
    _validate.chunked_backward(*inputs)
    return _gradients(*inputs, grad_x, grad_weights, grad_alpha)


def _gradients(
    grad_y, x, seed_offsets, state, alpha, blueprint_weights, grad_telemetry, grad_x, grad_weights, grad_alpha
) -> tuple[Tensor, Tensor, Tensor]:
    """Of arguments that were checked: in the forward, where this is its derivative."""
    seeds = seed_offsets.size(0) - 1
    dx, dw = x.new_empty(0), blueprint_weights.new_empty(0)
    dalpha = alpha.new_empty(0)
    if seeds == 0 or x.numel() == 0:
        return (
            _like(grad_y.clone(), x) if grad_x else dx,
            torch.zeros_like(blueprint_weights, memory_format=torch.contiguous_format) if grad_weights else dw,
            alpha.new_zeros(seeds) if grad_alpha else dalpha,
        )
    if grad_telemetry.numel() and torch._C._are_functorch_transforms_active():
        # As for telemetry: only an operator may write to what the transform did not make.
        inputs = (x, seed_offsets, state, alpha, blueprint_weights, grad_telemetry)
        torch.ops.kasmina.chunked_backward(grad_y, *inputs, False, False, False)
        grad_telemetry = grad_telemetry.new_empty(0)
    accumulate = accumulation_dtype(x.dtype)
    f = _features(seed_offsets, state, alpha, blueprint_weights, accumulate)
    wide_grad = grad_y.to(accumulate)
    if grad_x:
        dx = _like(torch.where(f.grafted, (_slope(f) * wide_grad).to(x.dtype), grad_y), x)
    if grad_weights or grad_alpha or grad_telemetry.numel():
        rows = tuple(range(x.dim() - 1))
        # An empty tuple of dimensions would sum over all of them.
        product = wide_grad * x.to(accumulate)
        u = product.sum(rows, dtype=torch.float64) if rows else product.double()
        v = wide_grad.sum(rows, dtype=torch.float64) if rows else wide_grad.double()
        if grad_telemetry.numel():
            _add_gradient_telemetry(f, u.detach(), v.detach(), grad_telemetry)
        if grad_weights:
            dw = _weight_gradient(f, u, v, blueprint_weights)
        if grad_alpha:
            dalpha = _sum_by_seed(f, _alpha_gradient(f, u, v), seeds).to(torch.float32)
    return dx, dw, dalpha


def _weight_gradient(f: Features, u: Tensor, v: Tensor, weights: Tensor) -> Tensor:
    alpha = f.alpha.double()
    own = torch.where((f.strategy == MULTIPLICATIVE) | (f.strategy == AFFINE), alpha * u, alpha * v)
    own = torch.where(f.strategy == MIXED, alpha * v / 2, own)
    rows = torch.arange(weights.size(0), device=weights.device)[:, None]
    dw = torch.where(f.trains & (rows == f.blueprint), own, 0.0)
    following = f.trains & (f.strategy == AFFINE) & (rows == f.blueprint + 1)
    return torch.where(following, alpha * v, dw).to(weights.dtype)


def _alpha_gradient(f: Features, u: Tensor, v: Tensor) -> Tensor:
    w = f.w.double()
    per_feature = (w - 1) * u
    # Not for the others: 0 * inf would be NaN.
    per_feature = torch.where(f.strategy == AFFINE, per_feature + f.v.double() * v, per_feature)
    per_feature = torch.where(f.strategy == ADDITIVE, w * v, per_feature)
    per_feature = torch.where(f.strategy == MIXED, (w * v - u) / 2, per_feature)
    return torch.where(f.grafted, per_feature, 0.0)


def _sum_by_seed(f: Features, values: Tensor, seeds: int) -> Tensor:
    """``[S]`` sums of ``values [H]`` over each seed's features; index_put is deterministic on every device."""
    values = torch.where(f.owned, values, 0.0)
    return values.new_zeros(seeds).index_put((f.owner,), values, accumulate=True)


def _add_gradient_telemetry(f: Features, u: Tensor, v: Tensor, grad_telemetry: Tensor) -> None:
    seeds = grad_telemetry.size(0)
    u2, v2 = _sum_by_seed(f, u * u, seeds), _sum_by_seed(f, v * v, seeds)
    added = torch.stack((u2, v2, torch.ones_like(u2)), 1)
    finite = torch.isfinite(u2) & torch.isfinite(v2)
    added = torch.where(finite[:, None], added, 0.0)
    # A compiler cannot trace a lock; what it compiles adds in one operation.
    with nullcontext() if torch.compiler.is_compiling() else _merging:
        grad_telemetry += added


# ---- telemetry -------------------------------------------------------------------------------------------------------


def telemetry_update(x: Tensor, seed_offsets: Tensor, telemetry: Tensor) -> None:
    """Merge the statistics of ``x`` into ``telemetry``, unless this is a recomputation inside a backward."""
    _validate.telemetry_update(x, seed_offsets, telemetry)
    _collect(x.detach(), seed_offsets, telemetry)


def update_op(x, seed_offsets, telemetry) -> None:
    """The operator below autograd: no gate."""
    _validate.telemetry_update(x, seed_offsets, telemetry)
    if telemetry.numel():
        _update(x, seed_offsets, telemetry)


def _update(x: Tensor, seed_offsets: Tensor, telemetry: Tensor) -> None:
    seeds, features = telemetry.size(0), x.size(-1)
    rows = x.numel() // max(features, 1)
    if rows == 0:
        return
    batch = telemetry.new_zeros(seeds, 5)
    batch[:, 3] = 1
    if features:
        owner, owned = feature_owner(seed_offsets, features)

        def by_seed(values: Tensor) -> Tensor:
            values = torch.where(owned, values.sum(0, dtype=torch.float64), 0.0)
            return values.new_zeros(seeds).index_put((owner,), values, accumulate=True)

        wide = x.reshape(rows, features).to(torch.float64)
        finite = torch.isfinite(wide)
        wide = torch.where(finite, wide, 0.0)
        count = by_seed(finite)
        # Divided before they are summed: numbers near the end of the range have a mean, but no sum.
        each = count.clamp(min=1)[owner]
        mean = by_seed(wide / each)
        deviation = torch.where(finite, wide - mean[owner], 0.0)
        # The mean is only known to rounding: what is left of the deviations' sum corrects both moments.
        residue = by_seed(deviation / each)
        residue = torch.where(torch.isfinite(residue), residue, 0.0)
        batch[:, 0] = count
        batch[:, 1] = mean + residue
        batch[:, 2] = (by_seed(deviation * deviation) - count * residue * residue).clamp(min=0)
        batch[:, 4] = by_seed(~finite)
    _merge(telemetry, batch)


def _merge(telemetry: Tensor, other: Tensor) -> None:
    """Chan, Golub and LeVeque (1979): moments of a union from the moments of its parts."""
    with _merging:
        telemetry.copy_(_joined(telemetry, other))


def _joined(telemetry: Tensor, other: Tensor) -> Tensor:
    (count, mean, m2), (count_b, mean_b, m2_b) = telemetry.unbind(1)[:3], other.unbind(1)[:3]
    total = count + count_b
    share = torch.where(total > 0, count_b / total, 0.0)
    delta = mean_b - mean
    # Means at opposite ends of the range: their distance overflows, their average does not.
    average = torch.where(torch.isfinite(delta), mean + delta * share, mean * (1 - share) + mean_b * share)
    squares = m2 + m2_b + delta * delta * count * share
    # A side without elements leaves the other's bits alone.
    mean = torch.where(count_b == 0, mean, torch.where(count == 0, mean_b, average))
    m2 = torch.where(count_b == 0, m2, torch.where(count == 0, m2_b, squares))
    # inf - inf is a sum of squares beyond float64.
    m2 = torch.where(torch.isnan(m2), torch.inf, m2)
    return torch.stack((total, mean, m2, telemetry[:, 3] + other[:, 3], telemetry[:, 4] + other[:, 4]), 1)


def telemetry_reduce(telemetry: Tensor) -> Tensor:
    """``[S, 3]`` float64: mean, variance (M2 / count) and standard deviation; NaN where the count is 0."""
    _validate.telemetry_reduce(telemetry)
    count, mean, m2 = telemetry.unbind(1)[:3]
    measured = count > 0
    variance = torch.where(measured, m2 / count, torch.nan)
    return torch.stack((torch.where(measured, mean, torch.nan), variance, variance.sqrt()), 1)


def telemetry_merge(telemetry: Tensor, other: Tensor) -> None:
    """Join ``other`` into ``telemetry``: as if ``telemetry`` had seen both sets of activations."""
    _validate.telemetry_merge(telemetry, other)
    _merge(telemetry, other)


# ---- reconstruction_loss ---------------------------------------------------------------------------------------------


def reconstruction_loss(
    x: Tensor, target: Tensor, seed_offsets: Tensor, state: Tensor, blueprint_weights: Tensor
) -> Tensor:
    """``[S]``: mean of ``(g(x, w) - target)^2`` over the chunks of seeds in TRAINING, 0 for all others.

    ``x`` and ``target`` are ``(..., H)`` of one dtype and taken as constants; the loss is float32 (float64 for a float64
    ``x``) and differentiable in ``blueprint_weights``. ``g`` is the strategy's blend at alpha 1. (Squared in float64 here,
    in the accumulation type by the kernels: a float32 residual above 1.8e19 makes their loss infinite.)
    """
    _validate.reconstruction_loss(x, target, seed_offsets, state, blueprint_weights)
    return _reconstruction(x.detach(), target.detach(), seed_offsets, state, blueprint_weights)


def _reconstruction(x, target, seed_offsets, state, blueprint_weights) -> Tensor:
    seeds, accumulate = seed_offsets.size(0) - 1, accumulation_dtype(x.dtype)
    if seeds == 0 or x.numel() == 0 or blueprint_weights.size(0) == 0:
        # Through none of the bank, so that the loss has a derivative, which is 0.
        return blueprint_weights[:0].sum().to(accumulate) + x.new_zeros(seeds, dtype=accumulate)
    f, residual, elements = _residuals(x, target, seed_offsets, state, blueprint_weights)
    return (_sum_by_seed(f, residual.square().sum(0), seeds) / elements).to(accumulate)


def _residuals(x, target, seed_offsets, state, blueprint_weights) -> tuple[Features, Tensor, Tensor]:
    """Who trains, ``g(x, w) - target`` as float64 ``[N, H]``, 0 where nobody does, and the elements of each seed's chunk."""
    seeds, features = seed_offsets.size(0) - 1, x.size(-1)
    alpha = x.new_ones(seeds, dtype=torch.float32)
    f = _features(seed_offsets, state, alpha, blueprint_weights, accumulation_dtype(x.dtype), TRAINING, TRAINING)
    # In float64, where no square of a small residual vanishes.
    w, v = f.w.double(), f.v.double()
    slope = torch.where(f.strategy == MIXED, 0.5, torch.where(f.strategy == ADDITIVE, 1.0, w))
    added = torch.where(f.strategy == AFFINE, v, 0.0)
    added = torch.where(f.strategy == ADDITIVE, w, torch.where(f.strategy == MIXED, w / 2, added))
    residual = slope * x.double() + added - target.double()
    # Seeds that take no part may hold what is not finite.
    residual = torch.where(f.grafted, residual, 0.0).reshape(-1, features)
    elements = _sum_by_seed(f, f.owned.double(), seeds) * residual.size(0)
    return f, residual, elements.clamp(min=1)


def reconstruction_loss_backward(
    grad_loss: Tensor, x: Tensor, target: Tensor, seed_offsets: Tensor, state: Tensor, blueprint_weights: Tensor
) -> Tensor:
    """``[P, H]`` in the bank's dtype: the derivative of :func:`reconstruction_loss`, weighted by ``grad_loss [S]``.

    With residuals ``r`` and ``u = sum r x``, ``v = sum r`` over the rows: ``2 grad_loss / elements`` times u, v, v / 2 or
    (u, v) for MULTIPLICATIVE, ADDITIVE, MIXED, AFFINE; zero but for seeds in TRAINING.
    """
    inputs = (x.detach(), target.detach(), seed_offsets, state, blueprint_weights)
    _validate.reconstruction_loss_backward(grad_loss, *inputs)
    if seed_offsets.size(0) == 1 or x.numel() == 0 or blueprint_weights.size(0) == 0:
        return torch.zeros_like(blueprint_weights, memory_format=torch.contiguous_format)
    f, residual, elements = _residuals(*inputs)
    scale = (2 * grad_loss.double() / elements)[f.owner]
    # Not for the others: 0 * inf would be NaN.
    wide = torch.where(f.grafted, x.detach().double().reshape(residual.shape), 0.0)
    u, v = (residual * wide).sum(0), residual.sum(0)
    return _weight_gradient(f, scale * u, scale * v, blueprint_weights)


_REFERENCE = _autograd.Backend(_blend, _gradients, _blend)
