"""What an evaluation of seeds on held-out batches finds; nothing is changed here, see the controller for what follows."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kasmina_ext.credit import Credit, grafted, measured_credit
from kasmina_ext.culling import find_at_fault, find_expendable
from kasmina_ext.lifecycle import ExtendedLifecycle
from kasmina_ext.measure import Layers, LossFunction, Measurement
from kasmina_ext.policy import Measured, Observation
from kasmina_ext.ranks import Ranks

_S = ExtendedLifecycle


@dataclass(frozen=True)
class Evaluation:
    """What :meth:`GrowthController.evaluate` found and did. Losses are means over what was not left out."""

    loss: float
    """Of the batches, after what was culled has gone; NaN where nothing could be judged."""
    loss_before: float
    """As the seeds were; not finite where one of them is at fault."""
    loss_without: float
    """With no seed at all."""
    advanced: int
    fossilized: int
    culled: int
    """Rolled back ones included."""
    alive: int
    """GERMINATED to FOSSILIZED, afterwards."""
    credit: Credit | None
    """Of the seeds as they were, less those with which a loss is not finite; None where the settings say ``points=0``, or
    nothing could be judged."""
    left_out: int = 0
    """Batches (samples, where ``loss_fn`` gives a loss for each) that say nothing of the seeds, since their loss is not
    finite even without them."""

    @property
    def judged(self) -> bool:
        """Whether there was a finite loss to judge by."""
        return math.isfinite(self.loss_without)

    def __str__(self) -> str:
        text = f"loss {self.loss:.6g}, before culling {self.loss_before:.6g}, without seeds {self.loss_without:.6g}; "
        if not self.judged:
            text = f"nothing could be judged: none of {self.left_out} losses is finite without seeds; "
        text += f"{self.advanced} advanced, {self.fossilized} fossilized, {self.culled} culled, {self.alive} alive"
        if self.judged and self.left_out:
            text += f"; {self.left_out} losses left out, which are not finite without seeds either"
        return text if self.credit is None else f"{text}\n{self.credit}"


@dataclass(frozen=True)
class Findings:
    """Of :func:`judge`; fields as in :class:`Evaluation`."""

    measured: Measured
    loss: float
    loss_before: float
    loss_without: float
    left_out: int
    credit: Credit | None


def judge(
    roots: Layers, batches: Iterable[Any], loss_fn: LossFunction, seeds: Observation, ranks: Ranks | None = None
) -> Findings:
    """Losses with and without the seeds, their credit, and which of them are expendable.

    First go the batches (or samples) whose loss is not finite without any seed: no seed is to blame.
    Then the seeds with which a loss is not finite, or whose weights are not: they are expendable at
    once. What is left is compared as :func:`~kasmina_ext.culling.find_expendable` says; what has no
    part in the output yet makes room first where the budget has shrunk. Of several ``ranks`` all
    bring batches, and all find the same. ValueError for fewer than two batches.
    """
    config, in_output = seeds.config, grafted(seeds.lifecycle)
    candidates = in_output & seeds.may(_S.CULLED)
    removable = candidates | (in_output & seeds.may(_S.ROLLED_BACK))
    gone = removable & (seeds.nonfinite > 0)
    with Measurement(roots, batches, loss_fn, ranks) as measurement:
        if measurement.num_batches < 2:
            raise ValueError("evaluate needs at least 2 batches to tell what is chance; split the one given")
        alpha = measurement.alpha.double()
        before = measurement.losses(alpha)
        if gone.any():
            measurement.silence(gone)
        without = measurement.losses(0 * alpha)
        given, kept = len(without), torch.isfinite(without)
        measurement.keep(kept)
        before, without = before[kept], without[kept]
        nonfinite = torch.zeros_like(alpha)
        if not torch.isfinite(before).all():
            fault = find_at_fault(measurement, alpha, removable & ~gone, seeds.lifecycle)
            before, without = before[fault.kept], without[fault.kept]
            gone, nonfinite = gone | fault.seeds, fault.batches
        left_out = given - len(without)
        if not len(without):
            return Findings(_nothing(seeds), math.nan, math.nan, math.nan, left_out, None)
        alpha = torch.where(gone, 0.0, alpha)
        account = None
        if config.points:
            present = measurement.losses(alpha) if gone.any() else before
            account = measured_credit(measurement, without - present, config.points, alpha=alpha)
        waiting = seeds.among(_S.GERMINATED, _S.TRAINING) & seeds.may(_S.CANCELLED)
        surplus = -int(seeds.room) - int(torch.where(waiting | gone, seeds.price, 0).sum())
        found = find_expendable(
            measurement,
            alive=in_output & ~gone,
            candidates=candidates & ~gone,
            z=config.z,
            share=config.group,
            exact=config.exact,
            prices=seeds.price,
            surplus=surplus,
            spare=removable & ~gone,
            alpha=alpha,
        )
        measured = Measured(
            cost=torch.where(gone, -math.inf, found.cost),
            error=torch.where(gone, 0.0, found.error),
            expendable=found.removed | gone,
            group_cost=torch.where(gone, -math.inf, found.group_cost),
            group_error=torch.where(gone, 0.0, found.group_error),
            credit=_unknown(seeds) if account is None else measurement.layout.join(account.mean),
            error_rate=torch.where(gone, nonfinite, found.nonfinite) / measurement.num_batches,
            improvement=share_removed(found.losses.mean().item(), without.mean().item()),
        )
        loss, loss_before, loss_without = (losses.mean().item() for losses in (found.losses, before, without))
    return Findings(measured, loss, loss_before, loss_without, left_out, account)


def share_removed(loss: float, without: float) -> float:
    """Of the size of the loss ``without`` seeds, what they take away: positive where ``loss`` is lower, whatever its sign."""
    removed = without - loss
    if without:
        return removed / abs(without)
    return removed * math.inf if removed else 0.0


def _nothing(seeds: Observation) -> Measured:
    unknown = _unknown(seeds)
    return Measured(
        cost=unknown,
        error=unknown,
        expendable=torch.zeros_like(seeds.alive),
        group_cost=unknown,
        group_error=unknown,
        credit=unknown,
        error_rate=torch.zeros_like(unknown),
        improvement=math.nan,
    )


def _unknown(seeds: Observation) -> Tensor:
    return torch.full_like(seeds.potential, torch.nan)
