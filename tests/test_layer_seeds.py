"""Changing seeds: requests through the gate, the direct helpers, and what a change does to the bank and to alpha."""

from __future__ import annotations

import pytest
import torch
from layer_checks import LIFE, assert_unchanged, everything, four_seeds
from torch import nn

from kasmina_ext import telemetry
from kasmina_ext.layer import KasminaLayer, TritonChunkedKasminaLayer
from kasmina_ext.lifecycle import ExtendedLifecycle, LifecycleManager


@pytest.fixture
def layer(device):
    return four_seeds(device)


def test_a_whole_life(layer):
    for name in LIFE:
        if name == "evaluating":
            assert not layer.request_state_transition(2, name)
            for _ in range(5):
                layer.extended_state.increment_epochs(2)
        assert layer.request_state_transition(2, name) is True
    states = [0, *(int(ExtendedLifecycle.parse(name)) for name in LIFE)]
    path = list(zip(states, states[1:], strict=False))
    assert layer.extended_state.get_transition_history(2) == path[::-1]
    assert layer.state[:, 2].tolist() == [7, 0, 0, 0, 6, -1, 0, 0]
    assert layer.lifecycle_states.tolist() == [0, 0, 7, 0]
    assert layer.get_active_seed_count() == 1
    assert not layer.request_state_transition(2, "dormant")


def test_refused_requests_change_nothing(layer):
    before = everything(layer)
    for target in range(11):
        if target != 1:
            assert layer.request_state_transition(0, target) is False
    assert_unchanged(layer, before)


@pytest.mark.parametrize(
    ("seed", "target", "metadata", "error", "message"),
    [
        (4, 1, None, ValueError, r"seed_id must be in \[0, 4\), got 4"),
        (-1, 1, None, ValueError, "got -1"),
        (2**100, 1, None, ValueError, "seed_id must be in"),
        (1.0, 1, None, TypeError, "seed_id must be an integer, got float"),
        ("0", 1, None, TypeError, "seed_id must be an integer, got str"),
        (True, 1, None, TypeError, "got bool"),
        (None, 1, None, TypeError, "got NoneType"),
        (0, 11, None, ValueError, "unknown lifecycle state 11"),
        (0, "asleep", None, ValueError, "unknown lifecycle state 'asleep'"),
        (0, None, None, TypeError, "lifecycle state"),
        (0, 1, {"blueprint": 10}, ValueError, r"BLUEPRINT_ID must be in \[-1, 9\], got 10"),
        (0, 1, {"blueprint_id": -2}, ValueError, "got -2"),
        (0, 1, {"blueprint": 1, "blueprint_id": 2}, ValueError, "named twice"),
        (0, 1, {"strategy": "conv"}, ValueError, "unknown grafting strategy 'conv'"),
        (0, 1, {"grafting_strategy": 4}, ValueError, "unknown grafting strategy 4"),
        (0, 1, {"strategy": "affine", "blueprint": 9}, ValueError, "AFFINE takes the rows p and p"),
        (0, 1, {"epochs": -1}, ValueError, "EPOCHS_IN_STATE must be"),
        (0, 3, {"blueprint": 10}, ValueError, "BLUEPRINT_ID"),
    ],
)
def test_bad_requests_change_nothing(layer, seed, target, metadata, error, message):
    before = everything(layer)
    with pytest.raises(error, match=message):
        layer.request_state_transition(seed, target, metadata)
    assert_unchanged(layer, before)


def test_metadata_is_written_with_the_transition(layer):
    given = {"blueprint_id": 6, "grafting_strategy": "additive", "epochs_in_state": 40, "note": "mine"}
    assert layer.request_state_transition(1, "germinated", given)
    assert layer.state[:, 1].tolist() == [1, 6, 40, 1, 0, -1, 0, 0]
    assert layer.request_state_transition(1, 2, {"epochs": 0, "blueprint": None})
    assert layer.state[:, 1].tolist() == [2, 6, 0, 1, 1, -1, 0, 0]


def test_gate_sees_metrics_and_errors(layer):
    seen = []
    layer.lifecycle_manager.validators[ExtendedLifecycle.TRAINING] = lambda made: seen.append(made) or False
    layer.request_state_transition(3, 1)
    layer.extended_state.increment_error_count([3, 3])
    layer.extended_state.increment_epochs(3)
    metadata = {"performance_metrics": {"loss": 0.5}, "why": "test"}
    assert layer.request_state_transition(3, 2, metadata) is False
    [made] = seen
    assert (made.seed_id, made.current_state, made.target_state) == (3, 1, 2)
    assert (made.epochs_in_state, made.error_count) == (1, 2)
    assert made.performance_metrics == {"loss": 0.5} and made.metadata["why"] == "test"
    layer.lifecycle_manager = LifecycleManager()
    assert layer.request_state_transition(3, 2)
    assert not layer.request_state_transition(3, 3, {"performance_metrics": {"training_loss": 2.0}})
    assert not layer.request_state_transition(3, 3, {"training_loss": 1.0})
    assert layer.request_state_transition(3, 3, {"training_loss": 0.5})


def test_a_seed_in_no_state_can_go_nowhere(layer):
    layer.lifecycle_states[0] = 42
    before = everything(layer)
    assert not any(layer.request_state_transition(0, target) for target in range(11))
    assert_unchanged(layer, before)


# ---- neutral germination -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "blueprint", "rows"),
    [("multiplicative", 9, {9: 1.0}), ("additive", 3, {3: 0.0}), ("affine", 4, {4: 1.0, 5: 0.0})],
)
def test_germination_writes_the_neutral_slice_and_nothing_else(layer, strategy, blueprint, rows):
    before = layer.blueprint_weights.detach().clone()
    assert layer.request_state_transition(2, 1, {"strategy": strategy, "blueprint": blueprint})
    expected = before.clone()
    for row, value in rows.items():
        expected[row, 10:15] = value
    assert torch.equal(layer.blueprint_weights, expected)


def test_mixed_germinates_at_the_mean_of_what_it_saw(layer, device):
    assert layer.request_state_transition(0, 1, {"strategy": "mixed", "blueprint": 2})
    assert layer.blueprint_weights[2, :5].tolist() == [0.0] * 5
    x = torch.randn(50, 5, device=device)
    layer(x)
    assert layer.request_state_transition(1, 1, {"strategy": "mixed", "blueprint": 2})
    mean = layer.base_layer(x)[:, 5:10].double().mean().float()
    torch.testing.assert_close(layer.blueprint_weights[2, 5:10], mean.expand(5))


def test_germination_can_keep_the_blueprint(layer):
    before = layer.blueprint_weights.detach().clone()
    assert layer.request_state_transition(2, 1, {"blueprint": 7, "keep_blueprint": True})
    assert torch.equal(layer.blueprint_weights, before)
    assert int(layer.blueprint_ids[2]) == 7


def test_a_blueprint_that_was_chosen_before_stays(layer):
    layer.set_blueprint(2, 5, "additive")
    assert layer.request_state_transition(2, 1)
    assert layer.state[:4, 2].tolist() == [1, 5, 0, 1]
    assert layer.blueprint_weights[5, 10:15].tolist() == [0.0] * 5


def test_the_unowned_tail_and_empty_seeds_are_left_alone(device):
    layer = TritonChunkedKasminaLayer(nn.Linear(2, 7, device=device), 3)
    before = layer.blueprint_weights.detach().clone()
    for seed in range(3):
        layer.request_state_transition(seed, 1)
    assert torch.equal(layer.blueprint_weights[:, 6:], before[:, 6:])
    assert layer.blueprint_weights[0, :6].tolist() == [1.0] * 6
    crowded = TritonChunkedKasminaLayer(nn.Linear(2, 2, device=device), 4)
    before = crowded.blueprint_weights.detach().clone()
    assert crowded.request_state_transition(3, 1)
    assert torch.equal(crowded.blueprint_weights, before)


@pytest.mark.parametrize("strategy", ["multiplicative", "additive", "affine"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_growth_preserves_the_function_bit_for_bit(device, strategy, dtype):
    base = nn.Identity().to(device)
    layer = TritonChunkedKasminaLayer(base, 4, device, hidden_dim=16, strategy=strategy)
    x = torch.randn(9, 16, device=device).to(dtype)
    x[0, ::2], x[1, ::3] = -0.0, 0.0
    before = layer(x).clone()
    layer.set_alpha(None, [0.0, 0.3, 0.7, 1.0])
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    for seed in range(4):
        for name in LIFE[:3]:
            assert layer.request_state_transition(seed, name)
            assert torch.equal(layer(x).view(bits), before.view(bits))


@pytest.mark.parametrize("end", ["rolled_back", "culled"])
def test_the_end_of_a_graft_gives_the_old_output_back(layer, device, end):
    x = torch.randn(6, 5, device=device)
    before = layer(x).clone()
    for name in LIFE[:3]:
        layer.request_state_transition(1, name, {"keep_blueprint": True})
    assert not torch.equal(layer(x), before)
    if end == "culled":
        layer.extended_state.set_state(1, "evaluating")
    assert layer.request_state_transition(1, end)
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize(("schedule", "alphas"), [(None, [0.5, 0.5]), ("cosine", [0.0, 1.0])])
def test_alpha_at_the_ends_of_a_scheduled_graft(device, schedule, alphas):
    layer = KasminaLayer(nn.Linear(4, 8, device=device), num_seeds=2, alpha_schedule=schedule)
    layer.set_alpha(1, 0.5)
    layer.request_state_transition(1, 1)
    layer.request_state_transition(1, 2)
    assert layer.alpha.tolist() == [1.0, 0.5]
    for target, alpha in zip((3, 4), alphas, strict=True):
        assert layer.request_state_transition(1, target)
        assert layer.alpha.tolist() == [1.0, alpha]


def test_a_transition_between_forward_and_backward_is_an_error(layer, device):
    loss = layer(torch.randn(3, 5, device=device)).sum()
    assert layer.request_state_transition(0, 1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---- direct helpers ----------------------------------------------------------------------------------


def test_alpha_for_one_some_and_all(layer):
    layer.set_alpha(1, 0.25)
    layer.set_alpha([0, 3], torch.tensor([0.0, 0.5]))
    assert layer.alpha.tolist() == [0.0, 0.25, 1.0, 0.5]
    layer.set_alpha(None, 0.75)
    assert layer.alpha.tolist() == [0.75] * 4
    layer.set_alpha(torch.tensor([True, False, False, True]), 1)
    assert layer.alpha.tolist() == [1.0, 0.75, 0.75, 1.0]


@pytest.mark.parametrize("alpha", [-0.01, 1.01, float("nan"), float("inf"), [0.5, 2.0], [0.1, 0.2, 0.3]])
def test_bad_alpha_changes_nothing(layer, alpha):
    before = everything(layer)
    with pytest.raises(ValueError, match="alpha"):
        layer.set_alpha([0, 1], alpha)
    assert_unchanged(layer, before)


@pytest.mark.parametrize("seeds", [4, [0, 9], -1, torch.tensor([5])])
def test_bad_seeds_change_nothing(layer, seeds):
    before = everything(layer)
    for change in (
        lambda: layer.set_alpha(seeds, 0.5),
        lambda: layer.set_blueprint(seeds, 1),
        lambda: layer.set_strategy(seeds, 1),
    ):
        with pytest.raises(ValueError, match=r"must be in \[0, 4\)"):
            change()
    assert_unchanged(layer, before)


def test_blueprint_and_strategy(layer):
    bank = layer.blueprint_weights.detach().clone()
    layer.set_blueprint([0, 1], [3, 8], ["affine", 3])
    layer.set_strategy(2, "mixed")
    layer.set_blueprint(0, -1)
    assert layer.blueprint_ids.tolist() == [-1, 8, -1, -1]
    assert layer.grafting_strategies.tolist() == [3, 3, 2, 0]
    assert torch.equal(layer.blueprint_weights, bank) and not layer.lifecycle_states.any()


def test_a_pair_that_ends_outside_the_bank(layer):
    layer.set_blueprint(0, 9)
    before = everything(layer)
    for change in (
        lambda: layer.set_strategy([1, 0], "affine"),
        lambda: layer.set_blueprint(1, 9, "affine"),
        lambda: layer.set_blueprint(1, 10),
        lambda: layer.set_strategy(1, "none"),
    ):
        with pytest.raises(ValueError, match="AFFINE takes|BLUEPRINT_ID|unknown grafting strategy"):
            change()
    assert_unchanged(layer, before)


def test_extended_state_holds_nothing_of_its_own(layer):
    held = layer.extended_state
    held.update_state(1, {"lifecycle": 3, "blueprint": 2})
    assert int(layer.lifecycle_states[1]) == 3
    layer.to("meta")
    assert held.device.type == "meta"
    layer.to_empty(device="cpu")
    layer.reset_parameters()
    held.set_state(0, 4)
    assert layer.lifecycle_states.tolist() == [4, 0, 0, 0]
    with pytest.raises(ValueError, match=r"BLUEPRINT_ID must be in \[-1, 9\]"):
        held.update_blueprint(0, 10)


# ---- where to grow -----------------------------------------------------------------------------------


def test_potential_is_the_squared_gradient_of_a_neutral_blueprint(device):
    base = nn.Linear(3, 8, device=device, dtype=torch.float64)
    layer = KasminaLayer(base, num_seeds=4, num_blueprints=2)
    layer.set_strategy(None, ["multiplicative", "additive", "mixed", "affine"])
    assert telemetry.potential(layer).isnan().all()
    sums = []
    for _ in range(3):
        x, weight = torch.randn(5, 3, device=device).double(), torch.randn(5, 8, device=device).double()
        (layer(x) * weight).sum().backward()
        u, v = (weight * base(x)).sum(0).detach(), weight.sum(0)
        sums.append(torch.stack([u.square().view(4, 2).sum(1), v.square().view(4, 2).sum(1)]))
    u2, v2 = torch.stack(sums).mean(0)
    expected = torch.stack([u2[0], v2[1], v2[2], u2[3] + v2[3]])
    torch.testing.assert_close(telemetry.potential(layer), expected, rtol=1e-12, atol=1e-12)
    layer.grafting_strategies[0] = 77
    assert telemetry.potential(layer).isnan().tolist() == [True, False, False, False]


def test_reduce(device):
    layer = KasminaLayer(nn.Linear(3, 8, device=device), num_seeds=2)
    assert telemetry.reduce(layer).isnan().all()
    x = torch.randn(50, 3, device=device)
    layer(x)
    first = layer.base_layer(x)[:, :4].double()
    expected = [first.mean(), first.var(correction=0), first.std(correction=0)]
    assert telemetry.reduce(layer)[0].tolist() == pytest.approx([v.item() for v in expected], rel=1e-5)
    assert torch.equal(telemetry.reduce(layer.telemetry), telemetry.reduce(layer))
