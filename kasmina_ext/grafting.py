"""How a blueprint is blended in: the four strategies, the ramps that alpha follows, and alpha for one seed at a time."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, ClassVar

import torch
from torch import Tensor

from kasmina_ext.arguments import parse_choice


class GraftingStrategy(IntEnum):
    """What a grafted seed makes of a feature x, with blueprint weight w, blended in by alpha."""

    MULTIPLICATIVE = 0
    """w x"""
    ADDITIVE = 1
    """x + w"""
    MIXED = 2
    """(x + w) / 2"""
    AFFINE = 3
    """w x + v, with v from the next row of the bank"""

    @classmethod
    def parse(cls, value: GraftingStrategy | int | str) -> GraftingStrategy:
        """From a member, an id or a name; ValueError naming the known ones."""
        return parse_choice(cls, value, "grafting strategy")

    @property
    def rows(self) -> int:
        """Adjacent rows of the bank that one blueprint takes."""
        return 2 if self is GraftingStrategy.AFFINE else 1

    @property
    def neutral(self) -> tuple[float, ...]:
        """The weights, one for each of its rows, that change nothing; MIXED has none and starts at 0."""
        return {
            GraftingStrategy.MULTIPLICATIVE: (1.0,),
            GraftingStrategy.ADDITIVE: (0.0,),
            GraftingStrategy.MIXED: (0.0,),
            GraftingStrategy.AFFINE: (1.0, 0.0),
        }[self]


@torch.compiler.assume_constant_result
def strategy_number(strategy: GraftingStrategy | int | str) -> int:
    """:meth:`GraftingStrategy.parse` as a plain number, which is a constant while a graph is traced."""
    return int(GraftingStrategy.parse(strategy))


class AlphaSchedule(IntEnum):
    """The curve of alpha while a seed is in GRAFTING."""

    NONE = 0
    LINEAR = 1
    COSINE = 2
    SIGMOID = 3

    @classmethod
    def parse(cls, value: AlphaSchedule | int | str | None) -> AlphaSchedule:
        """From a member, an id, a name or None; ValueError naming the known ones."""
        return cls.NONE if value is None else parse_choice(cls, value, "alpha schedule")


def ramp(schedule: AlphaSchedule | int | str, t: float) -> float:
    """Alpha after the fraction ``t`` (clipped to [0, 1]) of a ramp: exactly 0 at its start, exactly 1 at its end.

    linear: t; cosine: (1 - cos(pi t)) / 2; sigmoid: the logistic function of slope 12 about 1/2,
    scaled to reach 0 and 1. ValueError for no schedule: alpha is then the caller's.
    """
    schedule = AlphaSchedule.parse(schedule)
    t = min(1.0, max(0.0, float(t)))
    if schedule is AlphaSchedule.LINEAR:
        return t
    if schedule is AlphaSchedule.COSINE:
        return (1.0 - math.cos(math.pi * t)) / 2.0
    if schedule is AlphaSchedule.SIGMOID:
        low, high = _logistic(-6.0), _logistic(6.0)
        return (_logistic(12.0 * (t - 0.5)) - low) / (high - low)
    raise ValueError("no alpha schedule: there is no ramp to evaluate")


def _logistic(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))


# ---- alpha for one seed, from Python -------------------------------------------------------------
#
# A layer's own schedule moves all seeds on the device and knows the time only. These objects look at metrics and weights
# as well, one object for each seed; their alpha goes in with ``layer.set_alpha``.

ABORT_ERROR_RATE = 0.5
STABLE_SCORE = 0.8
STABLE_VARIATION = 0.1
"""Greatest standard deviation of recent losses, as a part of their mean, that counts as stable."""


@dataclass
class GraftingConfig:
    """What the strategies go by; each uses its own part. ValueError for a value that makes no sense."""

    ramp_duration: int = 50
    """Epochs from ``min_alpha`` to ``max_alpha`` when nothing holds it up; 0: at once."""
    drift_threshold: float = 0.01
    """Relative change of the model's weights from one epoch to the next that stops the ramp."""
    pause_duration: int = 10
    """Epochs for which it then stands still."""
    momentum_factor: float = 0.1
    """How much of its pace a ramp takes from the latest epoch, in [0, 1]."""
    stability_window: int = 5
    """Epochs over which losses must be steady."""
    min_alpha: float = 0.0
    max_alpha: float = 1.0

    def __post_init__(self) -> None:
        for name, low in (("ramp_duration", 0), ("drift_threshold", 0), ("pause_duration", 0), ("stability_window", 1)):
            if not getattr(self, name) >= low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")
        if not 0 <= self.momentum_factor <= 1:
            raise ValueError(f"momentum_factor must be in [0, 1], got {self.momentum_factor}")
        if not 0 <= self.min_alpha <= self.max_alpha <= 1:
            raise ValueError(
                f"0 <= min_alpha <= max_alpha <= 1 must hold, got min_alpha {self.min_alpha}, max_alpha {self.max_alpha}"
            )


@dataclass
class GraftingContext:
    """All that is known of a seed in an epoch of its graft.

    ``metrics`` that are looked at: loss, accuracy, performance_delta, stability_score, drift,
    error_rate. Weights are a tensor, or a list or mapping of tensors.
    """

    seed_id: int
    current_epoch: int
    total_epochs: int
    current_alpha: float
    metrics: dict[str, float] = field(default_factory=dict)
    model_weights: Any = None
    blueprint_weights: Any = None

    def __post_init__(self) -> None:
        self.metrics = {} if self.metrics is None else self.metrics


class BaseGraftingStrategy:
    """A ramp from ``min_alpha`` to ``max_alpha`` whose pace a subclass sets, epoch by epoch.

    At pace 1 throughout, alpha rises evenly over ``ramp_duration`` epochs; at pace 0 it stays where
    the context says that it is. Asking twice in an epoch changes nothing.
    """

    name: ClassVar[str]

    def __init__(self, config: GraftingConfig | Mapping[str, Any] | None = None) -> None:
        if not isinstance(config, GraftingConfig):
            config = GraftingConfig(**(config or {}))
        self.config = config
        self.reset()

    def reset(self) -> None:
        """Forget the graft: ready for the next one."""
        self._epoch: int | None = None
        self._ramped = 0.0

    def compute_alpha(self, context: GraftingContext) -> float:
        """Alpha for this epoch, in [min_alpha, max_alpha]."""
        self._observe(context)
        pace = self._pace(context)
        if self._epoch is None:
            self._ramped = float(context.current_epoch)
        elif pace > 0:
            self._ramped += pace * max(0, context.current_epoch - self._epoch)
        self._epoch = context.current_epoch
        low, high, duration = self.config.min_alpha, self.config.max_alpha, self.config.ramp_duration
        if pace == 0:
            held = min(max(float(context.current_alpha), low), high)
            self._ramped = duration * (held - low) / (high - low) if high > low else 0.0
            return held
        done = min(1.0, max(0.0, self._ramped / duration)) if duration > 0 else 1.0
        return high if done == 1.0 else low + (high - low) * done

    def should_abort(self, context: GraftingContext) -> bool:
        """Whether the graft does harm: an ``error_rate`` above 0.5, or one that is not a number."""
        rate = context.metrics.get("error_rate")
        return rate is not None and not float(rate) <= ABORT_ERROR_RATE

    def on_epoch_end(self, context: GraftingContext) -> None:
        """Take note of the epoch's metrics and weights, also where no alpha was asked for."""
        self._observe(context)

    def _observe(self, context: GraftingContext) -> None:
        """What the pace depends on; may be called more than once in an epoch."""

    def _pace(self, context: GraftingContext) -> float:
        return 1.0


class LinearGrafting(BaseGraftingStrategy):
    """Time alone: ``current_epoch / ramp_duration`` of the way."""

    name = "linear"

    def compute_alpha(self, context: GraftingContext) -> float:
        self._epoch = None  # each epoch for itself
        return super().compute_alpha(context)


class DriftControlledGrafting(BaseGraftingStrategy):
    """Stands still for ``pause_duration`` epochs when the model's weights move by more than ``drift_threshold``.

    The drift is the metric of that name, or the change of ``model_weights`` since the last epoch,
    relative to their norm.
    """

    name = "drift_controlled"

    def reset(self) -> None:
        super().reset()
        self.paused_until = -math.inf
        self._before: list[Tensor] | None = None

    def _observe(self, context: GraftingContext) -> None:
        drift = self._drift(context)
        if context.current_epoch >= self.paused_until and not drift <= self.config.drift_threshold:
            self.paused_until = context.current_epoch + self.config.pause_duration

    def _drift(self, context: GraftingContext) -> float:
        if "drift" in context.metrics:
            return float(context.metrics["drift"])
        if context.model_weights is None:
            return 0.0
        before, weights = self._before, _weights(context.model_weights)
        self._before = [weight.detach().clone() for weight in weights]
        return 0.0 if before is None else _relative_change(before, weights)

    def _pace(self, context: GraftingContext) -> float:
        return 0.0 if context.current_epoch < self.paused_until else 1.0


class _Series:
    """The latest values of a metric, one for each epoch."""

    def __init__(self, length: int) -> None:
        self.values: deque[float] = deque(maxlen=length)
        self._epoch: int | None = None

    def put(self, epoch: int, value: float) -> None:
        if self.values and epoch == self._epoch:
            self.values.pop()
        self.values.append(float(value))
        self._epoch = epoch


class MomentumGrafting(BaseGraftingStrategy):
    """Gathers pace, up to twice the linear one, while the network improves, and loses it, down to none, while it does not.

    Improvement is a positive ``performance_delta``, else a rising ``accuracy``, else a falling
    ``loss``.
    """

    name = "momentum"

    def reset(self) -> None:
        super().reset()
        self.velocity = 0.0
        self._scores = _Series(2)
        self._settled = 0.0  # the velocity before this epoch
        self._epoch_seen: int | None = None

    def _observe(self, context: GraftingContext) -> None:
        if context.current_epoch != self._epoch_seen:
            self._settled, self._epoch_seen = self.velocity, context.current_epoch
        signal = self._signal(context)
        if signal is not None:
            self.velocity = self._settled + self.config.momentum_factor * (signal - self._settled)

    def _signal(self, context: GraftingContext) -> float | None:
        """+1 better, -1 worse (or not a number), 0 the same; None where nothing is known."""
        metrics = context.metrics
        if "performance_delta" in metrics:
            return _sign(metrics["performance_delta"])
        score = metrics.get("accuracy", -metrics["loss"] if "loss" in metrics else None)
        if score is None:
            return None
        self._scores.put(context.current_epoch, score)
        return _sign(self._scores.values[1] - self._scores.values[0]) if len(self._scores.values) == 2 else None

    def _pace(self, context: GraftingContext) -> float:
        return 1.0 + self.velocity


class StabilityGrafting(BaseGraftingStrategy):
    """Rises only while the network is steady.

    That is a ``stability_score`` of at least 0.8 where one is given, else losses that, over the
    last ``stability_window`` epochs, deviate by at most a tenth of their mean.
    """

    name = "stability"

    def reset(self) -> None:
        super().reset()
        self._losses = _Series(self.config.stability_window)

    def _observe(self, context: GraftingContext) -> None:
        if "loss" in context.metrics:
            self._losses.put(context.current_epoch, context.metrics["loss"])

    def _pace(self, context: GraftingContext) -> float:
        return 1.0 if self.is_stable(context) else 0.0

    def is_stable(self, context: GraftingContext) -> bool:
        """Whether nothing speaks against it; a value that is not finite does."""
        if "stability_score" in context.metrics:
            return context.metrics["stability_score"] >= STABLE_SCORE
        losses = self._losses.values
        if not losses:
            return True
        mean = sum(losses) / len(losses)
        deviation = math.hypot(*(loss - mean for loss in losses)) / math.sqrt(len(losses))
        return deviation <= STABLE_VARIATION * abs(mean)


class AdaptiveGrafting(BaseGraftingStrategy):
    """All of it: stands still while the weights drift or the losses are unsteady, else goes at the pace of momentum."""

    name = "adaptive"

    def reset(self) -> None:
        super().reset()
        self._parts = [part(self.config) for part in (DriftControlledGrafting, StabilityGrafting, MomentumGrafting)]

    def _observe(self, context: GraftingContext) -> None:
        for part in self._parts:
            part._observe(context)

    def _pace(self, context: GraftingContext) -> float:
        return math.prod(part._pace(context) for part in self._parts)


# ---- by name -------------------------------------------------------------------------------------

GRAFTING_STRATEGIES: dict[str, type[BaseGraftingStrategy]] = {
    strategy.name: strategy
    for strategy in (
        LinearGrafting,
        DriftControlledGrafting,
        MomentumGrafting,
        AdaptiveGrafting,
        StabilityGrafting,
    )
}


class GraftingStrategyFactory:
    """Makes strategies by their names, those of :data:`GRAFTING_STRATEGIES`."""

    @staticmethod
    def create(name: str, config: GraftingConfig | Mapping[str, Any] | None = None) -> BaseGraftingStrategy:
        """A strategy of its own for one seed; ValueError naming the known ones."""
        strategy = GRAFTING_STRATEGIES.get(name.lower()) if isinstance(name, str) else None
        if strategy is None:
            raise ValueError(f"unknown grafting strategy {name!r}; known are {', '.join(GRAFTING_STRATEGIES)}")
        return strategy(config)

    @staticmethod
    def available() -> list[str]:
        """The known names."""
        return list(GRAFTING_STRATEGIES)


def create_grafting_strategy(
    name: str, config: GraftingConfig | Mapping[str, Any] | None = None
) -> BaseGraftingStrategy:
    """:meth:`GraftingStrategyFactory.create`."""
    return GraftingStrategyFactory.create(name, config)


# ---- what the strategies measure -----------------------------------------------------------------


def _sign(value: float) -> float:
    return 1.0 if value > 0 else 0.0 if value == 0 else -1.0


def _weights(weights: Tensor | Mapping[Any, Tensor] | Iterable[Tensor]) -> list[Tensor]:
    if isinstance(weights, Tensor):
        return [weights]
    return list(weights.values() if isinstance(weights, Mapping) else weights)


def _relative_change(before: list[Tensor], after: list[Tensor]) -> float:
    """Norm of the difference by the norm before, over all tensors together; infinite where the shapes differ."""
    if [weight.shape for weight in before] != [weight.shape for weight in after]:
        return math.inf
    moved = size = 0.0
    for old, new in zip(before, after, strict=True):
        old = old.double()
        moved += float((new.detach().to(old) - old).square().sum())
        size += float(old.square().sum())
    if moved == 0:
        return 0.0
    return math.sqrt(moved / size) if size > 0 else math.inf
