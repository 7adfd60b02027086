"""The lifecycle's operators in plain PyTorch: the fallback, and the documentation. No sync, no loop over seeds.

=================  =======  =====================================================================================
argument           dtype    shape and meaning
=================  =======  =====================================================================================
``state``          int32    ``[8, S]``: :class:`kasmina_ext.state.StateVar`
``history``        int32    ``[S, 10, 2]``: a ring of (from, to); transition ``k`` of a seed is at ``k % 10``
``history_count``  int32    ``[S]``: transitions ever recorded
``alpha``          float32  ``[S]``: blend factors
``seed_ids``       int32    ``[U]``: the seed that each request is for
``values``         int32    ``[U, 4]``: lifecycle state, blueprint, epochs, strategy
``mask``           int32    ``[U]``: bits 1, 2, 4, 8 choose the columns of ``values``; other bits are ignored
``rules``          int32    ``[11, 11]``: ``rules[from, to]`` is the least epochs in ``from``; below 0: illegal
=================  =======  =====================================================================================

What is written must be contiguous. ``RuntimeError`` for a wrong dtype, device, rank or length, before anything is written.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kasmina_ext import _validate

# Rows of the state; kasmina_ext.state names them all.
LIFECYCLE_STATE, BLUEPRINT_ID, EPOCHS_IN_STATE, GRAFTING_STRATEGY, PARENT_STATE = range(5)
HISTORY_LENGTH = 10
STATES, STRATEGIES = 11, 4
GRAFTING, STABILIZATION = 3, 4
SETS_LIFECYCLE, SETS_BLUEPRINT, SETS_EPOCHS, SETS_STRATEGY = 1, 2, 4, 8
# Verdicts; see :class:`kasmina_ext.lifecycle.Verdict`.
(
    APPLIED,
    SEED_OUT_OF_RANGE,
    ILLEGAL_TRANSITION,
    TOO_FEW_EPOCHS,
    BLUEPRINT_OUT_OF_RANGE,
    STRATEGY_OUT_OF_RANGE,
    SUPERSEDED,
    EPOCHS_OUT_OF_RANGE,
) = range(8)
SIGMOID_SLOPE = 12.0
NO_SCHEDULE, LINEAR, COSINE, SIGMOID = range(4)
_INT32_MAX = 2**31 - 1


def _judge(state, seed, exists, last, values, mask, rules, num_blueprints) -> Tensor:
    """Verdicts ``[U]`` int32; ``seed`` is 0 where the seed does not exist."""
    to, blueprint, epochs, strategy = values.unbind(1)
    current = state[LIFECYCLE_STATE][seed]
    known = (current >= 0) & (current < STATES) & (to >= 0) & (to < STATES)
    rule = rules[current.clamp(0, STATES - 1).long(), to.clamp(0, STATES - 1).long()]
    legal = known & (rule >= 0)
    early = state[EPOCHS_IN_STATE][seed] < rule

    def wrong(bit: int, condition: Tensor) -> Tensor:
        return ((mask & bit) != 0) & condition

    verdict = torch.where(wrong(SETS_EPOCHS, epochs < 0), EPOCHS_OUT_OF_RANGE, APPLIED)
    bad_strategy = wrong(SETS_STRATEGY, (strategy < 0) | (strategy >= STRATEGIES))
    bad_blueprint = wrong(SETS_BLUEPRINT, (blueprint < -1) | (blueprint.long() >= num_blueprints))
    # The first check that fails names the verdict, so the last written here is the first in order.
    verdict = torch.where(bad_strategy, STRATEGY_OUT_OF_RANGE, verdict)
    verdict = torch.where(bad_blueprint, BLUEPRINT_OUT_OF_RANGE, verdict)
    verdict = torch.where(wrong(SETS_LIFECYCLE, early), TOO_FEW_EPOCHS, verdict)
    verdict = torch.where(wrong(SETS_LIFECYCLE, ~legal), ILLEGAL_TRANSITION, verdict)
    verdict = torch.where(last, verdict, SUPERSEDED)
    return torch.where(exists, verdict, SEED_OUT_OF_RANGE).to(torch.int32)


def _transition(state: Tensor, history: Tensor, history_count: Tensor, to: Tensor, moves: Tensor) -> None:
    """Move the seeds where ``moves [S]`` to the states ``to [S]``: parent, epochs and history follow."""
    lifecycle = state[LIFECYCLE_STATE]
    at = torch.arange(HISTORY_LENGTH, device=state.device) == (history_count % HISTORY_LENGTH)[:, None]
    entry = torch.stack((lifecycle, to), 1)[:, None, :]
    history.copy_(torch.where((at & moves[:, None])[:, :, None], entry, history))
    history_count += moves.to(history_count.dtype)
    state[PARENT_STATE] = torch.where(moves, lifecycle, state[PARENT_STATE])
    state[EPOCHS_IN_STATE] = torch.where(moves, 0, state[EPOCHS_IN_STATE])
    state[LIFECYCLE_STATE] = torch.where(moves, to, lifecycle)


# ---- state_update ----------------------------------------------------------------------------------------------------


def state_update(
    state: Tensor,
    history: Tensor,
    history_count: Tensor,
    seed_ids: Tensor,
    values: Tensor,
    mask: Tensor,
    rules: Tensor,
    num_blueprints: int,
) -> Tensor:
    """Judge U requests and apply the good ones, each whole or not at all; returns the verdicts, int32 ``[U]``.

    The last request for a seed is the only one considered. A lifecycle change writes PARENT_STATE, resets the epochs
    (unless the request sets them) and is recorded in the history; one from a state to itself writes nothing.
    """
    _validate.state_update(state, history, history_count, seed_ids, values, mask, rules)
    seeds, updates = state.size(1), seed_ids.size(0)
    if updates == 0 or seeds == 0:
        return torch.full_like(seed_ids, SEED_OUT_OF_RANGE, memory_format=torch.contiguous_format)
    ids = seed_ids.long()
    exists = (ids >= 0) & (ids < seeds)
    # Requests for seeds that do not exist meet in a slot of their own, behind the last seed.
    slot = torch.where(exists, ids, seeds)
    order = torch.arange(updates, device=state.device)
    winner = torch.full((seeds + 1,), -1, device=state.device).scatter_reduce(0, slot, order, "amax")
    seed = torch.where(exists, ids, 0)
    verdicts = _judge(state, seed, exists, winner[slot] == order, values, mask, rules, num_blueprints)

    # Seen from the seeds: each has one request at most.
    request = winner[:seeds].clamp(min=0)
    applied = (winner[:seeds] >= 0) & (verdicts[request] == APPLIED)
    to, blueprint, epochs, strategy = values[request].unbind(1)
    chosen = mask[request]

    def sets(bit: int) -> Tensor:
        return applied & ((chosen & bit) != 0)

    _transition(state, history, history_count, to, sets(SETS_LIFECYCLE) & (to != state[LIFECYCLE_STATE]))
    for bit, variable, column in (
        (SETS_BLUEPRINT, BLUEPRINT_ID, blueprint),
        (SETS_EPOCHS, EPOCHS_IN_STATE, epochs),
        (SETS_STRATEGY, GRAFTING_STRATEGY, strategy),
    ):
        state[variable] = torch.where(sets(bit), column, state[variable])
    return verdicts


# ---- lifecycle_step --------------------------------------------------------------------------------------------------


def ramp(schedule: int, t: Tensor) -> Tensor:
    """Alpha at ``t`` (float64, in [0, 1]): 0 at 0 and 1 at 1 exactly."""
    if schedule == COSINE:
        value = (1 - torch.cos(torch.pi * t)) / 2
    elif schedule == SIGMOID:
        low = 1 / (1 + math.exp(SIGMOID_SLOPE / 2))
        value = (torch.sigmoid(SIGMOID_SLOPE * (t - 0.5)) - low) / (1 - 2 * low)
    else:
        value = t
    return torch.where(t >= 1, 1.0, torch.where(t <= 0, 0.0, value))


def lifecycle_step(
    state: Tensor,
    history: Tensor,
    history_count: Tensor,
    alpha: Tensor,
    schedule: int,
    ramp_epochs: int,
    advance: bool,
) -> None:
    """One epoch for every seed: epochs + 1 (at most 2^31 - 1) and, for seeds in GRAFTING, alpha along the ramp.

    ``t = min(1, epochs / ramp_epochs)``, 1 where ``ramp_epochs <= 0``. ``schedule``: 0 leaves alpha alone, 1 linear,
    2 cosine, 3 sigmoid. With ``advance``, seeds at ``t = 1`` go on to STABILIZATION, recorded like any transition.
    """
    _validate.lifecycle_step(state, history, history_count, alpha, schedule)
    epochs = state[EPOCHS_IN_STATE]
    epochs += (epochs < _INT32_MAX).to(epochs.dtype)
    grafting = state[LIFECYCLE_STATE] == GRAFTING
    t = torch.ones_like(epochs, dtype=torch.float64)
    if ramp_epochs > 0:
        t = (epochs.double() / ramp_epochs).clamp(max=1)
    if schedule != NO_SCHEDULE:
        alpha.copy_(torch.where(grafting, ramp(schedule, t).to(alpha.dtype), alpha))
    if advance:
        to = torch.full_like(epochs, STABILIZATION)
        _transition(state, history, history_count, to, grafting & (t >= 1))
