"""The experiments of growth.py: each a function of (kind of damage, random seed), on the demo's digits.

Networks are the demo's; what is judged is judged on its held-out images, what is reported on its test images.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import demo_task as task
import numpy as np
import torch
from damage import scale_outputs_
from demo_grow import CHUNK, HELD_OUT_BATCH, LEARNING_RATE, Growth, grow, wrap
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional as F

from kasmina_ext import ExtendedLifecycle, GrowthController, KasminaLayer, credit, default_policy, param_groups
from kasmina_ext.policy import Observation
from kasmina_ext.state_layout import StateVar
from kasmina_ext.telemetry import TelemetryColumn, reduce

CPU = torch.device("cpu")
DAMAGES = (*task.DAMAGES, "fade")
FADED, FADED_TO = 1 / 3, 0.05
SEEDS = task.HIDDEN_LAYERS * task.WIDTH // CHUNK


@dataclass(frozen=True)
class Sizes:
    """How much is done; ``--quick`` does next to nothing, all the same."""

    base_steps: int = task.BASE_STEPS
    numbers: tuple[int, ...] = (4, 8)
    """Seeds to grow."""
    ticks: int = 80
    """Of growing them."""
    repair_ticks: int = 160
    trained_steps: int = 400
    """Of all seeds together, before they are judged."""
    permutations: int = 120
    """For the Shapley values; half of them for each of two estimates."""
    draws: int = 5
    """Of random halves."""


QUICK = Sizes(base_steps=40, numbers=(2,), ticks=32, repair_ticks=48, trained_steps=20, permutations=2, draws=1)


def ignore(steps: int) -> None:
    """A progress bar that nobody looks at."""


# ---- networks --------------------------------------------------------------------------------------------------------


@lru_cache
def healthy(seed: int, steps: int) -> nn.Sequential:
    return task.train_base(task.load(seed, CPU), seed, steps, ignore)


def damaged(kind: str, seed: int, steps: int) -> nn.Sequential:
    """The demo's kinds, and "fade": a third of the chunks of every hidden layer, drawn at random, put out next to nothing."""
    network = copy.deepcopy(healthy(seed, steps))
    if kind != "fade":
        task.damage(network, kind, seed)
        return network
    generator = torch.Generator().manual_seed(seed)
    for layer in task.hidden(network):
        faded = torch.rand(task.WIDTH // CHUNK, generator=generator) < FADED
        scale_outputs_(layer, torch.where(faded, FADED_TO, 1.0).repeat_interleave(CHUNK))
    return network


def losses_of(network: nn.Module) -> Callable[[tuple[Tensor, Tensor]], Tensor]:
    """One for each image."""
    return lambda part: F.cross_entropy(network(part[0]), part[1], reduction="none")


def in_batches(part: tuple[Tensor, Tensor]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(*(each.split(HELD_OUT_BATCH) for each in part), strict=True))


def tested(network: nn.Module, data: task.Data) -> dict[str, float]:
    return {"accuracy": task.accuracy(network, data.test), "loss": task.losses(network, data.test).mean().item()}


# ---- where to grow ---------------------------------------------------------------------------------------------------


def where_to_grow(kind: str, seed: int, sizes: Sizes) -> dict[str, Any]:
    """So many seeds, picked by potential, at random and by the shift of their activations; nothing is culled."""
    data, network = task.load(seed, CPU), damaged(kind, seed, sizes.base_steps)
    before = activations(healthy(seed, sizes.base_steps), data, seed)

    def shift(seeds: Observation) -> Tensor:
        moved = seeds.activations[:, TelemetryColumn.MEAN] - before[:, 0]
        return (moved / before[:, 2]).abs()

    scores = {"potential": None, "random": lambda seeds: seeds.random(), "activation shift": shift}
    found: dict[str, Any] = {"damaged": tested(network, data)}
    for number in sizes.numbers:
        for name, score in scores.items():
            policy = default_policy if score is None else partial(default_policy, score=score)
            found[f"{number} by {name}"] = tested(grown(network, data, seed, number, policy, sizes.ticks), data)
    return found


def activations(network: nn.Sequential, data: task.Data, seed: int) -> Tensor:
    """Mean, variance and deviation of each seed's chunk in an undamaged network."""
    watched = wrap(network)
    for images, _ in task.batches(data, 20, seed):
        watched(images)
    return torch.cat([reduce(layer) for layer in task.hidden(watched)])


def grown(network: nn.Sequential, data: task.Data, seed: int, number: int, policy, ticks: int) -> nn.Sequential:
    """``number`` seeds, grown in a copy; RuntimeError if there are not as many in the end."""
    copied = wrap(network)
    how = Growth(number, ticks=ticks)
    optimizer = torch.optim.AdamW(param_groups(copied), lr=LEARNING_RATE)
    control = GrowthController(
        copied, optimizer, budget=number, tick_every=how.tick_steps, until=how.until, seed=seed, policy=policy
    )
    train(copied, optimizer, data, how.steps, seed, control.step)
    alive = sum(int((layer.lifecycle_states > ExtendedLifecycle.DORMANT).sum()) for layer in task.hidden(copied))
    if alive != number:
        raise RuntimeError(f"{alive} seeds are alive instead of {number}")
    return copied


def train(network, optimizer, data: task.Data, steps: int, seed: int, after_step: Callable[[Tensor], Any]) -> None:
    for done, (images, digits) in enumerate(task.batches(data, steps, seed)):
        task.set_learning_rate(optimizer, LEARNING_RATE * (1 - done / steps))
        optimizer.zero_grad()
        loss = F.cross_entropy(network(images), digits)
        loss.backward()
        optimizer.step()
        after_step(loss)


# ---- who helped, and what to cull ------------------------------------------------------------------------------------


def all_trained(kind: str, seed: int, sizes: Sizes) -> nn.Sequential:
    """All 48 seeds trained together, in EVALUATING for long enough."""
    network = wrap(damaged(kind, seed, sizes.base_steps))
    for layer in task.hidden(network):
        layer.extended_state.update_state(
            None, {"lifecycle": ExtendedLifecycle.EVALUATING, "blueprint": 0, "epochs": 100}
        )
    optimizer = torch.optim.AdamW(param_groups(network), lr=LEARNING_RATE)
    train(network, optimizer, task.load(seed, CPU), sizes.trained_steps, seed, lambda loss: None)
    return network


def who_helped(kind: str, seed: int, sizes: Sizes) -> dict[str, Any]:
    """Credit against Shapley values by Monte Carlo on the same held-out images, and its sum against the true gain.

    The deviation is a share of the gain; where seeds have brought next to nothing, what was missed says more: a share of
    the gain or of its standard error, whichever is larger.
    """
    network, data = all_trained(kind, seed, sizes), task.load(seed, CPU)
    held_out = in_batches(data.held)
    four = credit(network, held_out, losses_of(network))
    closer = credit(network, held_out, losses_of(network), tolerance=0.02)
    halves = [shapley(network, data.held, sizes.permutations // 2, [seed, half]) for half in range(2)]
    values, found = (halves[0] + halves[1]) / 2, torch.cat(four.mean)
    return {
        "gain": four.gain,
        "deviation at 4 points": four.deviation,
        "points with a tolerance of 2 %": closer.points,
        "deviation with it": closer.deviation,
        "missed with it": abs(closer.total - closer.gain) / max(abs(closer.gain), closer.gain_error),
        "rank correlation with Shapley": float(spearmanr(found, values).statistic),
        "rank correlation of Shapley's halves": float(spearmanr(*halves).statistic),
        "Shapley sum over gain": values.sum().item() / four.gain if four.gain else 1.0,
    }


def shapley(network: nn.Sequential, part: tuple[Tensor, Tensor], permutations: int, seed: list[int]) -> Tensor:
    """``[48]``: by what each seed lowers the loss when it joins, averaged over random orders of joining."""
    layers, values = task.hidden(network), torch.zeros(SEEDS, dtype=torch.float64)
    generator = np.random.default_rng(seed)
    with alphas(layers) as alpha:
        for _ in range(permutations):
            alpha(torch.zeros(SEEDS))
            present, before = torch.zeros(SEEDS), task.losses(network, part).mean().item()
            for one in generator.permutation(SEEDS).tolist():
                present[one] = 1.0
                alpha(present)
                after = task.losses(network, part).mean().item()
                values[one] += before - after
                before = after
    return values / permutations


class alphas:
    """A context in which alpha of all seeds can be set, without telemetry; as before afterwards."""

    def __init__(self, layers: list[KasminaLayer]) -> None:
        self.layers = layers

    def __enter__(self) -> Callable[[Tensor], None]:
        self.before = [layer.alpha.clone() for layer in self.layers]
        for layer in self.layers:
            layer.telemetry_enabled = False
        return lambda values: self.set(values.split([layer.num_seeds for layer in self.layers]))

    def set(self, values) -> None:
        for layer, value in zip(self.layers, values, strict=True):
            layer.alpha.copy_(value)

    def __exit__(self, *exception: object) -> None:
        self.set(self.before)
        for layer in self.layers:
            layer.telemetry_enabled = True


def what_to_cull(kind: str, seed: int, sizes: Sizes) -> dict[str, Any]:
    """Half of 48 trained seeds go, without retraining: the test accuracy that is left."""
    network, data = all_trained(kind, seed, sizes), task.load(seed, CPU)
    layers, held_out, passes = task.hidden(network), in_batches(data.held), [0]
    half = SEEDS // 2

    def counted(part: tuple[Tensor, Tensor]) -> Tensor:
        passes[0] += 1
        return losses_of(network)(part)

    found: dict[str, Any] = {"all 48": tested(network, data)}
    account = torch.cat(credit(network, held_out, losses_of(network)).mean)
    generator = torch.Generator().manual_seed(seed)
    with alphas(layers) as alpha:
        random = []
        for _ in range(sizes.draws):
            alpha(only(torch.randperm(SEEDS, generator=generator)[:half]))
            random.append(tested(network, data))
        found["random"] = {name: sum(each[name] for each in random) / len(random) for name in random[0]}
        alpha(only(account.argsort(descending=True)[:half]))
        found["one cut by credit"] = tested(network, data)
        kept = greedy(lambda: task.losses(network, data.held).mean().item(), alpha, half)
        alpha(only(torch.tensor(kept)))
        found["greedy leave-one-out"] = tested(network, data) | {"passes": sum(range(half + 1, SEEDS + 1))}
    # The controller's way: the budget is halved. It would cull more, or less, if it were to decide by itself how many.
    control = GrowthController(network, budget=half, z=float("-inf"), points=0)
    control.evaluate(held_out, counted)
    alive = sum(int((layer.state[StateVar.LIFECYCLE_STATE] == ExtendedLifecycle.EVALUATING).sum()) for layer in layers)
    advanced = sum(
        int((layer.state[StateVar.LIFECYCLE_STATE] == ExtendedLifecycle.FINE_TUNING).sum()) for layer in layers
    )
    if alive + advanced != half:
        raise RuntimeError(f"{alive + advanced} seeds are alive instead of {half}")
    found["controller"] = tested(network, data) | {"passes": passes[0] / len(held_out)}
    return found


def only(kept: Tensor) -> Tensor:
    return torch.zeros(SEEDS).index_fill(0, kept, 1.0)


def greedy(loss: Callable[[], float], alpha: Callable[[Tensor], None], number: int) -> list[int]:
    """Leave out the seed that would be missed least, measured exactly, until ``number`` are left."""
    kept = list(range(SEEDS))
    while len(kept) > number:
        costs = []
        for one in kept:
            alpha(only(torch.tensor([other for other in kept if other != one])))
            costs.append(loss())
        kept.pop(costs.index(min(costs)))
    return kept


# ---- all of it together ----------------------------------------------------------------------------------------------


def repair(kind: str, seed: int, sizes: Sizes) -> dict[str, Any]:
    """The demo's network, grown by the controller alone, against the frozen one and the last layer, retrained."""
    data, network = task.load(seed, CPU), damaged(kind, seed, sizes.base_steps)
    how = Growth(SEEDS, ticks=sizes.repair_ticks)
    result = grow(network, data, how, seed=seed, on_step=ignore)
    common = {"steps": how.steps, "lrs": task.LAST_LAYER_LRS, "seed": seed, "on_step": ignore}

    def of_equal_size(copied: nn.Sequential) -> dict:
        return task.subset_of_last_layer(copied, how.parameters, seed)

    equal = task.control(network, of_equal_size, data, **common)
    whole = task.control(network, task.last_layer, data, **common)
    return {
        "frozen": tested(network, data),
        "controller": {"accuracy": result.accuracy, "parameters": result.parameters},
        "last layer, equal size": {"accuracy": equal.accuracy, "parameters": equal.parameters},
        "last layer, all of it": {"accuracy": whole.accuracy, "parameters": whole.parameters},
    }


EXPERIMENTS: dict[str, Callable[[str, int, Sizes], dict[str, Any]]] = {
    "where to grow": where_to_grow,
    "who helped": who_helped,
    "what to cull": what_to_cull,
    "repair": repair,
}
