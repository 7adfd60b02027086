"""Seed files: what is saved comes back bit for bit, in whatever the model is wrapped, and grows on from there."""

from __future__ import annotations

import copy
import json
import os
import pickle

import pytest
import torch
from checkpoint_cases import FailingSystem
from hypothesis import given, settings
from seed_file_cases import (
    FLOATS,
    SAVED,
    any_layer,
    bits,
    everything,
    grow_,
    inputs,
    layers_of,
    made,
    network,
    owned_bits,
    read_plainly,
    scramble_,
    size_by_the_formula,
)
from torch import nn

import kasmina_ext as kx
from kasmina_ext.checkpoint import CheckpointMismatch, CheckpointSaveError, files

X = inputs()


def test_outputs_before_and_after(device, tmp_path):
    """In a model that was made anew, and in one whose seeds had become something else."""
    grown = grow_(network(device=device), 1)
    x = X.to(device)
    expected = grown(x)
    assert not torch.equal(network(device=device)(x), expected)
    path = kx.save_seeds(grown, tmp_path / "a.safetensors")
    for other in (network(device=device), grow_(network(device=device), 2)):
        report = kx.load_seeds(other, str(path))
        assert torch.equal(other(x), expected)
        assert {name: (row["seeds"], row["awake"], row["grafted"]) for name, row in report.items()} == {
            "0": (5, 2, 2),
            "2": (4, 2, 2),
        }


@settings(max_examples=60, deadline=None)
@given(any_layer())
def test_round_trip(tmp_path_factory, drawn):
    """Any layout, strategy, dtype of the bank and state: the same bits, in a layer that was full of others; the file's size
    is the formula's, and a second reader finds the same in it.
    """
    arguments, number = drawn
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    saved, other = scramble_(made(**arguments), number), scramble_(made(**arguments), number + 1)
    kx.save_seeds(saved, path)
    report = kx.load_seeds(other, path)
    assert owned_bits(other) == owned_bits(saved)
    assert not report[""]["note"] and report.size == path.stat().st_size == size_by_the_formula(path, [saved])
    plainly = read_plainly(path)[""]
    end = int(saved.seed_offsets[-1])
    for name in SAVED:
        values = plainly[name][:, :end] if name == "blueprint_weights" else plainly[name]
        assert bits(values) == owned_bits(saved)[name]
    x = torch.randn(4, 3)
    other.base_layer.load_state_dict(saved.base_layer.state_dict())
    assert bits(saved(x).nan_to_num(7.25)) == bits(other(x).nan_to_num(7.25))
    again = kx.save_seeds(other, path.with_name("again.safetensors"))
    assert again.read_bytes() == path.read_bytes()


def test_kilobytes(tmp_path):
    """A tenth of the seeds of eight layers: less than a hundredth of what the model's state_dict takes."""
    model = nn.Sequential(*(kx.KasminaLayer(nn.Linear(512, 512), chunk_size=8) for _ in range(8)))
    for layer in model:
        for _ in range(3):
            layer.step_lifecycle()  # all seeds grow older, those that sleep, too
        layer.extended_state.update_state(range(6), {"lifecycle": "fossilized", "blueprint": 0})
        with torch.no_grad():
            layer.blueprint_weights[:, :48] += 1
    path = kx.save_seeds(model, tmp_path / "a.safetensors")
    seeds, slices, weights = 8 * 6, 8 * 6 * 2, 8 * 6 * 2 * 8
    header = int.from_bytes(path.read_bytes()[:8], "little")
    assert path.stat().st_size == 8 + header + 36 * 8 + 44 * seeds + 8 * slices + 4 * weights
    assert header < 1000 + 100 * len(model)
    torch.save(model.state_dict(), tmp_path / "all.pt")
    assert 100 * path.stat().st_size < os.path.getsize(tmp_path / "all.pt")


def test_nothing_grown_is_a_header(tmp_path):
    path = kx.save_seeds(network(), tmp_path / "a.safetensors")
    assert path.stat().st_size == 8 + int.from_bytes(path.read_bytes()[:8], "little") + 36 * 2
    model = grow_(network(), 1)
    kx.load_seeds(model, path)
    assert torch.equal(model(X), network()(X))


def test_growing_goes_on(tmp_path):
    """Ramps, moves and blueprints of the loaded model are those of the one that was saved and went on."""
    arguments = {"chunk_size": 4, "alpha_schedule": "cosine", "ramp_epochs": 10, "auto_advance": True}
    torch.manual_seed(0)
    saved = kx.KasminaLayer(nn.Linear(8, 16), **arguments)
    other = kx.KasminaLayer(copy.deepcopy(saved.base_layer), **arguments)
    rules = kx.TransitionRules.any()
    saved.request_state_transitions([0, 2], "GERMINATED")
    saved.request_state_transitions([0, 2], "GRAFTING", rules=rules)
    with torch.no_grad():
        saved.blueprint_weights[0, :4] = 3.0
    for _ in range(4):
        saved.step_lifecycle()
    kx.load_seeds(other, kx.save_seeds(saved, tmp_path / "a.safetensors"))
    for epoch in range(12):
        for layer in (saved, other):
            layer.step_lifecycle()
            if epoch == 3:
                layer.request_state_transitions([1], "GERMINATED")
        assert owned_bits(other) == owned_bits(saved)
        assert torch.equal(other(X), saved(X))
    assert other.lifecycle_states.tolist() == [4, 1, 4, 0] and other.alpha[0] == 1


def test_what_was_only_watched_starts_afresh(tmp_path):
    model = grow_(network(), 1)
    model(X).sum().backward()
    path = kx.save_seeds(model, tmp_path / "a.safetensors")
    resets = [layer.telemetry_resets for layer in layers_of(model)]
    kx.load_seeds(model, path)
    for layer, before in zip(layers_of(model), resets, strict=True):
        assert layer.telemetry_resets == before + 1
        for name in ("telemetry", "grad_telemetry", "history", "history_count", "performance_metrics"):
            assert not layer._buffers[name].any()


def test_folded(tmp_path):
    """What is loaded folds into the bits that what was saved folds into."""
    saved, other = grow_(network(), 1), network()
    kx.load_seeds(other, kx.save_seeds(saved, tmp_path / "a.safetensors"))
    folded, expected = kx.fold_(other), kx.fold_(saved)
    assert everything(folded) == everything(expected)
    assert torch.equal(folded(X), expected(X))


# ---- optimizers ----------------------------------------------------------------------------------


def test_optimizers_forget_the_seeds_that_were(tmp_path):
    """The next step is that of an optimizer without a past, and moments that are loaded afterwards stay."""
    model = grow_(network(), 1)
    path = kx.save_seeds(grow_(network(), 2), tmp_path / "b.safetensors")
    optimizer = torch.optim.SGD(kx.param_groups(model, lr=0.1), momentum=0.9)

    def step(model, optimizer):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()

    for _ in range(3):
        step(model, optimizer)
    bank = layers_of(model)[0].blueprint_weights
    assert optimizer.state[bank]["momentum_buffer"].any() and bank.grad.any()
    kx.load_seeds(model, path)
    assert not optimizer.state[bank]["momentum_buffer"].any() and not bank.grad.any()
    other = copy.deepcopy(model)
    step(model, optimizer)
    step(other, torch.optim.SGD(kx.param_groups(other, lr=0.1), momentum=0.9))
    for ours, theirs in zip(layers_of(model), layers_of(other), strict=True):
        assert bits(ours.blueprint_weights) == bits(theirs.blueprint_weights)

    state = copy.deepcopy(optimizer.state_dict())
    kx.load_seeds(model, path)
    optimizer.load_state_dict(state)
    before = optimizer.state[bank]["momentum_buffer"].clone()
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()
    assert before.any() and torch.allclose(optimizer.state[bank]["momentum_buffer"], 0.9 * before)


# ---- devices, dtypes, wrappers -------------------------------------------------------------------


@pytest.mark.parametrize("to", FLOATS, ids=str)
@pytest.mark.parametrize("source", FLOATS, ids=str)
def test_banks_of_other_dtypes(tmp_path, source, to):
    """As if the bank had been cast; the report says so."""
    saved, other = (made(20, num_seeds=4, blueprint_dtype=dtype) for dtype in (source, to))
    grow_(saved, 1)
    report = kx.load_seeds(other, kx.save_seeds(saved, tmp_path / "a.safetensors"))
    assert bits(other.blueprint_weights) == bits(saved.blueprint_weights.to(to))
    assert (report[""]["note"] != "") == (source != to)


def test_across_devices(device, tmp_path):
    saved = grow_(network(), 1)
    path = kx.save_seeds(saved, tmp_path / "a.safetensors")
    there = network(device=device)
    kx.load_seeds(there, path)
    back = network()
    kx.load_seeds(back, kx.save_seeds(there, tmp_path / "b.safetensors"))
    assert (tmp_path / "b.safetensors").read_bytes() == path.read_bytes()
    assert torch.equal(back(X), saved(X))


@pytest.mark.usefixtures("data_parallel_stays")
def test_wrapped_models(tmp_path):
    """Names in the file are those of the model alone, whichever side was wrapped."""
    plain = grow_(network(), 1)
    path = kx.save_seeds(plain, tmp_path / "a.safetensors")

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.DataParallel(torch.compile(network(), backend="eager"))

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = network()

    for wrap in (lambda m: torch.compile(m, backend="eager"), nn.DataParallel):
        wrapped = wrap(network())
        kx.load_seeds(wrapped, path)
        assert torch.equal(wrapped(X), plain(X))
        assert kx.save_seeds(wrapped, tmp_path / "b.safetensors").read_bytes() == path.read_bytes()
    whole, inner = Whole(), Plain()
    grow_(whole, 3)
    report = kx.load_seeds(inner, kx.save_seeds(whole, tmp_path / "c.safetensors"))
    assert list(report) == ["body.0", "body.2"] and torch.equal(inner.body(X), whole.body(X))


def test_a_layer_within_a_layer_and_one_used_twice(tmp_path):
    def nested():
        torch.manual_seed(0)
        layer = kx.KasminaLayer(kx.KasminaLayer(nn.Linear(8, 8), num_seeds=2), num_seeds=4)
        return nn.Sequential(layer, nn.Tanh(), layer)

    saved = grow_(nested(), 1)
    report = kx.load_seeds(other := nested(), kx.save_seeds(saved, tmp_path / "a.safetensors"))
    assert list(report) == ["0", "0.base_layer"]
    assert torch.equal(other(X), saved(X))


def test_handles_lists_and_single_layers(tmp_path):
    model = grow_(network(), 1)
    layer = layers_of(model)[0]
    a = kx.save_seeds(kx.Seeds(model), tmp_path / "a.safetensors")
    assert list(kx.load_seeds(model, a)) == ["0", "2"]
    b = kx.save_seeds(layer, tmp_path / "b.safetensors")
    assert list(kx.load_seeds(layer, b)) == [""] and "(model)" in str(kx.load_seeds(layer, b))
    c = kx.save_seeds({"first": layer}, tmp_path / "c.safetensors")
    assert list(kx.load_seeds({"first": layer}, c)) == ["first"]


def test_in_inference_mode(tmp_path):
    saved, other = grow_(network(), 1), network()
    with torch.inference_mode():
        kx.load_seeds(other, kx.save_seeds(saved, tmp_path / "a.safetensors"))
    y = other(X)
    y.sum().backward()
    assert torch.equal(y, saved(X))


def test_another_default_device(tmp_path):
    saved, other = grow_(network(), 1), network()
    with torch.device("meta"):
        kx.load_seeds(other, kx.save_seeds(saved, tmp_path / "a.safetensors"))
    assert torch.equal(other(X), saved(X))


# ---- another structure ---------------------------------------------------------------------------

_CHANGES = {
    "features": ({"features": 21}, "'0' has 20 features in the file, 21 in the model"),
    "seeds": ({"num_seeds": 5}, "'0' has 4 seeds in the file, 5 in the model"),
    "rows": ({"num_blueprints": 3}, "'0' has 2 rows in its bank in the file, 3 in the model"),
    "chunking": ({"chunking": "uniform"}, "'0' has balanced chunking in the file, uniform in the model"),
    "feature_dim": ({"feature_dim": 1}, "'0' has -1 feature_dim in the file, 1 in the model"),
}


@pytest.mark.parametrize("change", _CHANGES)
def test_refused_in_another_structure(tmp_path, change):
    arguments = {"features": 20, "num_seeds": 4}
    changed, message = _CHANGES[change]
    path = kx.save_seeds(nn.Sequential(grow_(made(**arguments), 1)), tmp_path / "a.safetensors")
    other = nn.Sequential(grow_(made(**arguments | changed), 2))
    before = everything(other)
    for strict in (True, False):
        with pytest.raises(CheckpointMismatch, match="is of another structure") as caught:
            kx.load_seeds(other, path, strict=strict)
        assert message in str(caught.value) and str(path) in str(caught.value)
    assert everything(other) == before


def test_other_layers(tmp_path):
    """Refused, or only what both have."""
    both, first = network(), nn.ModuleDict({"0": network()[0]})
    of_both = kx.save_seeds(grow_(both, 1), tmp_path / "both.safetensors")
    of_first = kx.save_seeds(grow_(first, 2), tmp_path / "first.safetensors")
    before = everything(both), everything(first)
    with pytest.raises(ValueError, match="the file lacks '2'$"):
        kx.load_seeds(both, of_first)
    with pytest.raises(ValueError, match="the model lacks '2'$"):
        kx.load_seeds(first, of_both)
    with pytest.raises(ValueError, match="the file lacks 'a'; the model lacks '0', '2'"):
        kx.load_seeds(nn.ModuleDict({"a": network()[0]}), of_both, strict=False)
    assert before == (everything(both), everything(first))

    second = owned_bits(layers_of(both)[1])
    report = kx.load_seeds(both, of_first, strict=False)
    assert owned_bits(layers_of(both)[0]) == owned_bits(first["0"])
    assert owned_bits(layers_of(both)[1]) == second and report["2"]["note"] == "not in the file: as it was"
    report = kx.load_seeds(first, of_both, strict=False)
    assert report.unexpected == ["2"] and "not in the model: '2'" in report.title and list(report) == ["0"]


def test_another_strategy_for_new_seeds(tmp_path):
    """Is not the structure: state and bank are as they were saved, and the report tells."""
    saved, other = (made(20, num_seeds=4, strategy=name, num_blueprints=2) for name in ("affine", "additive"))
    report = kx.load_seeds(other, kx.save_seeds(grow_(saved, 1), tmp_path / "a.safetensors"))
    assert owned_bits(other) == owned_bits(saved) and report[""]["note"] == "affine in the file, additive here"


def test_a_model_without_seeds(tmp_path):
    path = kx.save_seeds(network(), tmp_path / "a.safetensors")
    for call in (lambda m: kx.load_seeds(m, path), lambda m: kx.save_seeds(m, tmp_path / "b.safetensors")):
        with pytest.raises(ValueError, match="the model has no seeds: call graft_ first"):
            call(nn.Linear(3, 4))
        with pytest.raises(TypeError, match="must be modules|must be a module"):
            call("model")
    assert not (tmp_path / "b.safetensors").exists()


def test_layers_that_cannot_be_written(tmp_path):
    path = kx.save_seeds(network(), tmp_path / "a.safetensors")
    parametrized = network()
    nn.utils.parametrize.register_parametrization(parametrized[0], "blueprint_weights", nn.Identity())
    meta = network().to("meta")
    for model, reason in ((parametrized, "parametrized"), (meta, "meta device")):
        with pytest.raises(ValueError, match=f"layer '0' can neither save nor load seeds: .*{reason}"):
            kx.load_seeds(model, path)
        with pytest.raises(ValueError, match=f"layer '0' can neither save nor load seeds: .*{reason}"):
            kx.save_seeds(model, path)


@pytest.mark.parametrize(
    ("name", "value"), [("state", 77), ("alpha", 1.5), ("alpha", float("nan")), ("seed_offsets", 9)]
)
def test_what_could_not_be_loaded_is_not_saved(tmp_path, name, value):
    model = network()
    layers_of(model)[1]._buffers[name].flatten()[1] = value
    with pytest.raises(ValueError, match=f"not saved: {name} of '2'"):
        kx.save_seeds(model, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_all_or_nothing(tmp_path, monkeypatch):
    """The last layer fails: the first one is as it was, too."""
    path = kx.save_seeds(grow_(network(), 1), tmp_path / "a.safetensors")
    model = grow_(network(), 2)
    before = everything(model)

    def fail():
        raise RuntimeError("out of luck")

    monkeypatch.setattr(layers_of(model)[1], "_mark_loaded", fail)
    with pytest.raises(RuntimeError, match="out of luck"):
        kx.load_seeds(model, path)
    assert everything(model) == before


# ---- the file ------------------------------------------------------------------------------------


def test_metadata_of_the_user(tmp_path):
    """Exactly what was given; other readers of the format see it as text."""
    given = {
        "tenant": "Ännä \U0001f600",
        "accuracy": 0.1 + 0.2,
        "bounds": (1, float("-inf")),
        "more": {"a": [None, True]},
    }
    path = kx.save_seeds(network(), tmp_path / "a.safetensors", metadata=given)
    assert kx.load_seeds(network(), path).metadata == given
    kx.save_seeds(network(), path, metadata={})
    assert kx.load_seeds(network(), path).metadata == {}
    kx.save_seeds(network(), path)
    assert kx.load_seeds(network(), path).metadata is None
    for odd, error in ((["list"], TypeError), ({"x": object()}, TypeError), ({"x": torch.ones(2)}, TypeError)):
        with pytest.raises(error):
            kx.save_seeds(network(), path, metadata=odd)
    assert kx.load_seeds(network(), path).metadata is None


def test_replaced_at_once_or_not_at_all(tmp_path, monkeypatch):
    """Whichever call of the system fails, the file that was there stays, and nothing else does."""
    path = tmp_path / "a.safetensors"
    kx.save_seeds(grow_(network(), 1), path)
    before, after = path.read_bytes(), kx.save_seeds(grow_(network(), 2), tmp_path / "b.safetensors").read_bytes()
    (tmp_path / "b.safetensors").unlink()
    system, number = FailingSystem(short_writes=True), 0
    monkeypatch.setattr(files, "os", system)
    kx.save_seeds(grow_(network(), 2), tmp_path / "c.safetensors")
    assert (tmp_path / "c.safetensors").read_bytes() == after and "fsync" in system.calls
    (tmp_path / "c.safetensors").unlink()
    calls = ["open", "write", "write", "fsync"]
    for number in range(len(calls)):
        failing = FailingSystem(fail_at=number)
        monkeypatch.setattr(files, "os", failing)
        with pytest.raises(CheckpointSaveError, match=f"saving {path} failed"):
            kx.save_seeds(grow_(network(), 2), path)
        assert failing.calls[: number + 1] == calls[: number + 1]
        assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kx.save_seeds(network(), "a.safetensors")
    (tmp_path / "link").symlink_to("a.safetensors")
    kx.load_seeds(network(), "link")
    with pytest.raises(OSError, match="saving missing/a failed: No such file or directory"):
        kx.save_seeds(network(), "missing/a")
    with pytest.raises(OSError, match="failed: Is a directory"):
        kx.save_seeds(network(), tmp_path)
    with pytest.raises(FileNotFoundError):
        kx.load_seeds(network(), "missing")
    assert sorted(os.listdir()) == ["a.safetensors", "link"]


def test_report(tmp_path):
    path = kx.save_seeds(grow_(network(), 1), tmp_path / "a.safetensors", metadata={"tenant": "anna"})
    report = kx.load_seeds(network(), path)
    assert report.title == f"a.safetensors: 4 seeds awake in 2 layers, {path.stat().st_size / 1024:.1f} KiB"
    assert str(report).splitlines()[1].split() == ["layer", "seeds", "awake", "grafted", "weights"]
    copied = pickle.loads(pickle.dumps(report))
    assert copied == report and copied.title == report.title and copied.metadata == {"tenant": "anna"}
    assert json.dumps(report)
