"""What is written for seeds, alphas and rules, and is none; and a handle whose seeds have gone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kasmina_ext import GraftingStrategy, Verdict, fold_, graft_, ungraft_
from kasmina_ext.lifecycle import TransitionRules


def two_layers():
    """6 seeds."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    return model, graft_(model, "*", chunk_size=2, table=False)


@pytest.mark.parametrize("number", [10**30, -(10**30), 2**63, [0, 2**64]])
def test_numbers_beyond_any_tensor(number):
    _, seeds = two_layers()
    with pytest.raises(IndexError, match=r"there are 6 seeds, there is no number .*\d\d"):
        seeds[number]


@pytest.mark.parametrize("kind", [list, tuple, iter, torch.tensor, lambda values: (value for value in values)])
def test_one_alpha_for_each(kind):
    _, seeds = two_layers()
    values = [0.0, 0.25, 0.5, 0.75, 1.0, 0.125]
    assert seeds[:].germinate(alpha=kind(values))
    assert seeds[:].alpha.tolist() == values


@pytest.mark.parametrize(
    "settings, error, message",
    [
        ({"alpha": "half"}, TypeError, r"alpha must be a number in \[0, 1\] or one for each seed"),
        ({"alpha": 1j}, TypeError, "alpha must be a number"),
        ({"alpha": [[0.5], [0.5, 0.5]]}, TypeError, "alpha must be a number"),
        ({"alpha": iter([0.5] * 5)}, ValueError, "5 values of alpha for 6 seeds"),
        ({"alpha": (value for value in [0.5] * 5 + [2.0])}, ValueError, r"alpha must be in \[0, 1\], got 2.0"),
        ({"rules": "strict"}, TypeError, r"rules must be TransitionRules, as TransitionRules.strict\(\), got str"),
        ({"rules": TransitionRules}, TypeError, "rules must be TransitionRules, .* got type"),
        ({"rules": torch.zeros(11, 11)}, TypeError, "rules must be TransitionRules, .* got Tensor"),
    ],
)
def test_what_is_none_changes_nothing(settings, error, message):
    model, seeds = two_layers()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(error, match=message):
        seeds[:].germinate(**settings)
    if "rules" in settings:
        for request in (seeds[:].graft, seeds[:].fossilize, seeds[:].cull):
            with pytest.raises(error, match=message):
                request(**settings)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_strategy_s_number_is_judged_and_its_name_is_read():
    _, seeds = two_layers()
    with pytest.raises(ValueError, match="unknown grafting strategy 'xor'"):
        seeds[:].germinate("xor")
    verdicts = seeds[:].germinate([9, -1, *GraftingStrategy])
    assert list(verdicts) == [Verdict.STRATEGY_OUT_OF_RANGE] * 2 + [Verdict.APPLIED] * 4
    assert seeds[:].state.tolist() == [0, 0, 1, 1, 1, 1]


def test_a_selection_follows_a_model_that_moves(device):
    model, seeds = two_layers()
    chosen = seeds[[5, 0, 2]]
    model.to(device)
    verdicts = chosen.germinate(alpha=[0.5, 0.25, 1.0])
    assert verdicts and verdicts.codes.device == chosen.state.device == model[0].device
    assert chosen.alpha.tolist() == [0.5, 0.25, 1.0] and chosen.state.tolist() == [1, 1, 1]
    model.to("meta")
    assert {part.local.device.type for part in chosen.parts} == {chosen.cull().codes.device.type} == {"meta"}


@pytest.mark.parametrize("away", [fold_, ungraft_])
def test_a_handle_whose_seeds_have_gone_can_be_shown(away):
    model, seeds = two_layers()
    assert repr(seeds) == "Seeds(6 seeds of 2 layers)"
    away(model)
    assert repr(seeds) == f"{seeds}" == "Seeds(0 seeds of 0 layers)"
    with pytest.raises(ValueError, match="no KasminaLayer"):
        seeds.states()
