"""The handle on the seeds of a model: which there are, what is asked of some of them, and reports."""

from __future__ import annotations

import copy
import math
import pickle
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from kasmina_ext import (
    ExtendedLifecycle,
    GraftingStrategy,
    GrowthController,
    KasminaLayer,
    Seeds,
    TransitionRules,
    Verdict,
    graft_,
    param_groups,
    potential,
)
from kasmina_ext.measure import roots_of, seed_layers
from kasmina_ext.state_layout import StateVar

S = ExtendedLifecycle
AT_ONCE = TransitionRules.strict().scaled(0)


def three_layers(device="cpu", **settings):
    """18 seeds: 5, 12 and 1."""
    model = nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 23), nn.Linear(23, 2)).to(device)
    return graft_(model, "*", chunk_size=2, table=False, **settings)


def everything(seeds):
    return [tensor.clone() for layer in seeds for tensor in (*layer.buffers(), layer.blueprint_weights)]


def unchanged(seeds, before):
    return all(map(torch.equal, everything(seeds), before))


# ---- what there is ---------------------------------------------------------------------------------------------------


def test_a_handle():
    seeds = three_layers()
    model = seeds.model
    layers = [model[0], model[2], model[3]]
    assert list(seeds) == layers and seeds.layers == {"0": layers[0], "2": layers[1], "3": layers[2]}
    assert len(seeds) == 18 and repr(seeds) == "Seeds(18 seeds of 3 layers)"
    for same in (Seeds(model), Seeds.of(model), Seeds(seeds)):
        assert same.layers == seeds.layers and same.model is model and same.skipped == {}
    for several in (layers[1:], tuple(layers[1:]), iter(layers[1:])):
        some = Seeds(several)
        assert list(some.layers) == ["0", "1"] and list(some) == layers[1:] and some.model is None
    named = Seeds({"wide": layers[1]})
    assert list(named.layers) == ["wide"] and len(named) == 12 and named.model is None
    assert Seeds(layers[2]).layers == {"": layers[2]} and Seeds(layers[2]).model is layers[2]
    assert roots_of(seeds) == {"": model} and seed_layers(seeds) == seeds.layers
    with pytest.raises(ValueError, match="there is no KasminaLayer"):
        Seeds(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="layers must be"):
        Seeds(3)


def test_tensors_of_all_seeds(device):
    seeds = three_layers(device)
    layers = list(seeds)
    assert seeds.potential().isnan().all() and seeds.states().eq(0).all()
    layers[1].request_state_transitions([3, 4], "germinated")
    seeds.model(torch.randn(7, 4, device=device)).square().sum().backward()
    states, received = seeds.states(), seeds.potential()
    assert states.dtype == torch.int32 and states.nonzero().flatten().tolist() == [8, 9]
    assert received.dtype == torch.float64 and received.device.type == device.type
    assert torch.equal(received, torch.cat([potential(layer) for layer in layers]))
    assert torch.equal(potential(seeds), received) and received.gt(0).all()
    states.zero_()
    assert layers[1].lifecycle_states[3] == 1  # a copy
    with pytest.raises(TypeError, match="since is of one layer"):
        potential(seeds, layers[0].grad_telemetry)


# ---- which of them ---------------------------------------------------------------------------------------------------


@given(st.data())
@settings(deadline=None, max_examples=80)
def test_numbers_are_those_of_a_list(data):
    seeds = three_layers()
    numbers = list(range(18))
    ids = data.draw(st.lists(st.integers(-18, 17), max_size=20))
    mask = data.draw(st.lists(st.booleans(), min_size=18, max_size=18))
    bounds = st.none() | st.integers(-25, 25)
    cut = slice(data.draw(bounds), data.draw(bounds), data.draw(st.none() | st.integers(-4, 4).filter(bool)))
    kind = data.draw(st.sampled_from([list, tuple, torch.tensor, np.array, iter, lambda x: torch.tensor(x).int()]))
    expected = [numbers[i] for i in ids]
    selection = seeds[kind(ids) if ids else ids]
    assert selection.ids.tolist() == expected and len(selection) == len(ids)
    assert seeds[cut].ids.tolist() == numbers[cut]
    chosen = [i for i, wanted in enumerate(mask) if wanted]
    assert seeds[mask].ids.tolist() == seeds[torch.tensor(mask)].ids.tolist() == chosen
    # Each is asked of the right seed of the right layer.
    before = seeds.states()
    selection.germinate()
    changed = (seeds.states() != before).nonzero().flatten().tolist()
    assert changed == sorted(set(expected))
    assert selection.state.tolist() == seeds.states()[selection.ids].tolist()


def test_names_and_single_seeds():
    seeds = three_layers()
    assert seeds[3].ids.tolist() == seeds[np.int64(3)].ids.tolist() == seeds[torch.tensor(3)].ids.tolist() == [3]
    assert seeds["2"].ids.tolist() == list(range(5, 17)) and seeds["[03]"].ids.tolist() == [0, 1, 2, 3, 4, 17]
    assert seeds[seeds["3"]].ids.tolist() == [17] and repr(seeds["*"]) == "Selection(18 seeds of 3 layers)"
    inner = Seeds(KasminaLayer(seeds.model, hidden_dim=2))
    assert seeds["3"].parts[0].layer is inner["3"].parts[0].layer is inner["base_layer.3"].parts[0].layer


def test_names_are_the_same_whatever_wraps_modules():
    """torch.compile, activation checkpointing; a layer around a layer keeps its own name."""
    seeds = three_layers()
    control = GrowthController(seeds)
    model = seeds.model
    model[2] = checkpoint_wrapper(model[2])
    model[3] = torch.compile(KasminaLayer(model[3], hidden_dim=2), backend="eager")
    wrapped = Seeds(torch.compile(model, backend="eager"))
    assert list(wrapped.layers) == ["0", "2", "3", "3.base_layer"]
    model[3] = model[3]._orig_mod.base_layer
    assert list(wrapped.layers) == list(seeds.layers) == ["0", "2", "3"]
    with pytest.warns(UserWarning, match="driven by another controller"):
        GrowthController(wrapped).load_state_dict(control.state_dict())


@pytest.mark.parametrize(
    "key, error, message",
    [
        (18, IndexError, "there are 18 seeds, there is no number 18"),
        (-19, IndexError, "no number -19"),
        ([0, 99], IndexError, "no number 99"),
        (torch.tensor([2**40]), IndexError, "no number 1099511627776"),
        ([True] * 17, IndexError, "a mask of seeds must have length 18, got 17"),
        ("mlp", KeyError, "no layer matches 'mlp'; there are '0', '2', '3'"),
        (1.0, TypeError, "by numbers, a mask, a slice or a layer's name, got float"),
        ([1.0], TypeError, "seeds must be integers, got float32"),
        (None, TypeError, "got NoneType"),
        (True, TypeError, "got bool"),
        (["0"], TypeError, "seeds must be integers"),
    ],
)
def test_seeds_that_do_not_exist(key, error, message):
    with pytest.raises(error, match=message):
        three_layers()[key]


# ---- requests --------------------------------------------------------------------------------------------------------


def reference(state, epochs, request, rules):
    """What becomes of one seed: the state after it, and the verdict. By looking at the rules, state by state."""
    least = {(a, b): rules.least_epochs(a, b) for a in S for b in S}
    if request == "recycle":
        return (S.DORMANT, Verdict.APPLIED) if state in (8, 9, 10) else (state, Verdict.ILLEGAL_TRANSITION)
    if request == "cull":
        ways = [to for to in (S.CULLED, S.ROLLED_BACK, S.CANCELLED) if least[state, to] is not None]
        for to in ways:
            if epochs >= least[state, to]:
                return to, Verdict.APPLIED
        return state, Verdict.TOO_FEW_EPOCHS if ways else Verdict.ILLEGAL_TRANSITION
    start, target = {
        "germinate": (S.DORMANT, S.GERMINATED), "graft": (S.DORMANT, S.GRAFTING), "fossilize": (S.GRAFTING, S.FOSSILIZED),
    }.get(request, (S.DORMANT, request))  # fmt: skip
    if not start <= state < target:
        return state, Verdict.ILLEGAL_TRANSITION
    for step in range(state, target):
        if least[S(step), S(step + 1)] is None:
            return state, Verdict.ILLEGAL_TRANSITION
        if (epochs if step == state else 0) < least[S(step), S(step + 1)]:
            return state, Verdict.TOO_FEW_EPOCHS
    return target, Verdict.APPLIED


REQUESTS = ["germinate", "graft", "cull", "recycle", "fossilize", S.TRAINING, S.EVALUATING, S.FINE_TUNING]
RULES = {"own": None, "strict": TransitionRules.strict(), "at once": AT_ONCE, "recycling": TransitionRules.recycling()}


@given(st.data())
@settings(deadline=None, max_examples=120)
def test_requests_go_by_the_rules_and_all_the_way_or_not_at_all(data):
    seeds = three_layers()
    states = data.draw(st.lists(st.sampled_from(list(S)), min_size=18, max_size=18))
    epochs = data.draw(st.lists(st.sampled_from([0, 1, 4, 5, 20, 60, 200]), min_size=18, max_size=18))
    start = 0
    for layer in seeds:
        stop = start + layer.num_seeds
        layer.lifecycle_states = torch.tensor([int(s) for s in states[start:stop]], dtype=torch.int32)
        layer.state[StateVar.EPOCHS_IN_STATE] = torch.tensor(epochs[start:stop], dtype=torch.int32)
        start = stop
    chosen = data.draw(st.lists(st.integers(0, 17), unique=True))
    request = data.draw(st.sampled_from(REQUESTS))
    rules = data.draw(st.sampled_from(list(RULES)))
    judged_by = TransitionRules.gate() if RULES[rules] is None else RULES[rules]
    selection = seeds[chosen]
    if request == "recycle":
        verdicts = selection.recycle()
    elif isinstance(request, str):
        verdicts = getattr(selection, request)(rules=RULES[rules])
    else:
        verdicts = selection.advance(request, rules=RULES[rules])
    expected = [reference(states[i], epochs[i], request, judged_by) for i in chosen]
    assert list(verdicts) == [verdict for _, verdict in expected]
    assert bool(verdicts) == all(verdict is Verdict.APPLIED for _, verdict in expected)
    assert verdicts.applied.tolist() == [verdict is Verdict.APPLIED for verdict in verdicts]
    after = [int(state) for state in states]
    for i, (state, _) in zip(chosen, expected, strict=True):
        after[i] = int(state)
    assert seeds.states().tolist() == after
    made = torch.cat([layer.history_count for layer in seeds]).tolist()
    for i, count in enumerate(made):  # as many transitions as there are steps, and none of a seed that was refused
        moved = i in chosen and after[i] != states[i]
        steps = after[i] - states[i] if moved and request not in ("cull", "recycle") else int(moved)
        assert count == steps


def test_germination_is_neutral_and_takes_strategies_and_alphas(device):
    seeds = three_layers(device, num_blueprints=3)
    with torch.no_grad():
        for layer in seeds:
            layer.blueprint_weights.uniform_(2, 3)
    x = torch.randn(6, 4, device=device)
    y = seeds.model(x)
    chosen = seeds[[17, 0, 6, 7]]
    assert chosen.germinate(["affine", "additive", 0, GraftingStrategy.ADDITIVE], [0.25, 0.5, 1, 0])
    assert chosen.alpha.tolist() == [0.25, 0.5, 1.0, 0.0]
    assert chosen.state.eq(1).all() and chosen.state.device.type == device.type
    strategies = torch.cat([layer.grafting_strategies for layer in seeds])[[17, 0, 6, 7]]
    assert strategies.tolist() == [3, 1, 0, 1]
    assert chosen.graft() and chosen.state.eq(3).all()
    assert torch.equal(seeds.model(x), y)
    layers = list(seeds)
    assert layers[0].blueprint_weights[0, :2].eq(0).all() and layers[0].blueprint_weights[:, 2:].ge(2).all()
    assert layers[2].blueprint_weights.tolist()[:2] == [[1.0, 1.0], [0.0, 0.0]]
    assert seeds[4].germinate("multiplicative", 0.75) and seeds[4].alpha.tolist() == [0.75]


def test_what_is_refused_is_as_it_was():
    seeds = three_layers(strategy="multiplicative", num_blueprints=1)
    assert seeds[[2, 9]].germinate()
    before = everything(seeds)
    verdicts = seeds[[2, 9]].germinate("additive", alpha=0.5)
    assert list(verdicts) == [Verdict.ILLEGAL_TRANSITION] * 2 and not verdicts and unchanged(seeds, before)
    verdicts = seeds[[0, 5]].germinate("affine", alpha=0.5)  # which takes two rows
    assert list(verdicts) == [Verdict.BLUEPRINT_OUT_OF_RANGE] * 2 and unchanged(seeds, before)
    for request in (lambda: seeds[0].germinate("xor"), lambda: seeds[0].germinate(alpha=1.5),
                    lambda: seeds[0].germinate(alpha=math.nan), lambda: seeds[:3].germinate(alpha=[0.1, 0.2]),
                    lambda: seeds[:3].germinate(["additive"] * 2), lambda: seeds[:].advance("culled"),
                    lambda: seeds[:].advance(0)):  # fmt: skip
        with pytest.raises(ValueError):
            request()
    assert unchanged(seeds, before)


def test_a_parametrized_bank_is_refused_before_anything_is_written():
    seeds = three_layers()
    torch.nn.utils.parametrize.register_parametrization(list(seeds)[2], "blueprint_weights", nn.Identity())
    states = seeds.states()
    for request in (seeds[:].germinate, seeds[:].graft):
        with pytest.raises(RuntimeError, match="parametrized"):
            request()
    assert torch.equal(seeds.states(), states)
    assert seeds[:17].graft()


def test_of_a_seed_that_is_named_twice_the_last_request_counts():
    seeds = three_layers()
    verdicts = seeds[[3, 7, 3]].germinate(["multiplicative", "affine", "affine"], alpha=[0.1, 0.2, 0.3])
    assert list(verdicts) == [Verdict.SUPERSEDED, Verdict.APPLIED, Verdict.APPLIED]
    assert list(seeds)[0].grafting_strategies[3] == 3 and seeds[3].alpha.item() == pytest.approx(0.3)
    assert list(seeds[[3, 7, 3]].graft()) == [Verdict.SUPERSEDED, Verdict.APPLIED, Verdict.APPLIED]
    assert seeds[[3, 7]].state.tolist() == [3, 3]


def test_nothing_is_asked_of_nothing():
    seeds = three_layers()
    for empty in (seeds[[]], seeds[5:5], seeds[[False] * 18]):
        verdicts = empty.graft()
        assert len(empty) == len(verdicts) == 0 and bool(verdicts) and str(verdicts) == "no requests"
        assert empty.state.tolist() == empty.alpha.tolist() == [] and empty.germinate("affine", 0.5).codes.numel() == 0
    assert seeds.states().eq(0).all()


def test_verdicts_in_words():
    seeds = three_layers()
    seeds[1].graft()
    verdicts = seeds[:3].graft()
    assert (
        str(verdicts)
        == repr(verdicts)
        == ("APPLIED: 2 seeds, 0, 2\nILLEGAL_TRANSITION (the rules have no such transition from its state): 1 seed, 1")
    )
    assert verdicts[1] is Verdict.ILLEGAL_TRANSITION and verdicts[0:2] == [Verdict.APPLIED, Verdict.ILLEGAL_TRANSITION]
    assert verdicts.codes.tolist() == [0, 2, 0] and verdicts.ids.tolist() == [0, 1, 2]
    assert str(seeds[3:].germinate()) == "APPLIED: 15 seeds, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, ..."


def test_no_request_waits_for_the_device(device):
    seeds = three_layers(device, alpha_schedule="linear")
    for selection in (seeds[:], seeds["2"]):  # rules are brought to the device once
        selection.fossilize(rules=AT_ONCE)
    chosen = seeds[[1, 17, 6, 5]]
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        found = [
            chosen.germinate("affine", 0.5), chosen.graft(), chosen.advance("evaluating", rules=AT_ONCE), chosen.cull(),
            chosen.recycle(), seeds["2"].graft(), seeds[3:9].fossilize(rules=AT_ONCE),
        ]  # fmt: skip
        state, alpha, received = chosen.state, chosen.alpha, seeds.potential()
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert all(found[:6]) and list(found[6]) == [Verdict.ILLEGAL_TRANSITION] * 2 + [Verdict.APPLIED] * 4
    assert state.tolist() == [0, 0, 7, 7] and alpha.shape == (4,) and received.shape == (18,)


def test_a_life_in_the_handle_s_words():
    """Grafted, trained, kept or removed, and again: the network learns while seeds live."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    teacher = copy.deepcopy(model)
    with torch.no_grad():
        model[0].weight *= torch.rand(8, 1) + 0.2
    seeds = graft_(model, "0", chunk_size=2, table=False)
    optimizer = torch.optim.AdamW(param_groups(seeds, lr=0.05))
    x = torch.randn(64, 6)

    def train(steps):
        for _ in range(steps):
            loss = (model(x) - teacher(x)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            for layer in seeds:
                layer.step_lifecycle()
        return loss.item()

    before = train(1)
    assert seeds[:].graft() and train(60) < 0.2 * before
    assert list(seeds[:].fossilize()) == [Verdict.TOO_FEW_EPOCHS] * 4 and seeds.states().eq(S.GRAFTING).all()
    assert seeds[:2].advance("stabilization") and train(6)
    assert seeds[:2].fossilize() and seeds[:2].state.eq(S.FOSSILIZED).all()
    assert seeds[2].cull() and seeds[2].state.tolist() == [S.ROLLED_BACK]
    assert seeds[2].recycle() and seeds[2].graft() and train(60) < 0.2 * before
    assert list(seeds[0].cull()) == [Verdict.ILLEGAL_TRANSITION]


# ---- reports ---------------------------------------------------------------------------------------------------------


def test_reports(capsys):
    seeds = three_layers()
    seeds[[0, 5, 6]].graft()
    seeds.model(torch.randn(7, 4)).square().sum().backward()
    by_layer = seeds.report()
    assert capsys.readouterr().out == "", "a prompt shows what comes back: it would be there twice"
    sys.displayhook(by_layer)  # what a prompt does
    assert capsys.readouterr().out == f"{by_layer}\n"
    by_layer.show()
    assert capsys.readouterr().out == f"{by_layer}\n"
    assert str(by_layer).splitlines()[0] == "18 seeds of 3 layers"
    assert list(by_layer) == ["0", "2", "3"]
    row, layer = by_layer["2"], list(seeds)[1]
    assert row["states"] == {"GRAFTING": 2, "DORMANT": 10} and row["kind"] == "Linear" and row["seeds"] == 12
    assert row["count"] == 7 * 23 and row["note"] == ""
    assert row["potential"] == pytest.approx(potential(layer).mean().item())
    by_seed = seeds.report("seed")
    assert list(by_seed) == list(range(18)) and by_seed[5]["state"] == "GRAFTING"
    assert [row["layer"] for row in by_seed.values()] == ["0"] * 5 + ["2"] * 12 + ["3"]
    assert by_seed[16] == {"layer": "2", **layer.seed_report()[11]}
    by_state = seeds.report("state")
    assert by_state["GRAFTING"]["seeds"] == 3 and by_state["DORMANT"]["seeds"] == 15
    for found in (by_layer, by_seed, by_state, seeds.table()):
        again = pickle.loads(pickle.dumps(found))
        assert repr(dict(again)) == repr(dict(found)) and str(again) == str(found) and type(again) is type(found)
    with pytest.raises(ValueError, match="per must be 'layer', 'seed' or 'state', got 'model'"):
        seeds.report("model")


def test_a_layer_that_the_model_never_calls_is_noted():
    class Reads(nn.Module):
        """As in torchvision's Swin: the weight is used, the module is not."""

        def __init__(self):
            super().__init__()
            self.qkv, self.out = nn.Linear(4, 6), nn.Linear(6, 4)

        def forward(self, x):
            return self.out(nn.functional.linear(x, self.qkv.weight, self.qkv.bias))

    seeds = graft_(Reads(), "*", table=False)
    assert [row["note"] for row in seeds.report().values()] == ["", ""]  # nothing has run yet
    seeds.model(torch.randn(3, 4))
    report = seeds.report()
    assert {name: row["note"] for name, row in report.items()} == {"qkv": "was never called", "out": ""}
    assert "was never called" in str(report)
