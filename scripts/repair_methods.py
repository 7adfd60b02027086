"""Ways to repair a damaged network, one beside the other: the same steps, the same batches, the same choice of a rate.

Each takes a copy of the damaged network, says what of it is trained, and is trained by :class:`Trainer`; how well it did is
judged by the problem: on held-out data to choose the learning rate, on test data to report.
"""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kasmina_ext import GrowthController, graft_, param_groups
from kasmina_ext.measure import seed_layers
from kasmina_ext.policy import alive_in

Batch = tuple[Tensor, ...]
Masks = dict[nn.Parameter, Tensor | None]
"""What is trained; of a parameter with a mask, the elements where it is 1."""

LADDER = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
"""Learning rates; each method climbs from ``START`` on until both neighbours are worse on held-out data."""
START = 1e-2
BETAS = (0.9, 0.95)
WARM_UPS, WARM_UP_RATE = 3, 1e-12  # of 0, AdamW on a GPU would make NaN
FIXED = ("frozen",)
"""The same for every random seed of a network."""
OURS, EQUAL, WIDER = "calibrate + grow", "LoRA of equal size", "LoRA r=8"


@dataclass(frozen=True)
class Growing:
    """How seeds are grown: with a tick every ``tick_every`` steps; ``evaluations`` are ticks."""

    tick_every: int
    evaluations: tuple[int, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of the :class:`~kasmina_ext.GrowthConfig`."""


@dataclass(frozen=True)
class Problem:
    """A damaged network, and all that repairs of it have in common."""

    network: nn.Module
    """Frozen; only copies are written."""
    names: tuple[str, ...]
    """Of the linear layers that get seeds or adapters."""
    last: str
    """Name of the last layer."""
    chunk_size: int
    calibrate: Callable[[nn.Module], None]
    """Fits a network's seeds, without labels."""
    losses: Callable[[nn.Module, Batch], Tensor]
    """One for each sample."""
    batches: Callable[[int], Iterable[Batch]]
    """``steps`` training batches for a random seed."""
    steps: int
    held_out: list[Batch]
    """What the controller judges seeds by."""
    judged: Callable[[nn.Module], dict[str, Any]]
    """Of a network, "score" (numbers, less is better, on held-out data) and what the test data say."""
    growing: Growing
    ia3: tuple[tuple[str, ...], tuple[str, ...]] | None = None
    """Names for PEFT's IA3, where it is tried: all, and those of them whose input is scaled (feed-forward)."""


# ---- what is trained -------------------------------------------------------------------------------------------------


@dataclass
class Prepared:
    """A copy of the damaged network, and what of it is to be trained."""

    network: nn.Module
    trained: Masks
    grows: bool = False
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        return sum(p.numel() if mask is None else int(mask.sum()) for p, mask in self.trained.items())


def frozen(problem: Problem, seed: int) -> Prepared:
    return Prepared(copy.deepcopy(problem.network), {})


def calibrated(problem: Problem, seed: int) -> Prepared:
    network = with_seeds(problem)
    begun = time.perf_counter()
    problem.calibrate(network)
    facts = {"calibration_seconds": time.perf_counter() - begun, "parameters": parameters_of_seeds(network)}
    return Prepared(network, {}, facts=facts)


def grown(problem: Problem, seed: int) -> Prepared:
    network = with_seeds(problem)
    return Prepared(network, _trained(network), grows=True)


def calibrated_and_grown(problem: Problem, seed: int) -> Prepared:
    prepared = calibrated(problem, seed)
    return Prepared(prepared.network, _trained(prepared.network), grows=True, facts=prepared.facts)


def last_layer(problem: Problem, seed: int) -> Prepared:
    network = copy.deepcopy(problem.network)
    network.get_submodule(problem.last).requires_grad_(True)
    return Prepared(network, _trained(network))


def everything(problem: Problem, seed: int) -> Prepared:
    """Every weight; what was pruned stays pruned."""
    network = copy.deepcopy(problem.network).requires_grad_(True)
    masks = _trained(network)
    for name in problem.names:
        weight = network.get_submodule(name).weight
        if not weight.all():
            masks[weight] = (weight != 0).to(weight.dtype)
    return Prepared(network, masks)


def adapted(problem: Problem, seed: int, rank: int | None = None) -> Prepared:
    """PEFT's LoRA, beside the layers that seeds would be around; without a rank, as large as all seeds together."""
    from peft import LoraConfig

    rank = rank or equal_rank(problem)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(problem.names))
    return Prepared(*_by_peft(problem, config, seed), facts={"rank": rank})


def scaled(problem: Problem, seed: int) -> Prepared:
    """PEFT's IA3."""
    from peft import IA3Config

    targets, feedforward = problem.ia3
    return Prepared(*_by_peft(problem, IA3Config(target_modules=[*targets], feedforward_modules=[*feedforward]), seed))


METHODS: dict[str, Callable[[Problem, int], Prepared]] = {
    "frozen": frozen,
    "calibrate": calibrated,
    "grow": grown,
    OURS: calibrated_and_grown,
    "last layer": last_layer,
    EQUAL: adapted,
    WIDER: lambda problem, seed: adapted(problem, seed, 8),
    "IA3": scaled,
    "full fine-tuning": everything,
}


def with_seeds(problem: Problem) -> nn.Module:
    """A copy of the damaged network with seeds around its layers, all dormant."""
    network = copy.deepcopy(problem.network)
    graft_(network, problem.names, chunk_size=problem.chunk_size, alpha_schedule="cosine", table=False)
    return network


def parameters_of_seeds(network: nn.Module) -> int:
    return sum(layer.blueprint_weights.numel() for layer in seed_layers(network).values())


def kept_of(network: nn.Module) -> dict[str, int]:
    """Seeds that are alive, and their parameters: a weight and a shift for each feature."""
    layers = list(seed_layers(network).values())
    alive = [alive_in(layer.lifecycle_states) for layer in layers]
    features = [int(layer.seed_offsets.diff()[chosen].sum()) for layer, chosen in zip(layers, alive, strict=True)]
    return {"kept_seeds": sum(int(chosen.sum()) for chosen in alive), "kept_parameters": 2 * sum(features)}


def equal_rank(problem: Problem) -> int:
    """Of the LoRA whose number of parameters is nearest to that of all seeds."""
    layers = [problem.network.get_submodule(name) for name in problem.names]
    seeds = 2 * sum(layer.out_features for layer in layers)
    return max(1, round(seeds / sum(layer.in_features + layer.out_features for layer in layers)))


def _by_peft(problem: Problem, config: Any, seed: int) -> tuple[nn.Module, Masks]:
    from peft import get_peft_model

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = get_peft_model(copy.deepcopy(problem.network), config)
    return network, _trained(network)


def _trained(network: nn.Module) -> Masks:
    return {parameter: None for parameter in network.parameters() if parameter.requires_grad}


# ---- training --------------------------------------------------------------------------------------------------------


class Trainer:
    """AdamW on what is trained; on a GPU a step is captured into a CUDA graph, which other rates reuse."""

    captures = True

    def __init__(
        self,
        network: nn.Module,
        trained: Masks,
        losses: Callable[[nn.Module, Batch], Tensor],
        example: Batch,
        *,
        weight_decay: float = 0.0,
        clip: float | None = None,
    ) -> None:
        self.network, self.trained, self.losses, self.clip = network, trained, losses, clip
        self.batch = tuple(tensor.clone() for tensor in example)
        device = self.batch[0].device
        self.on_gpu = device.type == "cuda"
        self.loss = torch.zeros((), device=device)
        rate = torch.tensor(WARM_UP_RATE, device=device) if self.on_gpu else WARM_UP_RATE
        self.optimizer = torch.optim.AdamW(
            param_groups(network), lr=rate, betas=BETAS, weight_decay=weight_decay, capturable=self.on_gpu
        )
        self._begun = [(tensor, tensor.detach().clone()) for tensor in _tensors(network, trained)]
        self._graph: torch.cuda.CUDAGraph | None = None
        if self.on_gpu and self.captures:
            self._capture()
            self.restart()

    def restart(self) -> None:
        """Network and optimizer as they were at first, in place."""
        with torch.no_grad():
            for tensor, begun in self._begun:
                tensor.copy_(begun)
            for state in self.optimizer.state.values():
                for value in state.values():
                    value.zero_()
        if self._graph is None:
            self.optimizer.zero_grad(set_to_none=True)

    def step(self, batch: Batch, rate: float) -> Tensor:
        """The batch's mean loss, which the next step overwrites."""
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        if self._graph is None:
            self.batch = batch
            self.optimizer.zero_grad(set_to_none=True)
            self._step()
        else:
            for static, given in zip(self.batch, batch, strict=True):
                static.copy_(given)
            self._graph.replay()
        return self.loss

    def _step(self) -> None:
        loss = self.losses(self.network, self.batch).mean()
        loss.backward()
        for parameter, mask in self.trained.items():
            if mask is not None:
                parameter.grad.mul_(mask)
        if self.clip is not None:
            nn.utils.clip_grad_norm_(list(self.trained), self.clip)
        self.optimizer.step()
        self.loss.copy_(loss.detach())

    def _capture(self) -> None:
        """As torch's documentation says: warm up on a side stream with next to no rate, then capture."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                self.optimizer.zero_grad(set_to_none=True)
                self._step()
        torch.cuda.current_stream().wait_stream(side)
        self.optimizer.zero_grad(set_to_none=True)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._step()


def _tensors(network: nn.Module, trained: Masks) -> Iterator[Tensor]:
    yield from trained
    yield from network.buffers()


@contextlib.contextmanager
def memory_in_use(device: torch.device) -> Iterator[dict[str, int]]:
    """Filled with the most bytes of the GPU that were in use at a time inside, above what was before; nothing on a CPU."""
    found: dict[str, int] = {}
    if device.type != "cuda":
        yield found
        return
    torch.cuda.empty_cache()  # else the pools of graphs that are gone pile up
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    yield found
    found["peak_bytes"] = torch.cuda.max_memory_allocated() - before


# ---- a repair --------------------------------------------------------------------------------------------------------


def repaired(
    problem: Problem, method: str, seed: int, *, start: float = START, rate: float | None = None
) -> dict[str, Any]:
    """What a method makes of the problem: with this learning rate, or with that which is best on held-out data, sought from
    ``start`` on.
    """
    batches = list(problem.batches(seed))
    with memory_in_use(batches[0][0].device) as memory:
        prepared = METHODS[method](problem, seed)
        facts = prepared.facts | {"parameters": prepared.parameters or prepared.facts.get("parameters", 0)}
        if not prepared.trained:
            return facts | problem.judged(prepared.network) | memory
        trainer = Trainer(prepared.network, prepared.trained, problem.losses, batches[0])

    def attempt(rate: float) -> dict[str, Any]:
        trainer.restart()
        return trained(problem, prepared, trainer, batches, rate, seed)

    found = attempt(rate) if rate is not None else climbed(attempt, start)
    return facts | found | memory


def trained(
    problem: Problem, prepared: Prepared, trainer: Trainer, batches: Sequence[Batch], rate: float, seed: int
) -> dict[str, Any]:
    """All steps with one learning rate that falls to 0, and how well it did."""
    network, growing = prepared.network, problem.growing
    control = None
    if prepared.grows:
        control = GrowthController(
            network, trainer.optimizer, tick_every=growing.tick_every, seed=seed, **growing.settings
        )
    _synchronize(trainer)
    begun, judging = time.perf_counter(), 0.0
    for done, batch in enumerate(batches):
        loss = trainer.step(batch, rate * (1 - done / len(batches)))
        if control is not None and control.step(loss) and control.ticks in growing.evaluations:
            _synchronize(trainer)
            judging -= time.perf_counter()
            control.evaluate(problem.held_out, lambda batch: problem.losses(network, batch))
            _synchronize(trainer)
            judging += time.perf_counter()
    _synchronize(trainer)
    seconds = time.perf_counter() - begun
    found = {"rate": rate, "seconds_per_step": (seconds - judging) / len(batches)}
    if control is not None:
        found |= {"evaluation_seconds": judging, **kept_of(network)}
    return found | problem.judged(network)


def _synchronize(trainer: Trainer) -> None:
    if trainer.on_gpu:
        torch.cuda.synchronize()


def climbed(attempt: Callable[[float], dict[str, Any]], start: float) -> dict[str, Any]:
    """The best attempt, with the score of each rate that was tried: from ``start`` on, always towards the better one."""
    found: dict[int, dict[str, Any]] = {}

    def score(rung: int) -> list[float]:
        if rung not in found:
            found[rung] = attempt(LADDER[rung])
        return [value if math.isfinite(value) else math.inf for value in found[rung]["score"]]

    best = min(range(len(LADDER)), key=lambda rung: abs(math.log(LADDER[rung] / start)))
    score(best)
    while True:
        neighbours = [rung for rung in (best + 1, best - 1) if 0 <= rung < len(LADDER) and rung not in found]
        better = next((rung for rung in neighbours if score(rung) < score(best)), None)
        if better is None:
            tried = {str(LADDER[rung]): found[rung]["score"] for rung in sorted(found)}
            return found[best] | {"tried": tried}
        best = better
