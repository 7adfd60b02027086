"""Repairs of the demo's digit classifier: what harms its weights, and what changes the images under it."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from typing import Any

import demo_task as task
import torch
from damage import prune_, quantize_, random_gains, scale_outputs_
from demo_grow import CHUNK, HELD_OUT_BATCH
from repair_methods import METHODS, Growing, Problem, repaired
from torch import Tensor, nn
from torch.nn import functional as F

from kasmina_ext import calibrate_, record_activations

CPU = torch.device("cpu")
METHODS_TRIED = tuple(name for name in METHODS if name not in ("LoRA r=8", "IA3"))
NAMES = tuple(str(2 * i) for i in range(task.HIDDEN_LAYERS))
LAST = str(2 * task.HIDDEN_LAYERS)
DAMAGES = ("90 % pruned", "80 % pruned", "2-bit weights", "unit gain drift", "pixel gain drift")
NEW_TASKS = ("rotation", "inversion")
"""Of a network as it was: no damage, but other images."""


@dataclass(frozen=True)
class Sizes:
    """How much is done; ``--quick`` does next to nothing, all the same."""

    base_steps: int = task.BASE_STEPS
    steps: int = 480
    tick_every: int = 4
    calibration_images: int = 20

    @property
    def growing(self) -> Growing:
        """Seeds germinate in the first three eighths, and are judged at half and at three quarters of the way."""
        ticks = self.steps // self.tick_every
        settings = {"budget": 1.0, "until": 3 * ticks // 8, "points": 0}
        return Growing(self.tick_every, (ticks // 2, 3 * ticks // 4), settings)


QUICK = Sizes(base_steps=40, steps=32, tick_every=1)


def repairs(damage: str, seed: int, sizes: Sizes, methods: tuple[str, ...] = METHODS_TRIED) -> dict[str, Any]:
    """What each method makes of one network with one kind of damage; and the healthy network, on healthy images."""
    problem = damaged(damage, seed, sizes)
    found = {method: repaired(problem, method, seed) for method in methods}
    data = task.load(seed, CPU)
    return {"healthy": {"accuracy": task.accuracy(healthy(seed, sizes.base_steps), data.test)}} | found


@lru_cache
def healthy(seed: int, steps: int) -> nn.Sequential:
    return task.train_base(task.load(seed, CPU), seed, steps, lambda done: None)


def damaged(damage: str, seed: int, sizes: Sizes) -> Problem:
    """The network of this random seed after the damage, and the data that it is to work on from now on."""
    clean, undamaged = task.load(seed, CPU), healthy(seed, sizes.base_steps)
    data, network = clean, copy.deepcopy(undamaged)
    generator = torch.Generator().manual_seed(seed)
    for layer in task.hidden(network):
        if damage.endswith("pruned"):
            prune_(layer.weight, int(damage.split()[0]) / 100)
        elif damage == "2-bit weights":
            quantize_(layer.weight, 2)
        elif damage == "unit gain drift":
            scale_outputs_(layer, random_gains(task.WIDTH, generator))
    if damage == "pixel gain drift":
        gains = random_gains(clean.train[0].shape[1], generator)
        data = clean.seen_through(lambda images: images * gains)
    elif damage == "rotation":
        data = clean.rotated()
    elif damage == "inversion":
        data = clean.seen_through(lambda images: 1 - images)
    samples = sizes.calibration_images

    def calibrate(model: nn.Module) -> None:
        """What the undamaged network makes of a few images, as they were, is known; their digits are not."""
        known = record_activations(undamaged, NAMES, [clean.train[0][:samples]])
        calibrate_(model, known, [data.train[0][:samples]], progress=False)

    return Problem(
        network=network,
        names=NAMES,
        last=LAST,
        chunk_size=CHUNK,
        calibrate=calibrate,
        losses=losses,
        batches=partial(task.batches, data, sizes.steps),
        steps=sizes.steps,
        held_out=list(zip(*(part.split(HELD_OUT_BATCH) for part in data.held), strict=True)),
        judged=partial(judged, data),
        growing=sizes.growing,
    )


def losses(network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(network(batch[0]), batch[1], reduction="none")


def judged(data: task.Data, network: nn.Module) -> dict[str, Any]:
    """The score is the share of held-out images that are not recognised; of equal ones the loss decides."""
    return {
        "score": [100 - task.accuracy(network, data.held), task.losses(network, data.held).mean().item()],
        "accuracy": task.accuracy(network, data.test),
        "loss": task.losses(network, data.test).mean().item(),
    }


def plain(sizes: Sizes) -> dict[str, Any]:
    """For the record."""
    return asdict(sizes) | {"growing": asdict(sizes.growing)}
