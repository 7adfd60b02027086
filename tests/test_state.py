"""The state's API: one memory, whatever way it is written; against a plain-Python model."""

from __future__ import annotations

import io
import random

import numpy as np
import pytest
import torch

from kasmina_ext import ops
from kasmina_ext.lifecycle import ExtendedLifecycle, TransitionRules
from kasmina_ext.state import ExtendedStateTensor, StateVar

FRESH_ROW = [0, -1, 0, 0, 0, -1, 0, 0]


@pytest.fixture
def state(device):
    return ExtendedStateTensor(6, device)


def bits(state):
    return {name: tensor.clone() for name, tensor in state._buffers.items()}


def assert_unchanged(state, before):
    for name, tensor in before.items():
        assert torch.equal(state._buffers[name], tensor), name


def test_rows_have_the_numbers_of_the_specification():
    assert [variable.name for variable in StateVar] == [
        "LIFECYCLE_STATE",
        "BLUEPRINT_ID",
        "EPOCHS_IN_STATE",
        "GRAFTING_STRATEGY",
        "PARENT_STATE",
        "CHECKPOINT_ID",
        "EVALUATION_SCORE",
        "ERROR_COUNT",
    ]


def test_fresh(state, device):
    assert state.state_tensor.tolist() == [FRESH_ROW] * 6
    assert state.state_tensor.dtype == torch.int32
    assert state.device.type == device.type and state.num_seeds == 6
    assert state.transition_history.shape == (6, 10, 2) and not state.transition_history.any()
    assert not state.history_pointers.any()
    assert state.performance_metrics.shape == (6, 4) and state.performance_metrics.dtype == torch.float32
    assert ExtendedStateTensor(2).device.type == "cpu"
    assert ExtendedStateTensor(np.int64(2)).num_seeds == ExtendedStateTensor(np.uint8(2)).num_seeds == 2


@pytest.mark.parametrize("count", [-1, 2.0, None, True])
def test_bad_number_of_seeds(count):
    with pytest.raises(ValueError, match="num_seeds must be"):
        ExtendedStateTensor(count)


def test_no_seeds_at_all():
    empty = ExtendedStateTensor(0)
    empty.increment_epochs()
    empty.set_state([], [])
    assert sum(empty.get_state_summary().values()) == 0
    with pytest.raises(ValueError, match=r"in \[0, 0\)"):
        empty.get_state(0)


def test_views_and_methods_share_one_memory(state):
    state.update_state(2, {"lifecycle": 3, "blueprint": 7, "strategy": "affine", "epochs": 4})
    assert state.state_tensor[2].tolist() == [3, 7, 4, 3, 0, -1, 0, 0]
    state.state_tensor[2, StateVar.ERROR_COUNT] = 9
    state.lifecycle_states[4] = 6
    state.blueprint_ids = torch.arange(6)
    assert int(state.get_state(4)) == 6
    assert state.state_tensor[:, 1].tolist() == [0, 1, 2, 3, 4, 5]
    assert int(state.state_tensor[2, 7]) == 9
    state.grafting_strategies += 1
    assert state.grafting_strategies.tolist() == [1, 1, 4, 1, 1, 1]


def test_a_transition_is_recorded_and_resets_the_epochs(state):
    state.increment_epochs()
    state.increment_epochs([1, 1, 3])
    assert state.state_tensor[:, StateVar.EPOCHS_IN_STATE].tolist() == [1, 3, 1, 2, 1, 1]
    state.set_state([1, 3], ["germinated", ExtendedLifecycle.CULLED])
    assert state.get_state().tolist() == [0, 1, 0, 8, 0, 0]
    assert state.state_tensor[:, StateVar.EPOCHS_IN_STATE].tolist() == [1, 0, 1, 0, 1, 1]
    state.set_state(1, 2)
    assert state.state_tensor[1].tolist() == [2, -1, 0, 0, 1, -1, 0, 0]
    assert state.get_transition_history(1) == [(1, 2), (0, 1)]
    assert state.get_transition_history(3) == [(0, 8)]
    assert state.get_transition_history(0) == []
    assert isinstance(state.get_transition_history(3)[0][1], ExtendedLifecycle)


def test_a_state_that_stays_is_no_transition(state):
    state.set_state(0, 2)
    state.increment_epochs()
    state.update_state([0, 1], {"lifecycle": [2, 2], "blueprint": 5})
    assert state.state_tensor[0].tolist() == [2, 5, 1, 0, 0, -1, 0, 0]
    assert state.get_transition_history(0) == [(0, 2)] == state.get_transition_history(1)


def test_history_is_a_ring_newest_first(state):
    path = [random.randrange(11)]
    state.set_state(5, path[0])
    for _ in range(40):
        path.append(random.choice([s for s in range(11) if s != path[-1]]))
        state.set_state(5, path[-1])
        expected = list(zip(path, path[1:], strict=False))[::-1][:10]
        assert state.get_transition_history(5)[: len(expected)] == expected
    moves = 40 + (path[0] != 0)
    assert int(state.history_pointers[5]) == moves % 10
    assert int(state.history_count[5]) == moves


def test_random_writes_match_a_model():
    rng = random.Random(1)
    seeds, state = 7, ExtendedStateTensor(7)
    rows = [list(FRESH_ROW) for _ in range(seeds)]
    columns = {"lifecycle": 0, "blueprint": 1, "epochs": 2, "strategy": 3, "checkpoint": 5, "error_count": 7}
    limits = {"lifecycle": 10, "blueprint": 50, "epochs": 300, "strategy": 3, "checkpoint": 9, "error_count": 9}
    for _ in range(300):
        ids = [rng.randrange(seeds) for _ in range(rng.randrange(5))]
        names = rng.sample(list(columns), rng.randrange(1, 4))
        values = {name: [rng.randint(0, limits[name]) for _ in ids] for name in names}
        state.update_state(ids, values)
        last = {seed: k for k, seed in enumerate(ids)}
        for seed, k in last.items():
            row = rows[seed]
            if "lifecycle" in names and values["lifecycle"][k] != row[0]:
                row[4], row[2] = row[0], 0
            for name in names:
                row[columns[name]] = values[name][k]
        assert state.state_tensor.tolist() == rows


@pytest.mark.parametrize(
    "ids",
    [
        [1, 4],
        (1, 4),
        torch.tensor([1, 4]),
        torch.tensor([1, 4], dtype=torch.uint8),
        np.array([1, 4]),
        torch.tensor([False, True, False, False, True, False]),
        slice(1, 5, 3),
        lambda: (seed for seed in (1, 4)),
        {1: "a", 4: "b"}.keys(),
    ],
    ids=["list", "tuple", "tensor", "uint8", "numpy", "mask", "slice", "generator", "keys"],
)
def test_ways_to_name_seeds(state, ids):
    # A generator is made afresh: one for all devices would be used up by the first.
    state.set_state(ids() if callable(ids) else ids, [5, 6])
    assert state.get_state().tolist() == [0, 5, 0, 0, 6, 0]


@pytest.mark.parametrize("seed", [2, np.int32(2), torch.tensor(2)], ids=["int", "numpy", "tensor"])
def test_a_single_seed(state, seed):
    state.set_state(seed, "culled")
    assert state.get_state().tolist() == [0, 0, 8, 0, 0, 0]
    assert state.get_state(seed).dim() == 0


@pytest.mark.parametrize(
    "values",
    [
        torch.tensor([3, 4]),
        torch.tensor([3, 4], dtype=torch.uint8),
        torch.tensor([3, 4], dtype=torch.int8),
        np.array([3, 4]),
        ["grafting", "stabilization"],
        [3, "stabilization"],
    ],
)
def test_ways_to_name_states(state, values):
    state.set_state([0, 5], values)
    assert state.get_state([0, 5]).tolist() == [3, 4]


@pytest.mark.parametrize(
    ("ids", "updates", "error", "message"),
    [
        (6, {"lifecycle": 1}, ValueError, r"seed_id must be in \[0, 6\), got 6"),
        (-1, {"lifecycle": 1}, ValueError, "got -1"),
        (2**80, {"lifecycle": 1}, ValueError, "seed_id"),
        ([0, 6], {"lifecycle": 1}, ValueError, r"seed_ids must be in \[0, 6\), got 6"),
        (torch.tensor([0, -2]), {"lifecycle": 1}, ValueError, "got -2"),
        ([0.0], {"lifecycle": 1}, TypeError, "seed_ids must be integers, got float32"),
        ("3", {"lifecycle": 1}, TypeError, "seed_ids must be integers"),
        (True, {"lifecycle": 1}, TypeError, "seed_id must be an integer, got bool"),
        ([True, False], {"lifecycle": 1}, ValueError, r"mask of seeds must have shape \[6\]"),
        (0, {"lifecycle": 11}, ValueError, "unknown lifecycle state 11"),
        ([0, 1], {"lifecycle": [1, -1]}, ValueError, "unknown lifecycle state -1"),
        ([0, 1], {"lifecycle": torch.tensor([1, 11])}, ValueError, "got 11"),
        (0, {"strategy": 4}, ValueError, "unknown grafting strategy 4"),
        (0, {"strategy": "conv"}, ValueError, "conv"),
        (0, {"blueprint": -2}, ValueError, "BLUEPRINT_ID must be in"),
        (0, {"blueprint": 2**40}, ValueError, "BLUEPRINT_ID"),
        (0, {"blueprint": 2**70}, ValueError, "BLUEPRINT_ID"),
        (0, {"epochs": -1}, ValueError, "EPOCHS_IN_STATE"),
        (0, {"epochs": 1.5}, TypeError, "EPOCHS_IN_STATE must be integers"),
        (0, {"evaluation_score": 0.9}, TypeError, "EVALUATION_SCORE must be integers"),
        (0, {"error_count": True}, TypeError, "got bool"),
        (0, {"colour": 1}, ValueError, "unknown state variable 'colour'; known are lifecycle"),
        (0, {"strategy": 1, "grafting_strategy": 2}, ValueError, "named twice"),
        ([0, 1], {"blueprint": [1, 2, 3]}, ValueError, "3 values of BLUEPRINT_ID for 2 seeds"),
        ([0, 1], {"blueprint": 3, "lifecycle": 99}, ValueError, "99"),
    ],
)
def test_bad_writes_change_nothing(state, ids, updates, error, message):
    state.set_state(0, 4)
    before = bits(state)
    with pytest.raises(error, match=message):
        state.update_state(ids, updates)
    assert_unchanged(state, before)


def test_summary_and_selections_match_counting(state):
    values = [0, 2, 3, 6, 10, 3]
    state.set_state(None, values)
    summary = state.get_state_summary()
    assert list(summary) == [s.name for s in ExtendedLifecycle]
    assert summary == {s.name: values.count(int(s)) for s in ExtendedLifecycle}
    assert state.get_seeds_in_state("grafting").tolist() == [2, 5]
    assert state.get_active_seeds_mask().tolist() == [v in (2, 3, 6) for v in values]


def test_small_writers(state):
    state.update_blueprint([0, 1], [3, 4], "additive")
    state.increment_error_count([1, 1, 2])
    state.reset_error_count(2)
    state.set_checkpoint(5, 77)
    state.update_performance(3, {"loss": 0.5, "efficiency": 2.0})
    state.update_performance([4, 5], torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert state.blueprint_ids.tolist() == [3, 4, -1, -1, -1, -1]
    assert state.grafting_strategies.tolist() == [1, 1, 0, 0, 0, 0]
    assert state.state_tensor[:, StateVar.ERROR_COUNT].tolist() == [0, 2, 0, 0, 0, 0]
    assert state.state_tensor[:, StateVar.CHECKPOINT_ID].tolist() == [-1, -1, -1, -1, -1, 77]
    assert state.performance_metrics.tolist()[3:] == [[0.5, 0, 0, 2], [1, 2, 3, 4], [1, 2, 3, 4]]
    with pytest.raises(ValueError, match="unknown metric 'speed'; known are loss, accuracy"):
        state.update_performance(0, {"speed": 1.0})


def test_performance_of_a_seed_named_twice_is_the_last(state):
    state.update_performance([2, 0, 2], {"loss": [1.0, 2.0, 3.0], "accuracy": 0.5})
    state.update_performance([1, 1], torch.arange(8.0).reshape(2, 4))
    assert state.performance_metrics.tolist()[:3] == [[2, 0.5, 0, 0], [4, 5, 6, 7], [3, 0.5, 0, 0]]
    before = bits(state)
    for metrics in (
        {"loss": 9.0, "speed": 1.0},
        {"loss": 9.0, "accuracy": [1.0, 2.0, 3.0]},
        torch.zeros(3),
        [[1.0] * 4] * 3,
    ):
        with pytest.raises(ValueError, match="unknown metric|must have shape"):
            state.update_performance([0, 1], metrics)
    assert_unchanged(state, before)


def test_epochs_and_errors_stay_at_the_greatest_int32(state):
    state.update_state([0, 1], {"epochs": [2**31 - 1, 2**31 - 2], "error_count": 2**31 - 2})
    state.increment_epochs()
    state.increment_epochs([1, 1, 1])
    state.increment_error_count([0, 0, 1])
    assert state.state_tensor[:3, StateVar.EPOCHS_IN_STATE].tolist() == [2**31 - 1, 2**31 - 1, 1]
    assert state.state_tensor[:3, StateVar.ERROR_COUNT].tolist() == [2**31 - 1, 2**31 - 1, 0]


def test_variables_by_member_and_by_name_in_any_case(state):
    state.update_state([0, 1], {StateVar.BLUEPRINT_ID: 4, "GRAFTING_STRATEGY": "mixed", "Epochs": [1, 2]})
    assert state.state_tensor[:2].tolist() == [[0, 4, 1, 2, 0, -1, 0, 0], [0, 4, 2, 2, 0, -1, 0, 0]]
    assert [getattr(ExtendedStateTensor, variable.name) for variable in StateVar] == list(StateVar)


def test_rollback_states_are_those_before(state):
    state.set_state([0, 1, 3], [2, 5, 7])
    state.set_state([0, 3], ["grafting", "dormant"])
    assert state.get_rollback_states().tolist() == [2, 0, 0, 7, 0, 0]
    assert state.get_rollback_states([3, 0, 3]).tolist() == [7, 2, 7]
    assert state.get_rollback_states(3).dim() == 0 and int(state.get_rollback_states(3)) == 7
    with pytest.raises(ValueError, match="got 6"):
        state.get_rollback_states([6])


@pytest.mark.parametrize("seeds", [1, np.int64(1), torch.tensor(1), [1, 3], None, slice(0, 2)], ids=repr)
@pytest.mark.parametrize("read", ["get_state", "get_rollback_states"])
def test_what_was_read_does_not_change_later(state, seeds, read):
    """Nor does writing it write the state."""
    got = getattr(state, read)(seeds)
    before = got.clone()
    state.set_state(None, "training")
    state.set_state(None, "grafting")
    assert torch.equal(got, before) and not torch.equal(getattr(state, read)(seeds), before)
    kept = bits(state)
    got.fill_(9)
    assert_unchanged(state, kept)


def test_a_loss_with_its_graph_leaves_no_graph_behind(state, device):
    weight = torch.ones(3, device=device, requires_grad=True)
    loss = (weight * 2).sum()
    state.update_performance(0, {"loss": loss, "accuracy": (weight / 2)[:1].squeeze()})
    state.update_performance([1, 2], torch.stack([loss] * 4))
    metrics = state.performance_metrics
    assert not metrics.requires_grad and metrics.grad_fn is None
    assert metrics.tolist()[:3] == [[6, 0.5, 0, 0], [6] * 4, [6] * 4]
    loss.backward()
    assert weight.grad.tolist() == [2, 2, 2]


def test_validate_transitions_is_the_strict_table(device):
    limits = {0: 0, 1: 0, 2: 100, 3: 50, 4: 20, 5: 30, 6: 50}
    graph = {0: {1}, 1: {2, 9}, 2: {3, 8, 9}, 3: {4, 10}, 4: {5, 10}, 5: {6, 8, 10}, 6: {7, 8, 10}}
    cases = [(a, b, e) for a in range(11) for b in range(-1, 12) for e in (0, 19, 20, 29, 30, 49, 50, 99, 100)]
    state = ExtendedStateTensor(len(cases), device)
    state.update_state(None, {"lifecycle": [a for a, _, _ in cases], "epochs": [e for _, _, e in cases]})
    before = bits(state)
    expected = [b in graph.get(a, ()) and (b == 10 or e >= limits[a]) for a, b, e in cases]
    targets = torch.tensor([b for _, b, _ in cases])
    assert state.validate_transitions(torch.arange(len(cases)), targets).tolist() == expected
    assert_unchanged(state, before)


def test_ways_to_ask_for_validation(state):
    state.set_state([1, 2], "training")
    assert state.validate_transitions(0, "germinated").tolist() == [True]
    assert state.validate_transitions([0, 1, 1], [1, "grafting", 8]).tolist() == [True, False, False]
    gate = TransitionRules.gate()
    assert state.validate_transitions(None, "grafting", gate).tolist() == [False, True, True, False, False, False]
    assert state.validate_transitions([], []).tolist() == []
    for ids, targets, error in (
        ([6], 1, ValueError),
        ([0], [1, 2], ValueError),
        (0, "x", ValueError),
        (0, 1.0, TypeError),
    ):
        with pytest.raises(error):
            state.validate_transitions(ids, targets)


def test_a_dict_with_pointers_only(state):
    for target in (1, 2, 3):
        state.set_state(0, target)
    data = state.to_dict()
    assert data["history_pointers"].tolist() == [3, 0, 0, 0, 0, 0]
    del data["history_count"]
    assert ExtendedStateTensor.from_dict(data).get_transition_history(0) == [(2, 3), (1, 2), (0, 1)]


@pytest.mark.parametrize("writer", ["update_state", "set_state", "update_blueprint"])
def test_many_seeds_are_written_by_the_operator(state, monkeypatch, writer):
    calls = []
    original = ops.state_update
    monkeypatch.setattr(ops, "state_update", lambda *args: calls.append(args) or original(*args))
    {
        "update_state": lambda: state.update_state(
            [0, 1, 2], {"lifecycle": 3, "blueprint": [1, 2, 3], "checkpoint": 9}
        ),
        "set_state": lambda: state.set_state([0, 1, 2], 3),
        "update_blueprint": lambda: state.update_blueprint([0, 1, 2], [1, 2, 3], "affine"),
    }[writer]()
    [args] = calls
    assert args[3].tolist() == [0, 1, 2] and args[0].data_ptr() == state.state_tensor.data_ptr()


def test_dict_round_trip_through_a_safe_file(state):
    state.set_state([0, 3], [4, 9])
    state.update_performance(0, {"accuracy": 0.25})
    file = io.BytesIO()
    torch.save(state.to_dict(), file)
    file.seek(0)
    again = ExtendedStateTensor.from_dict(torch.load(file, weights_only=True), state.device)
    assert_unchanged(again, bits(state))
    again.set_state(0, 1)
    assert int(state.get_state(0)) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"history_count": None, "history_pointers": None}, "the dict has no history_count"),
        ({"state_tensor": torch.zeros(2, 8, dtype=torch.int32)}, r"state_tensor must have shape \[3, 8\]"),
        ({"history_count": torch.ones(3)}, "history_count must be integers"),
        ({"num_seeds": -1}, "num_seeds must be"),
        ({"state_tensor": torch.full((3, 8), 2**40)}, r"LIFECYCLE_STATE must be in \[0, 10\], got 1099511627776"),
        ({"state_tensor": torch.full((3, 8), 99)}, "LIFECYCLE_STATE must be in"),
        ({"state_tensor": torch.tensor([[0, -2, 0, 0, 0, 0, 0, 0]] * 3)}, "BLUEPRINT_ID must be in"),
        ({"state_tensor": torch.tensor([[0, 0, -1, 0, 0, 0, 0, 0]] * 3)}, "EPOCHS_IN_STATE must be in"),
        ({"state_tensor": torch.tensor([[0, 0, 0, 4, 0, 0, 0, 0]] * 3)}, "GRAFTING_STRATEGY must be in"),
        ({"state_tensor": torch.tensor([[0, 0, 0, 0, 0, 0, 2**31, 0]] * 3)}, "EVALUATION_SCORE must be in"),
        ({"history_count": torch.tensor([0, -3, 1])}, r"history_count must be in \[0, 2147483647\], got -3"),
        ({"history_count": torch.tensor([0, 2**31, 1])}, "history_count must be in"),
        ({"transition_history": torch.full((3, 10, 2), 11)}, r"transition_history must be in \[0, 10\], got 11"),
    ],
)
def test_a_dict_that_does_not_fit(change, message):
    data = {**ExtendedStateTensor(3).to_dict(), **change}
    data = {name: value for name, value in data.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        ExtendedStateTensor.from_dict(data)


def test_garbage_written_behind_the_library(state):
    state.lifecycle_states[:3] = torch.tensor([99, -1, 2**31 - 1])
    assert state.get_state([0, 1]).tolist() == [99, -1]
    assert sum(state.get_state_summary().values()) == 3
    assert not state.validate_transitions(None, "germinated")[:3].any()
    state.set_state([0, 1], [1, 0])
    assert state.get_state().tolist() == [1, 0, 2**31 - 1, 0, 0, 0]
    assert state.get_transition_history(0) == [(0, 1)] and state.get_transition_history(1) == []
    state.transition_history[0, 0, 0] = 99
    assert state.get_transition_history(0) == [(99, 1)]
