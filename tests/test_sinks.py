"""What is logged of seeds: right, bounded, one copy from the device for each layer; and files that survive a kill."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from growing import STATES, Classifier, batches, graft
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import kasmina_ext as kx
from kasmina_ext import KasminaLayer, events, sinks
from kasmina_ext.seed_record import size_of_change
from kasmina_ext.sinks import JsonlSink, Sink, TensorBoardSink, log_seeds, read_jsonl


class Kept(Sink):
    """All that came."""

    def __init__(self) -> None:
        self.values, self.histograms, self.events, self.calls = {}, {}, [], 0

    def scalars(self, step, values):
        self.values |= values
        self.calls += 1

    def histogram(self, step, name, counts, edges):
        self.histograms[name] = counts, edges
        self.calls += 1

    def event(self, step, event):
        self.events.append(event)
        self.calls += 1

    def close(self):
        pass


def seen(seeds: int, device: torch.device | str = "cpu") -> KasminaLayer:
    """Of 2 features a seed: a third of the seeds is grafted, and all have seen something, forward and backward."""
    layer = KasminaLayer(nn.Linear(3, 2 * seeds), num_seeds=seeds, num_blueprints=2, strategy="affine").to(device)
    layer(torch.randn(5, 3, device=device)).square().sum().backward()
    layer.extended_state.update_state(range(0, seeds, 3), {"lifecycle": STATES.FINE_TUNING, "blueprint": 0})
    layer.set_alpha(range(0, seeds, 3), torch.rand(len(range(0, seeds, 3))))
    with torch.no_grad():
        layer.blueprint_weights += 0.3 * torch.randn_like(layer.blueprint_weights)
    return layer


# ---- what is said ----------------------------------------------------------------------------------------------------


def test_it_is_what_a_report_says(device):
    layer = seen(30, device)
    layer.extended_state.update_state([1, 2], {"lifecycle": STATES.CULLED})
    layer.telemetry[4] = 0  # measured nothing
    layer.grad_telemetry[5] = 0
    kept = Kept()
    totals = log_seeds({"block.mlp": layer}, 7, [kept], top_k=4)
    rows = list(layer.seed_report().values())
    counts = {state.name: sum(row["state"] == state.name for row in rows) for state in STATES}
    assert totals == counts and counts["CULLED"] == 2 and counts["FINE_TUNING"] == 10
    assert {name: kept.values[f"seeds/block.mlp/state/{name}"] for name in counts} == counts

    grafted = [row for row in rows if row["state"] == "FINE_TUNING"]
    change = size_of_change(layer)[::3].tolist()
    truth = {
        "alpha": [row["alpha"] for row in grafted],
        "change": change,
        "potential": [row["potential"] for row in rows if math.isfinite(row["potential"])],
        "mean": [row["mean"] for row in rows if math.isfinite(row["mean"])],
        "variance": [row["std"] ** 2 for row in rows if math.isfinite(row["std"])],
    }
    assert len(truth["potential"]) == len(truth["mean"]) == 29
    for name, values in truth.items():
        counts, edges = kept.histograms[f"seeds/block.mlp/{name}"]
        assert len(edges) == len(counts) + 1 == sinks.BINS + 1 and sum(counts) == len(values)
        assert (edges[0], edges[-1]) == pytest.approx((min(values), max(values)), rel=1e-6)
        # Values may lie on an edge but for rounding: so many are not above it, or so many and those on it.
        for k, edge in enumerate(edges[1:-1], 1):
            slack = 1e-6 * (edges[-1] - edges[0])
            assert sum(v < edge - slack for v in values) <= sum(counts[:k]) <= sum(v <= edge + slack for v in values)
    assert np.diff(np.log(kept.histograms["seeds/block.mlp/potential"][1])).std() < 1e-9, "a constant factor"

    best = sorted((row["potential"], seed) for seed, row in enumerate(rows) if seed != 5)[::-1][:4]
    assert [kept.values[f"seeds/block.mlp/top_potential/{k}"] for k in (1, 2, 3, 4)] == [value for value, _ in best]
    [event] = kept.events
    assert event["layer"] == "block.mlp" and [one["seed"] for one in event["top_potential"]] == [n for _, n in best]
    for one in event["top_potential"]:
        row = rows[one["seed"]]
        assert (one["state"], one["alpha"]) == (row["state"], row["alpha"]) and one["potential"] == row["potential"]


def test_credit():
    model = Classifier().grown()
    data = batches()
    model.loss(data[0]).mean().backward()
    found = kx.credit(model, data, model.loss)
    kept = Kept()
    log_seeds(model, 1, [kept], top_k=2, credit=found)
    for name, mean in zip(("first", "second"), found.mean, strict=True):
        best = mean.sort(descending=True)
        assert [kept.values[f"seeds/{name}/top_credit/{k}"] for k in (1, 2)] == best.values[:2].tolist()
        event = next(event for event in kept.events if event["layer"] == name)
        assert [one["seed"] for one in event["top_credit"]] == best.indices[:2].tolist()
    with pytest.raises(ValueError, match="of other layers"):
        log_seeds(model.first, 1, [kept], credit=found)


def test_a_layer_that_has_seen_nothing():
    layer = KasminaLayer(nn.Linear(3, 4), num_seeds=2)
    kept = Kept()
    assert log_seeds(layer, 0, [kept])["DORMANT"] == 2
    assert kept.histograms == {} and kept.events == [{"layer": "", "top_potential": []}]
    assert not any("top" in name for name in kept.values)
    graft(layer)
    log_seeds(layer, 0, [kept])
    counts, edges = kept.histograms["seeds/layer/alpha"]  # all of one value: neither empty bins nor a bin of no width
    assert sum(counts) == 2 and counts[10] == 2 and edges[10] < 1 < edges[11]
    assert "seeds/layer/change" not in kept.histograms, "neutral blueprints change nothing"


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-1e300, 1e300) | st.sampled_from([math.nan, math.inf, -math.inf, 0.0]), min_size=1))
def test_any_values_are_counted_once(values):
    found = sinks._histogram(torch.tensor(values, dtype=torch.float64)).tolist()
    edges, counts = found[: sinks.BINS + 1], found[sinks.BINS + 1 :]
    kept = [value for value in values if math.isfinite(value)]
    assert sum(counts) == len(kept) and min(counts) >= 0
    if len(set(kept)) > 1 and max(kept) - min(kept) > 1e-290:
        assert counts == np.histogram(kept, edges)[0].tolist()


# ---- bounded ---------------------------------------------------------------------------------------------------------


def test_as_much_for_a_hundred_thousand_seeds_as_for_a_hundred(tmp_path):
    sizes = {}
    for seeds in (100, 100_000):
        path = tmp_path / f"{seeds}.jsonl"
        log_seeds(seen(seeds), 1, [JsonlSink(path)])
        sizes[seeds] = path.stat().st_size, len(list(read_jsonl(path)))
    (small, records), (large, as_many) = sizes.values()
    assert records == as_many == 7 and large < 1.15 * small < 10_000


class Waits(TorchDispatchMode):
    """Counts what would wait for a device, if the tensors lay on one."""

    def __init__(self) -> None:
        super().__init__()
        self.counted = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.counted.append(str(function))
        return function(*args, **(kwargs or {}))


def test_one_copy_to_the_host_for_each_layer(monkeypatch):
    copies = []

    def counting(name):
        method = getattr(Tensor, name)
        return lambda tensor, *args: (copies.append(tuple(tensor.shape)), method(tensor, *args))[1]

    layers = [seen(40), seen(50), seen(60)]
    for name in ("tolist", "cpu", "numpy", "item", "__bool__", "__int__", "__float__", "__index__"):
        monkeypatch.setattr(Tensor, name, counting(name))
    with Waits() as waits:
        log_seeds(layers, 1, [Kept(), Kept()])
        assert len(copies) == 3 and waits.counted == []
        log_seeds(layers, 1, [])  # as a rank that logs nothing
    assert len(copies) == 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_is_waited_for_once_for_each_layer():
    layers = [seen(40, "cuda"), seen(50, "cuda")]
    log_seeds(layers, 1, [Kept()])
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            log_seeds(layers, 1, [])
            assert not caught
            log_seeds(layers, 1, [Kept()])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sum("synchroniz" in str(each.message) for each in caught) == 2


# ---- lines of JSON ---------------------------------------------------------------------------------------------------


def written(path: Path) -> list[dict]:
    with JsonlSink(path) as sink:
        sink.scalars(1, {"a": 0.5, "b": math.nan})
        sink.histogram(2, "h", [1, 2], [0.0, 1.0, math.inf])
        sink.event(3, {"text": "zwei\nZeilen", "list": (1, -math.inf)})
    return [
        {"step": 1, "scalars": {"a": 0.5, "b": None}},
        {"step": 2, "histogram": "h", "counts": [1, 2], "edges": [0.0, 1.0, None]},
        {"step": 3, "event": {"text": "zwei\nZeilen", "list": [1, None]}},
    ]


def test_lines(tmp_path):
    expected = written(tmp_path / "a.jsonl")
    assert list(read_jsonl(tmp_path / "a.jsonl")) == expected
    written(tmp_path / "a.jsonl")
    assert list(read_jsonl(tmp_path / "a.jsonl")) == expected * 2, "appended"
    with pytest.raises(OSError):
        JsonlSink(tmp_path / "not there" / "a.jsonl")
    with pytest.raises(TypeError):
        JsonlSink(tmp_path / "a.jsonl").event(1, {"x": object()})
    assert list(read_jsonl(tmp_path / "a.jsonl")) == expected * 2


def test_a_file_cut_off_anywhere_is_read_and_goes_on(tmp_path):
    path = tmp_path / "a.jsonl"
    expected = written(path)
    data = path.read_bytes()
    ends = [number for number, byte in enumerate(data, 1) if byte == ord("\n")]
    for size in range(len(data) + 1):
        path.write_bytes(data[:size])
        whole = [record for record, end in zip(expected, ends, strict=True) if end <= size]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert list(read_jsonl(path)) == whole
        JsonlSink(path).scalars(4, {"c": 1})
        half = size not in (0, *ends)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            after = list(read_jsonl(path))
        # A line that only its end was cut off from is whole again.
        complete = size + 1 in ends
        assert after == [*whole, *(expected[len(whole)] for _ in range(complete)), {"step": 4, "scalars": {"c": 1}}]
        assert len(caught) == (half and not complete)


def test_a_full_disk_leaves_no_half_line(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    expected = written(path)

    def full(file, data):
        file.write(data[:7])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(events, "_write_all", full)
        JsonlSink(path).scalars(9, {"x": 1})
    assert list(read_jsonl(path)) == expected and path.read_bytes().endswith(b"\n")


WRITER = """
import sys
from kasmina_ext.sinks import JsonlSink
sink = JsonlSink(sys.argv[1])
for step in range(10**9):
    sink.scalars(step, {"x" * 50 + str(k): k for k in range(200)})
"""


def test_a_writer_that_is_killed_leaves_whole_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    child = subprocess.Popen([sys.executable, "-c", WRITER, str(path)])
    deadline = time.monotonic() + 60
    while (not path.exists() or path.stat().st_size < 200_000) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert path.read_bytes().endswith(b"}\n")
    steps = [record["step"] for record in read_jsonl(path)]
    assert steps == list(range(len(steps))) and len(steps) > 20


def test_two_writers_do_not_mix(tmp_path):
    path = tmp_path / "a.jsonl"
    one, two = JsonlSink(path), JsonlSink(path)
    for step in range(20):
        (one if step % 3 else two).scalars(step, {"a": step})
    assert [record["step"] for record in read_jsonl(path)] == list(range(20))


# ---- TensorBoard -----------------------------------------------------------------------------------------------------


def test_tensorboard_reads_it(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    layer = seen(12)
    sink, kept = TensorBoardSink(tmp_path / "runs"), Kept()
    assert not (tmp_path / "runs").exists(), "until something is written"
    sink.close()
    log_seeds(layer, 5, [sink, kept], top_k=3)
    sink.close()
    log_seeds(layer, 6, [sink], top_k=3)  # it goes on, in another file
    sink.close()
    board = EventAccumulator(str(tmp_path / "runs")).Reload()
    tags = board.Tags()
    assert set(tags["scalars"]) == set(kept.values)
    for name, value in kept.values.items():
        assert [(event.step, event.value) for event in board.Scalars(name)] == [(5, pytest.approx(value))] * 1 + [
            (6, pytest.approx(value))
        ]
    assert set(tags["histograms"]) == set(kept.histograms)
    for name, (counts, edges) in kept.histograms.items():
        shown = board.Histograms(name)[0].histogram_value
        assert list(shown.bucket) == counts and shown.bucket_limit == pytest.approx(edges[1:])
        assert (shown.min, shown.max, shown.num) == (pytest.approx(edges[0]), pytest.approx(edges[-1]), sum(counts))
        width = max(np.diff(edges))
        truth = {"alpha": layer.alpha[::3], "mean": kx.telemetry.reduce(layer)[:, 0]}.get(name.rsplit("/", 1)[1])
        if truth is not None:
            assert abs(shown.sum - truth.sum().item()) <= width * len(truth) / 2
    text = board.Tensors("seeds/events/text_summary")[0].tensor_proto.string_val[0].decode()
    shown = json.loads("\n".join(line.removeprefix("    ") for line in text.splitlines()))
    assert shown == kept.events[0]


def test_without_tensorboard(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"tensorboard: pip install kasmina_ext\[tensorboard\]"):
        TensorBoardSink(tmp_path)


# ---- nothing by itself -----------------------------------------------------------------------------------------------


def test_the_package_imports_no_extra():
    program = """
import sys, kasmina_ext, kasmina_ext.sinks, kasmina_ext.integrations
print([name for name in ("transformers", "lightning", "pytorch_lightning", "tensorboard") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_sink_has_to_do_everything():
    with pytest.raises(TypeError, match="abstract"):
        type("Half", (Sink,), {"scalars": SimpleNamespace})()
