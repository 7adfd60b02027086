"""The life of seeds in plain Python, one seed at a time: what the operators are compared with.

Written from the specification alone: nothing of kasmina_ext is used here, numbers are Python's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch

INT_MAX, INT_MIN = 2**31 - 1, -(2**31)
STATES, STRATEGIES, RING = 11, 4, 10
(DORMANT, GERMINATED, TRAINING, GRAFTING, STABILIZATION, EVALUATING,
 FINE_TUNING, FOSSILIZED, CULLED, CANCELLED, ROLLED_BACK) = range(STATES)  # fmt: skip
(APPLIED, NO_SEED, ILLEGAL, TOO_EARLY, BAD_BLUEPRINT, BAD_STRATEGY, SUPERSEDED, BAD_EPOCHS) = range(8)
NONE, LINEAR, COSINE, SIGMOID = range(4)

# ---- policies: {(from, to): least epochs} ----------------------------------------------------------------------------

_MIN_EPOCHS = {
    DORMANT: 0,
    GERMINATED: 0,
    TRAINING: 100,
    GRAFTING: 50,
    STABILIZATION: 20,
    EVALUATING: 30,
    FINE_TUNING: 50,
}
_GRAPH = {
    DORMANT: (GERMINATED,),
    GERMINATED: (TRAINING, CANCELLED),
    TRAINING: (GRAFTING, CULLED, CANCELLED),
    GRAFTING: (STABILIZATION, ROLLED_BACK),
    STABILIZATION: (EVALUATING, ROLLED_BACK),
    EVALUATING: (FINE_TUNING, CULLED, ROLLED_BACK),
    FINE_TUNING: (FOSSILIZED, CULLED, ROLLED_BACK),
}
_EDGES = [(source, to) for source, targets in _GRAPH.items() for to in targets]
POLICIES: dict[str, dict[tuple[int, int], int]] = {
    "strict": {(a, b): 0 if b == ROLLED_BACK else _MIN_EPOCHS[a] for a, b in _EDGES},
    "gate": {(a, b): 5 if b == EVALUATING else 0 for a, b in _EDGES},
    "any": {(a, b): 0 for a in range(STATES) for b in range(STATES)},
    "recycling": {(a, DORMANT): 0 for a in (CULLED, CANCELLED, ROLLED_BACK)},
}


def table(policy: dict[tuple[int, int], int]) -> list[list[int]]:
    """The policy as rules ``[from][to]``."""
    return [[policy.get((a, b), -1) for b in range(STATES)] for a in range(STATES)]


# ---- one seed --------------------------------------------------------------------------------------------------------


@dataclass
class Seed:
    lifecycle: int = DORMANT
    blueprint: int = -1
    epochs: int = 0
    strategy: int = 0
    parent: int = 0
    rest: list[int] = field(default_factory=lambda: [-1, 0, 0])  # checkpoint, evaluation score, errors
    ring: list[tuple[int, int]] = field(default_factory=lambda: [(0, 0)] * RING)
    count: int = 0
    alpha: float = 1.0

    def move(self, to: int) -> None:
        self.ring[self.count % RING] = (self.lifecycle, to)
        self.count = (self.count + 1 + 2**31) % 2**32 - 2**31  # int32
        self.parent, self.lifecycle, self.epochs = self.lifecycle, to, 0

    def consider(self, request: tuple[int, int, int, int], mask: int, rules: list[list[int]], blueprints: int) -> int:
        """A request that is the last one for this seed."""
        to, blueprint, epochs, strategy = request
        if mask & 1:
            if self.lifecycle not in range(STATES) or to not in range(STATES) or rules[self.lifecycle][to] < 0:
                return ILLEGAL
            if self.epochs < rules[self.lifecycle][to]:
                return TOO_EARLY
        if mask & 2 and not -1 <= blueprint < blueprints:
            return BAD_BLUEPRINT
        if mask & 8 and strategy not in range(STRATEGIES):
            return BAD_STRATEGY
        if mask & 4 and epochs < 0:
            return BAD_EPOCHS
        if mask & 1 and to != self.lifecycle:
            self.move(to)
        self.blueprint = blueprint if mask & 2 else self.blueprint
        self.epochs = epochs if mask & 4 else self.epochs
        self.strategy = strategy if mask & 8 else self.strategy
        return APPLIED

    def step(self, schedule: int, ramp_epochs: int, advance: bool) -> None:
        self.epochs = min(self.epochs + 1, INT_MAX)
        if self.lifecycle != GRAFTING:
            return
        t = min(1.0, self.epochs / ramp_epochs) if ramp_epochs > 0 else 1.0
        if schedule != NONE:
            self.alpha = ramp(schedule, t)
        if advance and t == 1:
            self.move(STABILIZATION)


def ramp(schedule: int, t: float) -> float:
    """In closed form, by other routes than the code's: sin^2 for the cosine, tanh for the logistic function."""
    if t <= 0 or t >= 1:
        return float(t >= 1)
    if schedule == COSINE:
        return math.sin(math.pi * t / 2) ** 2
    if schedule == SIGMOID:
        return 0.5 + 0.5 * math.tanh(6 * (t - 0.5)) / math.tanh(3)
    return t


# ---- a layer's seeds, and their tensors ------------------------------------------------------------------------------


def update(seeds: list[Seed], ids: list[int], values: list, mask: list[int], rules: list[list[int]], blueprints: int):
    """Verdicts of a batch; of the requests for a seed only the last is looked at."""
    last = {seed: u for u, seed in enumerate(ids)}
    verdicts = []
    for u, seed in enumerate(ids):
        if not 0 <= seed < len(seeds):
            verdicts.append(NO_SEED)
        elif last[seed] != u:
            verdicts.append(SUPERSEDED)
        else:
            verdicts.append(seeds[seed].consider(values[u], mask[u], rules, blueprints))
    return verdicts


@dataclass
class Tensors:
    """What the operators take."""

    state: torch.Tensor
    history: torch.Tensor
    count: torch.Tensor
    alpha: torch.Tensor

    @property
    def lived(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.state, self.history, self.count

    def clone(self) -> Tensors:
        return Tensors(*(t.clone() for t in (self.state, self.history, self.count, self.alpha)))

    def same(self, other: Tensors) -> bool:
        pairs = zip((*self.lived, self.alpha), (*other.lived, other.alpha), strict=True)
        return all(torch.equal(a.cpu(), b.cpu()) for a, b in pairs)


def to_tensors(seeds: list[Seed], device: torch.device | str = "cpu") -> Tensors:
    columns = [[s.lifecycle, s.blueprint, s.epochs, s.strategy, s.parent, *s.rest] for s in seeds]
    state = torch.tensor(columns, dtype=torch.int32).reshape(len(seeds), 8).t().contiguous()
    history = torch.tensor([s.ring for s in seeds], dtype=torch.int32).reshape(len(seeds), RING, 2)
    count = torch.tensor([s.count for s in seeds], dtype=torch.int32)
    alpha = torch.tensor([s.alpha for s in seeds], dtype=torch.float32)
    return Tensors(*(t.to(device) for t in (state, history, count, alpha)))


def from_tensors(tensors: Tensors) -> list[Seed]:
    columns, rings = tensors.state.t().tolist(), tensors.history.tolist()
    counts, alphas = tensors.count.tolist(), tensors.alpha.tolist()
    return [
        Seed(*row[:5], row[5:], [tuple(pair) for pair in ring], count, alpha)
        for row, ring, count, alpha in zip(columns, rings, counts, alphas, strict=True)
    ]


def differences(seeds: list[Seed], tensors: Tensors) -> list[str]:
    """Where the tensors are not what the model says: integers exactly, alpha within two float32 roundings."""
    found = from_tensors(tensors)
    wrong = [] if len(found) == len(seeds) else [f"{len(found)} seeds, expected {len(seeds)}"]
    for number, (seed, got) in enumerate(zip(seeds, found, strict=False)):
        near = abs(seed.alpha - got.alpha) <= 2**-22 * max(abs(seed.alpha), 2**-10)
        exact = seed.alpha not in (0, 1) or seed.alpha == got.alpha
        got.alpha = seed.alpha if near and exact else got.alpha
        if seed != got:
            wrong.append(f"seed {number}: expected {seed}, got {got}")
    return wrong


def random_tensors(num_seeds: int, rng: np.random.Generator, device: torch.device | str = "cpu") -> Tensors:
    """Seeds anywhere in their lives; one in thirty in a state that does not exist."""
    state = rng.integers(0, 130, (8, num_seeds))
    state[0] = np.where(rng.random(num_seeds) < 0.03, rng.choice([-1, 11, INT_MIN], num_seeds), state[0] % STATES)
    state[3] %= STRATEGIES
    history = rng.integers(0, STATES, (num_seeds, RING, 2))
    count, alpha = rng.integers(0, 35, num_seeds), rng.random(num_seeds)
    tensors = (torch.from_numpy(array.astype(np.int32)) for array in (state, history, count))
    return Tensors(*(t.to(device) for t in tensors), torch.from_numpy(alpha.astype(np.float32)).to(device))
