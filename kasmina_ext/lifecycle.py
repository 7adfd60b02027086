"""The life of a seed: its states, which transitions are legal, and what each asks for."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import IntEnum
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from kasmina_ext.arguments import parse_choice


class ExtendedLifecycle(IntEnum):
    """The eleven states of a seed."""

    DORMANT = 0
    GERMINATED = 1
    TRAINING = 2
    GRAFTING = 3
    STABILIZATION = 4
    EVALUATING = 5
    FINE_TUNING = 6
    FOSSILIZED = 7
    CULLED = 8
    CANCELLED = 9
    ROLLED_BACK = 10

    @classmethod
    def parse(cls, value: ExtendedLifecycle | int | str) -> ExtendedLifecycle:
        """From a member, a number or a name; ValueError naming the known ones."""
        return parse_choice(cls, value, "lifecycle state")

    @property
    def is_terminal(self) -> bool:
        """No transition leads out of it (FOSSILIZED to ROLLED_BACK)."""
        return self >= ExtendedLifecycle.FOSSILIZED

    @property
    def is_active(self) -> bool:
        """Its blueprint is being trained."""
        return self in ACTIVE_STATES

    @property
    def requires_blueprint(self) -> bool:
        """It makes no sense without a blueprint (TRAINING to FINE_TUNING)."""
        return ExtendedLifecycle.TRAINING <= self <= ExtendedLifecycle.FINE_TUNING


@torch.compiler.assume_constant_result
def state_number(state: ExtendedLifecycle | int | str) -> int:
    """:meth:`ExtendedLifecycle.parse` as a plain number, which is a constant while a graph is traced."""
    return int(ExtendedLifecycle.parse(state))


_S = ExtendedLifecycle

# Plain numbers: a tensor compared with a member of an enumeration is False to the compiler.
ACTIVE_STATES = (int(_S.TRAINING), int(_S.GRAFTING), int(_S.FINE_TUNING))
_GERMINATED, _FOSSILIZED, _ROLLED_BACK = int(_S.GERMINATED), int(_S.FOSSILIZED), int(_S.ROLLED_BACK)


def begins_or_ends(lifecycle: Tensor) -> Tensor:
    """bool: states on entering which a blueprint begins or ends, GERMINATED and FOSSILIZED to ROLLED_BACK.

    What was gathered for its weights until then, moments and gradients, has no meaning any more; in
    these states they receive no gradient.
    """
    return (lifecycle == _GERMINATED) | ((lifecycle >= _FOSSILIZED) & (lifecycle <= _ROLLED_BACK))


_GRAPH = {
    _S.DORMANT: (_S.GERMINATED,),
    _S.GERMINATED: (_S.TRAINING, _S.CANCELLED),
    _S.TRAINING: (_S.GRAFTING, _S.CULLED, _S.CANCELLED),
    _S.GRAFTING: (_S.STABILIZATION, _S.ROLLED_BACK),
    _S.STABILIZATION: (_S.EVALUATING, _S.ROLLED_BACK),
    _S.EVALUATING: (_S.FINE_TUNING, _S.CULLED, _S.ROLLED_BACK),
    _S.FINE_TUNING: (_S.FOSSILIZED, _S.CULLED, _S.ROLLED_BACK),
}


@dataclass
class TransitionContext:
    """All that is known when a transition is asked for. States may be given as members, numbers or names."""

    seed_id: int
    current_state: ExtendedLifecycle
    target_state: ExtendedLifecycle
    epochs_in_state: int = 0
    performance_metrics: dict[str, float] = field(default_factory=dict)
    error_count: int = 0
    timestamp: float | None = None
    """Seconds since the epoch; None becomes now."""
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.current_state = ExtendedLifecycle.parse(self.current_state)
        self.target_state = ExtendedLifecycle.parse(self.target_state)
        self.performance_metrics = {} if self.performance_metrics is None else self.performance_metrics
        self.metadata = {} if self.metadata is None else self.metadata
        if self.timestamp is None:
            self.timestamp = time.time()


# ---- the strict table ----------------------------------------------------------------------------


class StateTransition:
    """The strict rules: which transitions exist, how long a state lasts at least, and which metrics must be met."""

    VALID_TRANSITIONS: dict[ExtendedLifecycle, frozenset[ExtendedLifecycle]] = {
        state: frozenset(_GRAPH.get(state, ())) for state in ExtendedLifecycle
    }
    MIN_EPOCHS_IN_STATE: dict[ExtendedLifecycle, int] = {
        _S.DORMANT: 0,
        _S.GERMINATED: 0,
        _S.TRAINING: 100,
        _S.GRAFTING: 50,
        _S.STABILIZATION: 20,
        _S.EVALUATING: 30,
        _S.FINE_TUNING: 50,
    }

    @classmethod
    def validate_transition(
        cls,
        from_state: ExtendedLifecycle | int | str,
        to_state: ExtendedLifecycle | int | str,
        context: TransitionContext,
    ) -> tuple[bool, str]:
        """``(True, "valid")``, or ``(False, why not)``: legality first, then epochs (but for
        ROLLED_BACK), then metrics.

        A metric that is missing, None or NaN never counts as met. ValueError for something that is
        no state.
        """
        source, target = ExtendedLifecycle.parse(from_state), ExtendedLifecycle.parse(to_state)
        if target not in cls.VALID_TRANSITIONS.get(source, ()):
            return False, f"Invalid transition from {source.name} to {target.name}"
        needed = cls.MIN_EPOCHS_IN_STATE.get(source, 0)
        if target is not _S.ROLLED_BACK and context.epochs_in_state < needed:
            return (
                False,
                f"Minimum epochs not met: {source.name} lasts at least {needed}, it has had {context.epochs_in_state}",
            )
        rule = _METRIC_RULES.get((source, target))
        problem = rule(context) if rule else ""
        return (False, problem) if problem else (True, "valid")


def _metric(context: TransitionContext, name: str, missing: float = 0.0) -> float:
    value = context.performance_metrics.get(name)
    return missing if value is None else value


def _training_to_grafting(context: TransitionContext) -> str:
    loss = _metric(context, "reconstruction_loss", math.inf)
    threshold = context.metadata.get("reconstruction_threshold")
    threshold = 0.01 if threshold is None else threshold
    return "" if loss <= threshold else f"reconstruction_loss is {loss}, at most {threshold} is allowed"


def _evaluating_to_fine_tuning(context: TransitionContext) -> str:
    delta, stability = _metric(context, "performance_delta"), _metric(context, "stability_score")
    if not delta > 0:
        return f"performance_delta is {delta}, it must be above 0"
    return "" if stability >= 0.8 else f"stability_score is {stability}, it must be at least 0.8"


def _evaluating_to_culled(context: TransitionContext) -> str:
    delta, error_rate = _metric(context, "performance_delta"), _metric(context, "error_rate")
    if delta < -0.05 or error_rate > 0.1 or context.error_count > 5:
        return ""
    return (
        f"nothing speaks for culling: performance_delta is {delta} (not below -0.05), "
        f"error_rate {error_rate} (not above 0.1), error_count {context.error_count} (not above 5)"
    )


def _fine_tuning_to_fossilized(context: TransitionContext) -> str:
    improvement, stability = _metric(context, "total_improvement"), _metric(context, "final_stability")
    if not improvement >= 0.01:
        return f"total_improvement is {improvement}, it must be at least 0.01"
    return "" if stability >= 0.95 else f"final_stability is {stability}, it must be at least 0.95"


_METRIC_RULES: MappingProxyType[tuple[ExtendedLifecycle, ExtendedLifecycle], Callable[[TransitionContext], str]]
_METRIC_RULES = MappingProxyType(
    {
        (_S.TRAINING, _S.GRAFTING): _training_to_grafting,
        (_S.EVALUATING, _S.FINE_TUNING): _evaluating_to_fine_tuning,
        (_S.EVALUATING, _S.CULLED): _evaluating_to_culled,
        (_S.FINE_TUNING, _S.FOSSILIZED): _fine_tuning_to_fossilized,
    }
)


# ---- the layer's gate ----------------------------------------------------------------------------


LEAST_EPOCHS_BEFORE_EVALUATING = 5


class LifecycleManager:
    """The gate that single requests to a layer pass: the strict graph without its least epochs and metric rules.

    ``valid_transitions`` is a set of (from, to) pairs, ``validators`` maps a target state to a
    function of the :class:`TransitionContext` that says whether it may be entered; both belong to
    the user and may be changed.
    """

    def __init__(self) -> None:
        self.valid_transitions: set[tuple[ExtendedLifecycle, ExtendedLifecycle]] = {
            (source, target) for source, targets in _GRAPH.items() for target in targets
        }
        # Plain functions, so that a layer with its manager can be copied and pickled.
        self.validators: dict[ExtendedLifecycle, Callable[[TransitionContext], bool]] = {
            _S.GRAFTING: may_enter_grafting,
            _S.EVALUATING: may_enter_evaluating,
            _S.FOSSILIZED: may_enter_fossilized,
        }

    def can_transition(self, current: ExtendedLifecycle | int | str, target: ExtendedLifecycle | int | str) -> bool:
        """Whether the graph has this edge."""
        return (
            ExtendedLifecycle.parse(current),
            ExtendedLifecycle.parse(target),
        ) in self.valid_transitions

    def request_transition(self, context: TransitionContext) -> bool:
        """Whether the edge exists and the target's validator, where there is one, agrees. Changes nothing."""
        if not self.can_transition(context.current_state, context.target_state):
            return False
        validator = self.validators.get(context.target_state)
        return validator is None or bool(validator(context))


def _given(context: TransitionContext, metric: str) -> float | None:
    return context.performance_metrics.get(metric, context.metadata.get(metric))


def may_enter_grafting(context: TransitionContext) -> bool:
    """Not with a ``training_loss`` of 1 or more (nor NaN); one that is not given is no obstacle."""
    loss = _given(context, "training_loss")
    return loss is None or loss < 1.0


def may_enter_evaluating(context: TransitionContext) -> bool:
    """After at least 5 epochs in the state before."""
    return context.epochs_in_state >= LEAST_EPOCHS_BEFORE_EVALUATING


def may_enter_fossilized(context: TransitionContext) -> bool:
    """Not with an ``accuracy`` of 0.9 or less (nor NaN); one that is not given is no obstacle."""
    accuracy = _given(context, "accuracy")
    return accuracy is None or accuracy > 0.9


# ---- policy as data, and what became of a request ------------------------------------------------


class TransitionRules:
    """Which transitions requests in batches may make, as data: least epochs in ``from``, -1 where it is illegal.

    ``tensor`` is int32 ``[11, 11]`` on the CPU, ``tensor[from, to]``; do not write it, :meth:`on`
    keeps copies. :meth:`strict`, :meth:`gate`, :meth:`any` and :meth:`recycling` make the four that
    the package uses.
    """

    ILLEGAL = -1

    def __init__(self, tensor: Tensor) -> None:
        tensor = tensor if isinstance(tensor, Tensor) else torch.as_tensor(tensor, device="cpu")
        states = len(ExtendedLifecycle)
        if tensor.shape != (states, states) or tensor.is_floating_point() or tensor.is_complex():
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ValueError(f"rules must be integers of shape [{states}, {states}], got {kind} {list(tensor.shape)}")
        self.tensor = tensor.detach().to("cpu", torch.int32, copy=True)
        self._on: dict[str, Tensor] = {"cpu": self.tensor}

    @classmethod
    def strict(cls) -> TransitionRules:
        """The table of :class:`StateTransition`, without its metric rules; ROLLED_BACK needs no epochs."""
        least = StateTransition.MIN_EPOCHS_IN_STATE
        return cls._of(
            (source, target, 0 if target is _S.ROLLED_BACK else least[source])
            for source, targets in _GRAPH.items()
            for target in targets
        )

    @classmethod
    def gate(cls) -> TransitionRules:
        """A fresh :class:`LifecycleManager`'s: the same graph, and only EVALUATING asks for epochs before it."""
        return cls._of(
            (source, target, LEAST_EPOCHS_BEFORE_EVALUATING if target is _S.EVALUATING else 0)
            for source, targets in _GRAPH.items()
            for target in targets
        )

    @classmethod
    def any(cls) -> TransitionRules:
        """From every state to every state, at once: for writes that are not transitions."""
        return cls._of((source, target, 0) for source in _S for target in _S)

    @classmethod
    def recycling(cls) -> TransitionRules:
        """From the terminal states that hold no blueprint (CULLED, CANCELLED, ROLLED_BACK) back to DORMANT."""
        return cls._of((source, _S.DORMANT, 0) for source in (_S.CULLED, _S.CANCELLED, _S.ROLLED_BACK))

    @classmethod
    def _of(cls, edges: Iterable[tuple[int, int, int]]) -> TransitionRules:
        tensor = torch.full((len(_S), len(_S)), cls.ILLEGAL, dtype=torch.int32, device="cpu")
        for source, target, least in edges:
            tensor[source, target] = least
        return cls(tensor)

    def scaled(self, factor: float) -> TransitionRules:
        """All least epochs times ``factor``, rounded up: what takes an epoch still takes one, unless ``factor`` is 0."""
        factor = float(factor)
        if not 0 <= factor < math.inf:
            raise ValueError(f"factor must be a finite number of at least 0, got {factor}")
        # The slack undoes the rounding of products such as 0.1 * 30, which would cost an epoch.
        scaled = (self.tensor.double() * factor * (1 - 1e-12)).ceil().clamp(max=2**31 - 1)
        return TransitionRules(torch.where(self.tensor < 0, self.tensor, scaled.int()))

    def least_epochs(self, source: ExtendedLifecycle | int | str, target: ExtendedLifecycle | int | str) -> int | None:
        """Epochs that ``source`` asks for before ``target``; None where there is no such transition."""
        least = int(self.tensor[ExtendedLifecycle.parse(source), ExtendedLifecycle.parse(target)])
        return None if least < 0 else least

    def on(self, device: torch.device) -> Tensor:
        """``tensor`` on a device, copied there once; never waits for the device."""
        found = self._on.get(str(device))
        if found is None:
            found = self.tensor.to(device, non_blocking=True)
            if type(found) is Tensor:  # not a tracer's stand-in
                self._on[str(device)] = found
        return found

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TransitionRules) and torch.equal(self.tensor, other.tensor)

    def __hash__(self) -> int:
        return hash(tuple(self.tensor.flatten().tolist()))

    def __deepcopy__(self, memo: dict[int, Any]) -> TransitionRules:
        return self  # nothing of it changes, and a copied layer finds them where it is

    def __reduce__(self) -> tuple[type, tuple[Tensor]]:
        return TransitionRules, (self.tensor,)

    def __repr__(self) -> str:
        edges = (
            f"{_S(source).name} -> {_S(target).name}: {self.tensor[source, target]}"
            for source, target in (self.tensor >= 0).nonzero().tolist()
        )
        return f"TransitionRules({', '.join(edges)})"


class Verdict(IntEnum):
    """What became of a request in a batch."""

    APPLIED = 0
    SEED_OUT_OF_RANGE = 1
    ILLEGAL_TRANSITION = 2
    TOO_FEW_EPOCHS = 3
    BLUEPRINT_OUT_OF_RANGE = 4
    STRATEGY_OUT_OF_RANGE = 5
    SUPERSEDED = 6
    EPOCHS_OUT_OF_RANGE = 7

    @property
    def message(self) -> str:
        """The verdict in words."""
        return _VERDICT_MESSAGES[self]


_VERDICT_MESSAGES = {
    Verdict.APPLIED: "applied",
    Verdict.SEED_OUT_OF_RANGE: "there is no such seed",
    Verdict.ILLEGAL_TRANSITION: "the rules have no such transition from its state",
    Verdict.TOO_FEW_EPOCHS: "the seed has not been in its state for long enough",
    Verdict.BLUEPRINT_OUT_OF_RANGE: "the blueprint's rows are not all in the bank",
    Verdict.STRATEGY_OUT_OF_RANGE: "there is no such grafting strategy",
    Verdict.SUPERSEDED: "a later request in the batch names the same seed",
    Verdict.EPOCHS_OUT_OF_RANGE: "the epochs are negative",
}


def explain_verdicts(verdicts: Tensor | Iterable[int], seed_ids: Tensor | Iterable[int] | None = None) -> list[str]:
    """A line for each request: its number, its seed where ``seed_ids`` are given, and the verdict in words.

    Waits for the device. ValueError where there are not as many seeds as verdicts.
    """
    codes = _listed(verdicts)
    if seed_ids is None:
        return [f"request {k}: {_in_words(code)}" for k, code in enumerate(codes)]
    seeds = _listed(seed_ids)
    if len(seeds) != len(codes):
        raise ValueError(f"{len(seeds)} seed_ids for {len(codes)} verdicts")
    return [f"request {k}, seed {seeds[k]}: {_in_words(code)}" for k, code in enumerate(codes)]


def _listed(values: Tensor | Iterable[int] | int) -> list[int]:
    if isinstance(values, Tensor):
        return values.flatten().tolist()
    return [values] if hasattr(values, "__index__") and not hasattr(values, "__len__") else list(values)


def _in_words(code: int) -> str:
    if not 0 <= code < len(Verdict):
        return f"unknown verdict {code}"
    verdict = Verdict(code)
    return verdict.name if verdict is Verdict.APPLIED else f"{verdict.name}: {verdict.message}"
