"""A small network with every kind of seed and a life of theirs, run twice and compared; for the tests of PyTorch's stacks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from kasmina_ext import KasminaLayer, TransitionRules, param_groups

STATES, STRATEGIES = 11, 4
SEEDS, INPUTS, OUTPUTS = STATES * STRATEGIES, 6, 3
ANY = TransitionRules.any()


class Net(nn.Module):
    """A grown layer between two ordinary ones: a seed for each state and strategy, of two features each."""

    def __init__(self, device: torch.device, dtype: torch.dtype = torch.float64, **options) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.grown = KasminaLayer(
            nn.Linear(INPUTS, 2 * SEEDS, device=device, dtype=dtype),
            num_seeds=SEEDS,
            num_blueprints=4,
            alpha_schedule="linear",
            ramp_epochs=3,
            auto_advance=True,
            **options,
        )
        self.head = nn.Linear(2 * SEEDS, OUTPUTS, device=device, dtype=dtype)
        grow(self.grown)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.grown(x).tanh())


def grow(layer: KasminaLayer) -> None:
    """All states with all strategies (as far as there are seeds), weights near neutral, alpha anywhere."""
    seeds, bank = torch.arange(layer.num_seeds), layer.blueprint_weights
    strategies = seeds // STATES % STRATEGIES
    verdicts = layer.request_state_transitions(seeds, seeds % STATES, seeds % 3, strategies, rules=ANY)
    assert not verdicts.any()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        bank.copy_(1 + 0.2 * torch.randn(bank.shape, generator=generator, dtype=torch.float64))
        layer.alpha.copy_(torch.rand(layer.num_seeds, generator=generator))


def turn(layer: KasminaLayer, step: int) -> None:
    """What happens to the seeds between two steps: every one goes on to its next state, or the ended ones start afresh."""
    if step % 4 == 3:
        layer.recycle()
    else:
        seeds = torch.arange(layer.num_seeds, device=layer.device)
        layer.request_state_transitions(seeds, (seeds + step + 1) % STATES, rules=ANY)
    layer.step_lifecycle()


@dataclass
class Life:
    """What a training run saw and left behind."""

    losses: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    left: dict[str, Tensor] = field(default_factory=dict)
    seen: set[tuple[int, int]] = field(default_factory=set)  # (state, strategy) of some forward
    alphas: set[float] = field(default_factory=set)  # of seeds in GRAFTING


def live(
    net: Net,
    forward: Callable[[Tensor], Tensor],
    rows: list[int],
    change: Callable[[KasminaLayer, int], None] = turn,
) -> Life:
    """A step of training for each number of rows, through ``forward``; between them, the seeds change."""
    layer, life = net.grown, Life()
    device, dtype = net.head.weight.device, net.head.weight.dtype
    data = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(param_groups(net, lr=0.01))
    for step, batch in enumerate(rows):
        x = torch.randn(batch, INPUTS, generator=data, dtype=torch.float64).to(device, dtype)
        life.seen |= set(zip(layer.lifecycle_states.tolist(), layer.grafting_strategies.tolist(), strict=True))
        life.alphas |= set(layer.alpha[layer.lifecycle_states == 3].tolist())
        optimizer.zero_grad()
        y = forward(x)
        loss = (y.double() - 0.5).square().mean()
        loss.backward()
        optimizer.step()
        change(layer, step)
        life.losses.append(loss.detach().clone())
        life.outputs.append(y.detach().clone())
    life.left = {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}
    return life


def twins(device: torch.device, dtype: torch.dtype = torch.float64, **options) -> tuple[Net, Net]:
    net = Net(device, dtype, **options)
    return net, copy.deepcopy(net)


def assert_same_life(got: Life, expected: Life, rtol: float = 1e-9, atol: float = 1e-11) -> None:
    """Integers and counts exactly, all else to rounding: float64 throughout, which a dozen steps may amplify."""
    for name in expected.left:
        compare(name, got.left[name], expected.left[name], rtol, atol)
    for number, (first, second) in enumerate(zip(got.outputs, expected.outputs, strict=True)):
        compare(f"output {number}", first, second, rtol, atol)
    compare("losses", torch.stack(got.losses), torch.stack(expected.losses), rtol, atol)


def compare(name: str, got: Tensor, expected: Tensor, rtol: float, atol: float) -> None:
    torch.testing.assert_close(got, expected, rtol=rtol, atol=atol, equal_nan=True, msg=lambda m: f"{name}: {m}")


def assert_counted_once(layer: KasminaLayer, forwards: int, backwards: int) -> None:
    batches, measured = layer.telemetry[:, 3], layer.grad_telemetry[:, 2]
    assert batches.eq(forwards).all(), f"{batches.unique().tolist()} batches counted, {forwards} seen"
    assert measured.eq(backwards).all(), f"{measured.unique().tolist()} backwards counted, {backwards} made"
