"""What each seed is worth: who brought the gain (for people and logs), and what a removal would cost (for culling)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kasmina_ext.arguments import at_least
from kasmina_ext.lifecycle import ExtendedLifecycle
from kasmina_ext.measure import Layers, LossFunction, Measurement, Moments, mean_and_error
from kasmina_ext.state_layout import StateVar

MAX_POINTS = 256

# ---- who helped ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Credit:
    """What :func:`credit` found. Losses are means over the batches; positive credit lowered the loss."""

    names: list[str]
    """Of the layers."""
    mean: list[Tensor] = field(repr=False)
    """float64 ``[S]`` for each layer: what each seed brought; 0 for seeds that are not grafted."""
    error: list[Tensor] = field(repr=False)
    """float64 ``[S]`` for each layer: standard errors over the batches; NaN from one batch."""
    gain: float
    """The true one: the loss with all alphas at 0 less the loss as it is."""
    gain_error: float
    """Its standard error, over the paired losses."""
    points: int
    """Forward and backward passes that each batch took."""
    batches: int

    @property
    def total(self) -> float:
        """The sum of all credits: the gain, but for the quadrature."""
        return sum(mean.sum().item() for mean in self.mean)

    @property
    def deviation(self) -> float:
        """How far the sum is from the true gain, as a share of it: 0.02 is 2 %."""
        difference = abs(self.total - self.gain)
        return difference / abs(self.gain) if self.gain else math.inf if difference else 0.0

    def __str__(self) -> str:
        return (
            f"credit of {sum(len(mean) for mean in self.mean)} seeds over {self.batches} batches: sum {self.total:.6g}, "
            f"true gain {self.gain:.6g} (standard error {self.gain_error:.2g}); they differ by {self.deviation:.2%} "
            f"at {self.points} points"
        )


def credit(
    layers: Layers,
    batches: Iterable[Any],
    loss_fn: LossFunction,
    points: int = 4,
    *,
    tolerance: float | None = None,
) -> Credit:
    """Each seed's Aumann-Shapley credit: the integral of -alpha dL/dalpha(c alpha) over c from 0 to 1, by midpoints.

    The credits of all seeds of all layers sum to the true gain, L(0) - L(alpha), up to the
    quadrature; print the result to see how far they are from it. ``points`` forward and backward
    passes a batch, whatever the number of seeds, and two forward passes for the true gain. A network
    of ReLUs has kinks on the way, so that four points may miss the gain by some percent: with
    ``tolerance``, the points are doubled (to 256 at most) until the sum is off by less than that
    share of the gain, or by less than the gain's standard error times that share.

    ``loss_fn(batch)`` runs the network and returns a loss, or one for each sample. See
    :class:`~kasmina_ext.measure.Measurement` for what is left untouched (all of it) and for the mode
    that modules run in (eval). Waits for the device.
    """
    points = at_least("points", points, 1)
    with Measurement(layers, batches, loss_fn) as measurement:
        gains = measurement.losses(0 * measurement.alpha) - measurement.losses(measurement.alpha)
        return measured_credit(measurement, gains, points, tolerance)


def measured_credit(
    measurement: Measurement, gains: Tensor, points: int, tolerance: float | None = None, alpha: Tensor | None = None
) -> Credit:
    """:func:`credit`, inside a measurement that is already there, at ``alpha`` (by default its own); ``gains`` are the
    true ones, of the paired losses.
    """
    layout = measurement.layout
    alpha = (measurement.alpha if alpha is None else alpha).double()
    gain, gain_error = mean_and_error(gains)
    while True:
        moments = Moments(alpha)
        midpoints = [(2 * k + 1) / (2 * points) * alpha for k in range(points)]
        for losses, slopes, _ in measurement.slopes(midpoints):
            moments.add(-alpha * sum(slopes) / points, len(losses))
        missed = abs(moments.mean.sum().item() - gain)
        enough = tolerance is None or missed <= tolerance * max(abs(gain), gain_error)
        if enough or 2 * points > MAX_POINTS:
            break
        points *= 2
    return Credit(
        names=measurement.names,
        mean=layout.split(moments.mean),
        error=layout.split(moments.error),
        gain=gain,
        gain_error=gain_error,
        points=points,
        batches=measurement.num_batches,
    )


# ---- what a removal would cost ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RemovalCost:
    """What :func:`removal_cost` found: by how much the mean loss would rise without a seed, all others as they are."""

    names: list[str]
    """Of the layers."""
    mean: list[Tensor] = field(repr=False)
    """float64 ``[S]`` for each layer; 0 for seeds that are not grafted."""
    error: list[Tensor] = field(repr=False)
    """float64 ``[S]`` for each layer: standard errors, over the batches or, where exact, over the paired losses."""
    exact: list[Tensor] = field(repr=False)
    """bool ``[S]`` for each layer: measured by leaving the seed out; elsewhere an estimate."""
    loss: float
    """With all seeds as they are."""
    batches: int


def removal_cost(layers: Layers, batches: Iterable[Any], loss_fn: LossFunction, exact: int = 0) -> RemovalCost:
    """What the removal of each seed would cost: -alpha g + alpha^2 E[g^2] / 2, with g = dL/dalpha of each batch.

    An estimate that ranks candidates for culling, from one backward pass over the batches, whatever
    the number of seeds; small batches make it better. The ``exact`` grafted seeds with the least
    estimates are measured instead: the losses of the same batches with and without each, one more
    forward pass a seed. ``loss_fn``, and what is left untouched, as in :func:`credit`. Waits for the
    device.
    """
    exact = at_least("exact", exact, 0)
    with Measurement(layers, batches, loss_fn) as measurement:
        layout = measurement.layout
        alpha = measurement.alpha.double()
        costs = estimated_costs(measurement, alpha)
        if exact:
            lifecycle = layout.buffer("state")[StateVar.LIFECYCLE_STATE]
            leave_one_out(measurement, alpha, costs, grafted(lifecycle), exact)
        return RemovalCost(
            names=measurement.names,
            mean=layout.split(costs.mean),
            error=layout.split(costs.error),
            exact=layout.split(costs.exact),
            loss=costs.losses.mean().item(),
            batches=measurement.num_batches,
        )


@dataclass
class Costs:
    """Of removing each of ``T`` seeds, at alphas that ``losses`` were measured at."""

    mean: Tensor
    error: Tensor
    exact: Tensor
    losses: Tensor
    nonfinite: Tensor
    """Batches whose derivative was not finite although all of their losses were: the seed is to blame, not the batch."""


def estimated_costs(measurement: Measurement, alpha: Tensor) -> Costs:
    """The estimate for all seeds at ``alpha [T]``, from one backward pass over the batches."""
    moments, losses, nonfinite = Moments(alpha), [], torch.zeros_like(alpha)
    for batch_losses, (slope,), whole in measurement.slopes([alpha]):
        if whole:
            nonfinite += (~torch.isfinite(slope) & torch.isfinite(batch_losses).all()).double()
        first_order = alpha * slope
        moments.add(first_order * first_order / 2 - first_order, len(batch_losses))
        losses.append(batch_losses)
    return Costs(
        mean=moments.mean,
        error=moments.error,
        exact=torch.zeros_like(alpha, dtype=torch.bool),
        losses=torch.cat(losses),
        nonfinite=nonfinite,
    )


def leave_one_out(measurement: Measurement, alpha: Tensor, costs: Costs, among: Tensor, count: int) -> None:
    """Measure, instead of estimating, the ``count`` seeds among those where ``among [T]`` that would cost least; those of
    which there is no estimate come last.
    """
    chosen = least(costs.mean, among, count)
    chosen += (among & costs.mean.isnan()).nonzero().flatten()[: count - len(chosen)].tolist()
    for one in chosen:
        without = alpha.clone()
        without[one] = 0.0
        costs.mean[one], costs.error[one] = increase(measurement.losses(without), costs.losses)
        costs.exact[one] = True


def increase(after: Tensor, before: Tensor) -> tuple[float, float]:
    """By how much paired losses have risen: mean and standard error; infinitely, beyond doubt, where they are not finite
    any more.
    """
    if (torch.isfinite(before) & ~torch.isfinite(after)).any():
        return math.inf, 0.0
    return mean_and_error(after - before)


def least(values: Tensor, among: Tensor, count: int) -> list[int]:
    """The indices of the ``count`` least values where ``among``, least first; NaN is never among them."""
    among = among & ~values.isnan()
    order = torch.where(among, values, torch.inf).argsort(stable=True)
    return order[: min(count, int(among.sum()))].tolist()


def grafted(lifecycle: Tensor) -> Tensor:
    """bool ``[T]``: seeds in states that take part in the output, GRAFTING to FOSSILIZED."""
    return (lifecycle >= ExtendedLifecycle.GRAFTING) & (lifecycle <= ExtendedLifecycle.FOSSILIZED)
