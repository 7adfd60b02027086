"""Runs of the controller repeat, go on later, are logged, and wait for no device."""

from __future__ import annotations

import io
import json

import pytest
import torch
from growing import FAST, STATES, Run, equal
from torch.utils._python_dispatch import TorchDispatchMode

from kasmina_ext import GrowthController, KasminaLayer
from kasmina_ext.seed_record import SeedRecord

# ---- determinism, and going on later ---------------------------------------------------------------------------------


def whole(run: Run, stop_after: int = 0) -> Run:
    """50 steps with two evaluations; stopped and loaded into new objects after ``stop_after``."""
    while run.done < 50:
        if run.done == stop_after > 0:
            saved = io.BytesIO()
            torch.save((run.model.state_dict(), run.optimizer.state_dict(), run.control.state_dict()), saved)
            saved.seek(0)
            model, optimizer, control = torch.load(saved, weights_only=True)
            later = Run()
            later.model.load_state_dict(model)
            later.optimizer.load_state_dict(optimizer)
            later.control.load_state_dict(control)
            later.events, later.done = run.events, run.done
            later.control._log._call = later.events.append
            run = later
        run.step()
        if run.done in (25, 41):
            run.evaluate()
    return run


def test_two_runs_are_equal_bit_for_bit():
    one, two = whole(Run()), whole(Run())
    assert len(one.events) > 40 and one.events == two.events and equal(one.bits(), two.bits())


@pytest.mark.parametrize("after", [1, 7, 25, 30])
def test_a_run_goes_on_bit_for_bit(after):
    straight, resumed = whole(Run()), whole(Run(), after)
    assert resumed.events == straight.events and equal(resumed.bits(), straight.bits())


def test_a_state_of_another_controller_is_refused():
    run = Run()
    run.step(5)
    saved, before = run.control.state_dict(), run.control.state_dict()
    other = GrowthController(Run().model.first, budget=1)
    with pytest.raises(ValueError, match="the state is of layers"):
        other.load_state_dict(saved)
    for wrong in ({}, saved | {"format": 0}):
        with pytest.raises(ValueError, match="no controller's state"):
            run.control.load_state_dict(wrong)
    with pytest.raises(ValueError, match="other banks"):
        run.control.load_state_dict(saved | {"snapshots": [[torch.zeros(1, 1)], []]})
    with pytest.raises(ValueError, match="different ticks"):
        run.control.load_state_dict(saved | {"snapshots": [[run.control.layers[0].blueprint_weights.detach()], []]})
    after = run.control.state_dict()
    assert after["steps"] == before["steps"] == 5 and torch.equal(after["lives"], before["lives"])


DAMAGE = {
    "lives": torch.zeros(9, dtype=torch.int32),
    "losses": torch.zeros(2),
    "watched": [torch.zeros(4, 3, dtype=torch.float64)],
    "reconstruction": [torch.zeros(4), torch.zeros(3)],
    "snapshots": [[], [torch.zeros(2, 12)] * 3],
    "budget": 1.5,
    "steps": -1,
    "ticks": None,
}


@pytest.mark.parametrize("entry", DAMAGE)
@pytest.mark.parametrize("how", ["damaged", "missing", "of no kind"])
def test_a_damaged_state_is_refused_and_nothing_is_changed(entry, how):
    run = Run()
    run.control.step(None, [torch.ones(4), torch.ones(3)])
    run.step(5)
    saved = run.control.state_dict()
    run.step(4)
    before = run.control.state_dict()
    if how == "missing":
        del saved[entry]
    else:
        saved[entry] = DAMAGE[entry] if how == "damaged" else "x"
    with pytest.raises(ValueError, match=entry if how != "missing" else f"the state has no {entry}"):
        run.control.load_state_dict(saved)
    after = run.control.state_dict()
    for name in ("budget", "steps", "ticks", "reconstruction"):
        assert after[name] == before[name]
    for name in ("lives", "losses"):
        assert torch.equal(after[name], before[name])
    for one, two in zip(
        after["watched"] + sum(after["snapshots"], []), before["watched"] + sum(before["snapshots"], []), strict=True
    ):
        assert torch.equal(one, two)


def test_a_state_of_nothing_is_refused():
    for wrong in (None, [], {"format": 1}):
        with pytest.raises(ValueError, match="no controller's state|the state has no"):
            Run().control.load_state_dict(wrong)


# ---- telemetry that begins afresh ------------------------------------------------------------------------------------


@pytest.mark.parametrize("resumes", [False, True])
@pytest.mark.parametrize("more", [0, 1, 2])
def test_after_a_reset_a_wave_goes_by_all_that_was_seen_since(more, resumes):
    """However many backward passes there have been before and since."""
    run = Run(budget=2, wave=0.5, watch=2)
    run.step(2)
    assert len(run.events) == 1
    run.step(more % 2)
    for layer in run.model.layers:
        layer.reset_telemetry()
    if resumes:
        later = Run(budget=2, wave=0.5, watch=2)
        later.model.load_state_dict(run.model.state_dict())
        later.control.load_state_dict(run.control.state_dict())
        later.done, run = run.done, later
    for _ in range(more):  # backward passes between the optimizer's steps
        run.model.loss((run.train[0][:9], run.train[1][:9])).mean().backward()
    run.step(2 - more % 2)
    seen = torch.cat([layer.grad_telemetry for layer in run.model.layers])
    assert (seen[:, 2] == 2 - more % 2 + more).all()
    [event] = [event for event in run.events if event["tick"] == 4 and event["to"] == "GERMINATED"]
    seed = event["seed"] + (4 if event["layer"] == "second" else 0)
    total = seen[seed, :2].sum() if seed >= 4 else seen[seed, 0]
    assert event["potential"] == pytest.approx((total / seen[seed, 2]).item())


# ---- the event log ---------------------------------------------------------------------------------------------------


def test_the_log_has_one_json_line_for_each_transition(tmp_path):
    path = tmp_path / "growth.jsonl"
    path.write_text('{"kept": "from before"}\n')
    run = whole(Run(log=path))
    run.control.state_dict()  # writes what is on its way
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines.pop(0) == {"kept": "from before"}
    assert lines == whole(Run()).events
    for name, layer in zip(("first", "second"), run.model.layers, strict=True):
        for seed in range(layer.num_seeds):
            mine = [(e["from"], e["to"]) for e in lines if (e["layer"], e["seed"]) == (name, seed)]
            history = layer.extended_state.get_transition_history(seed)[::-1]
            assert mine[-10:] == [(source.name, target.name) for source, target in history]
            assert len(mine) == layer.history_count[seed]
    decided = {
        "GERMINATED": {"potential", "room"},
        "GRAFTING": {"reconstruction"},
        "FINE_TUNING": {"cost", "error", "z", "stability", "credit"},
        "CULLED": {"group_cost", "group_error", "z"},
    }
    assert {event["to"] for event in lines} >= decided.keys() - {"CULLED"}
    for event in lines:
        assert event["step"] == event["tick"] and decided.get(event["to"], set()) <= event.keys()


# ---- no waiting ------------------------------------------------------------------------------------------------------


class NoSync(TorchDispatchMode):
    """On a GPU these operators would wait for the device; on the CPU we forbid them by name."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal", "bincount")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().partition("::")[2].partition(".")[0]
        assert name not in self.WAITS, f"{func} waits for the device"
        if name in ("index", "index_put", "index_put_"):
            assert not any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("schedule", [None, "sigmoid"])
def test_a_step_looks_at_no_value(schedule):
    run = Run(schedule=schedule, budget_in="parameters")
    run.control._log._call = None  # the log's copies are asynchronous on a GPU only
    run.control.record = SeedRecord(run.model)
    loss = torch.tensor(0.5)
    for _ in range(30):
        for layer in run.model.layers:
            layer.grad_telemetry += 1
        with NoSync():
            run.control.step(loss)
    assert STATES.EVALUATING in run.states()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda_a_step_waits_for_nothing_and_decides_as_on_the_cpu():
    run = Run(device="cuda")
    run.control.record = SeedRecord(run.model)
    run.step(3)  # memory is allocated, kernels are loaded
    loss = torch.tensor(0.5, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(30):
            for layer in run.model.layers:
                layer.grad_telemetry += 1
            run.control.step(loss)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert STATES.EVALUATING in run.states()
    run.evaluate()
    assert sum(int(layer.history_count.sum()) for layer in run.model.layers) == len(run.events)
    one, two = whole(Run(device="cuda")), whole(Run(device="cuda"))
    assert one.events == two.events and equal(one.bits(), two.bits())


def test_a_controller_follows_its_layers_to_another_device(device):
    run = Run()
    run.step(4)
    run.model.to(device)
    run.train, run.held = (
        tuple(part.to(device) for part in run.train),
        [(x.to(device), y.to(device)) for x, y in run.held],
    )
    run.optimizer.state.clear()
    run.step(20)
    run.evaluate()
    assert run.alive() > 0


def test_layers_of_other_kinds():
    conv = KasminaLayer(torch.nn.Conv2d(1, 8, 3), chunk_size=2, strategy="mixed", alpha_schedule="linear")
    control = GrowthController(conv, None, FAST, budget=2)
    x = torch.randn(4, 1, 6, 6)
    for _ in range(12):
        loss = conv(x).square().mean()
        loss.backward()
        control.step(loss)
    # MIXED has no neutral blueprint: what it cannot reconstruct is not grafted, but given up for others.
    assert conv.lifecycle_states.tolist().count(STATES.CANCELLED) == 2
    assert not ((conv.lifecycle_states >= 3) & (conv.lifecycle_states <= 7)).any()
    control.evaluate([x, x + 1], lambda x: conv(x).square().mean((1, 2, 3)))
