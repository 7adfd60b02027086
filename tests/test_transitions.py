"""Requests in batches: verdicts, state, bank and alpha against a plain-Python model, and what growth may not change."""

from __future__ import annotations

import copy
import random

import lifecycle_model as model
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_checks import LIFE, assert_unchanged, everything, four_seeds
from lifecycle_model import POLICIES
from torch import nn

from kasmina_ext import ExtendedLifecycle, KasminaLayer, TransitionRules, TritonChunkedKasminaLayer, Verdict
from kasmina_ext.lifecycle import explain_verdicts

ANY = TransitionRules.any()
NEUTRAL = {0: [1.0], 1: [0.0], 2: [0.0], 3: [1.0, 0.0]}  # MIXED: nothing was measured
AFFINE = 3


@pytest.fixture
def layer(device):
    return four_seeds(device)


@pytest.fixture(params=[True, False], ids=["kernels", "reference"])
def kernels(request):
    return request.param


# ---- against a model -------------------------------------------------------------------------------------------------


class LayerModel:
    """A layer's seeds, one at a time: what a request asks of the operator, and what follows from a transition."""

    def __init__(self, layer: KasminaLayer) -> None:
        self.seeds = model.from_tensors(tensors_of(layer))
        self.bank = layer.blueprint_weights.tolist()
        self.offsets = layer.seed_offsets.tolist()
        self.scheduled = bool(layer.alpha_schedule)

    def request(self, ids, targets, blueprints, strategies, policy, keep=False):
        rows, values, masks = len(self.bank), [], []
        for u, seed in enumerate(ids):
            known = self.seeds[seed] if 0 <= seed < len(self.seeds) else model.Seed()
            blueprint, strategy, mask = known.blueprint, known.strategy, 1
            if blueprints is not None:
                blueprint, mask = blueprints[u], mask | 2
            elif targets[u] == 1 and blueprint < 0:
                blueprint, mask = 0, mask | 2
            if strategies is not None:
                strategy, mask = strategies[u], mask | 8
            if mask > 1 and strategy == AFFINE and blueprint == rows - 1:
                blueprint, mask = rows, mask | 2
            values.append((targets[u], blueprint, 0, strategy))
            masks.append(mask)
        before = [seed.lifecycle for seed in self.seeds]
        verdicts = model.update(self.seeds, ids, values, masks, model.table(POLICIES[policy]), rows)
        for number, (seed, was) in enumerate(zip(self.seeds, before, strict=True)):
            self.follow_up(number, seed, was, keep)
        return verdicts

    def follow_up(self, number, seed, was, keep):
        if seed.lifecycle == was:
            return
        if self.scheduled and seed.lifecycle in (3, 4):
            seed.alpha = float(seed.lifecycle == 4)
        if seed.lifecycle == 1 and not keep:
            for k, value in enumerate(NEUTRAL.get(seed.strategy, [])):
                if 0 <= seed.blueprint and seed.blueprint + k < len(self.bank):
                    for feature in range(self.offsets[number], self.offsets[number + 1]):
                        self.bank[seed.blueprint + k][feature] = value


def tensors_of(layer):
    return model.Tensors(layer.state, layer.history, layer.history_count, layer.alpha)


requests = st.lists(
    st.tuples(
        st.integers(-2, 7),
        st.integers(-1, 11) | st.sampled_from([0, 1, 1, 2, 3]),
        st.integers(-2, 3),
        st.integers(-1, 4),
    ),
    max_size=12,
)


@settings(max_examples=120, deadline=None)
@given(
    st.lists(
        st.tuples(requests, st.sampled_from(sorted(POLICIES)), st.booleans(), st.booleans(), st.booleans()), max_size=8
    ),
    st.sampled_from([None, "cosine"]),
    st.booleans(),
    st.integers(1, 3),
)
def test_batches_match_the_model(batches, schedule, compiled, blueprints):
    layer = TritonChunkedKasminaLayer(
        nn.Linear(2, 17, device="cpu"), 6, None, None, compiled, num_blueprints=blueprints, alpha_schedule=schedule
    )
    layer.set_alpha(None, 0.5)
    expected = LayerModel(layer)
    for batch, policy, with_blueprints, with_strategies, keep in batches:
        columns = list(map(list, zip(*batch, strict=True))) if batch else [[], [], [], []]
        ids, targets = columns[:2]
        more = columns[2] if with_blueprints else None, columns[3] if with_strategies else None
        rules = getattr(TransitionRules, policy)()
        verdicts = layer.request_state_transitions(ids, targets, *more, rules=rules, keep_blueprints=keep)
        assert verdicts.tolist() == expected.request(ids, targets, *more, policy, keep)
        assert model.differences(expected.seeds, tensors_of(layer)) == []
        assert layer.blueprint_weights.tolist() == expected.bank


def test_batches_match_the_model_on_each_device(device, kernels):
    rng = random.Random(5)
    base = nn.Linear(2, 40, device=device)
    layer = KasminaLayer(base, num_seeds=9, num_blueprints=4, alpha_schedule="linear", enable_kernels=kernels)
    nn.init.normal_(layer.blueprint_weights)
    expected = LayerModel(layer)
    for _ in range(40):
        ids = [rng.randrange(-1, 10) for _ in range(12)]
        columns = [rng.choices([0, 1, 2, 3, 4, 10], (3, 3, 1, 1, 1, 1), k=12)]
        columns += [[rng.randrange(low, high) for _ in ids] for low, high in ((-1, 5), (0, 5))]
        policy = rng.choice(["any", "gate"])
        tensors = [torch.tensor(column, device=device) for column in (ids, *columns)]
        verdicts = layer.request_state_transitions(*tensors, rules=getattr(TransitionRules, policy)())
        assert verdicts.device == layer.device
        assert verdicts.tolist() == expected.request(ids, *columns, policy)
    assert model.differences(expected.seeds, tensors_of(layer)) == []
    assert layer.blueprint_weights.tolist() == expected.bank


# ---- what may be handed in -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ids",
    [
        [1, 3],
        (1, 3),
        {1: 0, 3: 0}.keys(),
        range(1, 4, 2),
        np.array([1, 3]),
        torch.tensor([1, 3]),
        torch.tensor([1, 3], dtype=torch.uint8),
        torch.tensor([[1], [3]], dtype=torch.int16),
        slice(1, None, 2),
    ],
    ids=["list", "tuple", "keys", "range", "numpy", "int64", "uint8", "two dimensions", "slice"],
)
@pytest.mark.parametrize("target", [1, "germinated", ExtendedLifecycle.GERMINATED, torch.tensor(1), [1, "Germinated"]])
def test_ways_to_name_seeds_and_targets(layer, ids, target):
    verdicts = layer.request_state_transitions(ids, target)
    assert verdicts.tolist() == [0, 0] and verdicts.dtype == torch.int32 and verdicts.device == layer.device
    assert layer.lifecycle_states.tolist() == [0, 1, 0, 1]
    assert layer.blueprint_ids.tolist() == [-1, 0, -1, 0]


def test_a_single_seed_all_seeds_none_and_a_mask(layer):
    assert layer.request_state_transitions(2, 1).tolist() == [0]
    assert layer.request_state_transitions([], 1).tolist() == []
    assert layer.request_state_transitions(None, "training").tolist() == [2, 2, 0, 2]
    mask = torch.tensor([True, False, False, True])
    assert layer.request_state_transitions(mask, 1).tolist() == [0, 1, 1, 0]
    assert layer.lifecycle_states.tolist() == [1, 0, 2, 1]


def test_tensors_of_another_device_are_taken(layer):
    ids, strategies = torch.tensor([0, 1]), torch.tensor([1, 2], dtype=torch.int8)
    assert (
        layer.request_state_transitions(ids, torch.tensor([1, 1]), torch.tensor([7, 8]), strategies).tolist() == [0] * 2
    )
    assert layer.state[:4, :2].tolist() == [[1, 1], [7, 8], [0, 0], [1, 2]]


@pytest.mark.parametrize("number", [2**31, 2**32, 2**32 + 1, 2**63 - 1, -(2**31) - 1, -(2**63)])
def test_numbers_that_do_not_fit_are_out_of_range_not_wrapped(layer, number):
    before = everything(layer)
    wide = torch.tensor([number])
    assert layer.request_state_transitions(wide, 1).tolist() == [Verdict.SEED_OUT_OF_RANGE]
    assert layer.request_state_transitions(0, wide).tolist() == [Verdict.ILLEGAL_TRANSITION]
    assert layer.request_state_transitions(0, number).tolist() == [Verdict.ILLEGAL_TRANSITION]
    assert layer.request_state_transitions(0, 1, wide).tolist() == [Verdict.BLUEPRINT_OUT_OF_RANGE]
    assert layer.request_state_transitions(0, 1, None, wide).tolist() == [Verdict.STRATEGY_OUT_OF_RANGE]
    assert_unchanged(layer, before)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([0.0], 1), TypeError, "seed_ids must be integers, got float32"),
        ((True, 1), TypeError, "seed_ids must be integers, got bool"),
        (("0", 1), TypeError, "seed_ids must be integers"),
        (([2**80], 1), ValueError, "seed_ids must be integers"),
        ((torch.tensor([True]), 1), ValueError, r"a mask of seeds must have shape \[4\], got \[1\]"),
        (([0, 1], [1, 1, 1]), ValueError, "3 targets for 2 seed_ids"),
        (([0, 1], [1.0, 1.0]), TypeError, "targets must be integers, got float32"),
        (([0, 1], True), TypeError, "targets must be integers, got bool"),
        (([0, 1], [True, False]), TypeError, "targets must be integers, got bool"),
        ((0, "asleep"), ValueError, "unknown lifecycle state 'asleep'"),
        (([0, 1], [1, "asleep"]), ValueError, "unknown lifecycle state 'asleep'"),
        ((0, None), TypeError, "targets must be integers"),
        (([0, 1], 1, [0]), ValueError, "1 blueprints for 2 seed_ids"),
        ((0, 1, 0.5), TypeError, "blueprints must be integers"),
        ((0, 1, "first"), TypeError, "blueprints must be integers"),
        ((0, 1, 0, "conv"), ValueError, "unknown grafting strategy 'conv'"),
        (([0, 1], 1, 0, torch.zeros(3, dtype=torch.int32)), ValueError, "3 strategies for 2 seed_ids"),
    ],
)
def test_bad_arguments_change_nothing(layer, arguments, error, message):
    before = everything(layer)
    with pytest.raises(error, match=message):
        layer.request_state_transitions(*arguments)
    assert_unchanged(layer, before)


def test_bad_rules(layer):
    with pytest.raises(RuntimeError, match="rules must be int32"):
        layer.request_state_transitions(0, 1, rules=ANY.tensor.long())
    with pytest.raises(RuntimeError, match=r"rules must have shape .*\[11, 11\]"):
        layer.request_state_transitions(0, 1, rules=ANY.tensor[:5])


def test_rules_are_the_layers_unless_given(layer):
    layer.request_state_transitions(None, "grafting", rules=ANY)
    layer.request_state_transitions(None, "stabilization")
    assert layer.request_state_transitions([0, 1], "evaluating").tolist() == [Verdict.TOO_FEW_EPOCHS] * 2
    layer.extended_state.increment_epochs(0)
    layer.transition_rules = TransitionRules.gate().scaled(0.2)
    assert layer.request_state_transitions([0, 1], "evaluating").tolist() == [0, Verdict.TOO_FEW_EPOCHS]
    assert layer.request_state_transitions(1, "evaluating", rules=ANY.tensor.to(layer.device)).tolist() == [0]
    assert layer.request_state_transitions(2, "evaluating", rules=ANY.tensor).tolist() == [0]


def test_an_affine_pair_that_ends_outside_the_bank(layer):
    layer.set_blueprint([0, 1], [9, 8], ["additive", "affine"])
    before = everything(layer)
    assert layer.request_state_transitions([0, 1], 1, 9, "affine").tolist() == [Verdict.BLUEPRINT_OUT_OF_RANGE] * 2
    assert layer.request_state_transitions(0, 1, None, 3).tolist() == [Verdict.BLUEPRINT_OUT_OF_RANGE]
    assert layer.request_state_transitions(1, 1, 9).tolist() == [Verdict.BLUEPRINT_OUT_OF_RANGE]
    assert_unchanged(layer, before)
    assert layer.request_state_transitions([0, 1], 1, [9, 8], [1, 3]).tolist() == [0, 0]


def test_a_single_request_and_a_batch_of_one_do_the_same(device):
    rng = random.Random(3)
    one = KasminaLayer(nn.Linear(3, 30, device=device), num_seeds=5, num_blueprints=4, alpha_schedule="sigmoid")
    nn.init.normal_(one.blueprint_weights)
    other = copy.deepcopy(one)
    for _ in range(150):
        seed, target = rng.randrange(5), rng.choice([1, 2, 3, 4, 6, 7, 8, 9, 10])
        blueprint, strategy = rng.choice([None, 0, 2]), rng.choice([None, 0, 1, 2, 3])
        done = one.request_state_transition(seed, target, {"blueprint": blueprint, "strategy": strategy})
        verdict = other.request_state_transitions(seed, target, blueprint, strategy).item()
        assert done == (verdict == 0)
        if rng.random() < 0.3:
            one.recycle()
            other.recycle()
        assert_unchanged(other, everything(one))


# ---- recycling -------------------------------------------------------------------------------------------------------


def test_recycle(layer):
    layer.extended_state.set_state(None, ["culled", "cancelled", "rolled_back", "fossilized"])
    layer.extended_state.update_state(None, {"blueprint": [1, 2, 3, 4], "epochs": 7})
    assert layer.recycle([0, 3, 9, 0]).tolist() == [6, 2, 1, 0]
    assert layer.lifecycle_states.tolist() == [0, 9, 10, 7]
    assert layer.state[:5, 0].tolist() == [0, 1, 0, 0, 8]
    assert layer.extended_state.get_transition_history(0) == [(8, 0), (0, 8)]
    assert layer.recycle().tolist() == [2, 0, 0, 2]
    assert layer.lifecycle_states.tolist() == [0, 0, 0, 7]
    assert layer.request_state_transitions(None, "germinated").tolist() == [0, 0, 0, 2]


# ---- growth preserves the function -----------------------------------------------------------------------------------

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def same_bits(a, b):
    kind = INTEGERS[a.element_size()]
    return torch.equal(a.view(kind), b.view(kind))


def with_zeros(x):
    x[0, ::2], x[1, ::3] = -0.0, 0.0
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("strategy", ["multiplicative", "additive", "affine"])
def test_germination_changes_no_bit_at_any_alpha(device, kernels, strategy, dtype):
    layer = KasminaLayer(
        nn.Identity(), hidden_dim=33, num_seeds=5, num_blueprints=3, enable_kernels=kernels, device=device
    )
    nn.init.normal_(layer.blueprint_weights)
    layer.set_alpha(None, [0.0, 0.3, 0.5, 0.7, 1.0])
    x = with_zeros(torch.randn(9, 33, device=device).to(dtype))
    before = layer(x).clone()
    assert same_bits(before, x)
    for name in LIFE[:3]:
        assert not layer.request_state_transitions(None, name, strategies=strategy if name == LIFE[0] else None).any()
        assert same_bits(layer(x), before)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "sigmoid"])
@pytest.mark.parametrize("strategy", ["multiplicative", "additive", "mixed", "affine"])
def test_entering_grafting_under_a_schedule_changes_no_bit(device, strategy, schedule):
    layer = KasminaLayer(
        nn.Identity(),
        device=device,
        hidden_dim=16,
        num_seeds=4,
        num_blueprints=3,
        strategy=strategy,
        alpha_schedule=schedule,
    )
    x = with_zeros(torch.randn(7, 16, device=device))
    for name in LIFE[:2]:
        layer.request_state_transitions(None, name)
    nn.init.normal_(layer.blueprint_weights)  # trained to anything
    assert not layer.request_state_transitions(None, "grafting").any()
    assert layer.alpha.tolist() == [0.0] * 4
    assert same_bits(layer(x), x)
    layer.request_state_transitions([1, 2], "stabilization")
    assert layer.alpha.tolist() == [0.0, 1.0, 1.0, 0.0]


@pytest.mark.parametrize("end", ["rolled_back", "culled"])
def test_the_end_of_a_graft_gives_the_old_bits_back(layer, device, end):
    x = with_zeros(torch.randn(6, 5, device=device))
    before = layer(x).clone()
    for name in LIFE[:3]:
        layer.request_state_transitions([1, 3], name, keep_blueprints=True)
    assert not same_bits(layer(x), before)
    assert not layer.request_state_transitions([1, 3], end, rules=ANY).any()
    assert same_bits(layer(x), before)
    assert not layer.recycle([1, 3]).any()
    assert not layer.request_state_transitions([1, 3], "germinated").any()
    for name in LIFE[1:3]:
        layer.request_state_transitions([1, 3], name)
    assert same_bits(layer(x), before)


def test_mixed_germinates_at_the_mean_of_what_it_saw(layer, device):
    x = torch.randn(50, 5, device=device)
    layer(x)
    layer.reset_telemetry()
    layer(x[:20])
    layer.telemetry[3] = 0
    assert not layer.request_state_transitions([0, 3], 1, 2, "mixed").any()
    mean = layer.base_layer(x[:20])[:, :5].double().mean().float()
    torch.testing.assert_close(layer.blueprint_weights[2, :5], mean.expand(5))
    assert layer.blueprint_weights[2, 15:].tolist() == [0.0] * 5


def test_a_batch_between_forward_and_backward_is_an_error(layer, device):
    for change in (lambda: layer.request_state_transitions(0, 1), layer.step_lifecycle, lambda: layer.recycle(0)):
        loss = layer(torch.randn(3, 5, device=device)).sum()
        change()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


# ---- epochs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("advance", [False, True])
@pytest.mark.parametrize(("schedule", "ramp"), [(None, 3), ("linear", 4), ("cosine", 3), ("sigmoid", 5), ("linear", 0)])
def test_step_lifecycle_follows_the_schedule(device, kernels, schedule, ramp, advance):
    layer = KasminaLayer(
        nn.Linear(3, 12, device=device),
        num_seeds=3,
        alpha_schedule=schedule,
        ramp_epochs=ramp,
        auto_advance=advance,
        enable_kernels=kernels,
    )
    for name in LIFE[:3]:
        layer.request_state_transitions([0, 2], name)
    seeds = model.from_tensors(tensors_of(layer))
    assert layer.alpha.tolist() == ([1.0] * 3 if schedule is None else [0.0, 1.0, 0.0])
    for _ in range(7):
        layer.step_lifecycle()
        for seed in seeds:
            seed.step(int(layer.alpha_schedule), ramp, advance)
        assert model.differences(seeds, tensors_of(layer)) == []


@pytest.mark.parametrize(("arguments", "error"), [({"ramp_epochs": 1.5}, TypeError), ({"ramp_epochs": "3"}, TypeError)])
def test_bad_ramp(arguments, error):
    with pytest.raises(error, match="ramp_epochs must be an integer"):
        KasminaLayer(nn.Linear(2, 4), **arguments)
    with pytest.raises(error, match="ramp_epochs"):
        TritonChunkedKasminaLayer(nn.Linear(2, 4), 2, **arguments)


# ---- graphs, streams, words ------------------------------------------------------------------------------------------


def a_day(layer, ids, targets, blueprints, strategies):
    first = layer.request_state_transitions(ids, targets, blueprints, strategies)
    second = layer.request_state_transitions(ids, "training", keep_blueprints=True)
    third = layer.request_state_transitions(None, ExtendedLifecycle.GRAFTING, strategies="additive")
    layer.step_lifecycle()
    return first, second, third, layer.recycle(ids)


@pytest.mark.stack("torch.compile: request_state_transitions and step_lifecycle traced")
def test_requests_and_steps_are_traced_into_one_graph(device, kernels):
    torch._dynamo.reset()
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    layer = KasminaLayer(
        nn.Linear(2, 20, device=device),
        num_seeds=5,
        num_blueprints=3,
        alpha_schedule="cosine",
        ramp_epochs=2,
        auto_advance=True,
        enable_kernels=kernels,
    )
    eager, rng = copy.deepcopy(layer), np.random.default_rng(2)
    traced = torch.compile(a_day, fullgraph=True, backend=count)
    for _ in range(6):
        columns = [torch.from_numpy(rng.integers(low, high, 7)) for low, high in ((-1, 6), (0, 11), (-1, 4), (0, 4))]
        columns = [column.to(device) for column in columns]
        got, expected = traced(layer, *columns), a_day(eager, *columns)
        assert [v.tolist() for v in got] == [v.tolist() for v in expected]
        assert_unchanged(layer, everything(eager))
    assert len(graphs) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_nothing_waits_for_a_gpu():
    device = torch.device("cuda")
    layer = KasminaLayer(nn.Linear(4, 64, device=device), num_seeds=16, num_blueprints=4, alpha_schedule="linear")
    ids, targets = torch.arange(16, device=device), torch.ones(16, dtype=torch.int64, device=device)
    mask = ids < 8
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer.request_state_transitions(ids, targets, 0, "affine")
        layer.request_state_transitions(mask, "training", rules=TransitionRules.strict())
        layer.request_state_transitions([1, 2, 3], [2, 2, 2])
        layer.request_state_transitions(None, targets + 2, targets - 1, targets)
        layer.step_lifecycle()
        layer.recycle()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert layer.lifecycle_states.tolist() == [3] * 8 + [1] * 8


def test_verdicts_in_words(layer):
    verdicts = layer.request_state_transitions([0, 0, 7, 1], [1, 1, 1, 3])
    lines = explain_verdicts(verdicts, [0, 0, 7, 1])
    assert lines == [
        "request 0, seed 0: SUPERSEDED: a later request in the batch names the same seed",
        "request 1, seed 0: APPLIED",
        "request 2, seed 7: SEED_OUT_OF_RANGE: there is no such seed",
        "request 3, seed 1: ILLEGAL_TRANSITION: the rules have no such transition from its state",
    ]
    assert explain_verdicts([3, 99]) == [
        "request 0: TOO_FEW_EPOCHS: the seed has not been in its state for long enough",
        "request 1: unknown verdict 99",
    ]
    with pytest.raises(ValueError, match="2 seed_ids for 4 verdicts"):
        explain_verdicts(verdicts, [0, 1])
