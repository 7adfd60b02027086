"""Which seeds nobody would miss: propose, measure, undo. Only alphas are overridden; no state changes here."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kasmina_ext.credit import Costs, estimated_costs, least, leave_one_out
from kasmina_ext.measure import Measurement, mean_and_error

# Single seeds in a row that may turn out to be missed before the search ends: the ranking is only an estimate.
PATIENCE = 3


@dataclass
class Expendable:
    """What :func:`find_expendable` found, of ``T`` seeds; float64 and NaN where nothing was measured."""

    removed: Tensor
    """bool: without all of these the loss is ``losses``."""
    cost: Tensor
    """What the removal of this seed alone would cost: at the end or, of a removed one, when it was proposed."""
    error: Tensor
    """Its standard error."""
    exact: Tensor
    """bool: measured, not estimated."""
    group_cost: Tensor
    """What the removal of the group that the seed was removed with did to the same batches."""
    group_error: Tensor
    """Its standard error."""
    nonfinite: Tensor
    """Batches whose derivative was not finite although their loss was."""
    losses: Tensor
    """float64 ``[n]``, at the end."""


def find_expendable(
    measurement: Measurement,
    alive: Tensor,
    candidates: Tensor,
    *,
    z: float,
    share: float,
    exact: int,
    prices: Tensor,
    surplus: float = 0.0,
) -> Expendable:
    """Remove, group by group, what does not hurt, from how the seeds are; all tensors ``[T]``.

    Each round ranks the candidates by the estimated cost of their removal at the alphas as they then
    are; the ``exact`` least of them are measured one by one instead. The first of the ranking, at
    most ``share`` of the seeds ``alive`` but at least one, are the group: it stays out if the mean
    increase of the losses of the same batches is not above ``z`` standard errors; else it is put
    back and its better half tried, down to a single seed, which then is no candidate any more. The
    search ends when nobody is left, or after three single seeds in a row that would be missed. Then
    ``exact`` more of those that stay are measured, where the estimate leaves open if they would be.

    While the ``prices`` of what was removed do not reach ``surplus`` (the budget has shrunk, say),
    groups stay out even if they hurt.
    """
    alpha, alive, candidates = measurement.alpha.double(), alive.clone(), candidates & alive
    proposed = candidates.clone()
    unknown = torch.full_like(alpha, torch.nan)
    group_cost, group_error = unknown.clone(), unknown.clone()
    removed = torch.zeros_like(alive)
    costs = estimated_costs(measurement, alpha)
    nonfinite = costs.nonfinite
    missed, paid, size, fresh = 0, 0.0, 0, True
    while candidates.any() and missed < PATIENCE:
        if fresh:
            leave_one_out(measurement, alpha, costs, candidates, exact)
            size, fresh = max(1, int(share * int(alive.sum()))), False
        group = _first(costs, candidates, size)
        if not group:
            break
        due = surplus - paid
        if due > 0:
            group = _at_most(group, prices, due)
        alone = len(group) == 1 and bool(costs.exact[group[0]])
        if alone and not due > 0 and _hurts(costs.mean[group[0]].item(), costs.error[group[0]].item(), z):
            candidates[group] = False
            missed += 1
            continue
        without = alpha.clone()
        without[group] = 0.0
        mean, error = mean_and_error(measurement.losses(without) - costs.losses)
        if due > 0 or not _hurts(mean, error, z):
            removed[group], candidates[group], alive[group] = True, False, False
            group_cost[group], group_error[group] = mean, error
            paid += prices[group].sum().item()
            alpha, missed, fresh = without, 0, True
            before, costs = costs, estimated_costs(measurement, alpha)
            costs.mean = torch.where(removed, before.mean, costs.mean)
            costs.error = torch.where(removed, before.error, costs.error)
            costs.exact = removed & before.exact
        elif len(group) > 1:
            size = len(group) // 2
        else:
            candidates[group] = False
            missed += 1
    unsure = proposed & ~removed & ~costs.exact & ~(costs.mean > z * costs.error)
    leave_one_out(measurement, alpha, costs, unsure, exact)
    return Expendable(removed, costs.mean, costs.error, costs.exact, group_cost, group_error, nonfinite, costs.losses)


def _first(costs: Costs, candidates: Tensor, size: int) -> list[int]:
    """The group to propose: of the measured candidates the cheapest, then the estimated ones."""
    measured = least(costs.mean, candidates & costs.exact, size)
    return measured + least(costs.mean, candidates & ~costs.exact, size - len(measured))


def _at_most(group: list[int], prices: Tensor, due: float) -> list[int]:
    """The first of the group, until they make up for what is due."""
    for count in range(1, len(group)):
        if prices[group[:count]].sum().item() >= due:
            return group[:count]
    return group


def _hurts(mean: float, error: float, z: float) -> bool:
    """Whether the loss rose by more than ``z`` standard errors, or nobody knows."""
    # Without any spread, infinitely many standard errors are NaN.
    return not (mean <= z * error or (mean <= 0 and z >= 0))
