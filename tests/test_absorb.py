"""Fossils go into the base layer for good: the output stays, the slot is free, all else is left alone."""

from __future__ import annotations

import pytest
import torch
from folding import ROUNDOFF, as_double, bits, effect, same
from layer_checks import everything
from torch import nn

from kasmina_ext import ExtendedLifecycle, param_groups
from kasmina_ext.fold import FoldError, absorb, fold_, unfold_
from kasmina_ext.layer import KasminaLayer

S = ExtendedLifecycle
LIVING = [S.FOSSILIZED, S.FINE_TUNING, S.FOSSILIZED, S.DORMANT, S.CULLED, S.FOSSILIZED]


def living(base=None, strategies=(3, 3, 1, 0, 2, 2), states=LIVING, seed=0, **arguments):
    """A layer of 12 features whose seeds have these states, two features each, with something in every tensor."""
    layer = KasminaLayer(base or nn.Linear(5, 12), num_seeds=6, num_blueprints=4, **arguments)
    generator = torch.Generator().manual_seed(seed)
    layer.extended_state.update_state(
        None, {"lifecycle": "grafting", "blueprint": [0, 1, 2, 0, 1, 2], "strategy": strategies}
    )
    layer.extended_state.update_state(
        None,
        {"lifecycle": list(map(int, states)), "epochs": 9, "checkpoint": 5, "error_count": 2, "evaluation_score": 1},
    )
    layer.alpha.copy_(torch.rand(6, generator=generator))
    layer.blueprint_weights.data.copy_(torch.randn(4, 12, generator=generator) * 0.5 + 1)
    layer.telemetry.copy_(torch.rand(6, 5, generator=generator) + 1)
    layer.grad_telemetry.copy_(torch.rand(6, 3, generator=generator) + 1)
    layer.performance_metrics.copy_(torch.rand(6, 4, generator=generator) + 1)
    layer.telemetry_enabled = False
    return layer


def fossil_features(layer, seeds):
    offsets = layer.seed_offsets.tolist()
    return [f for seed in seeds for f in range(offsets[seed], offsets[seed + 1])]


# ---- the output ------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("dtype", list(ROUNDOFF), ids=lambda dtype: str(dtype)[6:])
def test_the_output_stays_within_one_rounding_of_each_weight(dtype, device):
    torch.manual_seed(0)
    layer = living(nn.Linear(5, 12).to(dtype)).to(device)
    x = torch.randn(40, 5, dtype=torch.float64)
    a, b = effect(layer)
    truth = a * as_double(layer.base_layer)(x) + b
    features = fossil_features(layer, [0, 2, 5])
    others = [f for f in range(12) if f not in features]
    before = as_double(layer.base_layer)

    absorb(layer)
    after, (a, b) = as_double(layer.base_layer), effect(layer)
    error = (a * after(x) + b - truth).abs()
    step = x.abs() @ after.weight.abs().T + 2 * after.bias.abs()
    assert (error <= ROUNDOFF[dtype] * (1 + 2 * ROUNDOFF[dtype]) * step + 1e-13)[:, features].all()
    assert not error[:, others].any()
    assert torch.equal(before.weight[others], after.weight[others]) and torch.equal(
        before.bias[others], after.bias[others]
    )
    assert torch.equal(a[features], torch.ones(6).double()) and not b[features].any() and (a[others] != 1).any()


@torch.no_grad()
def test_the_forward_gives_the_same(device):
    layer = living(nn.Conv2d(3, 12, 3, bias=False)).to(device)
    x = torch.randn(2, 3, 5, 5, device=device)
    y = layer(x)
    report = absorb(layer)
    torch.testing.assert_close(layer(x), y, rtol=1e-5, atol=1e-5)
    row = report[""]
    assert row["kind"] == "Conv2d" and row["into"] == "base_layer" and row["added"] == "bias" and row["changed"] == 6
    assert "3 fossils absorbed" in str(report)
    assert layer.base_layer.bias is not None


# ---- the seeds -------------------------------------------------------------------------------------------------------


def test_the_slot_is_free_and_the_rest_is_left_alone(device):
    layer = living().to(device)
    before, bank = everything(layer), layer.blueprint_weights.detach().clone()
    absorb(layer)
    after = everything(layer)
    taken, left = [0, 2, 5], [1, 3, 4]
    for name in layer.BUFFER_DTYPES:
        if name != "seed_offsets":
            axis = 1 if name == "state" else 0
            index = torch.tensor(left, device=device)
            assert torch.equal(after[name].index_select(axis, index), before[name].index_select(axis, index)), name
    state = layer.state_tensor[taken].tolist()
    #  lifecycle, blueprint, epochs, strategy, parent, checkpoint, score, errors
    assert state == [[0, 0, 0, 3, 7, -1, 0, 0], [0, 2, 0, 1, 7, -1, 0, 0], [0, 2, 0, 2, 7, -1, 0, 0]]
    assert layer.alpha[taken].tolist() == [1.0] * 3
    for name in ("telemetry", "grad_telemetry", "performance_metrics"):
        assert not after[name][taken].any(), name
    assert layer.extended_state.get_transition_history(0)[0] == (S.FOSSILIZED, S.DORMANT)
    assert torch.equal(layer.history_count[taken].cpu(), before["history_count"][taken].cpu() + 1)

    neutral = bank.clone()
    neutral[0, 0:2], neutral[1, 0:2] = 1, 0  # seed 0: AFFINE, rows 0 and 1
    neutral[2, 4:6] = 0  # seed 2: ADDITIVE, row 2
    neutral[2, 10:12] = 0  # seed 5: MIXED, which starts at the mean of what it has seen: nothing
    assert torch.equal(layer.blueprint_weights, neutral)


def test_who_keeps_a_copy_of_the_telemetry_can_tell_that_it_began_afresh():
    """A controller subtracts what it has seen before from what there is now."""
    layer, asleep = living(), KasminaLayer(nn.Linear(5, 12), num_seeds=6)
    before = layer.telemetry_resets, asleep.telemetry_resets
    absorb(nn.ModuleList([layer, asleep]))
    assert (layer.telemetry_resets, asleep.telemetry_resets) == (before[0] + 1, before[1])


def test_an_absorbed_seed_lives_again():
    layer = living()
    with torch.no_grad():
        absorb(layer)
    x = torch.randn(6, 5)
    y = layer(x).detach()
    assert layer.request_state_transitions([0, 2], "germinated").tolist() == [0, 0]
    assert layer.request_state_transition(0, "training") and layer.request_state_transition(0, "grafting")
    torch.testing.assert_close(layer(x), y, rtol=0, atol=0)
    optimizer = torch.optim.AdamW(param_groups(layer, lr=0.1, weight_decay=0.1))
    layer(x).square().sum().backward()
    optimizer.step()
    assert (layer.blueprint_weights[0, :2] != 1).all() and layer.blueprint_weights[2, 4:6].tolist() == [0, 0]


def test_absorbed_seeds_stay_neutral_while_others_train():
    layer = living()
    optimizer = torch.optim.AdamW(param_groups(layer, lr=0.1, weight_decay=0.1))

    def train():
        for _ in range(5):
            optimizer.zero_grad()
            layer(torch.randn(6, 5)).square().sum().backward()
            optimizer.step()

    train()
    absorb(layer)
    bank = layer.blueprint_weights.detach().clone()
    train()
    assert torch.equal(layer.blueprint_weights[:, [0, 1, 4, 5, 10, 11]], bank[:, [0, 1, 4, 5, 10, 11]])
    assert not torch.equal(layer.blueprint_weights[1, 2:4], bank[1, 2:4])


@torch.no_grad()
@pytest.mark.parametrize("seeds", [2, [2], torch.tensor([2]), torch.arange(6) == 2, slice(2, 3), {"": [2]}], ids=str)
def test_one_at_a_time(seeds):
    layer = living()
    x = torch.randn(3, 5)
    y, before = layer(x), everything(layer)
    report = absorb(layer, seeds)
    torch.testing.assert_close(layer(x), y)
    assert layer.lifecycle_states.tolist() == [7, 6, 0, 0, 8, 7] and report[""]["changed"] == 2
    weight = layer.base_layer.weight
    assert torch.equal(weight, before["base_layer.weight"])  # it adds: only the bias changes
    assert (layer.base_layer.bias != before["base_layer.bias"]).nonzero().flatten().tolist() == [4, 5]


@torch.no_grad()
def test_fossils_without_a_blueprint_are_freed_too():
    layer = living()
    layer.blueprint_ids = torch.tensor([99, 1, -1, 0, 1, 99])
    before = everything(layer)
    report = absorb(layer)
    assert layer.lifecycle_states.tolist() == [0, 6, 0, 0, 8, 0]
    assert report[""]["changed"] == 0 and report[""]["into"] == ""
    for name in ("base_layer.weight", "base_layer.bias", "blueprint_weights"):
        assert torch.equal(layer.state_dict()[name], before[name])


def test_nothing_to_absorb():
    layer = living(states=[S.FINE_TUNING] * 6)
    before = bits(layer)
    assert absorb(layer) == {} and same(bits(layer), before)
    with pytest.raises(ValueError, match="no KasminaLayer"):
        absorb(nn.Linear(2, 2))


# ---- a model ---------------------------------------------------------------------------------------------------------


def network():
    return nn.Sequential(
        living(nn.Linear(5, 12), seed=1), nn.ReLU(), living(nn.Sequential(nn.Linear(12, 12), nn.Identity()), seed=2)
    )


@torch.no_grad()
def test_a_whole_model_or_named_layers():
    model = network()
    x = torch.randn(4, 5)
    y = model(x)
    first = everything(model[0])
    assert list(absorb(model, {"2": [0, 5]})) == ["2"]
    torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(t, first[n]) for n, t in model[0].state_dict().items())
    assert model[2].lifecycle_states.tolist() == [0, 6, 7, 0, 8, 0]
    report = absorb(model)
    assert list(report) == ["0", "2"] and report["2"]["into"] == "2.base_layer.0"
    torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-5)
    fold_(model)
    torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-5)


def test_seeds_that_cannot_be_meant():
    model = network()
    with pytest.raises(ValueError, match="must be a dict of layers' names"):
        absorb(model, [0])
    with pytest.raises(ValueError, match="no layer named '1'; there are '0', '2'"):
        absorb(model, {"1": [0]})
    with pytest.raises(ValueError, match=r"only FOSSILIZED .* '2' are not: \[1, 3\]"):
        absorb(model, {"2": [0, 1, 3]})
    with pytest.raises(ValueError, match="seed_ids must be in"):
        absorb(model, {"2": [6]})


def test_all_or_nothing():
    model = nn.ModuleList([living(), living(nn.RMSNorm(12))])
    before = bits(model)
    with pytest.raises(FoldError, match=r"cannot absorb, and nothing was changed:\n  1: RMSNorm: it has no bias"):
        absorb(model)
    assert same(bits(model), before)
    tied = nn.ModuleList([living(nn.Linear(12, 12)), nn.Linear(12, 12)])
    tied[1].weight = tied[0].base_layer.weight
    with pytest.raises(FoldError, match="its weight is tied: 1.weight"):
        absorb(tied)


def test_a_parametrized_bank_cannot_be_made_neutral():
    class Twice(nn.Module):
        def forward(self, w):
            return 2 * w

    layer = living()
    nn.utils.parametrize.register_parametrization(layer, "blueprint_weights", Twice())
    before = bits(layer)
    with pytest.raises(FoldError, match="blueprint_weights is parametrized"):
        absorb(layer)
    assert same(bits(layer), before)


@torch.no_grad()
def test_layers_around_layers():
    """An outer fossil passes through an inner layer's seed that sleeps, or is absorbed with it, but not a live one."""

    def nested(inner_states):
        inner = living(nn.Linear(5, 12), states=inner_states, seed=1)
        return living(inner, states=[S.FOSSILIZED, S.DORMANT, S.DORMANT, S.FOSSILIZED, S.DORMANT, S.DORMANT], seed=2)

    x = torch.randn(3, 5)
    together = nested([S.FOSSILIZED, S.FINE_TUNING, S.FINE_TUNING, S.DORMANT, S.DORMANT, S.FOSSILIZED])
    y = together(x)
    assert absorb(together)[""]["into"] == "base_layer.base_layer"
    torch.testing.assert_close(together(x), y, rtol=1e-5, atol=1e-5)
    assert together.base_layer.lifecycle_states.tolist() == [0, 6, 6, 0, 0, 0]
    assert not together.lifecycle_states.any()

    live = nested([S.DORMANT, S.DORMANT, S.DORMANT, S.FINE_TUNING, S.DORMANT, S.DORMANT])
    before = bits(live)
    with pytest.raises(FoldError, match="live seeds of base_layer lie in between"):
        absorb(live)
    assert same(bits(live), before)
    y = live(x)
    absorb(live, 0)  # over features where nothing lives below
    torch.testing.assert_close(live(x), y, rtol=1e-5, atol=1e-5)


def test_a_base_that_absorbed_is_no_longer_what_was_folded():
    base = nn.Linear(5, 12)
    model = nn.Sequential(living(base))
    fold_(model)
    model[0] = living(base, seed=4)
    absorb(model)
    with pytest.raises(FoldError, match="has changed since it was folded"):
        unfold_(model)
