"""Layers side by side against the same layers one by one, whose own methods are the truth; and how much a tick launches."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from kasmina_ext import ExtendedLifecycle, GrowthController, KasminaLayer, TransitionRules, reference
from kasmina_ext.lifecycle import begins_or_ends
from kasmina_ext.optim import settle
from kasmina_ext.policy import STAY
from kasmina_ext.side_by_side import SideBySide, Sides

ANY = TransitionRules.any()
SCHEDULES = (None, "linear", "cosine")
STRATEGIES = ("multiplicative", "additive", "mixed", "affine")


def layers(shapes, device="cpu", rows=2, dtype=None) -> list[KasminaLayer]:
    """Of (features, seeds, chunking)."""
    return [
        KasminaLayer(
            nn.Linear(3, features, device=device),
            num_seeds=seeds,
            chunking=chunking,
            num_blueprints=rows,
            alpha_schedule=SCHEDULES[i % 3],
            blueprint_dtype=dtype,
        )
        for i, (features, seeds, chunking) in enumerate(shapes)
    ]


SHAPES = [(7, 3, "uniform"), (12, 4, "balanced"), (3, 5, "balanced"), (2, 4, "uniform"), (16, 1, "balanced")]


def scrambled(shapes, device, rows, dtype, seed) -> tuple[list[KasminaLayer], torch.optim.Optimizer]:
    """Everything that a request may read or write is there, and random: states, strategies, telemetry, ``.grad``, moments."""
    torch.manual_seed(seed)
    made = layers(shapes, device, rows, dtype)
    for layer in made:
        seeds = layer.num_seeds
        ids = torch.randint(-1, rows - 1, (seeds,))  # AFFINE takes two rows
        layer.extended_state.update_state(None, {"lifecycle": torch.randint(0, 11, (seeds,)), "blueprint": ids})
        layer.set_strategy(None, torch.randint(0, 4, (seeds,)))
        layer.telemetry.copy_(torch.rand(seeds, 5) * torch.randint(0, 2, (seeds, 1)))
        layer.blueprint_weights.grad = torch.randn(rows, layer.hidden_dim, device=device, dtype=dtype)
    optimizer = torch.optim.Adam([layer.blueprint_weights for layer in made])
    optimizer.step()
    for layer in made:
        layer.blueprint_weights.grad = torch.randn_like(layer.blueprint_weights)
    return made, optimizer


def everything(made, optimizer) -> list[torch.Tensor]:
    found = [tensor for layer in made for tensor in (*layer.buffers(), layer.blueprint_weights)]
    found += [layer.blueprint_weights.grad for layer in made]
    return found + [moment for layer in made for moment in layer.moments(optimizer)]


# ---- what they compute -----------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 20), st.integers(1, 24), st.sampled_from(["balanced", "uniform"])), min_size=1,
                max_size=5))  # fmt: skip
def test_owners_are_those_of_each_layer(shapes):
    """Also where features have no owner, and seeds no features."""
    made = layers(shapes)
    owner, owned = SideBySide(made).feature_owner()
    first_feature = first_seed = 0
    for layer in made:
        own = slice(first_feature, first_feature + layer.hidden_dim)
        expected = reference.feature_owner(layer.seed_offsets, layer.hidden_dim)
        assert torch.equal(owner[own] - first_seed, expected[0]) and torch.equal(owned[own], expected[1])
        first_feature, first_seed = own.stop, first_seed + layer.num_seeds
    assert len(owner) == first_feature


@pytest.mark.parametrize("rows, dtype", [(2, None), (4, torch.float64), (3, torch.bfloat16)])
@pytest.mark.parametrize("seed", range(3))
def test_requests_are_those_of_each_layer(device, rows, dtype, seed):
    """Bit for bit: states, history, alphas, banks, gradients and moments."""
    twins, (made, optimizer) = (scrambled(SHAPES, device, rows, dtype, seed) for _ in range(2))
    total = sum(layer.num_seeds for layer in made)
    targets = torch.randint(-1, 12, (total,), dtype=torch.int32, device=device)  # -1 stays, 11 is no state
    targets[torch.rand(total, device=device) < 0.4] = int(ExtendedLifecycle.GERMINATED)
    broken = torch.rand(total, device=device) < 0.2

    side = SideBySide(made)
    requested = side.request(targets, ANY)
    ended = begins_or_ends(requested.changed)
    side.make_neutral(requested, broken)
    side.forget(requested.state, ended, ended, optimizer)

    verdicts, entered = [], []
    pieces = zip(
        twins[0], *(each.split([layer.num_seeds for layer in made]) for each in (targets, broken)), strict=True
    )
    for layer, wanted, is_broken in pieces:
        before = layer.lifecycle_states.clone()
        every = torch.arange(layer.num_seeds, dtype=torch.int32, device=device)
        ids = torch.where(wanted == STAY, -1, every)
        verdicts.append(layer.request_state_transitions(ids, wanted, rules=ANY))
        now = layer.lifecycle_states
        entered.append(torch.where(now != before, now, -1))
        layer.reset_optimizer_state(twins[1], begins_or_ends(entered[-1]))
        layer._make_neutral(is_broken)
    assert torch.equal(requested.verdicts, torch.cat(verdicts)) and torch.equal(requested.changed, torch.cat(entered))
    assert (requested.changed == ExtendedLifecycle.GERMINATED).any() and ended.any()
    for found, expected in zip(everything(made, optimizer), everything(*twins), strict=True):
        assert torch.equal(found, expected)


def test_an_error_half_way_leaves_no_seed_with_weights_of_another_life():
    made = [KasminaLayer(torch.nn.Linear(4, 4), num_seeds=2, strategy="multiplicative") for _ in range(2)]
    for layer in made:
        layer.blueprint_weights.data.fill_(7.0)
    optimizer = torch.optim.Adam([layer.blueprint_weights for layer in made])

    def fails(optimizer):
        raise torch.OutOfMemoryError("no memory for it")

    made[0].moments = fails
    grow = GrowthController(
        made, optimizer, tick_every=1, watch=1, budget=1.0, policy=lambda seeds: torch.ones_like(seeds.lifecycle)
    )
    with pytest.raises(torch.OutOfMemoryError):
        grow.step()
    for layer in made:
        assert layer.lifecycle_states.eq(ExtendedLifecycle.GERMINATED).all()
        assert layer.blueprint_weights[0].eq(1).all()


def test_banks_of_other_sizes_are_other_groups():
    """What is of all layers, in their order, is spread over the groups and gathered again."""
    made = [*layers(SHAPES[:2]), *layers(SHAPES[2:3], rows=3), *layers(SHAPES[3:])]
    sides = Sides(made)
    assert [side.layers for side in sides] == [[made[0], made[1], made[3], made[4]], [made[2]]]
    joined = torch.arange(sum(layer.num_seeds for layer in made))
    spread = sides.spread(joined)
    assert spread[1].tolist() == [7, 8, 9, 10, 11] and torch.equal(sides.gather(spread), joined)


def test_groups_follow_their_layers(device):
    made = layers(SHAPES)
    sides = Sides(made)
    assert [side.device for side in sides] == [torch.device("cpu")]
    made[1].to(device)
    for side in sides:
        owner, _ = side.feature_owner()
        assert owner.device == side.device == side.layers[0].device
    assert sum(len(side.layers) for side in sides) == len(made)


# ---- what it costs ---------------------------------------------------------------------------------------------------


class Counting(TorchDispatchMode):
    """How many operators run that are more than a view."""

    VIEWS = ("detach", "t", "split", "split_with_sizes", "select", "slice", "view", "unsqueeze", "unbind")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.name().partition("::")[2].partition(".")[0] not in self.VIEWS
        return func(*args, **(kwargs or {}))


def launched(number: int, what: str) -> int:
    """In a tick, or in the optimizer's look at the seeds after it, of so many layers."""
    made = layers([(8, 2, "balanced")] * number)
    optimizer = torch.optim.Adam([layer.blueprint_weights for layer in made])
    control = GrowthController(made, optimizer, tick_every=1, watch=1, scale=0.02, budget=1.0)
    for _ in range(4):
        for layer in made:
            layer(torch.randn(5, 3)).square().mean().backward()
        optimizer.step()
        with Counting() as tick:
            control.step()
        with Counting() as look:
            settle(optimizer)
    return {"tick": tick, "look": look}[what].count


@pytest.mark.parametrize("what, most", [("tick", 20), ("look", 6)])
def test_a_layer_more_costs_little(what, most):
    """Of all that is done for a layer, only what reads or writes its own tensors is done for each."""
    few, many = launched(2, what), launched(12, what)
    assert 0 < (many - few) / 10 <= most
