"""What a controller decides by: what it sees of all seeds, its settings, and the default policy."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from numbers import Real
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from kasmina_ext.arguments import at_least, integer
from kasmina_ext.lifecycle import ExtendedLifecycle, TransitionRules

_S = ExtendedLifecycle
STAY = -1
"""In place of a target state: no request for this seed."""

# A seed that has not learnt to reconstruct after so many times its least epochs in TRAINING is given up.
TRAINING_PATIENCE = 3


# ---- settings --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GrowthConfig:
    """How a :class:`~kasmina_ext.controller.GrowthController` grows a network. Times are ticks where not said otherwise."""

    budget: float | int = 0.1
    """Seeds alive at most (GERMINATED to FOSSILIZED): a share of all that own features, or an int, how many."""
    budget_in: str = "seeds"
    """"parameters" counts blueprint weights instead of seeds."""
    tick_every: int = 50
    """Optimizer steps per tick: an epoch of the lifecycle."""
    scale: float = 0.1
    """The least epochs of the strict rules (250 for a life) times this: 25 ticks."""
    rules: TransitionRules | None = None
    """Instead of the scaled strict rules; a ramp of alpha takes what GRAFTING takes."""
    watch: int = 5
    """Between waves of germination; the gradients of that time decide. Stability is over this time, too."""
    wave: float = 0.25
    """Share of the budget that may germinate at once."""
    until: int | None = None
    """After this tick nothing germinates, so that what grows has time to prove itself."""
    rest: int = 10
    """That a seed which was removed rests before it is recycled."""
    lives: int = 2
    """How often a seed may germinate."""
    z: float = 1.0
    """Standard errors by which the loss must rise without a seed for the seed to be missed."""
    group: float = 0.05
    """Share of the seeds alive that one proposal may cull."""
    exact: int = 8
    """Candidates whose removal is measured, not estimated, in each round of proposals."""
    points: int = 4
    """Of the credit's quadrature, in each evaluation; 0: no credit."""
    reconstruction: float = 0.01
    """TRAINING to GRAFTING: the reconstruction loss at most."""
    stability: float = 0.8
    """EVALUATING to FINE_TUNING, at least."""
    final_stability: float = 0.95
    """FINE_TUNING to FOSSILIZED, at least."""
    improvement: float = 0.01
    """FINE_TUNING to FOSSILIZED: what all seeds together take away of the loss, as a share of its size, at least."""
    error_rate: float = 0.1
    """EVALUATING to CULLED above this share of batches with a finite loss without a finite derivative."""
    errors: int = 5
    """EVALUATING to CULLED, and no germination, above this ERROR_COUNT."""
    seed: int = 0
    """Of random numbers that a policy may ask for; the default one does not."""

    def __post_init__(self) -> None:
        def put(name: str, value: Any) -> None:  # NumPy's numbers would not go through torch.load(weights_only=True)
            object.__setattr__(self, name, value)

        whole = {"tick_every": 1, "watch": 1, "rest": 0, "lives": 1, "exact": 0, "points": 0, "errors": 0}
        for name, lowest in whole.items():
            put(name, at_least(name, getattr(self, name), lowest))
        put("until", None if self.until is None else at_least("until", self.until, 0))
        put("seed", integer("seed", self.seed))
        for name in ("scale", "wave", "z", "group", "reconstruction", "stability", "final_stability", "improvement",
                     "error_rate"):  # fmt: skip
            put(name, _number(name, getattr(self, name)))
        for name in ("wave", "group"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in (0, 1], got {getattr(self, name)!r}")
        if self.budget_in not in ("seeds", "parameters"):
            raise ValueError(f'budget_in must be "seeds" or "parameters", got {self.budget_in!r}')
        if not isinstance(self.rules, (TransitionRules, NoneType)):
            raise TypeError(f"rules must be TransitionRules, got {type(self.rules).__name__}")
        put("budget", checked_budget(self.budget))

    def life(self) -> TransitionRules:
        """The rules that requests are judged by: those of a life, and recycling after the rest."""
        rules = TransitionRules.strict().scaled(self.scale) if self.rules is None else self.rules
        recycling = TransitionRules.recycling().tensor
        return TransitionRules(torch.where(recycling >= 0, self.rest, rules.tensor))

    def as_dict(self) -> dict[str, object]:
        """Plain values, for logs and checkpoints."""
        plain = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return plain | {"rules": None if self.rules is None else self.rules.tensor.tolist()}


_INT64_MAX = 2**63 - 1


def checked_budget(budget: float | int) -> float | int:
    """The budget, as a Python number; ValueError for a share outside [0, 1] or a number below 0."""
    if not isinstance(budget, bool) and hasattr(budget, "__index__"):
        checked = budget.__index__()
    elif not isinstance(budget, bool) and isinstance(budget, Real):
        checked = float(budget)
    else:
        raise ValueError(f"budget must be a share or an integer, got {budget!r}")
    if not 0 <= checked <= (_INT64_MAX if isinstance(checked, int) else 1):
        raise ValueError(f"budget must be a share in [0, 1] or an integer of at least 0 (int64), got {budget!r:.80}")
    return checked


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or math.isnan(value):
        raise ValueError(f"{name} must be a number, got {value!r}")
    return float(value)


def alive_in(lifecycle: Tensor) -> Tensor:
    """bool: seeds that the budget counts, GERMINATED to FOSSILIZED."""
    return (lifecycle >= _S.GERMINATED) & (lifecycle <= _S.FOSSILIZED)


# ---- what a policy sees ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """What an evaluation found, of ``T`` seeds; float64 where no other type is given."""

    cost: Tensor
    """By how much the held-out loss would rise without the seed, as things are after the culling; -inf where a loss is not
    finite with the seed, and is without it."""
    error: Tensor
    """Its standard error."""
    expendable: Tensor
    """bool: the loss was measured without all of these together."""
    group_cost: Tensor
    """Of the group that the seed was proposed with; NaN where it is not expendable."""
    group_error: Tensor
    credit: Tensor
    """NaN where the settings say ``points=0``."""
    error_rate: Tensor
    """Share of the batches with a loss or, where that was finite, a derivative that was not because of the seed."""
    improvement: float
    """Of the size of the loss without seeds, the share that all of them together take away; NaN where not measured."""


@dataclass(frozen=True)
class Observation:
    """All seeds of all layers, one after the other, as a policy sees them: tensors ``[T]`` on one device.

    To be read only: the log and the budget go by them, too. In a tick nothing should wait for the
    device: no ``.item()``, no ``if`` on a tensor, no ``nonzero``.
    """

    layer: Tensor
    """int64: number of the seed's layer."""
    lifecycle: Tensor
    """int32."""
    epochs: Tensor
    """int32: ticks in this state."""
    errors: Tensor
    """int32: ERROR_COUNT."""
    lives: Tensor
    """int32: how often the seed has germinated."""
    alpha: Tensor
    """float32."""
    parameters: Tensor
    """int64: blueprint weights that it has or would have."""
    potential: Tensor
    """float64: by the gradients since the last wave of germination; NaN where not measured."""
    activations: Tensor
    """float64 ``[T, 5]``: the layers' telemetry."""
    reconstruction: Tensor
    """float64: how far the blueprint is from reproducing its chunk, mean of squares; as given to ``step``, or else by
    the chunk's mean and variance."""
    stability: Tensor
    """float64 in [0, 1]: 1 less what the blueprint has moved in the last ``watch`` to twice ``watch`` ticks, as a share
    of its distance from doing nothing; NaN before there have been as many."""
    nonfinite: Tensor
    """float64: blueprint weights that are not finite."""
    rules: Tensor
    """int32 ``[11, 11]``: requests are judged by them."""
    price: Tensor
    """int64: what a seed takes of the budget, 1 or its parameters."""
    budget: int
    tick: int
    step: int
    loss: Tensor
    """float64, a scalar: mean of the losses given to ``step`` since the last tick; NaN where there were none."""
    germinates: bool
    """Whether this is a tick for germination."""
    config: GrowthConfig
    measured: Measured | None = None
    """In an evaluation: its findings. None in a tick."""
    _random: torch.Generator | None = field(default=None, repr=False)

    def among(self, *states: ExtendedLifecycle) -> Tensor:
        """bool: seeds in one of these states."""
        found = self.lifecycle == int(states[0])
        for state in states[1:]:
            found = found | (self.lifecycle == int(state))
        return found

    @property
    def alive(self) -> Tensor:
        """bool: GERMINATED to FOSSILIZED."""
        return alive_in(self.lifecycle)

    @property
    def room(self) -> Tensor:
        """int64, a scalar: what is left of the budget."""
        return self.budget - torch.where(self.alive, self.price, 0).sum()

    def may(self, target: ExtendedLifecycle) -> Tensor:
        """bool: seeds that the rules would let go there now."""
        last = len(ExtendedLifecycle) - 1
        rule = self.rules[:, int(target)][self.lifecycle.clamp(0, last).long()]
        known = (self.lifecycle >= 0) & (self.lifecycle <= last)
        return known & (rule >= 0) & (self.epochs >= rule)

    def best(self, candidates: Tensor, score: Tensor, room: Tensor | int, start: Tensor | float = math.inf) -> Tensor:
        """bool: the candidates with the highest scores whose prices together fit into ``room``.

        The first that does not fit ends the choice, and none is taken once ``start`` has been spent.
        Scores must be above 0; of equal ones the first seed wins.
        """
        candidates = candidates & (score > 0)
        order = torch.where(candidates, score.double(), -1.0).argsort(descending=True, stable=True)
        price = torch.where(candidates, self.price, 0)[order]
        spent = price.cumsum(0)
        fits = candidates[order] & (spent <= room) & (spent - price < start)
        return torch.zeros_like(candidates).scatter(0, order, fits)

    def random(self) -> Tensor:
        """float64: uniform in (0, 1], the same numbers at the same tick of every run with the same ``seed``."""
        assert self._random is not None
        self._random.manual_seed(zlib.crc32(f"{self.config.seed} {self.tick}".encode()))
        shape, device = self.potential.shape, self.potential.device
        return 1 - torch.rand(shape, dtype=torch.float64, generator=self._random, device=device)


Policy = Callable[[Observation], Tensor]
"""Integers ``[T]``: the state that each seed is to go to, :data:`STAY` where it stays. Requests that the rules refuse, and
germinations beyond the budget, come to nothing."""
Score = Callable[[Observation], Tensor]
"""float64 ``[T]``: seeds germinate in the order of it, the highest first; not at all where it is not above 0."""


# ---- the default policy ----------------------------------------------------------------------------------------------


def by_potential(seeds: Observation) -> Tensor:
    """What a neutral blueprint would receive of the gradient: see :func:`kasmina_ext.telemetry.potential`."""
    return seeds.potential


def default_policy(seeds: Observation, score: Score = by_potential) -> Tensor:
    """The life of a seed; each transition also takes the least epochs that the rules ask for.

    ==============================  ==================================================================================
    transition                      when
    ==============================  ==================================================================================
    DORMANT -> GERMINATED           every ``watch`` ticks until ``until``, in the order of ``score``, while the budget
                                    lasts, ``wave`` of it at most; not after ``lives`` lives, nor with more than
                                    ``errors`` errors, nor where a seed owns no features
    GERMINATED -> TRAINING          at once
    TRAINING -> GRAFTING            reconstruction loss at most ``reconstruction`` (a neutral blueprint has none)
    TRAINING -> CANCELLED           three times the least epochs have not been enough for that
    GRAFTING -> STABILIZATION       when the ramp of alpha is over
    STABILIZATION -> EVALUATING     at once
    EVALUATING -> FINE_TUNING       in an evaluation: its removal would cost more than ``z`` standard errors, and it is
                                    stable to ``stability``
    FINE_TUNING -> FOSSILIZED       in an evaluation: as before, stable to ``final_stability``, and all seeds together
                                    have removed ``improvement`` of the loss
    EVALUATING, FINE_TUNING         in an evaluation: its group was measured and nobody missed it (this takes the place
    -> CULLED                       of a fixed drop in performance); EVALUATING also with an error rate above
                                    ``error_rate`` or more than ``errors`` errors
    any with a blueprint            its blueprint is not finite; or in an evaluation: a loss is not finite with it, and is
    -> ROLLED_BACK, CANCELLED       without it, or the budget has shrunk and it comes first (below): ROLLED_BACK; before
                                    GRAFTING: CANCELLED
    CULLED, CANCELLED, ROLLED_BACK  after ``rest`` ticks
    -> DORMANT
    ==============================  ==================================================================================

    Where the budget has shrunk, as many seeds go as it takes and no more. First those that an
    evaluation culls anyway; then those without a part in the output, the youngest first: GERMINATED
    before TRAINING, then the fewest ticks in the state, then the least potential; last those whose
    measured removal costs least.

    To germinate by something else: ``functools.partial(default_policy, score=...)``.
    """
    wanted = torch.full_like(seeds.lifecycle, STAY)

    def move(chosen: Tensor, target: ExtendedLifecycle) -> None:
        wanted[...] = torch.where(chosen & seeds.may(target), int(target), wanted)

    config, measured = seeds.config, seeds.measured
    learnt = seeds.reconstruction <= config.reconstruction
    least = seeds.rules[_S.TRAINING, _S.GRAFTING]
    move(seeds.among(_S.CULLED, _S.CANCELLED, _S.ROLLED_BACK), _S.DORMANT)
    move(seeds.among(_S.GERMINATED), _S.TRAINING)
    move(seeds.among(_S.TRAINING) & ~learnt & (seeds.epochs > TRAINING_PATIENCE * least), _S.CANCELLED)
    move(seeds.among(_S.TRAINING) & learnt, _S.GRAFTING)
    move(seeds.among(_S.GRAFTING), _S.STABILIZATION)
    move(seeds.among(_S.STABILIZATION), _S.EVALUATING)
    if measured is not None:
        missed = (measured.cost > 0) & (measured.cost > config.z * measured.error) & ~measured.expendable
        failing = (measured.error_rate > config.error_rate) | (seeds.errors > config.errors)
        evaluating = seeds.among(_S.EVALUATING)
        move(evaluating & missed & (seeds.stability >= config.stability), _S.FINE_TUNING)
        if measured.improvement >= config.improvement:
            proven = missed & (seeds.stability >= config.final_stability)
            move(seeds.among(_S.FINE_TUNING) & proven, _S.FOSSILIZED)
        move(measured.expendable, _S.ROLLED_BACK)
        move(measured.expendable | (evaluating & failing), _S.CULLED)
    broken = seeds.nonfinite > 0
    move(broken & seeds.among(_S.GERMINATED, _S.TRAINING), _S.CANCELLED)
    move(broken, _S.ROLLED_BACK)
    if measured is not None:
        leaves = seeds.alive & (wanted > _S.FOSSILIZED)
        due = -int(seeds.room + torch.where(leaves, seeds.price, 0).sum())
        waiting = seeds.among(_S.GERMINATED, _S.TRAINING) & seeds.may(_S.CANCELLED) & ~leaves
        move(youngest(seeds, waiting, due), _S.CANCELLED)
    if seeds.germinates:
        fit = (seeds.lives < config.lives) & (seeds.errors <= config.errors) & (seeds.parameters > 0)
        wave = config.wave * seeds.budget
        move(seeds.best(fit & seeds.may(_S.GERMINATED), score(seeds), seeds.room, wave), _S.GERMINATED)
    return wanted


def youngest(seeds: Observation, among: Tensor, due: int) -> Tensor:
    """bool: of the seeds ``among [T]`` as many as it takes to free ``due`` of the budget, the youngest first.

    GERMINATED before TRAINING, then the fewest ticks in the state, then the least potential. Where
    prices differ, one that is not needed beside those after it stays. Waits for the device.
    """
    chosen = torch.zeros_like(among)
    if due <= 0:
        return chosen
    order = (among & (seeds.price > 0)).nonzero().flatten()
    for key in (seeds.potential.nan_to_num(nan=-math.inf), seeds.epochs, seeds.lifecycle):
        order = order[key[order].argsort(stable=True)]
    price = seeds.price[order]
    taken = order[price.cumsum(0) - price < due]
    chosen[taken] = True
    more = int(seeds.price[taken].sum()) - due
    if more > 0:
        for one, price in zip(taken.flip(0).tolist(), seeds.price[taken].flip(0).tolist(), strict=True):
            if price <= more:
                chosen[one] = False
                more -= price
    return chosen


# ---- for the log -----------------------------------------------------------------------------------------------------

NUMBERS = (
    "epochs", "alpha", "potential", "reconstruction", "stability", "nonfinite", "lives", "errors", "room", "loss",
)  # fmt: skip
"""What the log may say of a transition: fields of :class:`Observation`."""
MEASURED_NUMBERS = ("cost", "error", "group_cost", "group_error", "credit", "error_rate")
"""And, in an evaluation, of :class:`Measured`."""
_JUDGED = {"cost", "error", "z", "stability", "credit"}
_REMOVED = {"cost", "error", "z", "group_cost", "group_error", "credit", "error_rate", "errors", "nonfinite", "room"}
_DECIDED_BY = {
    _S.DORMANT: {"lives"},
    _S.GERMINATED: {"potential", "room", "lives", "errors"},
    _S.TRAINING: set(),
    _S.GRAFTING: {"reconstruction"},
    _S.STABILIZATION: {"alpha"},
    _S.EVALUATING: set(),
    _S.FINE_TUNING: _JUDGED,
    _S.FOSSILIZED: _JUDGED | {"improvement"},
    _S.CULLED: _REMOVED,
    _S.CANCELLED: {"reconstruction", "nonfinite", "room"},
    _S.ROLLED_BACK: _REMOVED,
}


def decided_by(policy: Policy) -> dict[str, set[str]] | None:
    """By the name of the state entered: the numbers that the default policy goes by. None, all of them, for others."""
    if getattr(policy, "func", policy) is not default_policy:
        return None
    return {state.name: numbers | {"epochs", "loss"} for state, numbers in _DECIDED_BY.items()}
