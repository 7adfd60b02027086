"""Histories of seeds: the size of a change against brute force, what is kept, what it costs, and that nothing else notices."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from growing import Run, equal
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from kasmina_ext import KasminaLayer
from kasmina_ext.lifecycle import ExtendedLifecycle as State
from kasmina_ext.seed_record import NO_STATE, SeedHistory, SeedRecord, size_of_change
from kasmina_ext.state_layout import StateVar

# ---- the size of a change --------------------------------------------------------------------------------------------


def layer_of_every_kind(device, dtype=torch.float64, features=48):
    """Around the identity: seeds in all states, with all strategies and other alphas."""
    base = nn.Linear(features, features, bias=False, dtype=dtype, device=device)
    with torch.no_grad():
        base.weight.copy_(torch.eye(features))
    layer = KasminaLayer(base, num_seeds=features // 4, num_blueprints=3)
    layer.lifecycle_states = torch.arange(layer.num_seeds) % len(State)
    layer.lifecycle_states[:4] = int(State.FINE_TUNING)
    layer.grafting_strategies = torch.arange(layer.num_seeds) % 4
    layer.blueprint_ids = torch.arange(layer.num_seeds) % 2
    with torch.no_grad():
        layer.alpha.uniform_(0, 1)
        layer.blueprint_weights.normal_()
    return layer


def test_size_of_change_is_that_of_the_data(device):
    """Features of a seed see the same values, each in an order of its own: the seed's moments are then each feature's."""
    layer = layer_of_every_kind(device)
    columns = []
    for seed in range(layer.num_seeds):
        values = torch.randn(200, dtype=torch.float64) * (seed + 1) + seed % 3
        columns += [values[torch.randperm(200)] for _ in range(4)]
    x = torch.stack(columns, 1).to(device)
    with torch.no_grad():
        y = layer(x)
    found = size_of_change(layer)
    moved = (y - x).view(200, -1, 4).square().mean((0, 2)).sqrt()
    expected = moved / x.view(200, -1, 4).square().mean((0, 2)).sqrt()
    assert found.dtype == torch.float64 and found.device.type == device.type
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-12)
    grafted = (layer.lifecycle_states >= State.GRAFTING) & (layer.lifecycle_states <= State.FOSSILIZED)
    assert (found[grafted] > 0).all() and not found[~grafted].any() and grafted.any() and not grafted.all()


def test_size_of_change_without_telemetry(device):
    """As if of mean 0 and variance 1: a shift counts by itself, a factor by what is over 1."""
    layer = layer_of_every_kind(device)
    layer.lifecycle_states, layer.blueprint_ids = int(State.FOSSILIZED), 0
    with torch.no_grad():
        layer.alpha.fill_(0.5)
        layer.blueprint_weights[0], layer.blueprint_weights[1] = 3.0, 4.0
    by_strategy = {0: 1.0, 1: 1.5, 2: math.hypot(0.25, 0.75), 3: math.hypot(1.0, 2.0)}
    expected = [by_strategy[seed % 4] for seed in range(layer.num_seeds)]
    torch.testing.assert_close(size_of_change(layer).cpu(), torch.tensor(expected, dtype=torch.float64))
    layer(torch.zeros(5, layer.hidden_dim, dtype=torch.float64, device=device))  # nothing but zeros says no more
    torch.testing.assert_close(size_of_change(layer).cpu(), torch.tensor(expected, dtype=torch.float64))


def test_a_seed_without_features_changes_nothing():
    layer = KasminaLayer(nn.Linear(4, 3), num_seeds=5)
    layer.lifecycle_states = int(State.FINE_TUNING)
    layer.blueprint_ids = 0
    with torch.no_grad():
        layer.blueprint_weights.fill_(2.0)
    assert size_of_change(layer).tolist()[3:] == [0.0, 0.0] and (size_of_change(layer)[:3] > 0).all()


# ---- what is kept ----------------------------------------------------------------------------------------------------


def test_a_snapshot_is_what_there_was(device):
    layers = [layer_of_every_kind(device), layer_of_every_kind(device, torch.float32, 16)]
    record = SeedRecord({"a": layers[0], "b": layers[1]})
    expected = {name: [] for name in ("state", "alpha", "change")}
    for step in (3, 10, 11):
        for layer in layers:
            layer.lifecycle_states = layer.lifecycle_states.roll(1)
            layer.alpha.uniform_(0, 1)
        record.take(step)
        expected["state"].append(torch.cat([layer.lifecycle_states for layer in layers]))
        expected["alpha"].append(torch.cat([layer.alpha for layer in layers]))
        expected["change"].append(torch.cat([size_of_change(layer) for layer in layers]))
    history = record.history()
    assert history.layers == {"a": 12, "b": 4} and history.steps == [3, 10, 11]
    for name, dtype in (("state", torch.uint8), ("alpha", torch.float16), ("change", torch.bfloat16)):
        assert torch.equal(getattr(history, name), torch.stack(expected[name]).to("cpu", dtype)), name
    assert history.credit.dtype == torch.bfloat16 and history.credit.isnan().all()


def test_what_is_no_state_is_told_as_none():
    layer = KasminaLayer(nn.Linear(4, 8), num_seeds=4)
    with torch.no_grad():
        layer.state[StateVar.LIFECYCLE_STATE] = torch.tensor([-1, 10, 255, 256])
    record = SeedRecord(layer)
    record.take(0)
    assert record.history().state.tolist() == [[NO_STATE, 10, NO_STATE, NO_STATE]]


def test_credit_stays_while_its_seed_is_grafted():
    layer = layer_of_every_kind("cpu", features=16)
    layer.lifecycle_states = torch.tensor([State.FINE_TUNING, State.EVALUATING, State.FOSSILIZED, State.TRAINING])
    record = SeedRecord(layer)
    record.take(1)
    record.take(2, [torch.tensor([1e-7, -2.0, 3.0, 0.0], dtype=torch.float64)])
    layer.lifecycle_states[1] = int(State.CULLED)
    record.take(3)
    layer.lifecycle_states[1] = int(State.GRAFTING)  # another life
    record.take(4)
    record.take(5, [torch.full((4,), 0.5)])
    nan, tiny = None, torch.tensor(1e-7).bfloat16().item()
    rows = [[None if math.isnan(value) else value for value in row] for row in record.history().credit.tolist()]
    assert rows == [[nan] * 4, [tiny, -2, 3, nan], [tiny, nan, 3, nan], [tiny, nan, 3, nan], [0.5, 0.5, 0.5, nan]]
    for wrong in ([torch.ones(3)], [torch.ones(4)] * 2, [[1.0] * 4], [], 0.5):
        with pytest.raises(ValueError, match="one tensor"):
            record.take(6, wrong)
    assert record.steps == [1, 2, 3, 4, 5]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=300), st.integers(2, 20))
def test_few_snapshots_at_equal_distances(distances, capacity):
    """Of the calls, every 2^n-th is kept and the last one, never more than there is room for, nor less than half of it."""
    layer = _small()
    record = SeedRecord(layer, snapshots=capacity)
    steps = [sum(distances[: i + 1]) for i in range(len(distances))]
    for step in steps:
        record.take(step)
        assert len(record.steps) <= capacity and record.steps[-1] == step
    numbers = [steps.index(step) for step in record.steps]
    stride = numbers[1] - numbers[0] if len(numbers) > 2 else 1 << (len(steps) - 1).bit_length()
    assert stride & (stride - 1) == 0 and numbers[:-1] == list(range(0, numbers[-1], stride))
    assert len(steps) <= capacity or len(numbers) >= capacity // 2


_layer = []


def _small() -> KasminaLayer:
    if not _layer:
        _layer.append(KasminaLayer(nn.Linear(2, 2), num_seeds=1))
    return _layer[0]


def test_memory_is_bounded():
    layer = KasminaLayer(nn.Linear(1, 1000), num_seeds=1000)
    record = SeedRecord(layer, memory=50 * 7 * 1000)
    for step in range(200):
        record.take(step)
    kept = record.state_dict()["rows"]
    assert 25 <= len(kept) <= 50 and sum(row.nbytes for row in kept) <= 50 * 7 * 1000
    assert len({row.untyped_storage().data_ptr() for row in kept}) == len(kept)
    assert all(row.untyped_storage().nbytes() == 7000 for row in kept)


def test_a_training_that_went_back_is_recorded_as_it_went_on():
    layer = _small()
    record = SeedRecord(layer)
    for step in (10, 20, 30, 40, 20, 25):
        record.take(step)
    assert record.steps == [10, 20, 25]
    record.take(-5)
    assert record.steps == [-5]
    assert record.history().state.tolist() == [[0]] and record.history().alpha.tolist() == [[1.0]]
    for wrong in (1.5, "3", None, True):
        with pytest.raises(TypeError, match="step"):
            record.take(wrong)
    assert SeedRecord(layer).history().state.shape == (0, 1)
    for wrong in ({"snapshots": 1}, {"memory": -1}, {"snapshots": 2.5}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            SeedRecord(layer, **wrong)


# ---- going on later --------------------------------------------------------------------------------------------------


def same_history(one: SeedHistory, two: SeedHistory) -> bool:
    names = ("state", "alpha", "credit", "change")
    bits = [[getattr(each, name).view(torch.uint8) for name in names] for each in (one, two)]
    return (one.layers, one.steps) == (two.layers, two.steps) and all(map(torch.equal, *bits))


def test_state_goes_on_where_it_was_taken(device):
    layer = layer_of_every_kind(device)
    credits = [torch.randn(layer.num_seeds, device=device)]
    one, two = SeedRecord(layer, snapshots=5), SeedRecord(layer, snapshots=5)
    for step in range(8):
        one.take(step, credits if step == 6 else None)
    state = one.state_dict()
    kept = copy.deepcopy(state)
    two.load_state_dict(torch.load(_saved(state), weights_only=True))
    for record in (one, two):
        for step in range(8, 23):
            record.take(step)
    assert same_history(one.history(), two.history()) and not one.history().credit.isnan().all()
    assert state["steps"] == kept["steps"] and equal(state["rows"], kept["rows"]), "the state is a copy"


def _saved(state):
    import io

    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


@pytest.mark.parametrize(
    "damage",
    [
        {"layers": {"": 3}},
        {"steps": [1, 1, 2]},
        {"steps": [1, 2]},
        {"numbers": [0, 2, 1]},
        {"numbers": [0, 1, 2.0]},
        {"stride": 0},
        {"rows": [torch.zeros(7)] * 3},
        {"rows": None},
        {"credit": torch.zeros(12)},
        None,
    ],
    ids=str,
)
def test_a_damaged_state_changes_nothing(damage):
    layer = layer_of_every_kind("cpu")
    record = SeedRecord(layer)
    for step in range(3):
        record.take(step)
    before = record.history()
    with pytest.raises(ValueError):
        record.load_state_dict(None if damage is None else record.state_dict() | damage)
    assert same_history(record.history(), before)


def test_a_history_in_a_file(tmp_path):
    layer = layer_of_every_kind("cpu")
    record = SeedRecord({'a "name"\n</script>': layer})
    for step in range(3):
        record.take(step)
    path = tmp_path / "history.safetensors"
    record.history().save(path)
    assert same_history(SeedHistory.load(path), record.history())
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    wrong = [
        ({}, {}),
        (tensors, {}),
        (tensors | {"alpha": torch.ones(3)}, None),
        (tensors | {"more": torch.ones(3)}, None),
    ]
    wrong.append((tensors | {"steps": torch.tensor([3, 2, 1])}, None))
    metadata = {"format": "kasmina_ext seed history 1", "layers": '{"a": 12}'}
    save_file(tensors, path, metadata)
    assert SeedHistory.load(path).layers == {"a": 12}
    texts = ('{"a": 11}', '{"a": -12}', "[]", "not JSON", "null", "[" * 100_000)
    wrong += [(tensors, metadata | {"layers": text}) for text in texts]
    for content, about in wrong:
        save_file(content, path, metadata if about is None else about)
        with pytest.raises(ValueError, match="is no seed history"):
            SeedHistory.load(path)
    for content in (b"", b"no such thing", b"\xff" * 100):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is no seed history"):
            SeedHistory.load(path)


# ---- with a controller -----------------------------------------------------------------------------------------------


def recorded(device="cpu", **settings) -> Run:
    run = Run(device=device, **settings)
    run.control.record = SeedRecord(run.model)
    return run


def test_a_controller_records_and_is_not_disturbed(device):
    run, plain = recorded(device), Run(device=device)
    credits, states = {}, {}
    for _ in range(3):
        run.step(20, each=lambda: states.update({run.control.steps: run.states()}))
        plain.step(20)
        found, same = run.evaluate(), plain.evaluate()
        assert found.loss == same.loss
        credits[run.control.steps] = torch.cat([mean.cpu() for mean in found.credit.mean])
        states[run.control.steps] = run.states()
    assert equal(run.bits(), plain.bits()) and run.events == plain.events
    history = run.control.record.history()
    assert history.steps == list(range(1, 61)) and history.layers == {"first": 4, "second": 3}
    assert history.state.tolist() == [states[step] for step in history.steps]
    for step, credit in credits.items():
        row = history.credit[history.steps.index(step)]
        known = ~row.isnan()
        assert known.any() and torch.equal(row[known], credit.bfloat16()[known])
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        try:
            run.control.record.take(100)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_controller_takes_its_own_layers_record():
    run = Run()
    with pytest.raises(ValueError, match="of other layers: 'first', 'second'"):
        Run(record=SeedRecord(run.model))


def test_a_checkpoint_has_the_record(tmp_path):
    run = recorded()
    run.step(25)
    state = run.control.state_dict()
    run.step(10)
    whole = run.control.record.history()
    run.control.load_state_dict(state)
    assert run.control.record.steps == list(range(1, 26)) and len(whole.steps) == 35
    run.control.load_state_dict(state | {"record": None})  # of a controller without one
    assert run.control.record.steps == list(range(1, 26))
    before = run.control.record.history()
    with pytest.raises(ValueError, match="damaged"):
        run.control.load_state_dict(state | {"steps": 3, "record": state["record"] | {"stride": -1}})
    assert same_history(run.control.record.history(), before) and run.control.steps == 25
    Run().control.load_state_dict(state)  # a controller without one takes the rest
    layer = run.model.first
    layer.checkpoint_dir = tmp_path
    name = layer.save_checkpoint(controller=run.control)
    run.step(5)
    layer.load_checkpoint(name, controller=run.control)
    assert same_history(run.control.record.history(), before)
