"""The demo's growth: seeds around the hidden layers, and a controller that decides by itself what becomes of them.

A seed's life is counted in ticks of a few training steps:

    DORMANT -> GERMINATED -> TRAINING -> GRAFTING -> STABILIZATION -> EVALUATING -> FINE_TUNING -> FOSSILIZED
                                         alpha 0..1     alpha 1           |              |
                                                                          +-> CULLED <---+
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import partial

import torch
from demo_task import Data, Step, accuracy, batches, hidden, set_learning_rate
from torch import nn
from torch.nn import functional as F

from kasmina_ext import ExtendedLifecycle, GrowthConfig, GrowthController, KasminaLayer, default_policy, param_groups
from kasmina_ext.policy import Policy
from kasmina_ext.seed_record import SeedHistory, SeedRecord

CHUNK = 8  # features per seed: 12 seeds around each of the four layers of 96

# Chosen by held-out accuracy on random seeds from 100 up; the test images had no part in it.
LEARNING_RATE = 0.2
TICK_STEPS, TICKS = 4, 160
HELD_OUT_BATCH = 30

POLICIES: dict[str, Policy] = {
    "gradient": default_policy,
    "random": partial(default_policy, score=lambda seeds: seeds.random()),
}


@dataclass(frozen=True)
class Growth:
    """How to grow: ``budget`` seeds alive at most, picked ``by`` "gradient" or "random" (the control)."""

    budget: int
    by: str = "gradient"
    tick_steps: int = TICK_STEPS
    ticks: int = TICKS
    z: float = GrowthConfig.z

    @property
    def until(self) -> int:
        """The last tick at which a seed may germinate: it then has time to live."""
        return 3 * self.ticks // 8

    @property
    def evaluations(self) -> tuple[int, ...]:
        """Ticks; after the last one the seeds that were kept go on learning."""
        return self.ticks // 2, 3 * self.ticks // 4

    @property
    def parameters(self) -> int:
        """What is trained at a time, at most."""
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
    history: SeedHistory = field(repr=False)


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
    """Let a controller grow a copy of ``network``."""
    grown = wrap(network)
    layers = hidden(grown)
    optimizer = torch.optim.AdamW(param_groups(grown), lr=LEARNING_RATE)
    record = SeedRecord(grown)
    control = GrowthController(
        grown,
        optimizer,
        budget=how.budget,
        tick_every=how.tick_steps,
        until=how.until,
        z=how.z,
        seed=seed,
        policy=POLICIES[how.by],
        record=record,
    )
    held_out = list(zip(*(part.split(HELD_OUT_BATCH) for part in data.held), strict=True))

    def losses(part: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return F.cross_entropy(grown(part[0]), part[1], reduction="none")

    lifecycles = [snapshot(layers)]
    for done, batch in enumerate(batches(data, how.steps, seed)):
        set_learning_rate(optimizer, LEARNING_RATE * (1 - done / how.steps))
        optimizer.zero_grad()
        loss = losses(batch).mean()
        loss.backward()
        optimizer.step()
        on_step(1)
        if control.step(loss):
            if control.ticks in how.evaluations:
                control.evaluate(held_out, losses)
            lifecycles.append(snapshot(layers))

    kept = sum(ExtendedLifecycle.GRAFTING <= int(state, 16) <= ExtendedLifecycle.FOSSILIZED for state in lifecycles[-1])
    return Grown(grown, accuracy(grown, data.test), kept, kept * CHUNK, lifecycles, record.history())


def snapshot(layers: list[KasminaLayer]) -> str:
    return "".join(f"{state:x}" for layer in layers for state in layer.lifecycle_states.tolist())
