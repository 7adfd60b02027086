"""What calibrate_ may be given: batches, references, kinds of modules, models that share, repeat, compile and mutate."""

from __future__ import annotations

import collections
import copy
import io

import checks
import numpy as np
import pytest
import torch
from test_calibrate import banks, damaged, inputs, layers, network, numbers, same, state, sweep
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import kasmina_ext as kx


def calibrated(healthy: nn.Module, *args, make=damaged, **settings) -> tuple[list[torch.Tensor], kx.CalibrationReport]:
    model = make(healthy)
    report = kx.calibrate_(model, *args, **settings)
    return banks(model), report


def same_banks(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(checks.same_bits(*pair) for pair in zip(first, second, strict=True))


# ---------------------------------------------------------------------------------------------------- batches


class Takes(nn.Module):
    """A network with two inputs, the second of which is a factor."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x, factor=1.0):
        return self.net(x * factor)


def test_batches_of_every_kind(device):
    healthy = Takes(network(device=device))
    xs = inputs(device)
    want, _ = calibrated(healthy, healthy, xs)
    named = collections.UserDict  # as transformers' BatchEncoding is
    kinds = {
        "generator": (x for x in xs),
        "tuples": [(x / 2, 2.0) for x in xs],
        "lists": [[x] for x in xs],
        "dicts": [{"x": x / 2, "factor": 2.0} for x in xs],
        "user dicts": [named(x=x) for x in xs],
        "mixed": [xs[0], (xs[1],), {"x": xs[2]}],
    }
    for kind, batches in kinds.items():
        assert same_banks(calibrated(healthy, healthy, batches)[0], want), kind
    labelled = [{"x": x, "label": 3} for x in xs]
    got, _ = calibrated(healthy, healthy, labelled, forward=lambda model, batch: model(batch["x"]))
    assert same_banks(got, want)


def test_a_shuffling_loader_is_walked_through_once(device):
    """Both networks see the same batches in every pass, and the user's random numbers are not spent."""
    healthy = network(device=device)
    data = TensorDataset(torch.cat(inputs()).to(device))
    loader, walks = DataLoader(data, batch_size=16, shuffle=True), []

    def counted():
        walks.append(1)
        yield from loader

    before = torch.get_rng_state()
    got, report = calibrated(healthy, healthy, counted(), memory=0)
    assert len(walks) == 1 and report.batches == 4 and torch.equal(torch.get_rng_state(), before)
    want, _ = calibrated(healthy, healthy, inputs(device))
    for first, second in zip(got, want, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-8, atol=1e-9)


def test_bad_arguments():
    healthy, x = network(), inputs()
    model = damaged(healthy)
    before = state(model)
    for arguments, settings, error, words in (
        ((model, healthy, []), {}, ValueError, "no batches"),
        ((model, healthy, [3]), {}, TypeError, "a batch must be a tensor, a tuple or a dict, got int; pass forward="),
        ((model, healthy, x), {"ridge": -1}, ValueError, "ridge must be a finite number of at least 0, got -1"),
        ((model, healthy, x), {"ridge": float("nan")}, ValueError, "ridge"),
        ((model, healthy, x), {"least_pairs": 0}, ValueError, "least_pairs"),
        ((healthy, healthy, x), {}, ValueError, "no KasminaLayer"),
        (("model", healthy, x), {}, TypeError, "model must be a torch.nn.Module, got str"),
        ((model, [1], x), {}, TypeError, "reference must be a model or a dict of activations, got list"),
        ((model, model, x), {}, ValueError, "share '0': the reference must be another"),
        ((model, healthy[:3], x), {}, ValueError, r"the reference has no module '4'; it has '0', '1', '2'"),
        ((model, network()[:0], x), {}, ValueError, "no module '0', '2', '4'; it has none"),
        ((model, healthy, x), {"forward": lambda net, batch: None}, ValueError, "none .* ran: '0', '2', '4'"),
        ((model, healthy, [(x[0], 1)]), {}, TypeError, "argument"),
    ):
        with pytest.raises(error, match=words):
            kx.calibrate_(*arguments, **settings)
        assert same(before, state(model)), words


# ---------------------------------------------------------------------------------------------------- references


def test_recorded_activations(device):
    """As the model's own, to the bit: lists by call, and tensors of all batches; from a file, on another device."""
    healthy, x = network(device=device), inputs(device)
    want, report = calibrated(healthy, healthy, x)
    recorded = kx.record_activations(healthy, ["0", "[24]"], iter(x))
    assert list(recorded) == ["0", "2", "4"] and {len(calls) for calls in recorded.values()} == {3}
    assert all(t.device.type == "cpu" for calls in recorded.values() for t in calls)
    file = io.BytesIO()
    torch.save(recorded, file)
    file.seek(0)
    got, again = calibrated(healthy, torch.load(file, weights_only=True), x)
    assert same_banks(got, want) and dict(again) == dict(report) and again.passes["reference"] == 0
    whole = {name: torch.cat(calls) for name, calls in recorded.items()}
    assert same_banks(calibrated(healthy, whole | {"1": whole["0"]}, x)[0], want), "others are ignored"
    wrapped = {f"_orig_mod.{name}.base_layer": tuple(calls) for name, calls in recorded.items()}
    assert same_banks(calibrated(healthy, wrapped, x)[0], want)


def test_recorded_activations_that_do_not_fit():
    healthy, x = network(), inputs()
    good = kx.record_activations(healthy, "[024]", x)
    model = damaged(healthy)
    before = state(model)
    for change, error, words in (
        ({"2": None}, ValueError, "no activations of '2'; it has '0', '4'"),
        ({"2": good["2"][:2]}, ValueError, "'2': the reference has 2 calls, the model's batches have more"),
        ({"4": good["4"] * 2}, ValueError, "'4': the reference has 6 calls, the model's batches have only 3"),
        ({"0": torch.cat(good["0"])[:-1]}, ValueError, "'0': the reference has 59 rows, the model's batches have more"),
        ({"0": torch.cat(good["0"] * 2)}, ValueError, "has 120 rows, the model's batches have only 60"),
        ({"2": [t[:, :-1] for t in good["2"]]}, ValueError, r"'2' puts out \[30, 14\], the reference \[30, 13\]"),
        ({"2": ["text"]}, TypeError, "activations of '2' must be tensors, got str"),
        ({"2": [t.long() for t in good["2"]]}, None, ""),
    ):
        recorded = {name: values for name, values in {**good, **change}.items() if values is not None}
        if error is None:  # integers are numbers, too
            kx.calibrate_(damaged(healthy), recorded, x)
            continue
        with pytest.raises(error, match=words):
            kx.calibrate_(model, recorded, x)
        assert same(before, state(model)), words


def test_recording_leaves_no_trace_and_names_what_is_missing():
    healthy = damaged(network()).train()
    before = state(healthy)
    recorded = kx.record_activations(healthy, "*", inputs(), forward=lambda model, x: model(x))
    assert set(recorded) == {"", "0", "1", "2", "3", "4"}, "base layers go by the names of their layers"
    assert torch.equal(recorded[""][1], healthy(inputs()[1])) and same(
        before, {**state(healthy), **telemetry_of(before)}
    )
    with pytest.raises(ValueError, match=r"no module is called '5\*'; there are '0', '1', '2', '3', '4'"):
        kx.record_activations(healthy, ["0", "5*"], inputs())
    with pytest.raises(TypeError, match="'' returned dict"):
        kx.record_activations(Returns(), "", [torch.ones(1)])


def telemetry_of(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: t for name, t in found.items() if name.endswith("telemetry")}


class Returns(nn.Module):
    def forward(self, x):
        return {"x": x}


@pytest.mark.parametrize("memory", [0, 1, 60 * 14 * 8 + 30 * 20 * 8, 2**40])
def test_memory_decides_on_passes_alone(device, memory):
    healthy, x = network(device=device), inputs(device)
    want, _ = calibrated(healthy, healthy, x)
    got, report = calibrated(healthy, healthy, x, memory=memory)
    assert same_banks(got, want)
    # Too little: one pass for each of three layers and one to measure. In between, a pass keeps the layer that is next.
    assert report.passes == {"reference": {2**40: 1, 0: 4, 1: 4}.get(memory, 3), "whole": 2, "partial": 2}


def test_stopping_early_decides_on_cost_alone(device):
    healthy, x, calls = network(device=device), inputs(device), collections.Counter()
    found = []
    for stop_early in (True, False):
        model = damaged(healthy)
        model[4].register_forward_hook(lambda *_, key=stop_early: calls.update([key]))
        kx.calibrate_(model, healthy, x, stop_early=stop_early)
        found.append(banks(model))
    assert same_banks(*found) and calls == {True: 3 * 2, False: 3 * 4}


def test_references_of_another_dtype(device):
    """A damaged network in bfloat16, the healthy one in float32 (and float16): pairs meet in a type that holds both."""
    healthy = network(torch.float32, device)
    model = damaged(healthy).bfloat16()
    for layer in layers(model):
        layer.blueprint_weights.data = layer.blueprint_weights.data.float()
    xs = [x.bfloat16().float() for x in inputs(device, torch.float32)]

    def cast(net, x):
        return net(x.to(net[0].weight.dtype))

    report = kx.calibrate_(model, healthy, xs, forward=cast)
    (a, b), *_ = sweep(damaged(healthy), healthy, torch.cat(xs), 1e-4)[0]
    torch.testing.assert_close(layers(model)[0].blueprint_weights.double().cpu(), torch.from_numpy(np.stack([a, b])), rtol=0.05, atol=0.05)  # fmt: skip
    assert report["0"]["after"] > report["0"]["before"]
    half = damaged(healthy).half()
    report = kx.calibrate_(half, healthy, xs, forward=cast)
    assert half[0].blueprint_weights.dtype == torch.float16 and report["0"]["after"] > report["0"]["before"]


def test_a_reference_that_is_grafted_itself(device):
    """Its layers' outputs count, seeds and all."""
    healthy, x = network(device=device), inputs(device)
    grown = damaged(healthy, share=0)
    grown[0].request_state_transitions(None, "EVALUATING", 0, rules=kx.TransitionRules.any())
    with torch.no_grad():
        grown[0].blueprint_weights[0] = 3.0
    telemetry = grown[0].telemetry.clone()
    scaled = copy.deepcopy(healthy)
    scaled[0].weight.data *= 3
    scaled[0].bias.data *= 3
    for first, second in zip(calibrated(healthy, grown, x)[0], calibrated(healthy, scaled, x)[0], strict=True):
        torch.testing.assert_close(first, second, rtol=1e-8, atol=1e-8)
    assert torch.equal(grown[0].telemetry, telemetry)


# ---------------------------------------------------------------------------------------------------- modules


def line(x: torch.Tensor, t: torch.Tensor, dim: int) -> np.ndarray:
    """numpy's line for every feature in dimension `dim`."""
    x, t = (np.moveaxis(numbers(v), dim, -1).reshape(-1, v.shape[dim]) for v in (x, t))
    return np.array([np.polyfit(x[:, f], t[:, f], 1) for f in range(x.shape[1])]).T


IMAGES = (5, 4, 7, 6)
KINDS = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), IMAGES[:3], 1),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3), IMAGES, 1),
    "grouped": (lambda: nn.Conv2d(4, 8, 3, groups=2), IMAGES, 1),
    "unbatched conv2d": (lambda: nn.Conv2d(4, 6, 3), IMAGES[1:], 0),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 2), IMAGES, 1),
    "batch norm": (lambda: nn.BatchNorm2d(4), IMAGES, 1),
    "group norm": (lambda: nn.GroupNorm(2, 4), IMAGES, 1),
    "layer norm": (lambda: nn.LayerNorm(6), IMAGES, -1),
    "embedding": (lambda: nn.Embedding(30, 8), (40, 3), -1),
    "attention": (lambda: nn.MultiheadAttention(8, 2, batch_first=True), (6, 5, 8), -1),
    "sequential": (lambda: nn.Sequential(nn.Linear(6, 5), nn.Softplus()), IMAGES, -1),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_modules(device, kind):
    make, shape, dim = KINDS[kind]
    torch.manual_seed(1)
    healthy = make().double().eval().to(device)
    bad = copy.deepcopy(healthy)
    with torch.no_grad():
        for parameter in bad.parameters():
            parameter.mul_(torch.rand_like(parameter) + 0.1).add_(0.2 * torch.randn_like(parameter))
    if kind == "embedding":
        batch = torch.randint(30, shape, device=device)
    else:
        batch = torch.randn(shape, dtype=torch.float64, device=device)
        batch = batch.contiguous(memory_format=torch.channels_last) if batch.dim() == 4 else batch
    batch = (batch,) * 3 if kind == "attention" else (batch,)
    x, t = (net(*batch) for net in (bad, healthy))
    x, t = (out[0] if isinstance(out, tuple) else out for out in (x, t))
    layer = kx.KasminaLayer(bad, chunk_size=3, hidden_dim=8 if kind == "attention" else None)
    report = kx.calibrate_(layer, healthy, [batch], ridge=0)
    np.testing.assert_allclose(numbers(layer.blueprint_weights), line(x, t, dim), rtol=1e-7, atol=1e-8)
    y = layer(*batch)
    y = y[0] if isinstance(y, tuple) else y
    spread = (numbers(t) - numbers(t).mean(tuple(d for d in range(t.dim()) if d != dim % t.dim()), keepdims=True)) ** 2
    np.testing.assert_allclose(report[""]["after"], 1 - ((numbers(t - y)) ** 2).sum() / spread.sum(), rtol=1e-8)
    assert report[""]["pairs"] == x.numel() // layer.hidden_dim and "(model)" in str(report)


class Block(nn.Module):
    """Queries, keys and values of one tensor, a product, and a way back in: what a transformer's layers depend on."""

    def __init__(self, in_place: bool = False):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(6, 6) for _ in range(4))
        self.in_place = in_place

    def forward(self, x):
        h = torch.tanh(x)
        q = self.q(h)
        if self.in_place:
            h += q  # the keys read the same tensor, and not the same numbers
        return x + self.out(torch.sigmoid(q) * self.k(h) + self.v(h))


def blocks(in_place: bool) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(5)
    healthy = nn.Sequential(Block(in_place), Block(in_place)).double().requires_grad_(False)
    return healthy, damaged(healthy, share=0.3)


@pytest.mark.parametrize("in_place", [False, True])
def test_layers_that_read_one_tensor_share_a_pass(in_place):
    """And are fitted as if they did not: the truth goes through the network once for each layer."""
    healthy, model = blocks(in_place)
    x = inputs()
    report = kx.calibrate_(model, healthy, x, ridge=0)
    assert list(report) == [f"{i}.{name}" for i in (0, 1) for name in ("q", "k", "v", "out")]
    assert report.passes["partial"] == (5 if in_place else 3)  # q + k + v, out, of two blocks, but for the first group
    # One by one: every layer in a model of its own, where only the layers before it are calibrated.
    truth = blocks(in_place)[1]
    names = list(report)
    for name in names:
        pairs = {}
        handles = [
            truth.get_submodule(name).base_layer.register_forward_hook(
                lambda m, a, out, p=pairs: p.update(x=out.clone())
            ),
            healthy.get_submodule(name).register_forward_hook(lambda m, a, out, p=pairs: p.update(t=out.clone())),
        ]
        truth(torch.cat(x)), healthy(torch.cat(x))
        for handle in handles:
            handle.remove()
        want, layer = line(pairs["x"], pairs["t"], -1), truth.get_submodule(name)
        layer.request_state_transitions(None, "EVALUATING", 0, rules=kx.TransitionRules.any())
        with torch.no_grad():
            layer.blueprint_weights.copy_(torch.from_numpy(want))
        np.testing.assert_allclose(numbers(model.get_submodule(name).blueprint_weights), want, rtol=1e-6, atol=1e-7)


class Repeats(nn.Module):
    """One module twice, with another between the calls; one that never runs."""

    def __init__(self, times: int = 2):
        super().__init__()
        self.twice, self.between, self.never, self.times = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6), times

    def forward(self, x):
        for _ in range(self.times):
            x = self.between(torch.relu_(self.twice(x)))  # in place, on what was put out
        return x


def test_modules_that_run_twice_or_never():
    torch.manual_seed(6)
    healthy = Repeats().double().requires_grad_(False)
    model, seen = damaged(healthy, share=0.3), {"x": [], "t": []}
    handles = [
        model.twice.base_layer.register_forward_hook(lambda m, a, out: seen["x"].append(out.clone())),
        healthy.twice.register_forward_hook(lambda m, a, out: seen["t"].append(out.clone())),
    ]
    x = inputs()
    model(torch.cat(x)), healthy(torch.cat(x))
    for handle in handles:
        handle.remove()
    report = kx.calibrate_(model, healthy, x, ridge=0)
    want = line(torch.cat(seen["x"]), torch.cat(seen["t"]), -1)
    np.testing.assert_allclose(numbers(model.twice.blueprint_weights), want, rtol=1e-7, atol=1e-8)
    assert list(report) == ["twice", "between", "never"] and report["twice"]["pairs"] == 120
    assert (
        report["never"]["pairs"] == 0 and np.isnan([report["never"][k] for k in ("before", "in_turn", "after")]).all()
    )
    assert model.never.lifecycle_states.eq(0).all() and report["never"]["seeds"] == 0
    assert same_banks(banks(model), calibrated(healthy, healthy, x, ridge=0, memory=0, make=lambda h: damaged(h, share=0.3))[0])  # fmt: skip


class Chooses(nn.Module):
    """Which layers run depends on the batch, as with experts."""

    def __init__(self):
        super().__init__()
        self.first, self.a, self.b, self.last = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x):
        x = torch.tanh(self.first(x))
        return self.last(torch.tanh(self.b(x) if len(x) == 20 else self.a(x)))


@pytest.mark.parametrize("memory", [0, 30 * 6 * 8, 60 * 6 * 8 * 2, 2**30])
def test_layers_that_some_batches_do_not_reach(memory):
    torch.manual_seed(7)
    healthy, x = Chooses().double().requires_grad_(False), inputs()  # 30, 20 and 10 rows
    model = damaged(healthy, share=0.3)
    report = kx.calibrate_(model, healthy, x, ridge=0, memory=memory)
    assert {name: row["pairs"] for name, row in report.items()} == {"first": 60, "a": 40, "b": 20, "last": 60}
    truth, h, t = damaged(healthy, share=0.3), torch.cat(x), torch.cat(x)
    second, every = (torch.arange(60) // 10 - 3) // 2 == 0, torch.ones(60, dtype=torch.bool)
    for name, mask in {"first": every, "a": ~second, "b": second, "last": every}.items():
        y, target = truth.get_submodule(name).base_layer(h[mask]), healthy.get_submodule(name)(t[mask])
        found = line(y, target, -1)
        np.testing.assert_allclose(numbers(model.get_submodule(name).blueprint_weights), found, rtol=1e-6, atol=1e-7)
        a, b = torch.from_numpy(found)
        h[mask], t[mask] = torch.tanh(a * y + b), torch.tanh(target)


class Fickle(nn.Module):
    """Its second layer runs in the first pass over three batches only."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.calls = nn.Linear(6, 6), nn.Linear(6, 6), 0

    def forward(self, x):
        self.calls += 1
        x = self.first(x)
        return self.second(x) if self.calls <= 3 else x


def test_calls_that_vary_from_pass_to_pass():
    healthy = Fickle().double()
    model = damaged(healthy)
    before = state(model)
    with pytest.raises(ValueError, match="'second' ran another number of times for batch 0 than before"):
        kx.calibrate_(model, healthy, inputs())
    assert same(before, state(model))


@pytest.mark.parametrize(
    ("times", "words"), [(1, "'twice' ran 1 times .* more often"), (3, "3 times .* 2 times in the model")]
)
def test_calls_that_do_not_fit(times, words):
    healthy = Repeats().double()
    model = damaged(healthy)
    before = state(model)
    with pytest.raises(ValueError, match=words):
        other = copy.deepcopy(healthy)
        other.times = times
        kx.calibrate_(model, other, inputs())
    assert same(before, state(model))


@pytest.mark.usefixtures("data_parallel_stays")
def test_names_through_wrappers(device):
    """torch.compile on the whole, on a part, in place; DataParallel; with hooks that a graph would not call."""
    healthy, x = network(device=device), inputs(device)
    want, _ = calibrated(healthy, healthy, x)

    def inner(net):
        model = damaged(net)
        model[2].base_layer = torch.compile(model[2].base_layer, backend="eager")
        return model

    def in_place(net):
        model = damaged(net)
        model[0].compile(backend="eager")
        return model

    compiled = torch.compile(healthy, backend="eager")
    compiled(x[0])
    makers = {
        "whole": lambda net: torch.compile(damaged(net), backend="eager"),
        "inner": inner,
        "in place": in_place,
        "parallel": lambda net: nn.DataParallel(damaged(net)) if device.type == "cpu" else damaged(net),
    }
    for kind, make in makers.items():
        for reference in (healthy, compiled):
            model = make(healthy)
            if kind != "parallel":
                model(x[0])  # compiled before hooks were there
            kx.calibrate_(model, reference, x)
            assert same_banks(banks(model), want), kind


def test_two_layers_around_one_module():
    model = damaged(network())
    model[0] = kx.KasminaLayer(model[0], chunk_size=4)
    with pytest.raises(ValueError, match="'0.base_layer' and another KasminaLayer wrap the same module"):
        kx.calibrate_(model, network(), inputs())


# ---------------------------------------------------------------------------------------------------- reports


def test_the_report(capsys):
    healthy = network()
    _, report = calibrated(healthy, healthy, inputs())
    text = str(report)
    assert capsys.readouterr() == ("", ""), "no bar but on a terminal"
    lines = text.splitlines()
    assert lines[0] == "explained variance: 11 seeds of 3 layers, 3 batches; 2 + 2 partial passes, reference 1"
    assert lines[1].split() == ["layer", "features", "seeds", "pairs", "before", "in_turn", "after"]
    assert [row.split()[0] for row in lines[3:]] == ["0", "2", "4"]
    for twin in (copy.deepcopy(report), torch.load(_saved(report), weights_only=False)):
        assert dict(twin) == dict(report) and str(twin) == text and twin.passes == report.passes
    report.show()
    assert capsys.readouterr().out == text + "\n"
    calibrated(healthy, healthy, inputs(), progress=True)
    assert "calibrating" in capsys.readouterr().err


def _saved(report: kx.CalibrationReport) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(report, file)
    file.seek(0)
    return file
