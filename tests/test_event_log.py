"""The event log when its sink fails: nothing is half done, nothing is lost, and it is said once."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from growing import Classifier, Run

from kasmina_ext import GrowthController
from kasmina_ext.policy import STAY


def one_by_one(seeds):
    """Seed number ``tick - 1`` germinates."""
    return torch.where(torch.arange(7) == seeds.tick - 1, 1, STAY)


class Sink:
    """Takes events while it works."""

    def __init__(self):
        self.events, self.works, self.tried = [], True, 0

    def __call__(self, event):
        self.tried += 1
        if not self.works:
            raise OSError("disk full")
        self.events.append(event)


def test_a_path_that_cannot_be_written_is_said_at_once(tmp_path):
    model = Classifier()
    before = copy.deepcopy(model.state_dict())
    for path in (tmp_path / "no/such/log.jsonl", tmp_path):
        with pytest.raises(OSError):
            GrowthController(model, log=path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    path = tmp_path / "log.jsonl"
    path.write_text("kept\n")
    GrowthController(model, log=path)
    GrowthController(model, log=str(tmp_path / "new.jsonl"))
    assert path.read_text() == "kept\n" and (tmp_path / "new.jsonl").read_text() == ""


def test_a_failing_sink_raises_once_and_events_wait():
    sink = Sink()
    run = Run(policy=one_by_one, log=sink)
    run.step(1)
    assert [event["seed"] for event in sink.events] == [0]
    sink.works = False
    with pytest.raises(OSError, match="disk full"):
        run.step(1)
    # All else of the step was done.
    assert run.states() == [1, 1, 0, 0, 0, 0, 0] and run.control.ticks == 2 and not run.control._losses.any()
    run.done += 1
    run.step(2)
    assert run.states() == [1, 1, 1, 1, 0, 0, 0] and len(sink.events) == 1 and sink.tried > 3
    run.control.state_dict()
    for _ in range(2):
        with pytest.raises(OSError, match="disk full"):
            run.control.flush()
    sink.works = True
    run.step(1)
    assert [(event["layer"], event["seed"]) for event in sink.events] == [
        *(("first", seed) for seed in range(4)),
        ("second", 0),
    ]
    sink.works = False
    with pytest.raises(OSError, match="disk full"):  # a new failure
        run.step(1)


def test_an_evaluation_is_whole_before_its_sink_fails():
    run = Run()
    run.step(40)
    twin = Run()
    twin.step(40)
    twin.evaluate()
    run.control._log._call = sink = Sink()
    sink.works = False
    with pytest.raises(OSError, match="disk full"):
        run.evaluate()
    assert run.states() == twin.states()
    sink.works = True
    run.control.flush()
    assert sink.events == twin.events[len(run.events) :] and sink.events


def test_half_a_line_is_taken_back(tmp_path, monkeypatch):
    from kasmina_ext import events

    path = tmp_path / "log.jsonl"
    run = Run(policy=one_by_one, log=path)
    run.step(2)
    before = path.read_text()
    write_all = events._write_all

    def half(file, data):
        write_all(file, data[: len(data) // 2])
        raise OSError("disk full")

    monkeypatch.setattr(events, "_write_all", half)
    with pytest.raises(OSError, match="disk full"):
        run.step(1)
    run.step(1)
    assert path.read_text() == before
    monkeypatch.undo()
    run.control.flush()
    assert path.read_text().startswith(before)
    assert [json.loads(line)["tick"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]


def test_flush_writes_what_is_on_its_way(device):
    run = Run(device=device, policy=lambda seeds: torch.where(seeds.lifecycle == 0, 1, STAY))
    run.step(1)
    run.control.flush()
    assert len(run.events) == 7
