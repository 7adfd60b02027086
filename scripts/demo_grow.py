"""The demo's growth: seeds around the hidden layers watch, germinate, are blended in, judged, and kept or culled.

A seed's life is counted in ticks of a few training steps:

    DORMANT -> GERMINATED -> TRAINING -> GRAFTING -> STABILIZATION -> EVALUATING -> FINE_TUNING -> FOSSILIZED
                                         alpha 0..1     alpha 1           |
                                                                          +-> CULLED
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from demo_task import Data, Step, accuracy, batches, hidden, losses, set_learning_rate
from torch import Tensor, nn
from torch.nn import functional as F

from kasmina_ext.grafting import ramp
from kasmina_ext.layer import KasminaLayer
from kasmina_ext.lifecycle import ExtendedLifecycle as State
from kasmina_ext.state import StateVar
from kasmina_ext.telemetry import potential

CHUNK = 8  # features per seed: 12 seeds around each of the four layers of 96

# Chosen by held-out accuracy on random seeds from 100 up; the test images had no part in it.
LEARNING_RATE = 0.2
TICK_STEPS = 4
WAVE = 8
WAVE_TICKS = 10

# Ticks that a seed spends in a state. It starts neutral, so that TRAINING has nothing to reconstruct.
LASTS = {
    State.GERMINATED: 1,
    State.TRAINING: 1,
    State.GRAFTING: 10,
    State.STABILIZATION: 10,
    State.EVALUATING: 18,
    State.FINE_TUNING: 60,
}
NEXT = {
    State.GERMINATED: State.TRAINING,
    State.TRAINING: State.GRAFTING,
    State.GRAFTING: State.STABILIZATION,
    State.STABILIZATION: State.EVALUATING,
    State.FINE_TUNING: State.FOSSILIZED,
}


@dataclass(frozen=True)
class Growth:
    """How to grow: ``budget`` seeds at most, picked ``by`` "gradient" or "random" (the control)."""

    budget: int
    by: str = "gradient"
    tick_steps: int = TICK_STEPS
    z: float = 1.0  # a seed is kept if its removal would cost more than z standard errors

    @property
    def ticks(self) -> int:
        """Until the last seed's life is over."""
        waves = -(-self.budget // WAVE)
        return waves * WAVE_TICKS + sum(LASTS.values())

    @property
    def parameters(self) -> int:
        """What is trained, the culled included."""
        return self.budget * CHUNK

    @property
    def steps(self) -> int:
        return self.ticks * self.tick_steps


@dataclass
class Grown:
    """What became of a network."""

    network: nn.Sequential
    accuracy: float
    kept: int
    parameters: int
    lifecycles: list[str] = field(repr=False)
    """One string per tick, one hexadecimal digit per seed: its state."""


def wrap(network: nn.Sequential) -> nn.Sequential:
    """A frozen copy of ``network`` with a KasminaLayer around each hidden layer; all seeds dormant."""
    grown = copy.deepcopy(network).requires_grad_(False)
    for i, layer in enumerate(hidden(grown)):
        grown[2 * i] = KasminaLayer(
            layer,
            chunk_size=CHUNK,
            num_blueprints=1,
            strategy="multiplicative",
            alpha_schedule="cosine",
        )
    return grown


def grow(network: nn.Sequential, data: Data, how: Growth, *, seed: int, on_step: Step) -> Grown:
    """Grow ``how.budget`` seeds in a copy of ``network``, eight at a time, and train them."""
    grown = wrap(network)
    layers = hidden(grown)
    # A dormant or culled seed has a zero gradient; weight decay would move its bank all the same.
    banks = [layer.blueprint_weights for layer in layers]
    optimizer = torch.optim.AdamW(banks, lr=LEARNING_RATE, weight_decay=0.0)
    shuffle = random.Random(seed)
    batch = iter(batches(data, how.steps, seed))
    steps_done, germinated, lifecycles = 0, 0, []

    def held_out() -> Tensor:
        with unwatched(layers):
            return losses(grown, data.held)

    for tick in range(how.ticks):
        if tick and tick % WAVE_TICKS == 0 and germinated < how.budget:
            count = min(WAVE, how.budget - germinated)
            for layer, one in pick(layers, count, how.by, shuffle):
                require(layer, one, State.GERMINATED)
            germinated += count
            # What the gradient says from here on is what it says to the network as it has become.
            for layer in layers:
                layer.reset_telemetry()
        advance(layers, held_out, how.z)
        lifecycles.append(snapshot(layers))

        for _ in range(how.tick_steps):
            images, digits = next(batch)
            set_learning_rate(optimizer, LEARNING_RATE * (1 - steps_done / how.steps))
            optimizer.zero_grad()
            F.cross_entropy(grown(images), digits).backward()
            optimizer.step()
            steps_done += 1
            on_step(1)
        for layer in layers:
            layer.extended_state.increment_epochs()

    advance(layers, held_out, how.z)
    lifecycles.append(snapshot(layers))
    kept = sum(int((layer.lifecycle_states == State.FOSSILIZED).sum()) for layer in layers)
    with unwatched(layers):
        return Grown(grown, accuracy(grown, data.test), kept, kept * CHUNK, lifecycles)


# ---- germination ---------------------------------------------------------------------------------


def pick(layers: list[KasminaLayer], count: int, by: str, shuffle: random.Random) -> list[tuple[KasminaLayer, int]]:
    """The ``count`` dormant seeds of all layers that the loss is most sensitive to, or as many at random."""
    dormant = [
        (layer, one)
        for layer in layers
        for one, state in enumerate(layer.lifecycle_states.tolist())
        if state == State.DORMANT
    ]
    if by == "random":
        return shuffle.sample(dormant, count)
    worth = {layer: potential(layer).tolist() for layer in layers}
    return sorted(dormant, key=lambda place: -worth[place[0]][place[1]])[:count]


# ---- one tick of every seed's life ---------------------------------------------------------------


def advance(layers: list[KasminaLayer], held_out: Callable[[], Tensor], z: float) -> None:
    """Move on every seed whose time in its state is over; in GRAFTING, raise its alpha."""
    to_judge = []
    for layer in layers:
        states = layer.lifecycle_states.tolist()
        ages = layer.state[StateVar.EPOCHS_IN_STATE].tolist()
        for one, (number, age) in enumerate(zip(states, ages, strict=True)):
            state = State(number)
            if state == State.GRAFTING:
                layer.set_alpha(one, ramp(layer.alpha_schedule, age / LASTS[state]))
            if age < LASTS.get(state, age + 1):
                continue
            if state == State.EVALUATING:
                to_judge.append((layer, one))
            else:
                require(layer, one, NEXT[state])
    judge(to_judge, held_out, z)


def judge(candidates: list[tuple[KasminaLayer, int]], held_out: Callable[[], Tensor], z: float) -> None:
    """Cull the seeds that are not worth their parameters, one at a time; the others go on to FINE_TUNING.

    Propose, measure, undo: each candidate in turn is switched off by its alpha alone, and the losses of the same
    held-out images are compared pairwise. The one that would be missed least is culled if the mean increase of the
    loss is not above ``z`` standard errors; then the rest is measured again, since the others may now matter more.
    """
    candidates = list(candidates)
    while candidates:
        with_all = held_out()
        costs = []
        for layer, one in candidates:
            with switched_off(layer, one):
                increase = (held_out() - with_all).double()
            error = increase.std() / len(increase) ** 0.5
            costs.append((increase.mean().item(), error.item()))
        least = min(range(len(costs)), key=lambda i: costs[i][0])
        cost, error = costs[least]
        if cost > z * error:
            break
        layer, one = candidates.pop(least)
        require(layer, one, State.CULLED)
    for layer, one in candidates:
        require(layer, one, State.FINE_TUNING)


@contextmanager
def switched_off(layer: KasminaLayer, one: int) -> Iterator[None]:
    """The seed at alpha 0, which is the identity to the bit; its own alpha afterwards."""
    alpha = layer.alpha[one].clone()
    layer.set_alpha(one, 0.0)
    try:
        yield
    finally:
        layer.set_alpha(one, alpha)


@contextmanager
def unwatched(layers: list[KasminaLayer]) -> Iterator[None]:
    """Telemetry off: what the seeds watch is the training images."""
    for layer in layers:
        layer.telemetry_enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.telemetry_enabled = True


def require(layer: KasminaLayer, one: int, target: State) -> None:
    """A transition that must not be refused: if it is, the plan above is wrong."""
    if not layer.request_state_transition(one, target):
        state = State(int(layer.lifecycle_states[one]))
        raise RuntimeError(f"seed {one} may not go from {state.name} to {target.name}")


def snapshot(layers: list[KasminaLayer]) -> str:
    return "".join(f"{state:x}" for layer in layers for state in layer.lifecycle_states.tolist())
