"""Which seeds nobody would miss: propose, measure, undo. Only alphas are overridden; no state changes here."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kasmina_ext.credit import Costs, estimated_costs, increase, least, leave_one_out
from kasmina_ext.measure import Measurement

# Single seeds in a row that may turn out to be missed before the search ends: the ranking is only an estimate.
PATIENCE = 3


# ---- losses that are not finite ----------------------------------------------------------------------------------


@dataclass
class AtFault:
    """What :func:`find_at_fault` found, of ``T`` seeds."""

    kept: Tensor
    """bool ``[n]``: losses that are finite without the seeds that were asked about; the others are left out now."""
    seeds: Tensor
    """bool: without all of these every loss is finite."""
    batches: Tensor
    """float64: those of which a loss is not finite with the seed, beside all that are not at fault before it."""


def find_at_fault(measurement: Measurement, alpha: Tensor, among: Tensor, trust: Tensor) -> AtFault:
    """Seeds ``among [T]`` with which a loss is not finite at ``alpha`` although without them it is.

    They come back one after the other, the most trusted first, and stay unless a loss is not finite
    then. Many come at once, and halves of them where that fails: it takes some passes for each seed
    at fault, not for each seed. Losses that are not finite even without all of them are left out of
    the measurement from then on: there is nothing to compare.
    """
    seeds, batches = torch.zeros_like(among), torch.zeros_like(alpha)
    present = torch.where(among, 0.0, alpha)
    kept = torch.isfinite(measurement.losses(present))
    measurement.keep(kept)
    order = trust.argsort(descending=True, stable=True)
    joining = [order[among[order]].tolist()] if measurement.num_batches else []
    while joining:
        group = joining.pop()
        if not group:
            continue
        joined = present.clone()
        joined[group] = alpha[group]
        wrong = ~torch.isfinite(measurement.losses(joined))
        if not wrong.any():
            present = joined
        elif len(group) > 1:
            joining += [group[len(group) // 2 :], group[: len(group) // 2]]  # the more trusted half comes next
        else:
            seeds[group], batches[group] = True, float(measurement.batches_with(wrong))
    return AtFault(kept, seeds, batches)


# ---- the search --------------------------------------------------------------------------------------------------


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
    spare: Tensor | None = None,
    alpha: Tensor | None = None,
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
    groups stay out even if they hurt, and the ``spare`` seeds (``candidates`` by default) are
    candidates, too. Once they do, those that are not needed for it are put back, the dearest first:
    where prices differ, one that came late may make up for some before it.

    ``alpha`` is what to begin from, by default the measurement's: a seed that has gone already is 0.
    """
    alpha = measurement.alpha.double() if alpha is None else alpha
    begun, alive, candidates = alpha, alive.clone(), candidates & alive
    spare = candidates.clone() if spare is None else (spare & alive & (prices > 0)) | candidates
    proposed = spare if surplus > 0 else candidates.clone()
    unknown = torch.full_like(alpha, torch.nan)
    group_cost, group_error = unknown.clone(), unknown.clone()
    removed, forced = torch.zeros_like(alive), torch.zeros_like(alive)
    costs = estimated_costs(measurement, alpha)
    nonfinite = costs.nonfinite
    missed, paid, size, fresh = 0, 0.0, 0, True
    while missed < PATIENCE:
        due = surplus - paid
        among = spare & ~removed if due > 0 else candidates
        if not among.any():
            break
        if fresh:
            leave_one_out(measurement, alpha, costs, among, exact)
            size, fresh = max(1, int(share * int(alive.sum()))), False
        group = _first(costs, among, size)
        if due > 0:  # of seeds that nothing is known of any will do
            group = _at_most(group or among.nonzero()[0].tolist(), prices, due)
        elif not group:
            break
        alone = len(group) == 1 and bool(costs.exact[group[0]])
        if alone and not due > 0 and _hurts(costs.mean[group[0]].item(), costs.error[group[0]].item(), z):
            candidates[group] = False
            missed += 1
            continue
        without = alpha.clone()
        without[group] = 0.0
        mean, error = increase(measurement.losses(without), costs.losses)
        hurts = _hurts(mean, error, z)
        if due > 0 or not hurts:
            forced[group] = ~candidates[group] | hurts
            removed[group], candidates[group], alive[group] = True, False, False
            group_cost[group], group_error[group] = mean, error
            paid += prices[group].sum().item()
            if due > 0:
                for one in _not_needed(forced, costs.mean, prices, paid - surplus):
                    forced[one], removed[one], alive[one], without[one] = False, False, True, begun[one]
                    group_cost[one] = group_error[one] = torch.nan
                    paid -= prices[one].item()
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


def _not_needed(forced: Tensor, cost: Tensor, prices: Tensor, more: float) -> list[int]:
    """Of the ``forced`` ones, those that may come back since together they cost at most what is paid ``more`` than is due."""
    back = []
    if more > 0:
        for one in sorted(forced.nonzero().flatten().tolist(), key=lambda seed: -cost[seed].item()):
            price = prices[one].item()
            if 0 < price <= more:
                back.append(one)
                more -= price
    return back


def _hurts(mean: float, error: float, z: float) -> bool:
    """Whether the loss rose by more than ``z`` standard errors, or nobody knows."""
    # Without any spread, infinitely many standard errors are NaN.
    return not (mean <= z * error or (mean <= 0 and z >= 0))
